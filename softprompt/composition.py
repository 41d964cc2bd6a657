"""The formula, `X = [p_0 … p_{P-1}; e_0 … e_{T-1}]`, as pure functions from prompts and tokens to logits.

    K prompts side by side   B examples per prompt   N rows of a batch, the B of every prompt together
    P prompt length          T input tokens          H hidden size          V vocabulary

Every composition computes the same logits. `concatenate` is the formula as written. `shared_prefix` computes the
states at a prompt's positions once per prompt: in a causal model they depend on nothing after them, so every example
attends to the same keys and values. Which one a model allows is decided by a number (`Backbone.composition`), never
by its name. Encoder-decoder models have a composition of their own, in `encoder_decoder`.

The formula joins prompt and tokens without a gap. The shared states of prompts of different length are padded on the
left, masked. Nothing here chooses data, trains or scores.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from softprompt.batch import Batch, send, unfold
from softprompt.prefix import Layers, is_prefix, length_of, mix, separate, side_by_side

States = TypeVar("States")


@dataclass(frozen=True, slots=True)
class Composition(Generic[States]):
    """A way to compute the formula, in two steps: what the prompts leave behind, and rows after that."""

    name: str
    keep: Callable[[PreTrainedModel, Sequence[Tensor]], States]
    """What K prompts leave, `[P_k, H]` or, where a model takes them, prefixes `[L, 2, G, P_k, D]`; computed once."""
    attend: Callable[[PreTrainedModel, States, Batch], Tensor]
    """Logits `[M, V]` of the batch's rows, each after the prompt that owns it."""
    map: Callable[[States, Callable[[Tensor], Tensor]], States]
    """The states with a function applied to each tensor through which prompts reach the rows."""
    together: Callable[[PreTrainedModel, Sequence[Tensor], Batch], Tensor] | None = None
    """Both steps at once, where that is quicker."""

    def __call__(self, model: PreTrainedModel, prompts: Sequence[Tensor], batch: Batch) -> Tensor:
        """Logits `[M, V]` at the batch's predicting places; P_k may be 0."""
        if self.together is not None:
            return self.together(model, prompts, batch)
        return self.attend(model, self.keep(model, prompts), batch)

    def behind(self, vectors: Tensor) -> "Composition[States]":
        """The same with vectors `[C, H]` before every soft prompt."""

        def join(prompts: Sequence[Tensor]) -> list[Tensor]:
            return [torch.cat([vectors, prompt]) for prompt in prompts]

        keep, together = self.keep, self.together
        return replace(
            self,
            keep=lambda model, prompts: keep(model, join(prompts)),
            together=together and (lambda model, prompts, batch: together(model, join(prompts), batch)),
        )


@dataclass(frozen=True, slots=True)
class Joined:
    """N rows of vectors, each its prompt and its tokens without a gap between them."""

    embeds: Tensor
    """`[N, P+T, H]`; the vectors of padding are any."""
    mask: Tensor
    """`[N, P+T]` ones and zeros."""
    first: Tensor
    """`[N]` column of each row's first token."""


def join(model: PreTrainedModel, prompts: Sequence[Tensor], batch: Batch, lengths: Tensor, *, left: bool) -> Joined:
    """Every row with its own copy of its prompt before the first of its tokens, `lengths` `[N]` of them.

    All padding is at one end, so that a model which counts columns counts what is there.
    """
    prefix, shown = pad_left(prompts, model)
    embeds = torch.cat([prefix[batch.owner], model.get_input_embeddings()(batch.tokens)], dim=1)
    width, sizes = embeds.shape[1], shown.sum(1)[batch.owner]
    start = width - sizes - lengths if left else torch.zeros_like(sizes)
    columns = torch.arange(width, device=embeds.device) - start[:, None]
    source = (columns + (prefix.shape[1] - sizes)[:, None]) % width
    mask = (columns >= 0) & (columns < (sizes + lengths)[:, None])
    return Joined(embeds.gather(1, source[..., None].expand_as(embeds)), mask.long(), start + sizes)


def _concatenate(model: PreTrainedModel, prompts: Sequence[Tensor], batch: Batch, *, left: bool = False) -> Tensor:
    """The formula as written: every row carries its own copy of its prompt, and every path of a tree is a row."""
    if batch.tree is not None:
        batch = unfold(batch)
    joined = join(model, prompts, batch, batch.lengths, left=left)
    keep, place = torch.unique(joined.first[batch.rows] + batch.columns, return_inverse=True)
    logits: Tensor = model(
        inputs_embeds=joined.embeds,
        attention_mask=joined.mask,
        position_ids=positions(joined.mask),
        use_cache=False,
        logits_to_keep=keep,
    ).logits
    return logits[batch.rows, place]


