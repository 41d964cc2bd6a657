"""The formula, `X = [p_0 … p_{P-1}; e_0 … e_{T-1}]`, as pure functions from prompts and tokens to logits.

    K prompts side by side   B examples per prompt   N rows of a batch, the B of every prompt together
    P prompt length          T input tokens          H hidden size          V vocabulary

Every composition computes the same logits. `concatenate` is the formula as written. `shared_prefix` computes the
states at a prompt's positions once per prompt: in a causal model they depend on nothing after them, so every example
attends to the same keys and values. Which one a model allows is decided by a number (`Backbone.composition`), never
by its name.

Rows are padded on the right, where a causal model never looks; prompts of different length on the left, masked.
Nothing here chooses data, trains or scores.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

States = TypeVar("States")


@dataclass(frozen=True, slots=True)
class Example:
    """One input and the target that the model is to continue it with, as token ids."""

    inputs: tuple[int, ...]
    target: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """N rows, each owned by one prompt, and the M places in them from which a target token is predicted."""

    tokens: Tensor
    """`[N, T]` input and target but its last token, padded on the right."""
    lengths: Tensor
    """`[N]` tokens of each row that are no padding."""
    owner: Tensor
    """`[N]` index of the row's prompt among the K."""
    rows: Tensor
    """`[M]` row of each predicting place."""
    columns: Tensor
    """`[M]` column of each predicting place in `tokens`."""
    targets: Tensor
    """`[M]` token id that is to be predicted there."""
    tree: "Tree | None" = None
    """Branching continuations of the inputs, in the last S columns of `tokens`."""
    first: int = 0
    """No place is left of this column; a number of the host's, for which no device has to be waited for."""

    @property
    def places(self) -> Tensor:
        """`[1 or N, T]` position of each column, counted from the row's first token."""
        width = self.tokens.shape[1]
        if self.tree is None:
            return torch.arange(width, device=self.tokens.device)[None]
        inputs = torch.arange(width - len(self.tree.depths), device=self.tokens.device).expand(len(self.tokens), -1)
        return torch.cat([inputs, self.lengths[:, None] + self.tree.depths], dim=1)

    @property
    def attends(self) -> Tensor:
        """`[1 or N, T, T]` whether a column attends to another: to itself, and to what stands before it."""
        width = self.tokens.shape[1]
        causal = torch.ones(width, width, dtype=torch.bool, device=self.tokens.device).tril()
        if self.tree is None:
            return causal[None]
        inputs = width - len(self.tree.depths)
        attends = causal.repeat(len(self.tokens), 1, 1)
        attends[:, inputs:, :inputs] = (torch.arange(inputs, device=self.lengths.device) < self.lengths[:, None])[
            :, None
        ]
        attends[:, inputs:, inputs:] = self.tree.ancestors
        return attends


@dataclass(frozen=True, slots=True)
class Tree:
    """S tokens that continue every input of a batch on branches of their own."""

    tokens: Tensor
    """`[S]` token ids."""
    depths: Tensor
    """`[S]` how many tokens of its branch stand before each."""
    ancestors: Tensor
    """`[S, S]` whether the second stands on the branch of the first, or is it."""


def lift(examples: Sequence[Example]) -> tuple[tuple[int, ...], list[Example]]:
    """The tokens that all inputs begin with, and the examples without them.

    A template's opening words stand before every input, and like a prompt they depend on nothing after them: put behind
    the prompt, they are computed once for all rows. Every input keeps a token of its own.
    """
    heads = [e.inputs[:-1] for e in examples]
    first, last = min(heads), max(heads)  # what these two have in common, all have that stand between them
    count = next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:count], [Example(e.inputs[count:], e.target) for e in examples]


_WIDTHS = {"cuda": 16}
"""By kind of device, what the columns of a batch are a multiple of: few widths, so that what is compiled for one serves
many batches."""


