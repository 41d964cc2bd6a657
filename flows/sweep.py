"""The main job: from rows to a registered soft prompt."""

from prefect import flow
from pydantic import BaseModel, ConfigDict

from flows.records import close_cancelled, close_failed
from softprompt.lane import Sweep, TrialRecord
from softprompt.registry import Decision
from softprompt.spec import ExperimentSpec
from tasks import (
    evaluate_baselines,
    evaluate_prompts,
    open_study,
    prepare_data,
    register_prompt,
    show_trials,
    tune_prompts,
)
from tasks.evaluate import Evaluation


class SweepResult(BaseModel):
    """What came of a sweep."""

    model_config = ConfigDict(frozen=True)

    sweep: Sweep
    trials: list[TrialRecord]
    evaluation: Evaluation
    decision: Decision


@flow(
    name="sweep",
    flow_run_name="{experiment.name}",
    log_prints=True,
    on_failure=[close_failed],
    on_crashed=[close_failed],
    on_cancellation=[close_cancelled],
)
def sweep(experiment: ExperimentSpec) -> SweepResult:
    """Search for the best soft prompt of an experiment, measure it on the untouched test split, and register it.

    Args:
        experiment: The frozen model, the dataset and what to search for.
    """
    data = prepare_data(experiment)
    return search_and_register(experiment, data, open_study(experiment, data))


def search_and_register(experiment: ExperimentSpec, data: str, study: Sweep) -> SweepResult:
    """What follows once there is a study: the steps that every search takes."""
    trials = tune_prompts(experiment, data, study)
    show_trials(experiment, trials)
    baselines = evaluate_baselines(experiment, data)
    evaluation = evaluate_prompts(experiment, data, study, baselines)
    decision = register_prompt(experiment, study, evaluation)
    return SweepResult(sweep=study, trials=trials, evaluation=evaluation, decision=decision)
