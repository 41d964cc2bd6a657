"""One trial from its start to its prompt: train to a rung, score on the validation split, keep the best.

A lane drives many of these side by side; `tune` drives one.
"""

import math
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from torch import Tensor

from softprompt.evaluation import Metrics
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
        self.losses: list[float] = []
        """Training loss of every step, in nats per target token."""
        self.rungs_passed = 0
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
        """Time since the trial began."""
        return time.monotonic() - self._began

    @property
    def failure(self) -> str | None:
        """Why the trial cannot go on, if it cannot."""
        if self.losses and not math.isfinite(self.losses[-1]):
            return f"the training loss is {self.losses[-1]} at step {len(self.losses)}; try a lower learning rate"
        return None

    def validate(self) -> Metrics:
        """Score the prompt as it stands on the validation split, and keep it if it is the best so far.

        Raises FloatingPointError where the scores are no numbers: the last update may overflow after a finite loss.
        """
        try:
            metrics = self._bench.measure(self.slot.prompt, self._bench.split("validation"))
        except FloatingPointError as error:
            raise FloatingPointError(f"{error} after step {len(self.losses)}; try a lower learning rate") from None
        now = Best(self.slot.prompt.detach().cpu().clone(), metrics, self.slot.steps_done)
        if self.best is None or now.rank > self.best.rank:
            self.best = now
        self.rungs_passed += 1
        return metrics

    def progress(self) -> TrialProgress:
        """What a watcher shows of it."""
        return TrialProgress(
            number=self.number,
            title=self.title,
            step=self.slot.steps_done,
            steps=self.slot.settings.steps,
            rung=self.rungs_passed,
            rungs=len(self._rungs),
            score=self.best.metrics.objective.tell(self.best.metrics.score) if self.best else None,
            loss=self.losses[-1],
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
        tuning.losses += step(bench.backbone, [tuning.slot], bench.passes).tolist()
        if tuning.failure:
            raise FloatingPointError(tuning.failure)
        if tuning.at_rung:
            tuning.validate()
    return tuning.prompt()


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
