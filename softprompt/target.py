"""What the model is to continue an input with, one of a few labels or a text, and how well a prompt makes it do so.

Everything that trains, searches and records asks a `Target`, and does not know which kind it has.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from softprompt.backbone import Backbone
from softprompt.batch import Example
from softprompt.data import encode_labels, encode_targets
from softprompt.data.tokens import Tokens
from softprompt.errors import UserError
from softprompt.evaluation import LabelMetrics, Metrics, TextMetrics, measure_scores, measure_targets
from softprompt.inference import Classifier
from softprompt.likelihood import score_targets
from softprompt.prompt import SoftPrompt
from softprompt.spec import FreeText, LabelSpec


class Target(Protocol):
    """What stands behind an input."""

    @property
    def labels(self) -> dict[str, Tokens]:
        """The tokens of each label; free text has none."""

    @property
    def longest(self) -> int:
        """The most tokens that a target may have."""

    @property
    def settings(self) -> dict[str, Any]:
        """What a `SoftPrompt` keeps of it, by the names that it has there."""

    def encode(self, answers: Sequence[str]) -> tuple[list[Tokens], int]:
        """The targets of N answers, which are labels or texts, and how many of them were cut."""

    def measure(self, prompt: Tensor, inputs: Sequence[Tokens], answers: Sequence[str]) -> Metrics:
        """How well a prompt `[P, H]`, P may be 0, or a prefix `[L, 2, G, P, D]` answers N inputs.

        Raises FloatingPointError where a score is no number.
        """

    def asked_of(self, prompt: SoftPrompt) -> "Target":
        """The same answers as a prompt spells them, where it stands; UserError where it was trained for others."""


def open_target(labels: LabelSpec, backbone: Backbone) -> Target:
    """The target of an experiment."""
    if isinstance(labels, FreeText):
        return TextTarget(backbone, before=labels.before, max_new_tokens=labels.max_new_tokens)
    return LabelTarget(backbone, labels.words)


class LabelTarget:
    """One of a few labels, each with the words that stand for it."""

    def __init__(self, backbone: Backbone, words: Mapping[str, str]) -> None:
        self._backbone = backbone
        self._words = dict(words)
        self.labels = encode_labels(words, backbone.tokenizer, apart=backbone.is_encoder_decoder)
        """The tokens of each label."""
        self._order = {label: n for n, label in enumerate(self.labels)}

    @property
    def longest(self) -> int:
        """The tokens of the longest label."""
        return max(map(len, self.labels.values()))

    @property
    def settings(self) -> dict[str, Any]:
        """The words."""
        return {"words": self._words}

    def encode(self, answers: Sequence[str]) -> tuple[list[Tokens], int]:
        """The tokens of each row's label; none is ever cut."""
        return [self.labels[answer] for answer in answers], 0

    def measure(self, prompt: Tensor, inputs: Sequence[Tokens], answers: Sequence[str]) -> LabelMetrics:
        """All labels are scored for every input."""
        scores = Classifier(self._backbone, prompt, list(self.labels.values())).score(inputs)
        _require_numbers(scores.log_probabilities)
        return measure_scores([self._order[answer] for answer in answers], scores)

    def asked_of(self, prompt: SoftPrompt) -> "LabelTarget":
        """The same labels in the prompt's words, behind the prompt's place."""
        if set(prompt.words) != set(self._words):
            raise UserError(
                f"the prompt answers with {_told(prompt)}, the experiment asks for {', '.join(self._words)}; "
                "evaluate it on an experiment with its own labels"
            )
        words = {label: prompt.words[label] for label in self._words}
        return LabelTarget(self._backbone.placed(prompt.position), words)


class TextTarget:
    """A text of its own for every input, which the end-of-sequence token ends."""

    def __init__(self, backbone: Backbone, *, before: str, max_new_tokens: int) -> None:
        self._backbone = backbone
        self._before = before
        self.longest = max_new_tokens
        """The most tokens of a target, its end included."""
        self.labels: dict[str, Tokens] = {}
        """None."""

    @property
    def settings(self) -> dict[str, Any]:
        """No words, but what stands before the text, and the limit."""
        return {"words": {}, "before": self._before, "max_new_tokens": self.longest}

    def encode(self, answers: Sequence[str]) -> tuple[list[Tokens], int]:
        """The tokens of each text and its end; what is too long loses its end and keeps the tokens that fit."""
        return encode_targets(
            answers,
            before=self._before,
            max_new_tokens=self.longest,
            tokenizer=self._backbone.tokenizer,
            apart=self._backbone.is_encoder_decoder,
        )

    def measure(self, prompt: Tensor, inputs: Sequence[Tokens], answers: Sequence[str]) -> TextMetrics:
        """Each text is scored behind its own input; a text that was cut is matched by nothing."""
        targets, _ = self.encode(answers)
        found = score_targets(self._backbone, prompt, [Example(*row) for row in zip(inputs, targets, strict=True)])
        _require_numbers(found.log_probabilities)
        whole = np.array([target[-1] == self._backbone.tokenizer.eos_token_id for target in targets])
        return measure_targets(found.log_probabilities, [len(target) for target in targets], found.greedy & whole)

    def asked_of(self, prompt: SoftPrompt) -> "TextTarget":
        """The same texts, cut where the experiment cuts them, behind what the prompt expects before them."""
        if prompt.words:
            raise UserError(
                f"the prompt answers with {_told(prompt)}, the experiment asks for a text; "
                "evaluate it on an experiment with its own labels"
            )
        backbone = self._backbone.placed(prompt.position)
        return TextTarget(backbone, before=prompt.before, max_new_tokens=self.longest)


def _told(prompt: SoftPrompt) -> str:
    return f"the labels {', '.join(prompt.words)}" if prompt.words else "a text"


def _require_numbers(scores: np.ndarray[Any, Any]) -> None:
    if np.isnan(scores).any():
        raise FloatingPointError("the scores are nan")
