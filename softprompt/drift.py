"""Whether the rows of now are like those that the champion was made on, and whether it still answers them as well.

"Drift" is said only where a test says so at the level of 1 %; each test stands with its p-value and the size of what it
saw, because with many rows a difference that matters to nobody is significant too.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from scipy.stats import PermutationMethod, chi2_contingency, fisher_exact, ks_2samp, norm
from scipy.stats.contingency import association

from softprompt.evaluation import LabelMetrics, Metrics
from softprompt.objective import Objective

LEVEL = 0.01
"""A test says drift where its p-value lies below."""
_FEW = 5
"""Rows to be expected in a cell, below which the chi-square distribution is not relied on (Cochran 1954)."""
_SHOWN = 6


class Check(BaseModel):
    """One thing that may have changed: what it was, what it is, and what a test says."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    """Its name in a metric, as in `drift_labels_p`."""
    subject: str
    """Its name in a sentence."""
    before: str = ""
    now: str = ""
    test: str = ""
    p: float | None = None
    """Probability of a difference as large without any change; None where nothing was tested."""
    effect: float | None = None
    """Size of the difference."""
    measure: str = ""
    """What the size is measured by."""
    untested: str = ""
    """Why nothing was tested."""

    @property
    def drifted(self) -> bool:
        """Whether the test says drift."""
        return self.p is not None and self.p < LEVEL

    @property
    def cells(self) -> list[str]:
        """A row of the table for a person."""
        if self.p is None:
            return [self.subject, self.before, self.now, f"not tested: {self.untested}", "", "", ""]
        seen = "**drift**" if self.drifted else "no drift seen"
        return [
            self.subject,
            self.before,
            self.now,
            self.test,
            f"{self.p:.2g}",
            f"{self.measure} {self.effect:.3g}",
            seen,
        ]


class Recorded(BaseModel):
    """The score that a version was registered with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: int
    score: float
    high: float
    """Upper end of its 95 % interval."""


class Drift(BaseModel):
    """All checks of a retune."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    champion: int
    """Version of the champion."""
    compared: str
    """Which rows were compared with which, in words."""
    new_rows: int | None
    """Rows that are not among the champion's; None where its rows are not there any more to tell."""
    gone_rows: int | None
    """The champion's rows that are not there any more."""
    checks: tuple[Check, ...]

    @property
    def seen(self) -> list[str]:
        """What has drifted."""
        return [check.subject for check in self.checks if check.drifted]

    @property
    def verdict(self) -> str:
        """The outcome in a line."""
        if self.seen:
            return "drift: " + ", ".join(f"{c.subject} (p {c.p:.2g})" for c in self.checks if c.drifted)
        tested = ", ".join(f"{c.subject} p {c.p:.2g}" for c in self.checks if c.p is not None)
        return f"no drift seen ({tested or 'nothing could be tested'})"

    @property
    def metrics(self) -> dict[str, float]:
        """The numbers by their names in MLflow."""
        found: dict[str, float | None] = {"drift_seen": len(self.seen)}
        found |= {"drift_new_rows": self.new_rows, "drift_gone_rows": self.gone_rows}
        for check in self.checks:
            found |= {f"drift_{check.key}_p": check.p, f"drift_{check.key}_effect": check.effect}
        return {name: float(value) for name, value in found.items() if value is not None}

    def describe(self) -> str:
        """The page for a person, as Markdown."""
        head = ["", f"champion v{self.champion}", "now", "test", "p", "size", f"at {LEVEL:.0%}"]
        rows = [[cell.replace("|", r"\|") for cell in check.cells] for check in self.checks]
        lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
        return "\n".join(
            [
                f"**{self.verdict[0].upper()}{self.verdict[1:]}**",
                "",
                f"{self.compared}.",
                "",
                *lines,
                "",
                f"Each test is at the level of {LEVEL:.0%}: without any change, one in a hundred still says drift.",
            ]
        )


