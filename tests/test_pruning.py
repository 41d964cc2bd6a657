"""Halving beside Optuna's own, on traces of many trials."""

import math
from typing import Literal

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.pruners import SuccessiveHalvingPruner
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState

from softprompt.pruning import Halving

SCORES = st.sampled_from([0.0, 0.25, 0.5, 0.5, 0.75, 1.0, math.nan, math.inf]) | st.floats(-2, 2)
"""Ties are common."""
TRACES = st.lists(st.tuples(st.integers(0, 5), SCORES, st.sampled_from(["go on", "go on", "fail", "finish"])))
"""Which of six slots comes to its next rung, with which score, and what becomes of its trial unless it is pruned."""


def study_with(pruner: optuna.pruners.BasePruner, direction: Literal["maximize", "minimize"]) -> optuna.Study:
    return optuna.create_study(direction=direction, pruner=pruner, storage=InMemoryStorage())


@settings(max_examples=200, deadline=None)
@given(TRACES, st.sampled_from(["maximize", "minimize"]), st.integers(1, 3), st.integers(2, 4))
def test_its_decisions_are_those_of_optuna(
    trace: list, direction: Literal["maximize", "minimize"], first_rung: int, factor: int
):
    studies = [
        study_with(Halving(first_rung, factor), direction),
        study_with(SuccessiveHalvingPruner(min_resource=first_rung, reduction_factor=factor), direction),
    ]
    slots: dict[int, list[optuna.Trial]] = {}
    rungs: dict[int, int] = {}
    for slot, score, end in trace:
        if slot not in slots:
            slots[slot], rungs[slot] = [study.ask() for study in studies], first_rung
        verdicts = []
        for trial in slots[slot]:
            trial.report(score, rungs[slot])
            verdicts.append(trial.should_prune())
        assert verdicts[0] == verdicts[1]
        rungs[slot] *= factor
        if verdicts[0] or end != "go on":
            state = TrialState.PRUNED if verdicts[0] else TrialState.FAIL if end == "fail" else TrialState.COMPLETE
            values = 0.0 if state == TrialState.COMPLETE else None
            for study, trial in zip(studies, slots.pop(slot), strict=True):
                study.tell(trial, values, state=state)


def reported(study: optuna.Study, *scores: tuple[int, float]) -> optuna.Trial:
    trial = study.ask()
    for step, score in scores:
        trial.report(score, step)
    return trial


def test_it_writes_nothing():
    study = study_with(Halving(2, 2), "maximize")
    reported(study, (2, 0.9))
    assert reported(study, (2, 0.1)).should_prune()
    assert [t.system_attrs for t in study.trials] == [{}, {}]


def test_asked_again_it_decides_the_same():
    study = study_with(Halving(2, 2), "minimize")
    reported(study, (2, 0.1))
    trial = reported(study, (2, 0.9))
    assert [trial.should_prune() for _ in range(3)] == [True, True, True]


@pytest.mark.parametrize("step", [1, 3, 5, 6])
def test_a_score_that_was_reported_at_no_rung_takes_no_part(step: int):
    study = study_with(Halving(2, 2), "maximize")
    for _ in range(3):
        reported(study, (2, 0.1), (step, 0.9))
    assert not reported(study, (step, 0.2)).should_prune()
    assert not reported(study, (2, 0.2)).should_prune()


def test_who_does_not_compete_is_not_compared_with():
    study = study_with(Halving(2, 2, competes=lambda trial: "out" not in trial.user_attrs), "maximize")
    for _ in range(3):
        reported(study, (2, 0.9)).set_user_attr("out", True)
    assert not reported(study, (2, 0.1)).should_prune()


def test_a_score_that_is_no_number_does_not_pass_and_does_not_compete():
    study = study_with(Halving(2, 2), "minimize")
    assert reported(study, (2, math.nan)).should_prune()
    assert not reported(study, (2, 0.5)).should_prune()


def test_before_its_first_score_a_trial_goes_on():
    assert not study_with(Halving(2, 2), "maximize").ask().should_prune()
