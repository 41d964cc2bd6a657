"""How inputs and targets are laid out for a pass: rows, the places in them that predict, trees of continuations.

    N rows of a batch   T columns   M predicting places   S tokens of a tree   J paths of it

Rows are padded on the right, where a causal model never looks. Nothing here knows a model or a prompt.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


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
    ends: Tensor
    """`[N]` those of them that are the row's input; what follows is of its target."""
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

    @property
    def paths(self) -> "Paths":
        """The branches from the input to their last tokens."""
        on = self.ancestors[self.ancestors.sum(0) == 1]
        tokens = self.tokens.new_zeros(len(on), int(self.depths.max()) + 1)
        path, node = on.nonzero(as_tuple=True)
        tokens[path, self.depths[node]] = self.tokens[node]
        return Paths(tokens, on.sum(1), on.int().argmax(0))


@dataclass(frozen=True, slots=True)
class Paths:
    """A tree as lines: each of its J paths from the input to a last token."""

    tokens: Tensor
    """`[J, D]` token ids, padded on the right."""
    lengths: Tensor
    """`[J]` tokens of each path."""
    holds: Tensor
    """`[S]` a path on which each token of the tree stands."""


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
        torch.tensor([len(e.inputs) for e in examples]),
        torch.tensor(owner),
        *torch.tensor(places, dtype=torch.long).T,
    )
    first = min(column for _, column, _ in places)
    tokens, lengths, ends, owners, rows, columns, targets = (send(part, device) for part in laid_out)
    return Batch(tokens, lengths, ends, owners, rows, columns, targets, first=first)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host's on a device, which has not to be waited for: what it does meanwhile goes on."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def collate_tree(inputs: Sequence[tuple[int, ...]], owner: Sequence[int], tree: Tree, *, pad: int) -> Batch:
    """Lay N inputs out, each with the whole tree behind it; `owner[n]` is the prompt of input n.

    The places are, for each input in turn, its last token and then the tree's tokens: 1 + S of them.
    """
    size, device = len(tree.tokens), tree.tokens.device
    line = collate([Example(row, (pad,)) for row in inputs], owner, pad=pad, device=device)
    if not size:
        return line
    width = line.tokens.shape[1]
    tokens = torch.cat([line.tokens, tree.tokens.expand(len(inputs), -1)], dim=1)
    nodes = torch.arange(width, width + size, device=device).expand(len(inputs), -1)
    columns = torch.cat([line.columns[:, None], nodes], dim=1).flatten()
    rows = line.rows.repeat_interleave(1 + size)
    targets = tokens[rows, columns]
    return Batch(tokens, line.lengths, line.ends, line.owner, rows, columns, targets, tree, line.first)


def unfold(batch: Batch) -> Batch:
    """The same places on lines: each input once for every path of the batch's tree, N·J rows."""
    assert batch.tree is not None
    tree, paths = batch.tree, batch.tree.paths
    width, count = batch.tokens.shape[1] - len(tree.depths), len(paths.tokens)
    tokens = nn.functional.pad(batch.tokens[:, :width], (0, paths.tokens.shape[1])).repeat_interleave(count, dim=0)
    ends = batch.ends.repeat_interleave(count)
    behind = ends[:, None] + torch.arange(paths.tokens.shape[1], device=ends.device)
    tokens.scatter_(1, behind, paths.tokens.repeat(len(batch.lengths), 1))
    node = (batch.columns - width).clamp(min=0)
    inside = batch.columns >= width
    return Batch(
        tokens,
        ends + paths.lengths.repeat(len(batch.lengths)),
        ends,
        batch.owner.repeat_interleave(count),
        batch.rows * count + torch.where(inside, paths.holds[node], 0),
        torch.where(inside, batch.ends[batch.rows] + tree.depths[node], batch.columns),
        batch.targets,
        first=batch.first,
    )
