"""Continue inputs with text after soft prompts: what the model says when nothing holds it to labels.

transformers' own `generate` decodes. What is ours is what it goes on from: rows of different prompts and lengths in one
pass, none of which depends on its company; a prompt's states computed once and kept, where the model allows that; and
none of a checkpoint's own habits (sampling, penalties, forced tokens), so that greedy is greedy.

    K prompts side by side   N rows of a pass   P prompt length   T input tokens   H hidden size   V vocabulary

Token ids go in and come out. Labels are scored by `inference`.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StaticCache,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from softprompt.backbone import Backbone
from softprompt.composition import PrefixStates, shared_prefix, window_of
from softprompt.errors import UserError
from softprompt.inference import ROWS, by_length, name_owners
from softprompt.prefix import is_prefix, length_of


@dataclass(frozen=True, slots=True)
class Greedy:
    """The likeliest token each time."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """A token drawn by its probability; row n of a call draws from a stream of its own, that of `seed` and n."""

    seed: int
    """Not negative; the same gives the same text."""
    temperature: float = 1.0
    """What the logits are divided by; the smaller, the nearer to greedy."""
    top_p: float = 1.0
    """Only the likeliest tokens are drawn, as many as together have this probability."""

    def __post_init__(self) -> None:
        if not (self.seed >= 0 and self.temperature > 0 and 0 < self.top_p <= 1):
            raise UserError(f"decoding: seed >= 0, temperature > 0 and 0 < top_p <= 1 must hold, got {self}")


@dataclass(frozen=True, slots=True)
class Beams:
    """The text of the best score that a beam search finds, which ends when no beam can overtake it any more."""

    count: int
    """Beams of a row."""
    length_penalty: float = 1.0
    """The score is the log-probability divided by this power of the number of tokens, the end token included."""

    def __post_init__(self) -> None:
        if self.count < 2:
            raise UserError(f"decoding: count >= 2 must hold, got {self}; one beam is Greedy()")


@dataclass(frozen=True, slots=True)
class Lookup:
    """Greedy in fewer passes: what followed the last tokens where they stood before is guessed, and checked at once."""

    tokens: int = 10
    """Tokens of a guess at the most."""


Decoding = Greedy | Sampling | Beams | Lookup
_GREEDY = Greedy()


class Generator:
    """K prompts `[P_k, H]`, or prefixes, over a backbone, ready to continue inputs; P_k may be 0."""

    def __init__(self, backbone: Backbone, prompts: Sequence[Tensor]) -> None:
        self._backbone = backbone
        before, prompts = backbone.embed(backbone.before), [prompt.detach().to(backbone.device) for prompt in prompts]
        whole = [prompt if is_prefix(prompt) else torch.cat([before, prompt]) for prompt in prompts]
        self._prompts = [prompt.to(backbone.model.dtype) for prompt in whole]
        self._special = _special_tokens(backbone)
        self._model: Any = copy.copy(backbone.model)  # the same weights, with no defaults for decoding
        self._model.generation_config = GenerationConfig()
        self._states = self._keep()

    @torch.inference_mode()
    def _keep(self) -> PrefixStates | None:
        """The states of the prompts, where rows after them are exact."""
        self._backbone.composition  # refuses a model that cannot go on from what it has read  # noqa: B018
        if self._backbone.native.attend is not shared_prefix.attend:
            return None
        return shared_prefix.keep(self._backbone.model, self._prompts)

    @torch.inference_mode()
    def generate(
        self,
        inputs: Sequence[Sequence[int]],
        owner: Sequence[int] | None = None,
        *,
        max_new_tokens: int,
        decoding: Decoding = _GREEDY,
        cache: Literal["dynamic", "static"] = "dynamic",
        rows: int = ROWS,
    ) -> list[tuple[int, ...]]:
        """The continuation of each of N inputs, as token ids without the end token; the order of the rows is kept.

        Args:
            inputs: token ids of each.
            owner: index of each input's prompt; the first for all of them by default.
            max_new_tokens: where a text is cut that has not ended by itself.
            decoding: how tokens are chosen.
            cache: `dynamic` grows with the text; `static` keeps its size, so that a GPU can compile the step.
            rows: rows of a pass at the most, every beam being one. It changes the speed alone.

        Raises UserError where an input has no tokens or no prompt, or takes more positions than the model has, and for
        prompt lookup where guesses cannot be taken back.
        """
        owners = name_owners(owner, inputs=len(inputs), prompts=len(self._prompts))
        lengths = self._measure(inputs, owners, max_new_tokens)
        if isinstance(decoding, Lookup) and (cache == "static" or self._model._is_stateful):
            raise UserError(f"decoding: {decoding} takes guesses back, which this cache or model cannot; use Greedy()")
        most = 1 if isinstance(decoding, Lookup) else max(1, rows // _beams(decoding))
        width = max(map(length_of, self._prompts)) + max(map(len, inputs), default=0) + max_new_tokens
        settings = GenerationConfig(max_new_tokens=max_new_tokens, **self._special, **_settings(decoding))
        found: list[tuple[int, ...]] = [()] * len(inputs)
        for batch in by_length([_beams(decoding) * length for length in lengths], most=most):
            part = [inputs[n] for n in batch], torch.tensor([owners[n] for n in batch], device=self._backbone.device)
            given, start = self._after_states(*part, decoding, width, cache) or self._after_prompts(*part, cache)
            choose = _choose(decoding, batch, max_new_tokens, start)
            output = self._model.generate(**given, generation_config=settings, logits_processor=choose)
            for n, line in zip(batch, output[:, start:].tolist(), strict=True):
                found[n] = self._cut(line)
        return found

    def _measure(self, inputs: Sequence[Sequence[int]], owners: Sequence[int], new: int) -> list[int]:
        """Positions that each row takes; UserError where the model has fewer, or there is nothing to continue."""
        if new < 1:
            raise UserError(f"max_new_tokens: must be at least 1, got {new}")
        limit, lengths = getattr(self._model.config, "max_position_embeddings", None), []
        for n, (row, k) in enumerate(zip(inputs, owners, strict=True)):
            if not row:
                raise UserError(f"inputs: input {n} has no tokens; give at least one")
            prompt = length_of(self._prompts[k])
            read = prompt + len(row)
            lengths.append(max(read, new) if self._model.config.is_encoder_decoder else read + new)
            if limit and lengths[-1] > limit:
                raise UserError(
                    f"max_new_tokens: {new}, a prompt of {prompt} vectors and input {n} of {len(row)} tokens take "
                    f"{lengths[-1]} positions, and the model has {limit}; lower it or cut the input"
                )
        return lengths

    def _after_states(
        self, inputs: Sequence[Sequence[int]], owner: Tensor, decoding: Decoding, width: int, cache: str
    ) -> tuple[dict[str, Any], int] | None:
        """What `generate` is given to go on from kept states, and where its output begins; None where it may not.

        Before a shorter prompt and between a prompt and a shorter input there are masked columns. A layer with a window
        counts them, so all have to be within it; prompt lookup miscounts with them.
        """
        if self._states is None or self._states.cache is None or width > window_of(self._model):
            return None
        tokens, mask = _pad([torch.tensor(row) for row in inputs], "left", self._backbone)
        mask = torch.cat([self._states.mask[owner], mask], dim=1)
        if isinstance(decoding, Lookup) and not mask.all():
            return None
        kept: Any = copy.deepcopy(self._states.cache)
        kept.batch_select_indices(owner.repeat_interleave(_beams(decoding)))
        if cache == "static":
            kept = _make_static(kept, self._model, width)
        return {"input_ids": tokens, "attention_mask": mask, "past_key_values": kept}, tokens.shape[1]

    def _after_prompts(self, inputs: Sequence[Sequence[int]], owner: Tensor, cache: str) -> tuple[dict[str, Any], int]:
        """What `generate` is given to go on from `[p; E[tokens]]`, and where its output begins."""
        if any(map(is_prefix, self._prompts)):
            raise UserError(
                "prefix_tuning: text goes on from prefixes within the model's attention window, and where guesses are "
                "looked up with prompts of one length; shorten the inputs, or use Greedy()"
            )
        both, embed = self._model.config.is_encoder_decoder, self._model.get_input_embeddings()
        lines = [
            torch.cat([self._prompts[k], embed(torch.tensor(row, device=owner.device))])
            for row, k in zip(inputs, owner.tolist(), strict=True)
        ]
        # An encoder counts positions by columns, a decoder by the mask. The output of a pair begins with a start token.
        embeds, mask = _pad(lines, "right" if both else "left", self._backbone)
        return {"inputs_embeds": embeds, "attention_mask": mask, "cache_implementation": cache}, int(both)

    def _cut(self, line: list[int]) -> tuple[int, ...]:
        """A row of output up to its end token."""
        ends = self._special["eos_token_id"] or ()
        return tuple(line[: next((n for n, token in enumerate(line) if token in ends), len(line))])


def _special_tokens(backbone: Backbone) -> dict[str, Any]:
    """The tokens that begin, end and pad a text, all that is taken from a checkpoint's own settings."""
    own: Any = backbone.model.generation_config
    ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    return {
        "eos_token_id": sorted({n for n in (*ends, backbone.tokenizer.eos_token_id) if n is not None}) or None,
        "bos_token_id": own.bos_token_id,
        "decoder_start_token_id": own.decoder_start_token_id,
        "pad_token_id": backbone.pad,
    }


