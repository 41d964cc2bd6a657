"""A frozen model with a verified identity.

Loading reads safetensors only and runs no code that comes with a model. The identity is the SHA-256 of the weights
and of the tokenizer as they are stored, so it does not depend on the type they are computed in. A numeric self-check
decides at loading which composition the model allows.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

from softprompt.composition import (
    Composition,
    Example,
    Tree,
    collate,
    collate_tree,
    compiled,
    concatenate,
    send,
    shared_prefix,
)
from softprompt.decoder import fits, written_out
from softprompt.errors import UserError
from softprompt.packages import file_sha256, move_in, writing_below
from softprompt.quantization import PRECISIONS, QUANTIZED, quantize, require_library

# Largest deviation of a composition from the formula, relative to what the prompt changes, that is rounding.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.02}

_NOTE = "converted.json"
"""Beside a converted copy: the SHA-256 of each of its files."""


@dataclass(frozen=True)
class Backbone:
    """A frozen causal language model, its tokenizer, and what identifies them."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    weights_sha256: str
    tokenizer_sha256: str
    reference: dict[str, Any] = field(default_factory=dict)
    """Where the model can be had again, as plain data; its author gives it meaning."""
    compile: bool = False
    """Whether passes of the model's own layers are compiled, where such a pass is exact."""

    @classmethod
    def wrap(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Self:
        """Freeze a model that is in memory already; its weights are hashed as they are."""
        model.requires_grad_(False).eval()
        weights = hash_tensors(sorted(model.state_dict().items()))
        return cls(model, tokenizer, weights, hash_tokenizer(tokenizer))

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        precision: str = "bfloat16",
        device: str = "auto",
        reference: dict[str, Any] | None = None,
        compile: bool = False,
    ) -> Self:
        """Load a folder that holds a config, safetensors weights and a tokenizer.

        Args:
            folder: as `save_pretrained` writes it.
            precision: `bfloat16` or `float32`, the type of the frozen weights; or `int8` or `int4`, in which the linear
                layers are stored, and computed in bfloat16.
            device: `auto`, `cpu`, `cuda` or `cuda:N`.
            reference: where the model can be had again; the folder by default.
            compile: whether passes are compiled.

        Raises UserError where the folder is no such model.
        """
        folder = Path(folder)
        if precision in QUANTIZED:
            require_library()
        weights = hash_folder(folder)
        place = pick_device(device)
        # On a CPU the fused attention's backward is the slow part of short sequences.
        model, tokenizer = _read_folder(folder, precision, attention="eager" if place.type == "cpu" else None)
        model.requires_grad_(False).eval()
        if precision in QUANTIZED:
            quantize(model, precision, place)  # layer by layer, so that the whole model is never there in bfloat16
        model.eval().to(place)
        reference = reference or {"kind": "local", "path": str(folder.absolute())}
        return cls(model, tokenizer, weights, hash_tokenizer(tokenizer), reference, compile)

    @property
    def device(self) -> torch.device:
        """Where the model is, and all of its tensors."""
        return self.model.device

    @property
    def hidden_size(self) -> int:
        """H, the width of an embedding."""
        return int(self.embeddings.shape[1])

    @property
    def embeddings(self) -> Tensor:
        """The frozen table E, `[V, H]`."""
        return self.model.get_input_embeddings().get_parameter("weight")

    def embed(self, ids: Sequence[int]) -> Tensor:
        """The embeddings of N tokens as the model looks them up, `[N, H]` in float32; some models scale them."""
        with torch.no_grad():
            embedded: Tensor = self.model.get_input_embeddings()(send(torch.tensor(ids, dtype=torch.long), self.device))
        return embedded.float()

    @property
    def pad(self) -> int:
        """A token id for padding: one that every table has, because nothing reads it."""
        return 0

    @cached_property
    def composition(self) -> Composition[Any]:
        """The fastest composition that is exact for this model; the plain concatenation if none is."""
        candidates: list[Composition[Any]] = [shared_prefix]
        if self.compile:
            candidates.insert(0, compiled(shared_prefix))
        elif self.device.type == "cpu" and fits(self.model):  # a GPU has the model's own fused attention
            candidates.insert(0, written_out)
        for composition in candidates:
            if self.deviation(composition) <= _TOLERANCE[self.model.dtype]:
                return composition
        return concatenate

    @cached_property
    def branches(self) -> bool:
        """Whether continuations on branches of one row have the logits that each has on a row of its own."""
        device, (a, b, c) = self.device, (len(self.embeddings) // n for n in (3, 4, 5))
        prompt = self.embeddings[[c, a]].float()
        ancestors = torch.tensor([[True, False, False], [False, True, False], [True, False, True]], device=device)
        tree = Tree(torch.tensor([a, b, c], device=device), torch.tensor([0, 0, 1], device=device), ancestors)
        inputs = [(b, c), (a, b, c, a)]
        with torch.inference_mode():
            states = self.composition.keep(self.model, [prompt])
            lines = [Example(row, (*line, 0)) for row in inputs for line in ((a, c), (b,))]
            alone = self.composition.attend(self.model, states, collate(lines, [0] * 4, pad=self.pad, device=device))
            try:
                found = self.composition.attend(self.model, states, collate_tree(inputs, tree, pad=self.pad))
            except (AttributeError, TypeError, ValueError, RuntimeError):
                return False
        # Of each input: its end, a, a c; its end, b. And in the tree: its end, a, b, a c.
        alone, found = alone.view(2, 5, -1)[:, [0, 1, 4, 2]].float(), found.view(2, 4, -1).float()
        return bool(
            (found - alone).norm() <= _TOLERANCE[self.model.dtype] * (alone - alone.mean(1, keepdim=True)).norm()
        )

    def deviation(self, composition: Composition[Any]) -> float:
        """How far a composition is from the formula on a few random rows, relative to what the prompts change.

        Rounding in bfloat16 gives a few percent; states that are not those of the formula give more than half, and a
        model that cannot be run with a kept prefix at all gives infinity.
        """
        random = torch.Generator().manual_seed(0)
        spread = self.embeddings.float().std().cpu()
        prompts = [(torch.randn(p, self.hidden_size, generator=random) * spread).to(self.device) for p in (3, 5)]
        rows = [torch.randint(len(self.embeddings), (t,), generator=random).tolist() for t in (4, 7, 6)]
        examples = [Example(tuple(row[:-2]), tuple(row[-2:])) for row in rows]
        batch = collate(examples, [0, 1, 0], pad=self.pad, device=self.device)
        with torch.inference_mode():
            plain = concatenate(self.model, prompts, batch).float()
            without = concatenate(self.model, [prompt[:0] for prompt in prompts], batch).float()
            try:
                found = composition(self.model, prompts, batch).float()
            except (AttributeError, TypeError, ValueError, RuntimeError):
                return float("inf")
        return float((found - plain).norm() / (without - plain).norm())

    def weights_in_memory_sha256(self) -> str:
        """The hash of the weights as they are now; equal before and after anything that we do."""
        return hash_tensors(sorted(self.model.state_dict().items()))


def pick_device(device: str) -> torch.device:
    """The device that `auto` stands for, or the one named; UserError where the machine has none such."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError:
        raise UserError(f"device: {device!r} is no device; use auto, cpu, cuda or cuda:N") from None
    counts = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    available = counts.get(place.type, 1)
    if (place.index or 0) >= available:
        raise UserError(
            f"device: {device} is not there, this machine has {available} {place.type.upper()} devices; use auto"
        )
    return place


def hash_tensors(named: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors, which come in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hash_folder(folder: Path) -> str:
    """SHA-256 of the safetensors weights that are loaded from a folder, however they are cut into files.

    Raises UserError where the folder holds none, a damaged one, or an adapter.
    """
    if (folder / "adapter_config.json").exists():
        raise UserError(f"{folder}: holds adapter_config.json, an adapter for another model; merge and save them")
    try:
        files = _weight_files(folder)
        with ExitStack() as stack:
            shards = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
            where = {name: shard for shard in shards for name in shard.keys()}  # noqa: SIM118
            return hash_tensors((name, where[name].get_tensor(name)) for name in sorted(where))
    except (SafetensorError, OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise UserError(f"{folder}: its weights cannot be read: {_one_line(error)}") from None


def _weight_files(folder: Path) -> list[Path]:
    """What transformers loads: one file, else those of the index; other files of weights count for nothing."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise UserError(f"{folder}: holds no {single.name}, nor its index; give a folder that save_pretrained wrote")
    shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return [folder / name for name in sorted(set(shards))]


def _read_folder(
    folder: Path, precision: str, attention: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        model = _read_model(folder, dtype=PRECISIONS[precision], use_safetensors=True, attn_implementation=attention)
        return model, AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a config that is wrong makes transformers raise anything
        raise UserError(f"{folder}: cannot be loaded as a causal language model: {_one_line(error)}") from error


def _read_model(folder: Path, **how: Any) -> PreTrainedModel:
    """The whole model; nothing of its own code is run, about which transformers would ask at a terminal."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, output_loading_info=True, **how)
    model: PreTrainedModel = loaded[0]
    if lacking := sorted(loaded[1]["missing_keys"]):  # transformers has filled them at random
        raise ValueError(f"{len(lacking)} of its tensors are missing, as {lacking[0]}; give the whole model")
    if getattr(model.config, "transformers_weights", None):  # not what was hashed
        raise ValueError("transformers_weights in config.json names another file of weights; take it out")
    return model


def hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of a tokenizer: its vocabulary, merges, normalisation and special tokens."""
    if tokenizer.is_fast:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        content = {k: v for k, v in content.items() if k not in ("padding", "truncation")}
    else:
        content = {"vocabulary": tokenizer.get_vocab()}
    content["special"] = {k: str(v) for k, v in tokenizer.special_tokens_map.items()}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def convert_gguf(file: Path, *, sha256: str, cache: Path) -> Path:
    """The folder of a GGUF file's weights, unpacked to float32 safetensors; converted once, then kept.

    Args:
        file: the GGUF file.
        sha256: its hash, already verified; the converted copy is kept under it.
        cache: where converted copies are kept.

    A kept copy that is not, byte for byte, what was written is made anew. Raises UserError where the file is no GGUF
    file of a causal language model, or the cache cannot be written.
    """
    folder = cache / "weights" / sha256
    if _is_sound(folder):
        return folder
    model, tokenizer = _read_gguf(file)
    with writing_below(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent, prefix=".convert-") as temporary:
            made = Path(temporary) / "made"
            model.save_pretrained(made)
            tokenizer.save_pretrained(made)
            (made / _NOTE).write_text(json.dumps(_hash_files(made), indent=1))
            move_in(made, folder, keep=lambda: _is_sound(folder))
    return folder


def _read_gguf(file: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    unpack = GgufConfig(dequantize=True)
    try:
        model = _read_model(file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=unpack)
        return model, AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    except Exception as error:  # a damaged file makes transformers raise anything
        raise UserError(f"{file}: cannot be read as the GGUF file of a language model: {_one_line(error)}") from error


def _is_sound(folder: Path) -> bool:
    """Whether a converted copy is what was written."""
    try:
        return bool(json.loads((folder / _NOTE).read_text(encoding="utf-8")) == _hash_files(folder))
    except (OSError, ValueError):
        return False


def _hash_files(folder: Path) -> dict[str, str]:
    return {file.name: file_sha256(file) for file in sorted(folder.iterdir()) if file.name != _NOTE}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
