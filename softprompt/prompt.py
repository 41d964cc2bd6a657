"""The artifact: a soft prompt or a prefix in a folder, bound to the exact model it was trained on.

The folder opens in PEFT as it is (`adapter_config.json`, `adapter_model.safetensors` with one float32 tensor
`prompt_embeddings`); `softprompt.json` beside them carries what PEFT has no place for. Reading verifies every hash.
No pickle is written or read.
"""

import hashlib
import json
import shutil
import stat
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from softprompt.backbone import Backbone
from softprompt.errors import UserError
from softprompt.packages import file_sha256, move_in, writing_below
from softprompt.prefix import is_prefix, length_of, method_of
from softprompt.quantization import PRECISIONS
from softprompt.template import columns_of

FORMAT = 1
"""Version of `softprompt.json`; another one is refused."""
_TENSOR = "prompt_embeddings"
_METADATA = {"format": "pt"}
_LARGEST = {"softprompt.json": 1 << 20, "adapter_model.safetensors": 1 << 30}
"""Bytes of the files that are read; what is larger is no soft prompt."""
_FIELDS: dict[str, type] = {
    "method": str,
    "shape": list,
    "vectors_sha256": str,
    "template": str,
    "words": dict,
    "before": str,
    "max_new_tokens": int,
    "max_tokens": int,
    "position": str,
    "encoder_decoder": bool,
    "weights_sha256": str,
    "tokenizer_sha256": str,
    "base": dict,
    "precision": str,
    "provenance": dict,
}
"""What `softprompt.json` holds."""
_MOST_TOKENS = 32_768
"""As in an experiment; more would only keep whoever uses the prompt waiting."""
_CHOICES = {"precision": PRECISIONS, "position": ("start", "after_bos")}
_DIMENSIONS = {"prompt_tuning": 2, "prefix_tuning": 5}
"""Of the tensor, by method."""


