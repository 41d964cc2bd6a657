"""Score every label of an experiment for an input, through prompts whose states are computed once and kept.

A label's score is the log-probability of its tokens after the input. All labels share a single pass: behind the input
stand their tokens as a trie, each attending to its own branch alone. Where a model cannot be told so, labels of several
tokens take a pass each.

The best label is what the model says if it may say nothing else. An output is legal when the tokens that it prefers
itself spell a label: when it would say one if it were let alone. Rows of different prompts share a pass, so that
several prompts can vote. Text is the business of `generation`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softprompt.backbone import Backbone
from softprompt.batch import Batch, Example, collate, collate_tree, lift
from softprompt.errors import UserError
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
    """A prompt `[P, H]` or K of them over a backbone, ready to score inputs."""

    def __init__(self, backbone: Backbone, prompts: Tensor | Sequence[Tensor], labels: Labels) -> None:
        self._backbone = backbone
        self._labels = list(labels)
        self._trie = Trie(self._labels, backbone.device)
        self._whole = backbone.branches or not self._trie.size
        """Whether all labels are scored in one pass."""
        prompts = [prompts] if isinstance(prompts, Tensor) else prompts
        self._prompts = [prompt.detach().to(backbone.device) for prompt in prompts]
        self._opening: tuple[int, ...] | None = None
        """The tokens behind every prompt whose states are kept with it."""
        self._keep(())

    @torch.inference_mode()
    def score(self, inputs: Sequence[Sequence[int]], owner: Sequence[int] | None = None) -> Scores:
        """Scores of N inputs, given as token ids; the order of the rows is kept.

        Args:
            inputs: token ids of each.
            owner: index of each input's prompt; the first for all of them by default.

        Raises UserError where `owner` does not name a prompt for each input.
        """
        owners = name_owners(owner, inputs=len(inputs), prompts=len(self._prompts))
        log_probabilities = np.empty((len(inputs), len(self._labels)), np.float32)
        legal = np.empty(len(inputs), bool)
        rest = self._lift([tuple(row) for row in inputs])
        branches = self._trie.size if self._whole else 0
        most = max(1, min(ROWS, _PLACES // (1 + branches)))
        for rows in by_length([len(row) + branches for row in rest], most=most):
            part, spells = self._score_batch([rest[i] for i in rows], [owners[i] for i in rows])
            log_probabilities[rows] = part.float().cpu().numpy()
            legal[rows] = spells.any(1).cpu().numpy()
        return Scores(log_probabilities, legal)

    def score_each(self, inputs: Sequence[Sequence[int]]) -> list[Scores]:
        """Scores of N inputs after every one of the K prompts, whose rows share the passes: `vote` counts them."""
        count = len(self._prompts)
        owner = [k for k in range(count) for _ in inputs]
        together = self.score([*inputs] * count, owner)
        parts = zip(np.split(together.log_probabilities, count), np.split(together.legal, count), strict=True)
        return [Scores(log_probabilities, legal) for log_probabilities, legal in parts]

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
            prompts = self._backbone.extend(self._prompts, opening)
            self._opening = opening
            self._states = self._backbone.composition.keep(self._backbone.model, prompts)

    def _score_batch(self, inputs: list[tuple[int, ...]], owner: list[int]) -> tuple[Tensor, Tensor]:
        """`[N, C]` log-probabilities, and whether each label is what the model itself would say."""
        if not self._whole:
            pairs = [self._score_label(inputs, owner, label) for label in self._labels]
            return torch.stack([p for p, _ in pairs], 1), torch.stack([s for _, s in pairs], 1)
        logits = self._logits(collate_tree(inputs, owner, self._trie.tree, pad=self._backbone.pad))
        logits = logits.view(len(inputs), 1 + self._trie.size, -1)
        return self._trie.score(logits), self._trie.spells(logits)

    def _score_label(
        self, inputs: list[tuple[int, ...]], owner: list[int], label: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        examples = [Example(row, label) for row in inputs]
        batch = collate(examples, owner, pad=self._backbone.pad, device=self._backbone.device)
        logits = self._logits(batch)
        tokens = logits.log_softmax(1).gather(1, batch.targets[:, None]).view(len(inputs), -1)
        chosen = (logits.argmax(1) == batch.targets).view(len(inputs), -1)
        return tokens.sum(1), chosen.all(1)

    def _logits(self, batch: Batch) -> Tensor:
        return self._backbone.composition.attend(self._backbone.model, self._states, batch).float()


def vote(members: Sequence[Scores]) -> NDArray[np.int64]:
    """`[N]` index of the label that most of K prompts predict; of several, the one of the highest mean probability.

    Args:
        members: the scores of each prompt for the same N inputs, as `Classifier.score_each` gives them.
    """
    labels = np.arange(members[0].log_probabilities.shape[1])
    votes = np.sum([scores.predicted[:, None] == labels for scores in members], axis=0)
    probability = np.mean([scores.probabilities for scores in members], axis=0)
    leads = votes == votes.max(1, keepdims=True)
    winners: NDArray[np.int64] = np.where(leads, probability, -1).argmax(1)
    return winners


def pool(members: Sequence[Scores]) -> NDArray[np.int64]:
    """`[N]` index of the label of the highest mean log-probability over K prompts: one sure member can outvote many."""
    winners: NDArray[np.int64] = np.mean([scores.log_probabilities for scores in members], axis=0).argmax(1)
    return winners


def name_owners(owner: Sequence[int] | None, *, inputs: int, prompts: int) -> list[int]:
    """The prompt of each input: the first by default; UserError where one is missing, or is not there."""
    owners = [0] * inputs if owner is None else list(owner)
    if len(owners) != inputs:
        raise UserError(f"owner: names a prompt for {len(owners)} inputs, found {inputs}; name one for each")
    if absent := [k for k in owners if not 0 <= k < prompts]:
        raise UserError(f"owner: there is no prompt {absent[0]}, found {prompts}; count them from 0")
    return owners


def by_length(lengths: Sequence[int], *, most: int) -> Iterator[list[int]]:
    """Rows of like length together, by index: at most so many of them, and so many tokens, in a pass."""
    rows: list[int] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if rows and (len(rows) == most or (len(rows) + 1) * lengths[row] > _TOKENS):
            yield rows
            rows = []
        rows.append(row)
    if rows:
        yield rows