def keep_as_they_are(model: PreTrainedModel, prompts: Sequence[Tensor]) -> Sequence[Tensor]:
    """Where nothing of prompts can be computed before the rows."""
    return prompts


def map_prompts(prompts: Sequence[Tensor], change: Callable[[Tensor], Tensor]) -> Sequence[Tensor]:
    """A function applied to each prompt."""
    return list(map(change, prompts))


concatenate = Composition("concatenation", keep_as_they_are, _concatenate, map_prompts)
concatenate_left = Composition(
    "concatenation, padded on the left", keep_as_they_are, partial(_concatenate, left=True), map_prompts
)


@dataclass(frozen=True, slots=True)
class PrefixStates:
    """The keys and values that K prompts leave in every layer; what inference computes once and keeps."""

    cache: Cache | None
    """One row per prompt; None where all prompts are empty."""
    mask: Tensor
    """`[K, P]` ones where a prompt has a vector, zeros on the left of a shorter one."""
    even: bool = False
    """Whether it is known that the mask has no zeros."""

    def map(self, change: Callable[[Tensor], Tensor]) -> "PrefixStates":
        """These states with a function applied to the keys and values of every layer."""
        if self.cache is None:
            return self
        cache = _copy(self.cache)
        layers: list[Any] = cache.layers
        for layer in layers:
            layer.keys, layer.values = change(layer.keys), change(layer.values)
        return replace(self, cache=cache)


def _prefix_states(model: PreTrainedModel, prompts: Sequence[Tensor]) -> PrefixStates:
    """Run K prompts `[P_k, H]` through the model, once each; prefixes stand beside them as they are."""
    if any(map(is_prefix, prompts)):
        keys, values, mask = mix(prompts, model.dtype, lambda soft: _leave(model, *pad_left(soft, model), _even(soft)))
        return PrefixStates(DynamicCache(list(zip(keys, values, strict=True))), mask, _even(prompts))
    prefix, mask = pad_left(prompts, model)
    even = _even(prompts)
    return PrefixStates(_read(model, prefix, mask, even) if prefix.shape[1] else None, mask, even)


def _even(prompts: Sequence[Tensor]) -> bool:
    """Whether prompts of either kind are of one length."""
    return len(set(map(length_of, prompts))) == 1


def _read(model: PreTrainedModel, vectors: Tensor, mask: Tensor, even: bool, before: Cache | None = None) -> Cache:
    """What K rows of C vectors `[K, C, H]` leave behind what is there before; `mask` `[K, P+C]` is of both.

    `even` says that the mask is known to have no zeros.
    """
    count, width = vectors.shape[1], mask.shape[1]
    own = torch.eye(count, width, dtype=torch.bool, device=mask.device).roll(width - count, 1)
    attends = (mask.bool()[:, None] | own).tril(width - count)  # even padding attends to something
    cache: Cache = model(
        inputs_embeds=vectors.to(model.dtype),
        attention_mask=None if even else _spell(model, attends) if _looks_at_masks(model) else mask,
        position_ids=positions(mask)[:, -count:],
        past_key_values=before,
        use_cache=True,
        logits_to_keep=1,
    ).past_key_values
    return cache


def _leave(model: PreTrainedModel, vectors: Tensor, mask: Tensor, even: bool, before: Layers = ()) -> Layers:
    """The keys and values in every layer of C vectors behind what is there before, all of them.

    The cache that a model makes of its own may forget what its attention window has passed.
    """
    cache = DynamicCache(list(before))
    _read(model, vectors, mask, even, cache)
    own = slice(-vectors.shape[1], None)
    return [(keys[:, :, own], values[:, :, own]) for keys, values, _ in cache]


def as_prefix(model: PreTrainedModel, prompt: Tensor) -> Tensor:
    """The prefix `[L, 2, G, P, D]` that a soft prompt `[P, H]` leaves; P > 0."""
    return separate(_leave(model, *pad_left([prompt], model), True), [len(prompt)])[0]


def extend(model: PreTrainedModel, prompts: Sequence[Tensor], vectors: Tensor) -> list[Tensor]:
    """K prompts of either kind, each with C vectors `[C, H]` behind it; a prefix takes in what they leave."""
    prefixes = iter(_lengthen(model, [prompt for prompt in prompts if is_prefix(prompt)], vectors))
    return [next(prefixes) if is_prefix(prompt) else torch.cat([prompt, vectors]) for prompt in prompts]


def _lengthen(model: PreTrainedModel, prefixes: Sequence[Tensor], vectors: Tensor) -> list[Tensor]:
    if not prefixes:
        return []
    keys, values, mask = side_by_side(prefixes, model.dtype)
    mask = nn.functional.pad(mask, (0, len(vectors)), value=1)
    each, even = vectors.expand(len(prefixes), -1, -1), _even(prefixes)
    left = _leave(model, each, mask, even, zip(keys, values, strict=True))
    behind = separate(left, [len(vectors)] * len(prefixes))
    return [torch.cat(pair, dim=3) for pair in zip(prefixes, behind, strict=True)]


