"""The main job: from rows to a registered soft prompt."""

from prefect import flow
from pydantic import BaseModel, ConfigDict

from flows.records import close_cancelled, close_failed
from softprompt.registry import Decision
from softprompt.spec import ExperimentSpec
from softprompt.sweep import Sweep, driving
from softprompt.trials import TrialRecord
from tasks import (
    close_study,
    evaluate_baselines,
    evaluate_prompts,
    open_study,
    prepare_data,
    prune_prompts,
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
def sweep(experiment: ExperimentSpec, new: bool = False) -> SweepResult:
    """Search for the best soft prompt of an experiment, measure it on the untouched test split, and register it.

    A sweep of the same experiment and data that was interrupted is gone on with.

    Args:
        experiment: The frozen model, the dataset and what to search for.
        new: Whether to give up an interrupted sweep, and begin anew.
    """
    data = prepare_data(experiment)
    return search_and_register(experiment, data, open_study(experiment, data, new))


def search_and_register(experiment: ExperimentSpec, data: str, study: Sweep) -> SweepResult:
    """What follows once there is a study: the steps that every search takes."""
    with driving(study):
        trials = tune_prompts(experiment, data, study)
        show_trials(experiment, trials)
        baselines = evaluate_baselines(experiment, data)
        evaluation = evaluate_prompts(experiment, data, study, baselines)
        decision = register_prompt(experiment, study, evaluation)
        prune_prompts(experiment, study)
        close_study(experiment, study)
    return SweepResult(sweep=study, trials=trials, evaluation=evaluation, decision=decision)
