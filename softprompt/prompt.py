"""The artifact: a soft prompt in a folder, bound to the exact model it was trained on.

The folder opens in PEFT as it is (`adapter_config.json`, `adapter_model.safetensors` with one float32 tensor
`prompt_embeddings`); `softprompt.json` beside them carries what PEFT has no place for. Reading verifies every hash.
No pickle is written or read.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from softprompt.backbone import Backbone
from softprompt.errors import UserError
from softprompt.packages import file_sha256, move_in

FORMAT = 1
"""Version of `softprompt.json`; another one is refused."""
_TENSOR = "prompt_embeddings"
_REQUIRED = ("vectors_sha256", "template", "words", "max_tokens", "weights_sha256", "tokenizer_sha256")


@dataclass(frozen=True, kw_only=True)
class SoftPrompt:
    """P trained vectors and everything that is needed to use them rightly."""

    vectors: Tensor
    """`[P, H]`, float32, on the CPU."""
    template: str
    """The input as text, with `{column}` where a column of the row stands."""
    words: dict[str, str]
    """For each label the text that the model continues with."""
    max_tokens: int
    """Longest input in tokens; longer ones have their longest field cut."""
    weights_sha256: str
    """Hash of the frozen weights that the vectors belong to."""
    tokenizer_sha256: str
    """Hash of the tokenizer they belong to."""
    base: dict[str, Any] = field(default_factory=dict)
    """Where the frozen model can be had: the `model` part of an experiment."""
    precision: str = "bfloat16"
    """Type of the frozen weights in training."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """How it came about: experiment, data, initialization, scores, versions. Plain JSON."""

    @property
    def length(self) -> int:
        """P, the number of vectors."""
        return len(self.vectors)

    def require(self, backbone: Backbone) -> None:
        """Raise UserError, with both hashes, unless this is the backbone that the prompt was trained on."""
        for what, expected, found in (
            ("weights", self.weights_sha256, backbone.weights_sha256),
            ("tokenizer", self.tokenizer_sha256, backbone.tokenizer_sha256),
        ):
            if expected != found:
                raise UserError(
                    f"the prompt belongs to another base model: its {what} have sha256 {expected}, "
                    f"those of the model given have {found}; load the model that it was trained on"
                )

    def save(self, folder: str | Path) -> Path:
        """Write the folder at once or not at all; an older soft prompt there is replaced. Returns it.

        Raises UserError where something else is there.
        """
        folder = Path(folder)
        _check_place(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(mkdtemp(dir=folder.parent, prefix=".softprompt-"))
        try:
            tensors = draft / "adapter_model.safetensors"
            save_file({_TENSOR: self.vectors.float().contiguous()}, tensors, metadata={"format": "pt"})
            _write_json(draft / "adapter_config.json", self._peft_config())
            _write_json(draft / "softprompt.json", self._manifest(tensors))
            draft.chmod(0o755)
            move_in(draft, folder, keep=lambda: False)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read a folder that `save` wrote.

        Raises UserError where it is none, damaged, or of another format; the base model is checked by `require`.
        """
        folder = Path(folder)
        try:
            manifest = json.loads((folder / "softprompt.json").read_text(encoding="utf-8"))
            tensors = folder / "adapter_model.safetensors"
            found = file_sha256(tensors)
        except FileNotFoundError as error:
            raise UserError(f"{folder}: is no soft prompt, {Path(error.filename).name} is missing in it") from None
        except (ValueError, OSError) as error:
            raise UserError(f"{folder}: softprompt.json cannot be read: {error}") from None
        _check_manifest(manifest, folder)
        if manifest["vectors_sha256"] != found:
            raise UserError(
                f"{tensors}: is damaged, sha256 {manifest['vectors_sha256']} was written and {found} is found; "
                "fetch the prompt again"
            )
        known = {k: v for k, v in manifest.items() if k in cls.__dataclass_fields__}
        return cls(vectors=_read_vectors(tensors), **known)

    def _manifest(self, tensors: Path) -> dict[str, Any]:
        plain = {k: v for k, v in vars(self).items() if k != "vectors"}
        shape = {"length": self.length, "hidden_size": self.vectors.shape[1]}
        return {"format": FORMAT, **shape, "vectors_sha256": file_sha256(tensors), **plain}

    def _peft_config(self) -> dict[str, Any]:
        where = self.base.get("id") or self.base.get("path") or self.base.get("package")
        return {
            "auto_mapping": None,
            "base_model_name_or_path": where,
            "inference_mode": True,
            "num_attention_heads": None,
            "num_layers": None,
            "num_transformer_submodules": 1,
            "num_virtual_tokens": self.length,
            "peft_type": "PROMPT_TUNING",
            "prompt_tuning_init": "RANDOM",
            "prompt_tuning_init_text": None,
            "revision": self.base.get("revision"),
            "task_type": "CAUSAL_LM",
            "token_dim": self.vectors.shape[1],
            "tokenizer_kwargs": None,
            "tokenizer_name_or_path": where,
        }


def _check_place(folder: Path) -> None:
    """Only a soft prompt may be replaced."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file, and a soft prompt is a folder; give another name")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "softprompt.json").is_file():
        raise UserError(f"{folder}: holds files and is no soft prompt, so it is not replaced; give another folder")


def _check_manifest(manifest: Any, folder: Path) -> None:
    if not isinstance(manifest, dict):
        raise UserError(f"{folder}: softprompt.json must hold an object, found {type(manifest).__name__}")
    if manifest.get("format") != FORMAT:
        raise UserError(f"{folder}: is of format {manifest.get('format')}, this version reads format {FORMAT}")
    for key in _REQUIRED:
        if key not in manifest:
            raise UserError(f"{folder}: softprompt.json lacks {key}; fetch the prompt again")


def _read_vectors(file: Path) -> Tensor:
    try:
        with safe_open(file, framework="pt") as tensors:
            vectors: Tensor = tensors.get_tensor(_TENSOR)
            return vectors
    except SafetensorError as error:
        raise UserError(f"{file}: is no safetensors file with a tensor {_TENSOR}: {error}") from None


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
