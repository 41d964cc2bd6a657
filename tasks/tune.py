"""The study, and the lanes that train its trials.

A model that cannot be had or used is refused before there is a study or a run: nothing is left of a mistake.
"""

import math
from pathlib import Path

from prefect import task
from prefect.artifacts import create_link_artifact, create_table_artifact

from softprompt.closing import close_abandoned_runs
from softprompt.data import load_prepared
from softprompt.evaluation import as_markdown
from softprompt.home import require_tracking
from softprompt.lane import Lane
from softprompt.objective import Objective
from softprompt.progress import watcher
from softprompt.search import load_study
from softprompt.spec import ExperimentSpec
from softprompt.storage import create_stores, study_store
from softprompt.sweep import Sweep, begin_sweep, close_sweep
from softprompt.tracking import Tracker
from softprompt.trials import TrialRecord, describe_end, trial_records
from softprompt.workbench import Workbench
from tasks.lanes import run_lanes, share_devices
from tasks.policy import flow_tags, may_retry, run_link
from tasks.prepare import describe_data
from tasks.ray_lanes import run_on_ray


@task(retries=2, retry_delay_seconds=5, retry_condition_fn=may_retry, log_prints=True)
def open_study(experiment: ExperimentSpec, data: str, new: bool = False) -> Sweep:
    """Go on with the interrupted sweep of this experiment, or begin one: a study, and a parent run in MLflow."""
    require_tracking()
    watcher().stage(describe_data(data))
    watcher().stage("loading the model")
    bench = Workbench(experiment, load_prepared(Path(data)))
    watcher().stage(f"model ready on {bench.backbone.device}, {bench.backbone.composition.name}")
    if bench.targets_cut:
        watcher().stage(
            f"{bench.targets_cut:,} texts are longer than labels.max_new_tokens: cut, and matched by nothing"
        )
    create_stores()
    close_abandoned_runs()
    sweep = begin_sweep(bench, flow_tags(), new=new)
    if sweep.resumed:
        done = len(trial_records(load_study(sweep.name, study_store(), experiment)))
        watcher().stage(f"going on with {sweep.name}, which was interrupted after {done} trials")
    create_link_artifact(
        key="mlflow-run",
        link=run_link(Tracker(experiment).experiment_id, sweep.run_id),
        link_text=sweep.name,
        description="The sweep in MLflow. For local state, start the pages with `softprompt ui`.",
    )
    return sweep


@task(retries=2, retry_delay_seconds=5, retry_condition_fn=may_retry, log_prints=True)
def tune_prompts(experiment: ExperimentSpec, data: str, sweep: Sweep) -> list[TrialRecord]:
    """Train trials of the study on this machine's devices until the budget is spent; returns all of the sweep."""

    def on_end(trial: TrialRecord) -> None:
        _show_end(trial, experiment.labels.objective)

    if experiment.execution.ray:
        run_on_ray(experiment, sweep, on_end=on_end)
    elif len(share_devices(experiment.execution)) > 1:
        run_lanes(experiment, Path(data), sweep, on_end=on_end)
    else:
        Lane(Workbench(experiment, load_prepared(Path(data))), sweep, on_end=on_end).run()
    return trial_records(load_study(sweep.name, study_store(), experiment))


# Apart from the search, which must not be lost where Prefect's server is away for a moment.
@task(retries=2, retry_delay_seconds=5)
def show_trials(experiment: ExperimentSpec, trials: list[TrialRecord]) -> None:
    """Show the trials as a table on the page of the flow run."""
    objective = experiment.labels.objective
    create_table_artifact(
        key="trials",
        table=[_row(r, objective) for r in sorted(trials, key=lambda r: _place(r, objective), reverse=True)],
        description=f"Trials of the search, best first; the score is the {objective.name} on the validation split.",
    )


@task(retries=2, retry_delay_seconds=5, retry_condition_fn=may_retry)
def close_study(experiment: ExperimentSpec, sweep: Sweep) -> None:
    """Close a sweep whose winner is not registered."""
    close_sweep(experiment, sweep)


# The name comes from a parameter: it holds texts of the user's, whose {braces} Prefect would fill in a template.
@task(task_run_name="{name}")
def record_trial(name: str, trial: TrialRecord) -> TrialRecord:
    """Show a trial's end on the page of the flow run."""
    return trial


def _show_end(trial: TrialRecord, objective: Objective) -> None:
    """As `record_trial`; a page that cannot be written ends no search."""
    try:
        record_trial(f"{trial.title}: {describe_end(trial, objective)}"[:200], trial)
    except Exception as error:
        watcher().stage(f"trial {trial.number} is not shown in Prefect ({type(error).__name__}: {error})")


def _place(record: TrialRecord, objective: Objective) -> tuple[float, int]:
    return -math.inf if record.score is None else objective.gain(record.score), -record.number


def _row(record: TrialRecord, objective: Objective) -> dict[str, str | int | float]:
    return {
        "trial": as_markdown(record.title),
        "outcome": record.outcome,
        f"validation {objective.name}": "" if record.score is None else objective.show(record.score),
        "steps": record.steps,
        "seconds": record.seconds,
        "reason": as_markdown(record.reason),
    }
