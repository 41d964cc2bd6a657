"""Metrics of predictions, with intervals; which predictions to make, and what follows, is decided elsewhere."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from scipy.stats import binomtest
from sklearn.metrics import f1_score, log_loss

from softprompt.inference import Scores


class Metrics(BaseModel):
    """How well N rows were classified."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: int
    """N."""
    accuracy: float
    """Share of rows whose best label is the right one."""
    low: float
    """Lower end of the 95 % Wilson interval of the accuracy."""
    high: float
    """Upper end of it."""
    macro_f1: float
    """F1 averaged over the labels, each counting alike."""
    log_loss: float | None = None
    """Mean negative log-probability of the right label among the labels, in nats; None without probabilities."""
    illegal: float | None = None
    """Share of rows where the model's own first choice is no label at all; None where nothing is generated."""
    correct: list[bool]
    """Per row, in the order of the split, whether it was right: what a paired test needs."""


def measure(gold: Sequence[int], predicted: Sequence[int] | NDArray[np.int64]) -> Metrics:
    """Metrics of N predicted label indices against the right ones."""
    right = np.asarray(gold) == np.asarray(predicted)
    interval = binomtest(int(right.sum()), len(right)).proportion_ci(0.95, method="wilson")
    return Metrics(
        rows=len(right),
        accuracy=float(right.mean()),
        low=float(interval.low),
        high=float(interval.high),
        macro_f1=float(f1_score(gold, predicted, average="macro", zero_division=0.0)),
        correct=right.tolist(),
    )


def measure_scores(gold: Sequence[int], scores: Scores) -> Metrics:
    """Metrics of N scored inputs against the right label indices."""
    labels = list(range(scores.log_probabilities.shape[1]))
    return measure(gold, scores.predicted).model_copy(
        update={
            "log_loss": float(log_loss(gold, scores.probabilities, labels=labels)),
            "illegal": float(1 - scores.legal.mean()),
        }
    )


def describe_table(systems: dict[str, Metrics]) -> str:
    """The systems as a Markdown table, in their order; a name may hold the table's own sign."""
    lines = ["| system | accuracy | 95 % interval | macro F1 | illegal |", "|---|---|---|---|---|"]
    for name, m in systems.items():
        illegal = "" if m.illegal is None else f"{m.illegal:.1%}"
        name = name.replace("|", r"\|")
        lines.append(f"| {name} | {m.accuracy:.1%} | {m.low:.1%} to {m.high:.1%} | {m.macro_f1:.3f} | {illegal} |")
    return "\n".join(lines)