def compare_labels(before: Mapping[str, int], now: Mapping[str, int]) -> Check:
    """Shares of the labels: chi-square test of homogeneity, and Cramér's V."""
    known = [label for label in {**before, **now} if before.get(label) or now.get(label)]
    blank = Check(key="labels", subject="label shares", before=_shares(before), now=_shares(now))
    table = np.array([[counts.get(label, 0) for label in known] for counts in (before, now)])
    if len(known) < 2 or not table.sum(axis=1).all():
        return blank.model_copy(update={"untested": "it takes rows of two labels, then and now"})
    expected = table.sum(axis=1, keepdims=True) * table.sum(axis=0) / table.sum()
    few = expected.min() < _FEW
    method = PermutationMethod(n_resamples=9999, rng=np.random.default_rng(0)) if few else None
    found = chi2_contingency(table, correction=False, method=method)
    return blank.model_copy(
        update={
            "test": "chi-square, by permutation" if few else "chi-square",
            "p": float(found.pvalue),
            "effect": float(association(table, method="cramer")),
            "measure": "Cramér's V",
        }
    )


def compare_lengths(key: str, subject: str, before: Mapping[int, int], now: Mapping[int, int]) -> Check:
    """Lengths in tokens, as rows by length: two-sample Kolmogorov-Smirnov test, which ties make only more cautious."""
    blank = Check(key=key, subject=subject, before=_quartiles(before), now=_quartiles(now))
    if not before or not now:
        return blank.model_copy(update={"untested": "it takes rows then and now"})
    found = ks_2samp(_spread(before), _spread(now), method="asymp")
    return blank.model_copy(
        update={
            "test": "Kolmogorov-Smirnov",
            "p": float(found.pvalue),
            "effect": float(found.statistic),
            "measure": "distance",
        }
    )


def compare_scores(recorded: Recorded, now: Metrics) -> Check:
    """The champion's score on rows of now, beside the one it was registered with on other rows.

    Shares of right answers by Fisher's exact test of two proportions; losses by the normal test that their intervals
    give.
    """
    objective = now.objective
    labels = isinstance(now, LabelMetrics)
    return Check(
        key=objective.key,
        subject=f"champion's {objective.name}",
        before=_told(objective, recorded.score, recorded.rows),
        now=f"{_told(objective, now.score, now.rows)} ({objective.number(now.low)} to {objective.number(now.high)})",
        test="two proportions, Fisher" if labels else "two means, normal",
        p=_p_of_shares(recorded, now) if labels else _p_of_means(recorded, now),
        effect=now.score - recorded.score,
        measure="difference",
    )


def _p_of_shares(recorded: Recorded, now: Metrics) -> float:
    right = [round(recorded.score * recorded.rows), sum(now.correct)]
    wrong = [recorded.rows - right[0], now.rows - right[1]]
    return float(fisher_exact([right, wrong]).pvalue)


def _p_of_means(recorded: Recorded, now: Metrics) -> float:
    # From the upper ends: the lower ones stop at zero.
    spread = np.hypot(recorded.high - recorded.score, now.high - now.score) / norm.ppf(0.975)
    difference = abs(now.score - recorded.score)
    return float(2 * norm.sf(difference / spread)) if spread else float(difference == 0)


def _told(objective: Objective, score: float, rows: int) -> str:
    return f"{objective.show(score)} on {rows:,} rows"


def _shares(counts: Mapping[str, int]) -> str:
    rows = sum(counts.values())
    if not rows:
        return "no rows"
    told = [f"{label} {counts[label] / rows:.1%}" for label in sorted(counts, key=lambda k: (-counts[k], k))]
    return ", ".join(told[:_SHOWN]) + (f" and {len(told) - _SHOWN} more" if len(told) > _SHOWN else "")


def _quartiles(counts: Mapping[int, int]) -> str:
    if not counts:
        return "no rows"
    low, middle, high = np.percentile(_spread(counts), [25, 50, 75], method="inverted_cdf")
    return f"median {middle:g} tokens, half of them {low:g} to {high:g}"


def _spread(counts: Mapping[int, int]) -> NDArray[np.int64]:
    return np.repeat(np.array(list(counts), dtype=np.int64), list(counts.values()))
