"""The experiment: what is learned, and, outside its fingerprint, where it runs.

Field docstrings reach the launch form of the Prefect UI, which resolves annotations at run time: hence
no postponed annotations in this package.
"""

import hashlib
import json
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from softprompt.spec.base import Slug, Spec
from softprompt.spec.data import DataSpec, LabelSpec, SplitSpec
from softprompt.spec.model import ModelSpec
from softprompt.spec.search import SearchSpec, StartPoint
from softprompt.template import columns_of


class TrainingSpec(Spec):
    """How one prompt is trained: AdamW on the prompt alone."""

    steps: int = Field(ge=1, le=1_000_000)
    """Optimizer steps of a trial that is not stopped early."""
    batch_size: int = Field(ge=1, le=4096)
    """Examples a step (B)."""
    max_tokens: int = Field(ge=8, le=32_768)
    """Longest input in tokens (T); longer ones have their longest field cut, and are counted."""
    schedule: Literal["constant", "linear", "cosine"]
    """How the learning rate goes after the warm-up."""
    warmup_steps: int = Field(ge=0)
    """Steps over which the learning rate rises from zero."""
    weight_decay: float = Field(ge=0)
    """Decoupled weight decay of AdamW."""
    clip_norm: float = Field(gt=0)
    """The gradient of a prompt is scaled down to this norm."""
    loss: Literal["vocabulary", "labels"] = "vocabulary"
    """What the right label has to win against: all that the model could say, or the other labels."""

    @model_validator(mode="after")
    def _warmup_ends(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps < steps must hold, got warmup_steps={self.warmup_steps}, steps={self.steps}"
            )
        return self


class BudgetSpec(Spec):
    """When the search ends: at the first of these."""

    trials: int | None = Field(default=None, ge=1)
    """Trials to train."""
    minutes: float | None = Field(default=None, gt=0)
    """Minutes of search; what a time limit leaves is not reproducible."""

    @model_validator(mode="after")
    def _ends(self) -> Self:
        if self.trials is None and self.minutes is None:
            raise ValueError("give trials, minutes or both")
        return self


class EvaluationSpec(Spec):
    """What the winner is compared with on the test split."""

    instruction: str = Field(min_length=1)
    """A plain instruction put before the input as text: what you would do without a soft prompt."""


Count = Annotated[
    Annotated[Annotated[int, Field(ge=1, le=256)], Tag("number")] | Annotated[Literal["auto"], Tag("word")],
    Discriminator(lambda value: "number" if isinstance(value, int | float) else "word"),
]


class ExecutionSpec(Spec):
    """Where and how it runs; outside the fingerprint, as it changes no trial's result.

    With several slots or lanes a search may ask for other trials, as more begin before the first results are in. With
    dropout, a step that is cut into other passes has other draws.
    """

    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?|mps)$")
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    lanes: Count = 1
    """Processes of this machine that train trials of one search, each with a GPU or its share of the CPU's threads;
    `auto` is one for each GPU, and one on a CPU."""
    ray: str | None = Field(default=None, min_length=1)
    """Address of a Ray cluster that trains the lanes in place of this machine, as `auto` or `ray://head:10001`, or
    `local`; needs the extra `ray`."""
    slots: Count = "auto"
    """Prompts trained side by side through one frozen forward pass (K), or `auto`: 1 on a CPU, on a GPU as many as
    still gain something and fit its memory, by a short measurement."""
    micro_batch_tokens: int | None = Field(default=None, ge=1)
    """Tokens of a forward and backward pass at the most: a step is cut into several, and their gradients added up.

    By default 1,024 on a CPU and 32,768 elsewhere, halved whenever memory runs out.
    """
    checkpoint_seconds: float = Field(default=30.0, ge=0)
    """Seconds after which the state of a trial is saved again; it is saved at every rung as well."""
    gradient_checkpointing: bool = False
    """Whether to compute the inside of the model's layers again on the way back: less memory, a third more work."""
    compile: bool = False
    """Whether passes of the model are compiled by `torch.compile`, which takes minutes and needs a C++ compiler."""
    keep_prompts: Annotated[int, Field(ge=0)] | None = None
    """How many of a sweep's trials keep their prompt when it has ended, the best first; null keeps all. That of the
    winner, and any that a registered version came from, are kept in any case."""


class ExperimentSpec(Spec):
    """A frozen model, a dataset, and what to search for."""

    name: Slug
    """Name of the experiment in MLflow, and of the model it registers."""
    seed: int = Field(ge=0, lt=2**32)
    """Seed of the splits, the search and every trial."""
    model: ModelSpec
    """The frozen language model."""
    precision: Literal["bfloat16", "float32", "int8", "int4"]
    """Type of the frozen weights, of which `int8` and `int4` are computed with in bfloat16 and need the extra
    `quantized`; prompts and optimizer are always float32."""
    data: DataSpec
    """The rows."""
    template: str = Field(min_length=1)
    """The input as text, with `{column}` where a column of the row stands."""
    labels: LabelSpec
    """The target: which label a row has and the words that stand for it, or the column of a free text."""
    prompt_position: Literal["start", "after_bos"] = "start"
    """Where the prompt stands: before all tokens, or behind the begin-of-sequence token of the tokenizer."""
    splits: SplitSpec
    """How many rows each split gets."""
    training: TrainingSpec
    """How one prompt is trained."""
    search: SearchSpec
    """What is searched."""
    budget: BudgetSpec
    """When the search ends."""
    evaluation: EvaluationSpec
    """What the winner is compared with."""
    execution: ExecutionSpec = ExecutionSpec()
    """Where it runs."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.fields:
            raise ValueError("template: must name at least one column, as in '{text}'")
        if not self.labels.words and any(spec.kind == "labels" for spec in self.search.initialization):
            raise ValueError("search.initialization: `labels` starts from label words, and free text has none; drop it")
        if not self.labels.words and self.training.loss == "labels":
            raise ValueError("training.loss: labels is for targets that are labels, found free text; use vocabulary")
        if self.prompt_position == "after_bos" and "prefix_tuning" in self.search.methods:
            raise ValueError("prompt_position: after_bos is for prompt_tuning alone, found search.method prefix_tuning")
        return self

    @property
    def fields(self) -> list[str]:
        """The columns that the template names, in order."""
        return columns_of(self.template)

    @property
    def rungs(self) -> list[int]:
        """The steps after which a trial is scored on the validation split; the last is `training.steps`."""
        return self.search.pruner.rungs(self.training.steps)

    @property
    def given(self) -> tuple[StartPoint, ...]:
        """The trials of the search, where its starting points are all of them."""
        start, trials = self.search.start, self.budget.trials
        return start[:trials] if trials and len(start) >= trials else ()

    @property
    def longest(self) -> int:
        """Length of the longest prompt that may be trained."""
        return max((point.length for point in self.given), default=self.search.longest)

    def with_one_trial(self) -> Self:
        """The same experiment with a budget of one trial: the first of its starting points, if it has any."""
        search = self.search.model_copy(update={"start": self.search.start[:1]})
        return self.model_copy(update={"search": search, "budget": BudgetSpec(trials=1)})

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what is learned, over canonical JSON; `execution` is left out."""
        return fingerprint(self.model_dump(mode="json", exclude={"execution"}))


def fingerprint(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form: sorted keys, no spaces."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
