"""A frozen model with a verified identity.

Loading reads safetensors only and runs no code that comes with a model. The identity is the SHA-256 of the weights
and of the tokenizer as they are stored, so it does not depend on the type they are computed in. A numeric self-check
(`probe`) decides which composition the model allows, and refuses a model for which prompts mean nothing.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from softprompt.batch import send
from softprompt.composition import Composition, as_prefix, compiled, concatenate, extend, shared_prefix
from softprompt.decoder import fits, written_out
from softprompt.encoder_decoder import encode_and_decode
from softprompt.errors import UserError
from softprompt.packages import file_sha256, move_in, writing_below
from softprompt.probe import UNABLE, Probe
from softprompt.quantization import PRECISIONS, QUANTIZED, quantize, require_library

_NOTE = "converted.json"
"""Beside a converted copy: the SHA-256 of each of its files."""


@dataclass(frozen=True)
class Backbone:
    """A frozen language model, its tokenizer, and what identifies them."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    weights_sha256: str
    tokenizer_sha256: str
    reference: dict[str, Any] = field(default_factory=dict)
    """Where the model can be had again, as plain data; its author gives it meaning."""
    before: tuple[int, ...] = ()
    """Tokens that stand before every prompt; inputs come without them."""
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
        return cls(model, tokenizer, weights, hash_tokenizer(tokenizer), reference, compile=compile)

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

    def extend(self, prompts: Sequence[Tensor], tokens: Sequence[int]) -> list[Tensor]:
        """K prompts of either kind, each with these tokens behind it."""
        return extend(self.model, prompts, self.embed(tokens)) if tokens else list(prompts)

    def as_prefix(self, vectors: Tensor) -> Tensor:
        """The prefix `[L, 2, G, P, D]`, float32, that a soft prompt `[P, H]` leaves; the logits are the same.

        Raises UserError where the model takes no prefix.
        """
        self.require_prefixes()
        with torch.no_grad():
            return as_prefix(self.model, vectors.to(self.device)).float()

    def require_prefixes(self) -> None:
        """Raise UserError unless the model takes a prefix."""
        if not self.takes_prefixes:
            raise UserError(
                "search.method: prefix_tuning needs a model that takes keys and values of ours in every layer, and by "
                f"its numbers this {self.model.config.model_type} model does not; use prompt_tuning"
            )

    @property
    def pad(self) -> int:
        """A token id for padding: one that every table has, because nothing reads it."""
        return 0

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether an encoder reads the input, and a decoder says the target."""
        return bool(self.model.config.is_encoder_decoder)

    def placed(self, position: str) -> Self:
        """The backbone with prompts at the `start` of what the model reads, or `after_bos`.

        Raises UserError where the tokenizer puts no begin-of-sequence token before a text.
        """
        before: tuple[int, ...] = ()
        if position == "after_bos":
            begin = self.tokenizer.bos_token_id
            if begin is None or self.tokenizer.encode("a")[0] != begin:
                raise UserError(
                    "prompt_position: after_bos, but the model's tokenizer puts no begin-of-sequence token before a "
                    "text; use start"
                )
            before = (begin,)
        return self if before == self.before else replace(self, before=before)

    @cached_property
    def _probe(self) -> Probe:
        formula = encode_and_decode if self.is_encoder_decoder else concatenate
        try:
            return Probe(self.model, formula)
        except UNABLE as error:
            raise self._refusal(f"it cannot be run on a prompt before its input: {_one_line(error)}") from error

    def _refusal(self, fault: str) -> UserError:
        return UserError(
            f"model: {type(self.model).__name__} cannot be used with soft prompts: {fault}; choose a causal or an "
            "encoder-decoder language model"
        )

    @cached_property
    def composition(self) -> Composition[Any]:
        """The fastest composition that is exact for this model; the plain concatenation if none is.

        Raises UserError where the concatenation means nothing either.
        """
        if fault := self._probe.find_fault():
            raise self._refusal(fault)
        return self._choose(self._candidates())

    def _choose(self, candidates: Sequence[Composition[Any]]) -> Composition[Any]:
        """The first that is exact, else the formula; with what stands before every prompt."""
        exact = (c for c in candidates if self.deviation(c) <= self._probe.tolerance)
        chosen = next(exact, self._probe.formula)
        return chosen.behind(self.embed(self.before)) if self.before else chosen

    def _candidates(self) -> list[Composition[Any]]:
        """Quicker ways than the formula, the quickest first."""
        if self.is_encoder_decoder:
            return []
        if self.compile:
            return [compiled(shared_prefix), shared_prefix]
        if self.device.type == "cpu" and fits(self.model):  # a GPU has the model's own fused attention
            return [written_out, shared_prefix]
        return [shared_prefix]

    @cached_property
    def native(self) -> Composition[Any]:
        """The fastest exact composition that calls the model's own layers, as dropout and checkpointing need."""
        return self._choose([] if self.is_encoder_decoder else [shared_prefix])

    @cached_property
    def takes_prefixes(self) -> bool:
        """Whether the prefix that a soft prompt leaves stands for it, by the logits, beside another soft prompt."""
        return self._probe.deviation(self.composition, prefixes=True) <= self._probe.tolerance

    @cached_property
    def branches(self) -> bool:
        """Whether continuations on branches of one row have the logits that each has on a row of its own."""
        return all(map(self._probe.reads_branches, {self.composition, self.native}))

    def deviation(self, composition: Composition[Any]) -> float:
        """How far a composition is from the formula on a few random rows, relative to what the prompts change."""
        return self._probe.deviation(composition)

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
    for name in shards:
        if Path(name).name != name:
            raise ValueError(f"{index.name} names {name!r}, and a file of weights lies beside it")
    return [folder / name for name in sorted(set(shards))]


def _read_folder(
    folder: Path, precision: str, attention: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model = _read_model(
            kind, folder, dtype=PRECISIONS[precision], use_safetensors=True, attn_implementation=attention
        )
        return model, AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a config that is wrong makes transformers raise anything
        raise UserError(f"{folder}: cannot be loaded as a language model: {_one_line(error)}") from error


def _read_model(kind: type[Any], folder: Path, **how: Any) -> PreTrainedModel:
    """The whole model; nothing of its own code is run, about which transformers would ask at a terminal."""
    loaded: Any = kind.from_pretrained(folder, trust_remote_code=False, output_loading_info=True, **how)
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
        model = _read_model(
            AutoModelForCausalLM, file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=unpack
        )
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
