"""Score every label of an experiment for an input, through a prompt whose states are computed once and kept.

A label's score is the log-probability of its tokens after the input. All labels share a single pass: behind the input
stand their tokens as a trie, each attending to its own branch alone. Where a model cannot be told so, labels of several
tokens take a pass each. An output is legal when the tokens that the model itself prefers spell a
label.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softprompt.backbone import Backbone
from softprompt.composition import Batch, Example, collate, collate_tree, lift
from softprompt.trie import Labels, Trie

ROWS = 32
"""Rows of a pass at the most: what two CPU cores are quickest with; a GPU is not filled yet."""
_TOKENS = 8192
"""Tokens of a pass at the most."""
_MANY = 64
"""Rows of a call from which on it pays to compute what they all begin with once."""
_PLACES = 512
"""Places of a pass at the most for which there are logits over the whole vocabulary."""


@dataclass(frozen=True, slots=True)
class Scores:
    """What the model says of N inputs and C labels."""

    log_probabilities: NDArray[np.float32]
    """`[N, C]` log-probability of each label's tokens, in nats, among everything the model could say."""
    legal: NDArray[np.bool_]
    """`[N]` whether the model's own first choice of tokens is a label."""

    @property
    def predicted(self) -> NDArray[np.int64]:
        """`[N]` index of the best label."""
        best: NDArray[np.int64] = self.log_probabilities.argmax(1)
        return best

    @property
    def probabilities(self) -> NDArray[np.float64]:
        """`[N, C]` probability of each label among the labels."""
        exact = self.log_probabilities.astype(np.float64)
        shares: NDArray[np.float64] = np.exp(exact - exact.max(1, keepdims=True))
        shares /= shares.sum(1, keepdims=True)
        return shares


class Classifier:
    """A prompt over a backbone, ready to score inputs."""

    def __init__(self, backbone: Backbone, prompt: Tensor, labels: Labels) -> None:
        self._backbone = backbone
        self._labels = list(labels)
        self._trie = Trie(self._labels, backbone.device)
        self._whole = backbone.branches or not self._trie.size
        """Whether all labels are scored in one pass."""
        self._prompt = prompt.detach().to(backbone.device)
        self._opening: tuple[int, ...] | None = None
        """The tokens behind the prompt whose states are kept with it."""
        self._keep(())

    @torch.inference_mode()
    def score(self, inputs: Sequence[Sequence[int]]) -> Scores:
        """Scores of N inputs, given as token ids; the order of the rows is kept."""
        log_probabilities = np.empty((len(inputs), len(self._labels)), np.float32)
        legal = np.empty(len(inputs), bool)
        rest = self._lift([tuple(row) for row in inputs])
        for rows in _by_length(rest, self._trie.size if self._whole else 0):
            part, spells = self._score_batch([rest[i] for i in rows])
            log_probabilities[rows] = part.float().cpu().numpy()
            legal[rows] = spells.any(1).cpu().numpy()
        return Scores(log_probabilities, legal)

    def _lift(self, inputs: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """The inputs without what they all begin with, where there are enough of them to keep the states of that."""
        if len(inputs) < _MANY:
            self._keep(())
            return inputs
        opening, rest = lift([Example(row, ()) for row in inputs])
        self._keep(opening)
        return [e.inputs for e in rest]

    @torch.inference_mode()
    def _keep(self, opening: tuple[int, ...]) -> None:
        if opening != self._opening:
            prompts = self._backbone.extend([self._prompt], opening)
            self._opening = opening
            self._states = self._backbone.composition.keep(self._backbone.model, prompts)

    def _score_batch(self, inputs: list[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
        """`[N, C]` log-probabilities, and whether each label is what the model itself would say."""
        if not self._whole:
            pairs = [self._score_label(inputs, label) for label in self._labels]
            return torch.stack([p for p, _ in pairs], 1), torch.stack([s for _, s in pairs], 1)
        logits = self._logits(collate_tree(inputs, self._trie.tree, pad=self._backbone.pad))
        logits = logits.view(len(inputs), 1 + self._trie.size, -1)
        return self._trie.score(logits), self._trie.spells(logits)

    def _score_label(self, inputs: list[tuple[int, ...]], label: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        examples = [Example(row, label) for row in inputs]
        batch = collate(examples, [0] * len(inputs), pad=self._backbone.pad, device=self._backbone.device)
        logits = self._logits(batch)
        tokens = logits.log_softmax(1).gather(1, batch.targets[:, None]).view(len(inputs), -1)
        chosen = (logits.argmax(1) == batch.targets).view(len(inputs), -1)
        return tokens.sum(1), chosen.all(1)

    def _logits(self, batch: Batch) -> Tensor:
        return self._backbone.composition.attend(self._backbone.model, self._states, batch).float()


def _by_length(inputs: Sequence[Sequence[int]], branches: int = 0) -> Iterator[list[int]]:
    """The rows in passes of like length; each row carries as many tokens more as there are branches."""
    most = max(1, min(ROWS, _PLACES // (1 + branches)))
    rows: list[int] = []
    for row in sorted(range(len(inputs)), key=lambda i: len(inputs[i])):
        if rows and (len(rows) == most or (len(rows) + 1) * (len(inputs[row]) + branches) > _TOKENS):
            yield rows
            rows = []
        rows.append(row)
    if rows:
        yield rows