def collate(
    examples: Sequence[Example], owner: Sequence[int], *, pad: int, device: torch.device, multiple: int | None = None
) -> Batch:
    """Lay N examples out as a `Batch`; `owner[n]` is the prompt of example n.

    The columns are a multiple of what the device wants, or of the number given.
    """
    lines = [[*e.inputs, *e.target[:-1]] for e in examples]
    multiple = multiple or _WIDTHS.get(device.type, 1)
    longest = math.ceil(max(map(len, lines)) / multiple) * multiple
    places = [(n, len(e.inputs) - 1 + t, token) for n, e in enumerate(examples) for t, token in enumerate(e.target)]
    laid_out = (
        torch.tensor([line + [pad] * (longest - len(line)) for line in lines]),
        torch.tensor([len(line) for line in lines]),
        torch.tensor(owner),
        *torch.tensor(places, dtype=torch.long).T,
    )
    tokens, lengths, owners, rows, columns, targets = (send(part, device) for part in laid_out)
    return Batch(tokens, lengths, owners, rows, columns, targets, first=min(column for _, column, _ in places))


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host's on a device, which has not to be waited for: what it does meanwhile goes on."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def collate_tree(inputs: Sequence[tuple[int, ...]], tree: Tree, *, pad: int) -> Batch:
    """Lay N inputs of one prompt out, each with the whole tree behind it.

    The places are, for each input in turn, its last token and then the tree's tokens: 1 + S of them.
    """
    size, device = len(tree.tokens), tree.tokens.device
    line = collate([Example(row, (pad,)) for row in inputs], [0] * len(inputs), pad=pad, device=device)
    if not size:
        return line
    width = line.tokens.shape[1]
    tokens = torch.cat([line.tokens, tree.tokens.expand(len(inputs), -1)], dim=1)
    nodes = torch.arange(width, width + size, device=device).expand(len(inputs), -1)
    columns = torch.cat([line.columns[:, None], nodes], dim=1).flatten()
    rows = line.rows.repeat_interleave(1 + size)
    return Batch(tokens, line.lengths, line.owner, rows, columns, tokens[rows, columns], tree, line.first)


@dataclass(frozen=True, slots=True)
class Composition(Generic[States]):
    """A way to compute the formula, in two steps: what the prompts leave behind, and rows after that."""

    name: str
    keep: Callable[[PreTrainedModel, Sequence[Tensor]], States]
    """What K prompts `[P_k, H]` leave; inference computes it once."""
    attend: Callable[[PreTrainedModel, States, Batch], Tensor]
    """Logits `[M, V]` of the batch's rows, each after the prompt that owns it."""

    def __call__(self, model: PreTrainedModel, prompts: Sequence[Tensor], batch: Batch) -> Tensor:
        """Logits `[M, V]` at the batch's predicting places; P_k may be 0."""
        return self.attend(model, self.keep(model, prompts), batch)


def _concatenate(model: PreTrainedModel, prompts: Sequence[Tensor], batch: Batch) -> Tensor:
    """The formula as written: every row carries its own copy of its prompt.

    A prompt shorter than the longest is padded on its left, so that prompt and tokens stay joined.
    """
    prefix, mask = pad_left(prompts, model)
    width = prefix.shape[1]
    embeds = torch.cat([prefix[batch.owner], model.get_input_embeddings()(batch.tokens)], dim=1)
    tokens = torch.arange(batch.tokens.shape[1], device=mask.device) < batch.lengths[:, None]
    mask = torch.cat([mask[batch.owner], tokens.to(mask.dtype)], dim=1)
    keep, place = torch.unique(batch.columns + width, return_inverse=True)
    logits: Tensor = model(
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=positions(mask),
        use_cache=False,
        logits_to_keep=keep,
    ).logits
    return logits[batch.rows, place]


concatenate = Composition("concatenation", lambda model, prompts: prompts, _concatenate)


@dataclass(frozen=True, slots=True)
class PrefixStates:
    """The keys and values that K prompts leave in every layer; what inference computes once and keeps."""

    cache: Cache | None
    """One row per prompt; None where all prompts are empty."""
    mask: Tensor
    """`[K, P]` ones where a prompt has a vector, zeros on the left of a shorter one."""
    even: bool = False
    """Whether it is known that the mask has no zeros."""


