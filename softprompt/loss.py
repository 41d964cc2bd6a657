"""What a prompt is trained for: its targets among everything that the model could say, or among the labels alone.

A loss lays examples out, has their logits computed, and returns one loss for each of its terms; how these are
weighted and summed is the training's. Nothing here chooses data.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from softprompt.backbone import Backbone
from softprompt.batch import Batch, Example, collate, collate_tree, send
from softprompt.trie import Labels, Trie

Logits = Callable[[Batch], Tensor]
"""Logits `[M, V]` at the places of a batch."""


class Loss(Protocol):
    """A loss that is a mean over terms."""

    def tokens(self, example: Example) -> int:
        """Tokens that the model reads for an example."""
        ...

    def terms(self, example: Example) -> int:
        """Terms of the mean that an example brings."""
        ...

    def losses(
        self, backbone: Backbone, examples: Sequence[Example], owner: Sequence[int], logits: Logits
    ) -> tuple[Tensor, Tensor]:
        """The loss of each term in nats, and the prompt that it belongs to; as many as the examples have terms."""
        ...


@dataclass(frozen=True)
class OverVocabulary:
    """Cross-entropy of every target token over the vocabulary; a term is a token."""

    def tokens(self, example: Example) -> int:
        """Input and target but its last token."""
        return len(example.inputs) + len(example.target) - 1

    def terms(self, example: Example) -> int:
        """The tokens of the target."""
        return len(example.target)

    def losses(
        self, backbone: Backbone, examples: Sequence[Example], owner: Sequence[int], logits: Logits
    ) -> tuple[Tensor, Tensor]:
        """`[M]` cross-entropies and their prompts."""
        batch = collate(examples, owner, pad=backbone.pad, device=backbone.device)
        found = nn.functional.cross_entropy(logits(batch).float(), batch.targets, reduction="none")
        return found, batch.owner[batch.rows]


class OverLabels:
    """Cross-entropy of the gold label among C labels; a term is an example, whose target is one of them.

    A label's score is the sum of the log-probabilities of its tokens. All labels are read in one pass, as a trie behind
    the input; by a row for each label where the model cannot read branches.
    """

    def __init__(self, backbone: Backbone, labels: Labels) -> None:
        self._labels = list(labels)
        self._trie = Trie(self._labels, backbone.device)
        self._whole = backbone.branches or not self._trie.size

    def tokens(self, example: Example) -> int:
        """The input with the trie behind it, or once for each label."""
        if self._whole:
            return len(example.inputs) + self._trie.size
        return len(self._labels) * (len(example.inputs) + max(map(len, self._labels)) - 1)

    def terms(self, example: Example) -> int:
        """One."""
        return 1

    def losses(
        self, backbone: Backbone, examples: Sequence[Example], owner: Sequence[int], logits: Logits
    ) -> tuple[Tensor, Tensor]:
        """`[N]` cross-entropies and their prompts."""
        gold = send(torch.tensor([self._labels.index(e.target) for e in examples]), backbone.device)
        score = self._score_together if self._whole else self._score_apart
        found = nn.functional.cross_entropy(score(backbone, examples, owner, logits), gold, reduction="none")
        return found, send(torch.tensor(owner), backbone.device)

    def _score_together(
        self, backbone: Backbone, examples: Sequence[Example], owner: Sequence[int], logits: Logits
    ) -> Tensor:
        batch = collate_tree([e.inputs for e in examples], owner, self._trie.tree, pad=backbone.pad)
        found = logits(batch).float()
        return self._trie.score(found.view(len(examples), 1 + self._trie.size, -1))

    def _score_apart(
        self, backbone: Backbone, examples: Sequence[Example], owner: Sequence[int], logits: Logits
    ) -> Tensor:
        lines = [Example(e.inputs, label) for e in examples for label in self._labels]
        owners = [k for k in owner for _ in self._labels]
        batch = collate(lines, owners, pad=backbone.pad, device=backbone.device)
        tokens = -nn.functional.cross_entropy(logits(batch).float(), batch.targets, reduction="none")
        return tokens.new_zeros(len(lines)).index_add(0, batch.rows, tokens).view(len(examples), -1)