def _beams(decoding: Decoding) -> int:
    return decoding.count if isinstance(decoding, Beams) else 1


def _settings(decoding: Decoding) -> dict[str, Any]:
    """What transformers calls it."""
    match decoding:
        case Beams(count, penalty):
            return {"num_beams": count, "length_penalty": penalty, "early_stopping": "never"}
        case Lookup(tokens):
            return {"prompt_lookup_num_tokens": tokens}
        case _:
            return {}


def _choose(decoding: Decoding, rows: Sequence[int], new: int, start: int) -> LogitsProcessorList:
    """What is done to the logits before the highest is taken."""
    if not isinstance(decoding, Sampling):
        return LogitsProcessorList()
    draws = torch.tensor(np.array([np.random.default_rng([decoding.seed, n]).random(new) for n in rows]))
    warp = TemperatureLogitsWarper(float(decoding.temperature)), TopPLogitsWarper(float(decoding.top_p))
    return LogitsProcessorList([*warp, _Draw(draws, start)])


class _Draw(LogitsProcessor):
    """Leaves the one token of each row whose share of the probability the row's draw falls into.

    transformers draws for the whole pass from one stream, so that a row's text would depend on its neighbours.
    """

    def __init__(self, draws: Tensor, start: int) -> None:
        self._draws = draws
        """`[N, max_new_tokens]` numbers in [0, 1), one for each token to come."""
        self._start = start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """From logits `[N, V]` to 0 for the token drawn and -inf for all others."""
        shares = scores.double().softmax(1).cumsum(1)
        points = self._draws[:, input_ids.shape[1] - self._start, None].to(scores.device) * shares[:, -1:]
        return torch.full_like(scores, -torch.inf).scatter_(1, (shares <= points).sum(1, keepdim=True), 0)


def _pad(lines: list[Tensor], side: str, backbone: Backbone) -> tuple[Tensor, Tensor]:
    """N lines of different length as one tensor, and ones and zeros for what is line and what is padding."""
    ones = [torch.ones(len(line), dtype=torch.long) for line in lines]
    padded = pad_sequence(lines, batch_first=True, padding_value=backbone.pad, padding_side=side)
    mask = pad_sequence(ones, batch_first=True, padding_side=side)
    return padded.to(backbone.device), mask.to(backbone.device)


def _make_static(kept: Any, model: PreTrainedModel, width: int) -> StaticCache:
    """The same keys and values in a cache with room for `width` columns."""
    static = StaticCache(config=model.config, max_cache_len=width)
    for n, layer in enumerate(kept.layers):
        static.update(layer.keys, layer.values, n)
    return static
