"""Score every label of an experiment for an input, through a prompt whose states are computed once and kept.

A label's score is the log-probability of its tokens after the input. Labels of one token each share a single pass;
labels of several tokens take a pass each. An output is legal when the tokens that the model itself prefers spell a
label.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softprompt.backbone import Backbone
from softprompt.composition import Batch, Example, collate

_ROWS, _TOKENS = 64, 8192
"""Rows and tokens of a pass at the most: enough to fill two CPU cores, and little enough for long inputs."""

Labels = Sequence[tuple[int, ...]]
"""The token ids of each label, C of them, none a prefix of another."""


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
        with torch.inference_mode():
            self._states = backbone.composition.keep(backbone.model, [prompt.detach().to(backbone.device)])

    @torch.inference_mode()
    def score(self, inputs: Sequence[Sequence[int]]) -> Scores:
        """Scores of N inputs, given as token ids; the order of the rows is kept."""
        log_probabilities = np.empty((len(inputs), len(self._labels)), np.float32)
        legal = np.empty(len(inputs), bool)
        for rows in _by_length(inputs):
            part, spells = self._score_batch([tuple(inputs[i]) for i in rows])
            log_probabilities[rows] = part.float().cpu().numpy()
            legal[rows] = spells.any(1).cpu().numpy()
        return Scores(log_probabilities, legal)

    def _score_batch(self, inputs: list[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
        """`[N, C]` log-probabilities, and whether each label is what the model itself would say."""
        if all(len(label) == 1 for label in self._labels):
            logits = self._logits(self._lay_out(inputs, self._labels[0]))
            ids = torch.tensor([label[0] for label in self._labels], device=logits.device)
            return logits.log_softmax(1)[:, ids], logits.argmax(1, keepdim=True) == ids
        pairs = [self._score_label(inputs, label) for label in self._labels]
        return torch.stack([p for p, _ in pairs], 1), torch.stack([s for _, s in pairs], 1)

    def _score_label(self, inputs: list[tuple[int, ...]], label: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        batch = self._lay_out(inputs, label)
        logits = self._logits(batch)
        tokens = logits.log_softmax(1).gather(1, batch.targets[:, None]).view(len(inputs), -1)
        chosen = (logits.argmax(1) == batch.targets).view(len(inputs), -1)
        return tokens.sum(1), chosen.all(1)

    def _lay_out(self, inputs: list[tuple[int, ...]], label: tuple[int, ...]) -> Batch:
        examples = [Example(row, label) for row in inputs]
        return collate(examples, [0] * len(inputs), pad=self._backbone.pad, device=self._backbone.device)

    def _logits(self, batch: Batch) -> Tensor:
        return self._backbone.composition.attend(self._backbone.model, self._states, batch).float()


def _by_length(inputs: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """The rows in passes of like length."""
    rows: list[int] = []
    for row in sorted(range(len(inputs)), key=lambda i: len(inputs[i])):
        if rows and (len(rows) == _ROWS or (len(rows) + 1) * len(inputs[row]) > _TOKENS):
            yield rows
            rows = []
        rows.append(row)
    if rows:
        yield rows
