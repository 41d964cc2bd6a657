"""Metrics of predictions, with intervals; which predictions to make, and what follows, is decided elsewhere."""

import html
import math
import re
from collections.abc import Sequence
from typing import ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from scipy.stats import binomtest
from sklearn.metrics import f1_score, log_loss

from softprompt.inference import Scores
from softprompt.objective import ACCURACY, TOKEN_LOSS, Objective

_MARKUP = re.compile(r"[\\`*\[\]|~#!]|(?<![^\W_])_+|_+(?![^\W_])")
"""Signs that Markdown may take for its own; an underscore within a word is none."""


class LabelMetrics(BaseModel):
    """How well N rows were classified."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    objective: ClassVar[Objective] = ACCURACY

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

    @property
    def score(self) -> float:
        """What the objective ranks by."""
        return self.accuracy

    @property
    def numbers(self) -> dict[str, float | None]:
        """The metrics by the names that they have in columns, the score first."""
        return {"accuracy": self.accuracy, "loss": self.log_loss, "macro_f1": self.macro_f1, "illegal": self.illegal}

    @property
    def cells(self) -> dict[str, str]:
        """A row of a table for a person, by column."""
        return {
            "accuracy": f"{self.accuracy:.1%}",
            "95 % interval": f"{self.low:.1%} to {self.high:.1%}",
            "macro F1": f"{self.macro_f1:.3f}",
            "illegal": "" if self.illegal is None else f"{self.illegal:.1%}",
        }


class TextMetrics(BaseModel):
    """How well N texts were foretold."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    objective: ClassVar[Objective] = TOKEN_LOSS

    rows: int
    """N."""
    tokens: int
    """Target tokens of all rows, ends included."""
    log_loss: float
    """Mean negative log-probability of a target token, in nats: a row counts by its tokens."""
    low: float
    """Lower end of the 95 % interval of the log loss, rows being what is drawn."""
    high: float
    """Upper end of it."""
    exact_match: float
    """Share of rows whose target is, to its end, what greedy decoding gives."""
    correct: list[bool]
    """Per row, in the order of the split, whether it is such a one."""

    @property
    def score(self) -> float:
        """What the objective ranks by."""
        return self.log_loss

    @property
    def numbers(self) -> dict[str, float | None]:
        """The metrics by the names that they have in columns, the score first."""
        return {"loss_per_token": self.log_loss, "exact_match": self.exact_match}

    @property
    def cells(self) -> dict[str, str]:
        """A row of a table for a person, by column."""
        return {
            "loss per token": f"{self.log_loss:.4f}",
            "95 % interval": f"{self.low:.4f} to {self.high:.4f}",
            "exact match": f"{self.exact_match:.1%}",
        }


Metrics: TypeAlias = LabelMetrics | TextMetrics


def measure(gold: Sequence[object], predicted: Sequence[object] | NDArray[np.generic]) -> LabelMetrics:
    """Metrics of N predicted labels against the right ones, given alike: as names or as indices."""
    right = np.asarray(gold) == np.asarray(predicted)
    interval = binomtest(int(right.sum()), len(right)).proportion_ci(0.95, method="wilson")
    return LabelMetrics(
        rows=len(right),
        accuracy=float(right.mean()),
        low=float(interval.low),
        high=float(interval.high),
        macro_f1=float(f1_score(gold, predicted, average="macro", zero_division=0.0)),
        correct=right.tolist(),
    )


def measure_scores(gold: Sequence[int], scores: Scores) -> LabelMetrics:
    """Metrics of N scored inputs against the right label indices."""
    labels = list(range(scores.log_probabilities.shape[1]))
    return measure(gold, scores.predicted).model_copy(
        update={
            "log_loss": float(log_loss(gold, scores.probabilities, labels=labels)),
            "illegal": float(1 - scores.legal.mean()),
        }
    )


def measure_targets(
    log_probabilities: NDArray[np.float64], lengths: Sequence[int], exact: NDArray[np.bool_]
) -> TextMetrics:
    """Metrics of N targets: the log-probability of each, its tokens, and whether greedy decoding gives it.

    The loss is a ratio of two sums over rows, and its interval that of a ratio estimator (Cochran, Sampling Techniques,
    third edition, section 2.11).
    """
    tokens, rows = np.asarray(lengths), len(lengths)
    loss = float(-log_probabilities.sum() / tokens.sum())
    spread = math.sqrt(rows / max(1, rows - 1) * ((log_probabilities + loss * tokens) ** 2).sum())
    half = 1.959964 * spread / float(tokens.sum())
    return TextMetrics(
        rows=rows,
        tokens=int(tokens.sum()),
        log_loss=loss,
        low=max(0.0, loss - half),
        high=loss + half,
        exact_match=float(exact.mean()),
        correct=exact.tolist(),
    )


def describe_table(systems: dict[str, Metrics]) -> str:
    """The systems as a Markdown table, in their order."""
    columns = list(next(iter(systems.values())).cells)
    lines = [f"| system | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for name, m in systems.items():
        lines.append(f"| {as_markdown(name)} | {' | '.join(m.cells.values())} |")
    return "\n".join(lines)


def as_markdown(text: str) -> str:
    """A text of a user's as it reads, on one line: nothing in it is taken for Markdown or HTML."""
    line = html.escape(" ".join(text.split()), quote=False)
    return _MARKUP.sub(lambda found: "".join(f"\\{sign}" for sign in found[0]), line)