@dataclass(frozen=True, kw_only=True)
class SoftPrompt:
    """P trained vectors and everything that is needed to use them rightly."""

    vectors: Tensor
    """`[P, H]`, or a prefix `[L, 2, G, P, D]`; float32, on the CPU."""
    template: str
    """The input as text, with `{column}` where a column of the row stands."""
    words: dict[str, str]
    """For each label the text that the model continues with; none where it answers with a free text."""
    before: str = ""
    """What stands before a free text: it is no part of the answer."""
    max_new_tokens: int = 0
    """Most tokens of a free text; 0 where the answer is a label."""
    max_tokens: int
    """Longest input in tokens; longer ones have their longest field cut."""
    position: str = "start"
    """Where the vectors stand: at the `start`, before all tokens, or `after_bos`."""
    encoder_decoder: bool = False
    """Whether they stand before the input of an encoder, or of a decoder-only model."""
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
        """P, the number of positions that are trained."""
        return length_of(self.vectors)

    @property
    def method(self) -> str:
        """The method that it was trained by."""
        return method_of(self.vectors)

    @property
    def vectors_sha256(self) -> str:
        """Hash of the vectors as they are stored: of the file `adapter_model.safetensors`."""
        return hashlib.sha256(save(self._stored, metadata=_METADATA)).hexdigest()

    @property
    def _stored(self) -> dict[str, Tensor]:
        return {_TENSOR: _to_peft(self.vectors).float().repeat(_copies(self.encoder_decoder), 1)}

    def require(self, backbone: Backbone) -> None:
        """Raise UserError, with both hashes, unless this is the backbone it was trained on, and has room for it."""
        for what, expected, found in (
            ("weights", self.weights_sha256, backbone.weights_sha256),
            ("tokenizer", self.tokenizer_sha256, backbone.tokenizer_sha256),
        ):
            if expected != found:
                raise UserError(
                    f"the prompt belongs to another base model: its {what} have sha256 {expected}, "
                    f"those of the model given have {found}; load the model that it was trained on"
                )
        if is_prefix(self.vectors):
            self._require_layers(backbone)
        elif self.vectors.shape[1] != backbone.hidden_size:
            raise UserError(
                f"the prompt's vectors have {self.vectors.shape[1]} dimensions, the model's embeddings have "
                f"{backbone.hidden_size}; fetch the prompt again"
            )
        positions = getattr(backbone.model.config, "max_position_embeddings", None)
        if positions and self.length + self.max_tokens + self.max_new_tokens > positions:
            more = f", max_new_tokens={self.max_new_tokens}" if self.max_new_tokens else ""
            raise UserError(
                f"the prompt's {self.length} vectors and max_tokens={self.max_tokens}{more} exceed the model's "
                f"{positions} positions; fetch the prompt again"
            )

    def _require_layers(self, backbone: Backbone) -> None:
        layers, pair, groups, _, width = backbone.as_prefix(backbone.embed([backbone.pad])).shape
        expected, found = [layers, pair, groups, self.length, width], list(self.vectors.shape)
        if found != expected:
            raise UserError(f"the prefix has the shape {found}, the model takes {expected}; fetch the prompt again")

    def save(self, folder: str | Path) -> Path:
        """Write the folder at once or not at all; an older soft prompt there is replaced. Returns it.

        Raises UserError where something else is there, or nothing can be written.
        """
        folder = Path(folder)
        _check_place(folder)
        with writing_below(folder.parent, "give another folder"):
            folder.parent.mkdir(parents=True, exist_ok=True)
            draft = Path(mkdtemp(dir=folder.parent, prefix=".softprompt-"))
            try:
                self._write(draft)
                move_in(draft, folder, keep=lambda: False)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
        return folder

    def _write(self, draft: Path) -> None:
        tensors = draft / "adapter_model.safetensors"
        save_file(self._stored, tensors, metadata=_METADATA)
        if self.position == "start":  # PEFT knows no other place, and refuses a folder without its config
            _write_json(draft / "adapter_config.json", self._peft_config())
        _write_json(draft / "softprompt.json", self._manifest(tensors))
        draft.chmod(0o755)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read a folder that `save` wrote; whoever made it is not trusted.

        Raises UserError where it is none, damaged, or of another format; the base model is checked by `require`.
        """
        folder = Path(folder)
        tensors = folder / "adapter_model.safetensors"
        try:
            for name, largest in _LARGEST.items():
                found = (folder / name).lstat()
                if not stat.S_ISREG(found.st_mode):  # a link leads elsewhere, a pipe or a device never ends
                    raise UserError(f"{folder}: {name} is no regular file; put the file itself there")
                if (size := found.st_size) > largest:
                    raise UserError(f"{folder}: {name} has {size} bytes, and {largest} are the most; fetch it again")
            text = (folder / "softprompt.json").read_text(encoding="utf-8")
            manifest = json.loads(text, object_pairs_hook=_once)
            json.dumps(manifest, ensure_ascii=False).encode()  # half of a surrogate pair is no text
            written = file_sha256(tensors)
        except FileNotFoundError as error:
            raise UserError(f"{folder}: is no soft prompt, {Path(error.filename).name} is missing in it") from None
        except (ValueError, OSError, RecursionError) as error:
            raise UserError(f"{folder}: softprompt.json cannot be read: {error}") from None
        _check_manifest(manifest, folder)
        if manifest["vectors_sha256"] != written:
            raise UserError(
                f"{tensors}: is damaged, sha256 {manifest['vectors_sha256']} was written and {written} is found; "
                "fetch the prompt again"
            )
        known = {name: manifest[name] for name in _FIELDS if name in cls.__dataclass_fields__}
        return cls(vectors=_read_vectors(tensors, manifest), **known)

    def _manifest(self, tensors: Path) -> dict[str, Any]:
        plain = {k: v for k, v in vars(self).items() if k != "vectors"}
        kind = {"method": self.method, "shape": list(self.vectors.shape)}
        return {"format": FORMAT, **kind, "vectors_sha256": file_sha256(tensors), **plain}

    def _peft_config(self) -> dict[str, Any]:
        where = self.base.get("id") or self.base.get("path") or self.base.get("package")
        return {
            "auto_mapping": None,
            "base_model_name_or_path": where,
            "inference_mode": True,
            "num_transformer_submodules": _copies(self.encoder_decoder),
            "num_virtual_tokens": self.length,
            "revision": self.base.get("revision"),
            "task_type": "SEQ_2_SEQ_LM" if self.encoder_decoder else "CAUSAL_LM",
            **(_prefix_config(self.vectors) if is_prefix(self.vectors) else _prompt_config(self.vectors, where)),
        }


def _prompt_config(vectors: Tensor, tokenizer: str | None) -> dict[str, Any]:
    return {
        "num_attention_heads": None,
        "num_layers": None,
        "peft_type": "PROMPT_TUNING",
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "token_dim": vectors.shape[1],
        "tokenizer_kwargs": None,
        "tokenizer_name_or_path": tokenizer,
    }


def _prefix_config(vectors: Tensor) -> dict[str, Any]:
    layers, _, groups, _, width = vectors.shape
    return {
        "encoder_hidden_size": groups * width,
        "init_weights": None,
        "num_attention_heads": groups,
        "num_layers": layers,
        "peft_type": "PREFIX_TUNING",
        "prefix_projection": False,
        "token_dim": groups * width,
    }


def _to_peft(vectors: Tensor) -> Tensor:
    """As PEFT keeps it: of a prefix `[P, L·2·G·D]`, a row for each position."""
    return vectors.permute(3, 0, 1, 2, 4).flatten(1) if is_prefix(vectors) else vectors


def _from_peft(stored: Tensor, shape: list[int]) -> Tensor:
    """The reverse, to the shape `[P, H]` or `[L, 2, G, P, D]`."""
    if len(shape) == 2:
        return stored
    layers, pair, groups, length, width = shape
    return stored.view(length, layers, pair, groups, width).permute(1, 2, 3, 0, 4).contiguous()


def _check_place(folder: Path) -> None:
    """Only a soft prompt may be replaced."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file, and a soft prompt is a folder; give another name")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "softprompt.json").is_file():
        raise UserError(f"{folder}: holds files and is no soft prompt, so it is not replaced; give another folder")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; ValueError where a key stands in it twice, as readers differ in which one they take."""
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _check_manifest(manifest: Any, folder: Path) -> None:
    if not isinstance(manifest, dict):
        raise UserError(f"{folder}: softprompt.json must hold an object, found {type(manifest).__name__}")
    if manifest.get("format") != FORMAT:
        raise UserError(f"{folder}: is of format {manifest.get('format')}, this version reads format {FORMAT}")
    for key, kind in _FIELDS.items():
        if key not in manifest:
            raise UserError(f"{folder}: softprompt.json lacks {key}; fetch the prompt again")
        _require(type(manifest[key]) is kind, folder, key, f"be {kind.__name__}", manifest[key])
    _check_shape(manifest["method"], manifest["shape"], folder)
    _require(manifest["max_tokens"] > 0, folder, "max_tokens", "be positive", manifest["max_tokens"])
    for key in ("max_tokens", "max_new_tokens"):
        _require(manifest[key] <= _MOST_TOKENS, folder, key, f"be at most {_MOST_TOKENS}", manifest[key])
    words, most = manifest["words"], manifest["max_new_tokens"]
    _require(all(type(word) is str for word in words.values()), folder, "words", "map labels to text", words)
    _require(most == 0 if words else most > 0, folder, "max_new_tokens", "be 0 beside words, else positive", most)
    for key, choices in _CHOICES.items():
        _require(manifest[key] in choices, folder, key, f"be one of {', '.join(choices)}", manifest[key])
    try:
        columns_of(manifest["template"])
    except ValueError as error:
        raise UserError(f"{folder}: softprompt.json: {error}") from None


def _check_shape(method: str, shape: list[Any], folder: Path) -> None:
    _require(method in _DIMENSIONS, folder, "method", f"be one of {', '.join(_DIMENSIONS)}", method)
    _require(all(type(n) is int and n > 0 for n in shape), folder, "shape", "hold whole numbers above zero", shape)
    dimensions = _DIMENSIONS[method]
    _require(len(shape) == dimensions, folder, "shape", f"have {dimensions} dimensions", shape)
    _require(method == "prompt_tuning" or shape[1] == 2, folder, "shape", "have keys and values, 2", shape)


def _require(holds: bool, folder: Path, key: str, must: str, found: Any) -> None:
    if not holds:
        raise UserError(
            f"{folder}: softprompt.json: {key} must {must}, found {repr(found)[:60]}; fetch the prompt again"
        )


def _copies(encoder_decoder: bool) -> int:
    """How often the vectors are stored: PEFT wants as many for a decoder too, and does not use them."""
    return 2 if encoder_decoder else 1


def _read_vectors(file: Path, manifest: dict[str, Any]) -> Tensor:
    """The vectors; type and shape of what is stored are verified before it is read, and the numbers then."""
    shape = manifest["shape"]
    length = shape[-2]
    expected = [_copies(manifest["encoder_decoder"]) * length, prod(shape) // length]
    try:
        with safe_open(file, framework="pt") as tensors:
            stored = tensors.get_slice(_TENSOR)
            found = stored.get_dtype(), stored.get_shape()
            if found != ("F32", expected):
                raise UserError(f"{file}: {_TENSOR} must be F32 of shape {expected}, found {found[0]} of {found[1]}")
            vectors: Tensor = tensors.get_tensor(_TENSOR)
    except SafetensorError as error:
        raise UserError(f"{file}: is no safetensors file with a tensor {_TENSOR}: {error}") from None
    if not vectors.isfinite().all():
        raise UserError(f"{file}: {_TENSOR} holds numbers that are not finite; fetch the prompt again")
    return _from_peft(vectors[:length], shape)


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