def _attend(model: PreTrainedModel, states: PrefixStates, batch: Batch) -> Tensor:
    """Logits `[M, V]` of the batch's rows, each after the states of the prompt that owns it."""
    mask = states.mask[batch.owner]
    if batch.tree is not None and mask.shape[1] + batch.tokens.shape[1] > window_of(model):
        batch = unfold(batch)
        mask = states.mask[batch.owner]
    logits: Tensor = model(
        inputs_embeds=model.get_input_embeddings()(batch.tokens),  # some models look at ids for padding, and wait
        attention_mask=_mask(model, mask, batch, even=states.even),
        position_ids=mask.sum(1, keepdim=True) + batch.places,
        past_key_values=states.cache and select_rows(states.cache, batch.owner),
        use_cache=states.cache is not None,
        logits_to_keep=batch.tokens.shape[1] - batch.first,
    ).logits
    return logits[batch.rows, batch.columns - batch.first]


shared_prefix = Composition("shared prefix", _prefix_states, _attend, PrefixStates.map)


def _mask(model: PreTrainedModel, prefix: Tensor, batch: Batch, *, even: bool) -> Tensor | None:
    """What the model is told of who attends to whom, in the shape that it needs.

    `prefix` is `[N, P]`; `even` says that it is known to have no zeros.
    """
    width = batch.tokens.shape[1]
    if batch.tree is None and even:
        # Right padding needs no mask: the columns after a row's end are read by nobody.
        return None
    if batch.tree is None and not _looks_at_masks(model):
        return nn.functional.pad(prefix, (0, width), value=1)
    own = batch.attends.expand(len(prefix), -1, -1)
    return _spell(model, torch.cat([prefix.bool()[:, None].expand(-1, width, -1), own], dim=2))


def _looks_at_masks(model: PreTrainedModel) -> bool:
    """Whether transformers looks at the numbers of a mask `[N, T]`, for which it waits for the device.

    It does for fused attention, which can take the whole `[N, T, P+T]` instead; not where only the model itself knows
    how far a token sees.
    """
    return bool(model.config._attn_implementation == "sdpa") and window_of(model) == math.inf


def window_of(model: PreTrainedModel) -> float:
    """How far back a token sees: a mask of our own would put the model's own window out of force."""
    names = ("sliding_window", "attention_chunk_size", "window_size")
    return min(getattr(model.config, name, None) or math.inf for name in names)


def _spell(model: PreTrainedModel, attends: Tensor) -> Tensor:
    """`[N, T, P+T]` whether one attends to the other, as what is added to the scores `[N, 1, T, P+T]`."""
    least = torch.finfo(model.dtype).min
    return torch.zeros(attends.shape, dtype=model.dtype, device=attends.device).masked_fill_(~attends, least)[:, None]


def select_rows(cache: Cache, rows: Tensor) -> Cache:
    """A cache of the given rows, in their order; the one given stays as it is."""
    selected = _copy(cache)
    for layer in selected.layers:
        # A layer that keeps no keys and values has no such method: the self-check takes that for an answer.
        layer.batch_select_indices(rows)  # type: ignore[union-attr]
    return selected


def _copy(cache: Cache) -> Cache:
    """A cache with layers of its own, which hold the same tensors."""
    own = copy.copy(cache)
    own.layers = [copy.copy(layer) for layer in cache.layers]
    return own


def compiled(composition: Composition[States], *, backend: str = "inductor") -> Composition[States]:
    """The same numbers by code that `torch.compile` makes, for all lengths and numbers of rows; it takes minutes."""
    keep = torch.compile(composition.keep, dynamic=True, backend=backend)
    attend = torch.compile(composition.attend, dynamic=True, backend=backend)
    return replace(composition, name=f"{composition.name}, compiled", keep=keep, attend=attend)


def pad_left(prompts: Sequence[Tensor], model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """`[K, P, H]` in the model's type and `[K, P]` ones and zeros, P being the longest of the lengths."""
    longest = max(len(p) for p in prompts)
    prefix = torch.stack([nn.functional.pad(p, (0, 0, longest - len(p), 0)) for p in prompts])
    mask = (torch.arange(longest) >= longest - torch.tensor([[len(p)] for p in prompts])).long()
    return prefix.to(model.dtype), send(mask, prefix.device)


def positions(mask: Tensor) -> Tensor:
    """`[K, P]` positions of the vectors that a mask shows; those of padding do not matter."""
    return (mask.cumsum(1) - 1).clamp(min=0)
