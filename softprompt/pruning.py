"""Which trials stop early: successive halving that only reads.

Optuna's own writes to the study which rungs a trial has reached, before it decides. A process that dies in between
leaves a note that changes the next decision. Here a decision is a function of the reported scores.
"""

import math
from collections.abc import Callable

from optuna import Study
from optuna.pruners import BasePruner
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial


class Halving(BasePruner):
    """Asynchronous successive halving: a trial passes a rung if it is among the best `1 / factor` that reached it.

    As long as fewer than `factor` trials have reached a rung, the best of them passes. The rungs are `first_rung` and
    its multiples by powers of `factor`; a score that was reported anywhere else is no part of it. A score that is no
    number does not pass, and is no competitor.

    Source: Li et al. 2020, "A System for Massively Parallel Hyperparameter Tuning" (arXiv 1810.05934), algorithm 2, in
    the form in which no trial is ever paused.

    Args:
        first_rung: steps before the first rung.
        factor: one trial in `factor` passes.
        competes: which of the study's trials are compared with.
    """

    def __init__(
        self, first_rung: int, factor: int, *, competes: Callable[[FrozenTrial], bool] = lambda trial: True
    ) -> None:
        self._first_rung = first_rung
        self._factor = factor
        self._competes = competes

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Whether the trial stops at the step that it reported last."""
        step = trial.last_step
        if step is None or not self._is_rung(step):
            return False
        score = trial.intermediate_values[step]
        if math.isnan(score):
            return True
        sign = 1 if study.direction == StudyDirection.MINIMIZE else -1
        others = [t.intermediate_values[step] for t in study.get_trials(deepcopy=False) if self._meets(t, trial, step)]
        better = sum(sign * other < sign * score for other in others)
        return better >= max(1, (len(others) + 1) // self._factor)

    def _meets(self, other: FrozenTrial, trial: FrozenTrial, step: int) -> bool:
        """Whether another trial has a score at this rung, and competes by it."""
        reached = not math.isnan(other.intermediate_values.get(step, math.nan))
        return reached and other.number != trial.number and self._competes(other)

    def _is_rung(self, step: int) -> bool:
        rung = self._first_rung
        while rung < step:
            rung *= self._factor
        return rung == step
