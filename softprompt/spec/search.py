"""The space that is searched, and how: every searched value is a small distribution."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, Generic, Literal, Self, TypeVar

from pydantic import AfterValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from softprompt.spec.base import Positive, Spec

T = TypeVar("T")


class FloatRange(Spec):
    """All values between two bounds, both included."""

    low: float
    """Least value."""
    high: float
    """Greatest value."""
    log: bool = False
    """Whether to search on a logarithmic scale."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low <= self.high:
            raise ValueError(f"low <= high must hold, got low={self.low:g}, high={self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"a logarithmic range starts above zero, got low={self.low:g}")
        return self


class IntRange(FloatRange):
    """All whole numbers between two bounds, both included."""

    low: int
    """Least value."""
    high: int
    """Greatest value."""


class Choices(Spec, Generic[T]):
    """One of a few values."""

    # A generic's own title is the whole type, and its docstring is lost: both reach the launch form.
    model_config = ConfigDict(title="Choices", json_schema_extra={"description": "One of a few values."})

    choices: tuple[T, ...] = Field(min_length=1)
    """The values."""


def _shape(value: Any) -> str:
    if isinstance(value, Choices) or (isinstance(value, dict) and "choices" in value):
        return "choices"
    return "range" if isinstance(value, FloatRange | dict) else "fixed"


_by_shape = Discriminator(_shape)

V = TypeVar("V")


def _above_zero(value: V) -> V:
    if isinstance(value, FloatRange) and value.low <= 0:
        raise ValueError(f"only values above zero can be searched, got low={value.low:g}")
    return value


def _of_a_prompt(value: V) -> V:
    if isinstance(value, IntRange) and not 1 <= value.low <= value.high <= 2048:
        raise ValueError(f"1 <= length <= 2048 must hold, got {value.low} to {value.high}")
    return value


Length = Annotated[int, Field(ge=1, le=2048)]
Count = Annotated[int, Field(ge=1)]
Words = Annotated[str, Field(min_length=1)]
Method = Literal["prompt_tuning", "prefix_tuning"]

SearchedLength = Annotated[
    Annotated[Length, Tag("fixed")] | Annotated[IntRange, Tag("range")] | Annotated[Choices[Length], Tag("choices")],
    _by_shape,
    AfterValidator(_of_a_prompt),
]
SearchedFloat = Annotated[
    Annotated[Positive, Tag("fixed")]
    | Annotated[FloatRange, Tag("range")]
    | Annotated[Choices[Positive], Tag("choices")],
    _by_shape,
    AfterValidator(_above_zero),
]
SearchedCount = Annotated[
    Annotated[Count, Tag("fixed")] | Annotated[IntRange, Tag("range")] | Annotated[Choices[Count], Tag("choices")],
    _by_shape,
    AfterValidator(_above_zero),
]
SearchedMethod = Annotated[Annotated[Method, Tag("fixed")] | Annotated[Choices[Method], Tag("choices")], _by_shape]
SearchedBound = Annotated[
    Annotated[Positive | None, Tag("fixed")]
    | Annotated[FloatRange, Tag("range")]
    | Annotated[Choices[Positive | None], Tag("choices")],
    _by_shape,
    AfterValidator(_above_zero),
]
SearchedSwitch = Annotated[Annotated[bool, Tag("fixed")] | Annotated[Choices[bool], Tag("choices")], _by_shape]
SearchedText = Annotated[Annotated[Words, Tag("fixed")] | Annotated[Choices[Words], Tag("choices")], _by_shape]


class Kind(Spec):
    """One of several ways, named by its `kind`, with settings of its own."""

    @property
    def settings(self) -> list[str]:
        """The names of its settings."""
        return [name for name in type(self).model_fields if name != "kind"]


class UniformInit(Kind):
    """Each component drawn from U[-bound, bound]."""

    kind: Literal["uniform"] = "uniform"
    bound: SearchedFloat = 0.5
    """Half-width of the interval."""


class NormalInit(Kind):
    """Each component drawn from a normal with the embedding table's own mean and deviation, per dimension."""

    kind: Literal["normal"] = "normal"
    scale: SearchedFloat = 1.0
    """Factor on the table's deviation."""


class VocabularyInit(Kind):
    """Embeddings of tokens sampled without replacement from the most common ones."""

    kind: Literal["vocabulary"] = "vocabulary"
    most_common: SearchedCount = 5000
    """How many of the tokenizer's lowest ids to sample from: merges are ordered by frequency."""


class TextInit(Kind):
    """Embeddings of a text, cut to the length or filled up from the common vocabulary."""

    kind: Literal["text"] = "text"
    text: SearchedText
    """The text."""


class LabelsInit(Kind):
    """Embeddings of the label words, sub-tokens of one label averaged, filled up from the common vocabulary."""

    kind: Literal["labels"] = "labels"


class PromptInit(Kind):
    """The vectors of a prompt that is there, cut to the length or filled up from the common vocabulary."""

    kind: Literal["prompt"] = "prompt"
    source: Words
    """A registered soft prompt, as `models:/NAME@champion` or `models:/NAME/3`, or the folder of a saved one; it must
    have been trained on the experiment's own base model."""


InitSpec = Annotated[
    UniformInit | NormalInit | VocabularyInit | TextInit | LabelsInit | PromptInit, Field(discriminator="kind")
]


class NoReparameterization(Kind):
    """The prompt itself is trained."""

    kind: Literal["none"] = "none"


class ResidualReparameterization(Kind):
    """Vectors and a network that all of them pass, with a skip connection; folded into the prompt after training."""

    kind: Literal["residual"] = "residual"
    bottleneck: SearchedCount = 128
    """Width of the network's hidden layer."""


ReparameterizationSpec = Annotated[NoReparameterization | ResidualReparameterization, Field(discriminator="kind")]


class HalvingPruner(Spec):
    """Successive halving: a trial passes a rung only among the best of those that reached it."""

    kind: Literal["halving"] = "halving"
    first_rung: int = Field(ge=1)
    """Steps before the first validation; each further rung comes after `factor` times as many."""
    factor: int = Field(default=2, ge=2, le=8)
    """One trial in `factor` passes a rung."""

    def rungs(self, steps: int) -> list[int]:
        """The steps after which a trial is scored; the last is its last."""
        rungs, rung = [], self.first_rung
        while rung < steps:
            rungs.append(rung)
            rung *= self.factor
        return [*rungs, steps]

    def usual_steps(self, steps: int) -> float:
        """The steps of an average trial, if one in `factor` passes each rung."""
        rungs = [0, *self.rungs(steps)]
        return sum((b - a) / float(self.factor) ** n for n, (a, b) in enumerate(pairwise(rungs)))


class MedianPruner(Spec):
    """A trial stops when it is worse than the median of the completed ones at the same rung."""

    kind: Literal["median"] = "median"
    every: int = Field(ge=1)
    """Steps between validations."""
    startup_trials: int = Field(default=4, ge=0)
    """Trials that run to their end before any is stopped."""

    def rungs(self, steps: int) -> list[int]:
        """The steps after which a trial is scored; the last is its last."""
        return [*range(self.every, steps, self.every), steps]

    def usual_steps(self, steps: int) -> float:
        """The steps of an average trial; how many the median stops is not known before."""
        return steps


class NoPruner(Spec):
    """Every trial runs to its end."""

    kind: Literal["none"] = "none"
    every: int = Field(ge=1)
    """Steps between validations."""

    def rungs(self, steps: int) -> list[int]:
        """The steps after which a trial is scored; the last is its last."""
        return [*range(self.every, steps, self.every), steps]

    def usual_steps(self, steps: int) -> float:
        """The steps of an average trial: all."""
        return steps


PrunerSpec = Annotated[HalvingPruner | MedianPruner | NoPruner, Field(discriminator="kind")]


class StartPoint(Spec):
    """A trial that the search begins with, before it suggests its own. What it does not name, the search chooses."""

    length: Length
    """Prompt length (P)."""
    initialization: str
    """Kind of initialization, one of those searched."""
    learning_rate: Positive
    """Peak learning rate."""
    method: Method | None = None
    """Method, one of those searched."""
    settings: dict[str, bool | int | float | str | None] = Field(default_factory=dict)
    """Further settings by their full names, as `dropout`, `max_norm`, `reparameterization`, `normal.scale`."""

    @model_validator(mode="after")
    def _stands_once(self) -> Self:
        twice = [name for name in self.settings if name in type(self).model_fields]
        if twice:
            raise ValueError(f"settings.{twice[0]}: {twice[0]} stands beside the settings, not among them; move it")
        return self

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> Self:
        """The point at which a trial has these settings."""
        fields = {name: value for name, value in params.items() if name in cls.model_fields}
        return cls(**fields, settings={name: value for name, value in params.items() if name not in fields})

    @property
    def named(self) -> dict[str, Any]:
        """Everything that it names, by the names that a trial's settings have."""
        return self.model_dump(exclude={"settings"}, exclude_none=True) | self.settings


class SearchSpec(Spec):
    """The space, and how it is searched. A bare value is held fixed."""

    length: SearchedLength
    """Prompt length (P): a number, or `{low, high, log}`, or `{choices}`."""
    initialization: tuple[InitSpec, ...] = Field(min_length=1)
    """Where the prompt may start from; several kinds are searched over, with their own settings."""
    learning_rate: SearchedFloat
    """Peak learning rate of AdamW."""
    method: SearchedMethod = "prompt_tuning"
    """What is trained at each of the prompt's positions: a vector before the embeddings with `prompt_tuning`, the keys
    and values of every layer with `prefix_tuning`."""
    reparameterization: tuple[ReparameterizationSpec, ...] = Field(default=(NoReparameterization(),), min_length=1)
    """What a soft prompt is made of in training; several kinds are searched over, with their own settings."""
    max_norm: SearchedBound = None
    """Longest norm of a soft prompt's vectors, in mean norms of the model's embeddings; null leaves them."""
    dropout: SearchedSwitch = False
    """Whether the frozen model's own dropout is on in training."""
    pruner: PrunerSpec
    """When to stop a weak trial, and when trials are scored."""
    startup_trials: int = Field(default=6, ge=0)
    """Trials drawn at random before the TPE sampler starts to model the scores."""
    start: tuple[StartPoint, ...] = ()
    """Trials to begin with."""

    @property
    def longest(self) -> int:
        """The longest prompt length (P) that may be tried."""
        if isinstance(self.length, IntRange):
            return self.length.high
        return max(self.length.choices) if isinstance(self.length, Choices) else self.length

    @property
    def methods(self) -> tuple[Method, ...]:
        """The methods that may be tried."""
        return self.method.choices if isinstance(self.method, Choices) else (self.method,)

    @property
    def may_drop_out(self) -> bool:
        """Whether any trial may have dropout on."""
        return True in self.dropout.choices if isinstance(self.dropout, Choices) else self.dropout

    @model_validator(mode="after")
    def _kinds_stand_once(self) -> Self:
        for name in ("initialization", "reparameterization"):
            kinds = [spec.kind for spec in getattr(self, name)]
            if len(set(kinds)) != len(kinds):
                raise ValueError(f"each kind of {name} stands once, got {kinds}; use {{choices: [...]}} inside it")
        return self

    @model_validator(mode="after")
    def _starts_lie_inside(self) -> Self:
        for n, point in enumerate(self.start):
            try:
                self.place(point)
            except ValueError as error:
                raise ValueError(f"start.{n}.{error}") from None
        return self

    def place(self, point: StartPoint) -> dict[str, Any]:
        """The values that a point names, as the space has them, by the names of a trial's settings.

        Raises ValueError where one lies outside, or where the point has no such setting.
        """
        spaces, placed = self._spaces(point), {}
        for name, value in point.named.items():
            where = f"settings.{name}" if name in point.settings else name
            if name not in spaces:
                raise ValueError(f"{where} is no setting of this point; it has {', '.join(spaces)}")
            key, space = spaces[name]
            placed[name] = _find(space, value, where, key)
        return placed

    def _spaces(self, point: StartPoint) -> dict[str, tuple[str, Any]]:
        """What a point may name: the key in the search, and what it may be."""
        names = ["length", "initialization", "learning_rate", "method", "dropout"]
        if "prompt_tuning" in ([point.method] if point.method else self.methods):
            names += ["max_norm", "reparameterization"]
        spaces: dict[str, tuple[str, Any]] = {}
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, tuple):
                spaces[name] = name, value
                continue
            spaces[name] = name, Choices[str](choices=tuple(spec.kind for spec in value))
            for n, spec in enumerate(value):
                if spec.kind == point.named.get(name, spec.kind):
                    own = {f"{spec.kind}.{key}": (f"{name}.{n}.{key}", getattr(spec, key)) for key in spec.settings}
                    spaces |= own
        return spaces


def _find(space: Any, value: Any, where: str, key: str) -> Any:
    """The value as the space has it; ValueError where it has none such."""
    outside = f"{where}={value!r} lies outside search.{key}; change one of them"
    if isinstance(space, FloatRange):
        number = isinstance(value, int | float) and not isinstance(value, bool) and space.low <= value <= space.high
        if not number or (isinstance(space, IntRange) and value != int(value)):
            raise ValueError(outside)
        return int(value) if isinstance(space, IntRange) else float(value)
    options = space.choices if isinstance(space, Choices) else (space,)
    for option in options:
        if option == value and isinstance(option, bool) == isinstance(value, bool):
            return option
    raise ValueError(f"{where} must be one of {list(options)}, got {value!r}" if isinstance(value, str) else outside)
