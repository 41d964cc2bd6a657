"""From rows of text to answers, with a saved prompt: what serving and `softprompt predict` have in common."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self, TypeAlias

from softprompt.backbone import Backbone
from softprompt.data import encode_inputs, encode_labels
from softprompt.data.tokens import Tokens
from softprompt.errors import UserError
from softprompt.generation import Generator
from softprompt.inference import Classifier
from softprompt.loading import load_base
from softprompt.prompt import SoftPrompt
from softprompt.template import columns_of

Row: TypeAlias = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer for one row."""

    label: str
    """The best label."""
    probabilities: dict[str, float]
    """Probability of each label among the labels."""


class _Reader:
    """A prompt over the base model that it was trained on, and rows as it reads them."""

    def __init__(self, backbone: Backbone, prompt: SoftPrompt) -> None:
        prompt.require(backbone)
        self.prompt = prompt
        self.fields = self.fields_of(prompt)
        """The columns that a row must have."""
        self._backbone = backbone.placed(prompt.position)

    @staticmethod
    def fields_of(prompt: SoftPrompt) -> list[str]:
        """The columns that a prompt's template names, in order."""
        return columns_of(prompt.template)

    @classmethod
    def open(cls, prompt: SoftPrompt, *, device: str = "auto") -> Self:
        """Load the base model that the prompt refers to, verify it, and be ready."""
        return cls(load_base(prompt.base, precision=prompt.precision, device=device), prompt)

    def _encode(self, rows: Sequence[Row]) -> list[Tokens]:
        for n, row in enumerate(rows, start=1):
            missing = [name for name in self.fields if name not in row]
            if missing:
                raise UserError(f"row {n}: column {missing[0]!r} is missing, found {', '.join(row) or 'none'}")
        return encode_inputs(
            rows,
            template=self.prompt.template,
            fields=self.fields,
            tokenizer=self._backbone.tokenizer,
            max_tokens=self.prompt.max_tokens,
            apart=self._backbone.is_encoder_decoder,
            before=self._backbone.before,
        ).inputs


class Predictor(_Reader):
    """A prompt that answers with a label, with its states computed once."""

    def __init__(self, backbone: Backbone, prompt: SoftPrompt) -> None:
        super().__init__(backbone, prompt)
        if not prompt.words:
            raise UserError("the prompt answers with a free text, not with a label; open it with a Writer")
        labels = encode_labels(prompt.words, backbone.tokenizer, apart=backbone.is_encoder_decoder)
        self._classifier = Classifier(self._backbone, prompt.vectors, list(labels.values()))

    def predict(self, rows: Sequence[Row]) -> list[Prediction]:
        """Label N rows; UserError names the row that lacks a column."""
        probabilities = self._classifier.score(self._encode(rows)).probabilities
        names = list(self.prompt.words)
        return [
            Prediction(names[int(p.argmax())], {name: round(float(q), 6) for name, q in zip(names, p, strict=True)})
            for p in probabilities
        ]

    @property
    def columns(self) -> list[str]:
        """What a table of answers has beside the row's own columns."""
        return ["label", *(f"p({name})" for name in self.prompt.words)]

    def cells(self, rows: Sequence[Row]) -> list[list[str]]:
        """The answers for N rows in these columns."""
        return [[p.label, *(f"{share:.4f}" for share in p.probabilities.values())] for p in self.predict(rows)]


class Writer(_Reader):
    """A prompt that answers with a free text."""

    columns = ["answer"]  # noqa: RUF012
    """What a table of answers has beside the row's own columns."""

    def __init__(self, backbone: Backbone, prompt: SoftPrompt) -> None:
        super().__init__(backbone, prompt)
        if prompt.words:
            raise UserError("the prompt answers with a label, not with a free text; open it with a Predictor")

    def write(self, rows: Sequence[Row]) -> list[str]:
        """The most likely text for N rows, token by token; UserError names the row that lacks a column."""
        vectors, most = self.prompt.vectors.to(self._backbone.device), self.prompt.max_new_tokens
        written = Generator(self._backbone, [vectors]).generate(self._encode(rows), max_new_tokens=most)
        return [self._decode(ids) for ids in written]

    def cells(self, rows: Sequence[Row]) -> list[list[str]]:
        """The answers for N rows in these columns."""
        return [[text] for text in self.write(rows)]

    def _decode(self, ids: Tokens) -> str:
        text = self._backbone.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text).removeprefix(self.prompt.before)


def open_prompt(prompt: SoftPrompt, *, device: str = "auto") -> Predictor | Writer:
    """Load the base model that a prompt refers to, and be ready to answer as the prompt does."""
    return Predictor.open(prompt, device=device) if prompt.words else Writer.open(prompt, device=device)