def _prefix_states(model: PreTrainedModel, prompts: Sequence[Tensor]) -> PrefixStates:
    """Run K prompts `[P_k, H]` through the model, once each."""
    prefix, mask = pad_left(prompts, model)
    even = all(len(prompt) == prefix.shape[1] for prompt in prompts)
    if prefix.shape[1] == 0:
        return PrefixStates(None, mask, even)
    own = torch.eye(prefix.shape[1], dtype=torch.bool, device=mask.device)  # even padding attends to something
    whole = (mask.bool()[:, None] | own).tril()
    output = model(
        inputs_embeds=prefix,
        attention_mask=None if even else _spell(model, whole) if _looks_at_masks(model) else mask,
        position_ids=positions(mask),
        use_cache=True,
        logits_to_keep=1,
    )
    return PrefixStates(output.past_key_values, mask, even)


def _attend(model: PreTrainedModel, states: PrefixStates, batch: Batch) -> Tensor:
    """Logits `[M, V]` of the batch's rows, each after the states of the prompt that owns it."""
    mask = states.mask[batch.owner]
    logits: Tensor = model(
        inputs_embeds=model.get_input_embeddings()(batch.tokens),  # some models look at ids for padding, and wait
        attention_mask=_mask(model, mask, batch, even=states.even),
        position_ids=mask.sum(1, keepdim=True) + batch.places,
        past_key_values=_rows_of(states.cache, batch.owner),
        use_cache=states.cache is not None,
        logits_to_keep=batch.tokens.shape[1] - batch.first,
    ).logits
    return logits[batch.rows, batch.columns - batch.first]


shared_prefix = Composition("shared prefix", _prefix_states, _attend)


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
    return bool(model.config._attn_implementation == "sdpa") and _window(model) == math.inf


def _window(model: PreTrainedModel) -> float:
    """How far back a token sees: a mask of our own would put the model's own window out of force."""
    names = ("sliding_window", "attention_chunk_size", "window_size")
    return min(getattr(model.config, name, None) or math.inf for name in names)


def _spell(model: PreTrainedModel, attends: Tensor) -> Tensor:
    """`[N, T, P+T]` whether one attends to the other, as what is added to the scores `[N, 1, T, P+T]`."""
    least = torch.finfo(model.dtype).min
    return torch.zeros(attends.shape, dtype=model.dtype, device=attends.device).masked_fill_(~attends, least)[:, None]


def _rows_of(cache: Cache | None, owner: Tensor) -> Cache | None:
    if cache is None:
        return None
    rows = copy.copy(cache)
    rows.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in rows.layers:
        # A layer that keeps no keys and values has no such method: the self-check takes that for an answer.
        layer.batch_select_indices(owner)  # type: ignore[union-attr]
    return rows


def compiled(composition: Composition[States], *, backend: str = "inductor") -> Composition[States]:
    """The same numbers by code that `torch.compile` makes, for all lengths and numbers of rows; it takes minutes."""
    keep = torch.compile(composition.keep, dynamic=True, backend=backend)
    attend = torch.compile(composition.attend, dynamic=True, backend=backend)
    return Composition(f"{composition.name}, compiled", keep, attend)


def pad_left(prompts: Sequence[Tensor], model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """`[K, P, H]` in the model's type and `[K, P]` ones and zeros, P being the longest of the lengths."""
    longest = max(len(p) for p in prompts)
    prefix = torch.stack([nn.functional.pad(p, (0, 0, longest - len(p), 0)) for p in prompts])
    mask = (torch.arange(longest) >= longest - torch.tensor([[len(p)] for p in prompts])).long()
    return prefix.to(model.dtype), send(mask, prefix.device)


def positions(mask: Tensor) -> Tensor:
    """`[K, P]` positions of the vectors that a mask shows; those of padding do not matter."""
    return (mask.cumsum(1) - 1).clamp(min=0)
