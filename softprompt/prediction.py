"""From rows of text to labels, with a saved prompt: what serving and `softprompt predict` have in common."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from softprompt.backbone import Backbone
from softprompt.data import encode_inputs, encode_labels
from softprompt.errors import UserError
from softprompt.inference import Classifier
from softprompt.loading import load_base
from softprompt.prompt import SoftPrompt
from softprompt.template import columns_of


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer for one row."""

    label: str
    """The best label."""
    probabilities: dict[str, float]
    """Probability of each label among the labels."""


class Predictor:
    """A prompt over the base model that it was trained on, with its states computed once."""

    def __init__(self, backbone: Backbone, prompt: SoftPrompt) -> None:
        prompt.require(backbone)
        self.prompt = prompt
        self.fields = self.fields_of(prompt)
        """The columns that a row must have."""
        self._backbone = backbone.placed(prompt.position)
        labels = encode_labels(prompt.words, backbone.tokenizer, apart=backbone.is_encoder_decoder)
        self._classifier = Classifier(self._backbone, prompt.vectors, list(labels.values()))

    @staticmethod
    def fields_of(prompt: SoftPrompt) -> list[str]:
        """The columns that a prompt's template names, in order."""
        return columns_of(prompt.template)

    @classmethod
    def open(cls, prompt: SoftPrompt, *, device: str = "auto") -> Self:
        """Load the base model that the prompt refers to, verify it, and be ready."""
        return cls(load_base(prompt.base, precision=prompt.precision, device=device), prompt)

    def predict(self, rows: Sequence[Mapping[str, str]]) -> list[Prediction]:
        """Label N rows; UserError names the row that lacks a column."""
        for n, row in enumerate(rows, start=1):
            missing = [name for name in self.fields if name not in row]
            if missing:
                raise UserError(f"row {n}: column {missing[0]!r} is missing, found {', '.join(row) or 'none'}")
        encoded = encode_inputs(
            rows,
            template=self.prompt.template,
            fields=self.fields,
            tokenizer=self._backbone.tokenizer,
            max_tokens=self.prompt.max_tokens,
            apart=self._backbone.is_encoder_decoder,
            before=self._backbone.before,
        )
        probabilities = self._classifier.score(encoded.inputs).probabilities
        names = list(self.prompt.words)
        return [
            Prediction(names[int(p.argmax())], {name: round(float(q), 6) for name, q in zip(names, p, strict=True)})
            for p in probabilities
        ]
