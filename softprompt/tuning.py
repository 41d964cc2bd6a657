"""One trial from its start to its prompt: train to a rung, score on the validation split, keep the best.

A lane drives many of these side by side; `tune` drives one.
"""

import math
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, PositiveInt
from torch import Tensor

from softprompt.checkpoint import State
from softprompt.evaluation import LabelMetrics, Metrics, TextMetrics
from softprompt.history import TRAIN_LOSS, VAL, Entry, pack, unpack
from softprompt.progress import TrialProgress
from softprompt.prompt import SoftPrompt
from softprompt.training import step
from softprompt.workbench import Workbench


@dataclass(frozen=True)
class Best:
    """The best prompt of a trial so far, by its score on the validation split, then by the loss there."""

    vectors: Tensor
    metrics: Metrics
    step: int

    @property
    def rank(self) -> tuple[float, float]:
        """What the best is the greatest by."""
        return self.metrics.objective.gain(self.metrics.score), -(self.metrics.log_loss or 0.0)


class _BestMeta(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    step: PositiveInt
    metrics: list[str]
    """Names of the numbers that are stored."""


class _Meta(BaseModel):
    """What a state has beside its tensors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    number: int
    params: dict[str, Any]
    seed: list[int]
    seconds: NonNegativeFloat
    pass_tokens: PositiveInt
    history: list[str]
    """Names of its metrics."""
    best: _BestMeta | None


class Tuning:
    """A trial under way."""

    def __init__(self, bench: Workbench, params: dict[str, Any], *, number: int, seed: Sequence[int]) -> None:
        self.number = number
        self.slot = bench.start(params, seed=seed)
        self.source = bench.source_of(params)
        """The prompt that it starts from, if it starts from one."""
        self.params = params | ({"source_prompt": str(self.source)} if self.source else {})
        """Its settings, and the source as it was found: what its name stands for may change."""
        self.best: Best | None = None
        self.history: list[Entry] = []
        """Every training loss and every metric on the validation split, in their order."""
        self.rungs_passed = 0
        self._seed = [int(part) for part in seed]
        self._bench = bench
        self._rungs = bench.experiment.rungs
        self._began = time.monotonic()

    @property
    def title(self) -> str:
        """The trial in words."""
        return f"trial {self.number}: {describe(self.params)}"

    @property
    def at_rung(self) -> bool:
        """Whether the last step reached a rung, where a trial is scored."""
        return self.slot.steps_done in self._rungs

    @property
    def seconds(self) -> float:
        """Time that was spent on the trial, that of processes before included."""
        return time.monotonic() - self._began

    @property
    def failure(self) -> str | None:
        """Why the trial cannot go on, if it cannot."""
        last = self._last_loss
        if last and not math.isfinite(last.value):
            return f"the training loss is {last.value} at step {last.step}; try a lower learning rate"
        return None

    @property
    def losses(self) -> list[float]:
        """Training loss of every step, in nats per term of the loss."""
        return [entry.value for entry in self.history if entry.key == TRAIN_LOSS]

    @property
    def judged(self) -> float | None:
        """The score, where validation is the last thing that was done; None where steps came after it."""
        if not self.history or not self.history[-1].key.startswith(VAL):
            return None
        score = f"{VAL}{self._bench.experiment.labels.objective.key}"
        return next(entry.value for entry in reversed(self.history) if entry.key == score)

    @property
    def _last_loss(self) -> Entry | None:
        return next((entry for entry in reversed(self.history) if entry.key == TRAIN_LOSS), None)

    def add_loss(self, loss: float) -> None:
        """Take down the training loss of a step."""
        last = self._last_loss
        self.history.append(Entry(TRAIN_LOSS, loss, last.step + 1 if last else 1, _now()))

    def validate(self) -> Metrics:
        """Score the prompt as it stands on the validation split, and keep it if it is the best so far.

        Raises FloatingPointError where the scores are no numbers: the last update may overflow after a finite loss.
        """
        try:
            metrics = self._bench.measure(self.slot.prompt, self._bench.split("validation"))
        except FloatingPointError as error:
            raise FloatingPointError(f"{error} after step {self.slot.steps_done}; try a lower learning rate") from None
        time_ms = _now()
        for name, value in metrics.numbers.items():
            if value is not None:
                self.history.append(Entry(f"{VAL}{name}", value, self.slot.steps_done, time_ms))
        now = Best(self.slot.prompt.detach().cpu().clone(), metrics, self.slot.steps_done)
        if self.best is None or now.rank > self.best.rank:
            self.best = now
        self.rungs_passed += 1
        return metrics

    def state(self) -> State:
        """Everything that a process needs to go on with the trial: copies, which later steps leave alone."""
        names, columns = pack(self.history)
        tensors = {
            **{f"slot.{name}": tensor for name, tensor in self.slot.state().items()},
            **{f"history.{name}": column for name, column in columns.items()},
        }
        best = None
        if self.best is not None:
            numbers = self.best.metrics.model_dump(exclude={"correct"}, exclude_none=True)
            best = _BestMeta(step=self.best.step, metrics=list(numbers))
            tensors["best.vectors"] = self.best.vectors.contiguous()
            tensors["best.numbers"] = torch.tensor(list(numbers.values()), dtype=torch.float64)
            tensors["best.correct"] = torch.tensor(self.best.metrics.correct)
        meta = _Meta(
            number=self.number,
            params=self.params,
            seed=self._seed,
            seconds=self.seconds,
            pass_tokens=self._bench.passes.tokens,
            history=names,
            best=best,
        )
        return State(tensors, meta.model_dump())

    def restore(self, state: State) -> None:
        """Go on from a state that `state` gave, of a trial with the same number, settings and seed, to the same bits.

        Passes become as small as those were, where memory had run out: another cut is another rounding.
        Raises ValueError, and changes nothing, where the state does not fit.
        """
        meta = _Meta.model_validate(state.meta)
        for name, own in (("number", self.number), ("seed", self._seed), ("params", self.params)):
            if (found := getattr(meta, name)) != own:
                raise ValueError(f"{name} is {found!r:.200} there and {own!r:.200} here")
        slot, curves, kept = (_below(part, state.tensors) for part in ("slot.", "history.", "best."))
        if len(slot) + len(curves) + len(kept) < len(state.tensors):
            raise ValueError("it has tensors that are neither of the slot, nor of the history, nor of the best")
        history, best = unpack(meta.history, curves), self._read_best(meta.best, kept)
        self.slot.restore(slot)
        self.history, self.best = history, best
        self.rungs_passed = sum(e.key == f"{VAL}{self._bench.experiment.labels.objective.key}" for e in history)
        self._bench.passes.tokens = min(self._bench.passes.tokens, meta.pass_tokens)
        self._began = time.monotonic() - meta.seconds

    def _read_best(self, meta: _BestMeta | None, tensors: Mapping[str, Tensor]) -> Best | None:
        expected = set() if meta is None else {"vectors", "numbers", "correct"}
        if tensors.keys() != expected:
            raise ValueError(f"the best must have the tensors {sorted(expected)}, found {sorted(tensors)!r:.200}")
        if meta is None:
            return None
        vectors, own = tensors["vectors"], self.slot.prompt
        if (vectors.shape, vectors.dtype) != (own.shape, own.dtype):
            raise ValueError(
                f"the best vectors must be {own.dtype} of shape {list(own.shape)}, "
                f"found {vectors.dtype} of {list(vectors.shape)}"
            )
        objective = self._bench.experiment.labels.objective
        kind = next(kind for kind in (LabelMetrics, TextMetrics) if kind.objective == objective)
        if tensors["numbers"].shape != (len(meta.metrics),):
            raise ValueError(f"the best must have {len(meta.metrics)} numbers, found {list(tensors['numbers'].shape)}")
        numbers = dict(zip(meta.metrics, tensors["numbers"].tolist(), strict=True))
        return Best(vectors, kind.model_validate(numbers | {"correct": tensors["correct"].tolist()}), meta.step)

    def progress(self) -> TrialProgress:
        """What a watcher shows of it."""
        last = self._last_loss
        return TrialProgress(
            number=self.number,
            title=self.title,
            step=self.slot.steps_done,
            steps=self.slot.settings.steps,
            rung=self.rungs_passed,
            rungs=len(self._rungs),
            score=self.best.metrics.objective.tell(self.best.metrics.score) if self.best else None,
            loss=last.value if last else math.nan,
        )

    def prompt(self) -> SoftPrompt:
        """The best prompt so far, as an artifact."""
        if self.best is None:
            raise RuntimeError(f"{self.title} has not been validated yet")
        experiment, data, backbone = self._bench.experiment, self._bench.data, self._bench.backbone
        return SoftPrompt(
            vectors=self.best.vectors,
            template=experiment.template,
            **self._bench.target.settings,
            max_tokens=experiment.training.max_tokens,
            position=experiment.prompt_position,
            encoder_decoder=backbone.is_encoder_decoder,
            weights_sha256=backbone.weights_sha256,
            tokenizer_sha256=backbone.tokenizer_sha256,
            base=backbone.reference,
            precision=experiment.precision,
            provenance={
                "experiment": experiment.name,
                "fingerprint": experiment.fingerprint,
                "seed": experiment.seed,
                "dataset": {
                    "source": data.source,
                    "digest": data.digest,
                    "test_bound": data.test_bound,
                    "summary": self._bench.summary.model_dump(mode="json"),
                },
                "source_prompt": self.source.record if self.source else None,
                "params": self.params,
                "trial": self.number,
                "step": self.best.step,
                "validation": self.best.metrics.model_dump(exclude={"correct"}),
                "versions": versions(),
            },
        )


def tune(bench: Workbench, params: dict[str, Any], *, number: int = 0) -> SoftPrompt:
    """Train one prompt to the end of its steps and return the best of its rungs.

    Raises FloatingPointError where the loss stops being finite.
    """
    tuning = Tuning(bench, params, number=number, seed=[bench.experiment.seed, number])
    while not tuning.slot.finished:
        tuning.add_loss(step(bench.backbone, [tuning.slot], bench.passes).item())
        if tuning.failure:
            raise FloatingPointError(tuning.failure)
        if tuning.at_rung:
            tuning.validate()
    return tuning.prompt()


def _now() -> int:
    return int(time.time() * 1000)


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a part of the state, by their names there."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def history_of(state: State) -> list[Entry]:
    """The history in a state; ValueError where it has none."""
    return unpack(_Meta.model_validate(state.meta).history, _below("history.", state.tensors))


def describe(params: dict[str, Any]) -> str:
    """The settings of a trial in words, as `labels · P=20 · lr 0.01`; what is off is left out."""
    words = ["prefix"] if params.get("method") == "prefix_tuning" else []
    words += [params["initialization"], f"P={params['length']}", f"lr {_short(params['learning_rate'])}"]
    for name, value in params.items():
        if "." in name:
            words.append(f"{name.partition('.')[2]} {_short(value)}")
        elif name == "reparameterization" and value != "none":
            words.append(value)
        elif name == "max_norm" and value:
            words.append(f"max norm {_short(value)}")
        elif name == "dropout" and value:
            words.append("dropout")
    return " · ".join(words)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2g}"
    text = " ".join(str(value).split())  # a line break would end the row of a table
    return text if len(text) <= 24 else f"{text[:23]}…"


def versions() -> dict[str, str]:
    """Versions of what decides a result."""
    return {"python": platform.python_version(), **{n: version(n) for n in ("softprompt", "torch", "transformers")}}
