"""The winner on the test split, beside what there would be without it: the only tasks that read that split.

A champion that cannot answer these rows is left out with the reason, and does not fail the sweep. One that may have
been trained on some of them is shown, and not compared with.
"""

import tempfile
from pathlib import Path
from typing import Any

from prefect import task
from prefect.artifacts import create_markdown_artifact
from pydantic import BaseModel, ConfigDict

from softprompt.comparison import measure_baselines, measure_prompt
from softprompt.data import load_prepared
from softprompt.errors import UserError
from softprompt.evaluation import Metrics, describe_table
from softprompt.exposure import OTHER_SPLITS, may_have_seen_test
from softprompt.home import require_tracking
from softprompt.loading import load_backbone
from softprompt.progress import watcher
from softprompt.prompt import SoftPrompt
from softprompt.registry import champion_version, load_registered
from softprompt.search import TITLE, best_trial, load_study
from softprompt.spec import ExperimentSpec, fingerprint
from softprompt.storage import study_store
from softprompt.sweep import Sweep
from softprompt.tracking import Tracker
from softprompt.workbench import Workbench
from tasks.policy import close_earlier_try, flow_tags, may_retry


class Evaluation(BaseModel):
    """The systems on the test split, and which trial won."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    trial: int
    """Number of the winning trial."""
    run_id: str
    """Its run in MLflow."""
    title: str
    """Its settings in words."""
    systems: dict[str, Metrics]
    """Metrics by name, the baselines first."""
    winner: Metrics
    champion: Metrics | None
    """The registered champion on the same rows; None where there is none to compare with."""
    champion_version: int | None
    not_measured: str
    """Why there is none to compare with, where there is a champion."""


_BASELINES = 3
"""Changes with what the baselines are: those of an earlier number are measured anew."""


def _baselines_key(_: Any, arguments: dict[str, Any]) -> str | None:
    experiment: ExperimentSpec = arguments["experiment"]
    try:
        data = load_prepared(Path(arguments["data"]))
        # As the task has it, from memory: a local folder may hold other weights than last time.
        place = experiment.execution
        backbone = load_backbone(
            experiment.model, precision=experiment.precision, device=place.device, compile=place.compile
        )
    except UserError:
        return None  # said by the task itself
    parts = experiment.model_dump(mode="json", include={"model", "precision", "template", "labels", "evaluation"})
    parts |= {"weights": backbone.weights_sha256, "tokenizer": backbone.tokenizer_sha256, "digest": data.digest}
    parts |= {"max_tokens": experiment.training.max_tokens, "version": _BASELINES}
    return f"baselines-{fingerprint(parts)}"


@task(
    retries=1,
    retry_condition_fn=may_retry,
    cache_key_fn=_baselines_key,
    persist_result=True,
    result_serializer="json",
    log_prints=True,
)
def evaluate_baselines(experiment: ExperimentSpec, data: str) -> dict[str, Metrics]:
    """The systems without a soft prompt on the test split; measured once per data and model."""
    watcher().stage("measuring the baselines on the test split")
    return measure_baselines(Workbench(experiment, load_prepared(Path(data))))


@task(retries=1, retry_condition_fn=may_retry, log_prints=True)
def evaluate_prompts(experiment: ExperimentSpec, data: str, sweep: Sweep, baselines: dict[str, Metrics]) -> Evaluation:
    """The best trial and the champion on the test split, in one table with the baselines."""
    watcher().stage("measuring the winner on the test split")
    bench = Workbench(experiment, load_prepared(Path(data)))
    best = best_trial(load_study(sweep.name, study_store(), experiment))
    tracker = Tracker(experiment)
    run_id = tracker.find_trial_run(sweep.name, best.number)
    if run_id is None:
        raise RuntimeError(f"trial {best.number} of {sweep.name} has no run in MLflow")
    with tempfile.TemporaryDirectory() as folder:
        winner = SoftPrompt.load(tracker.fetch_prompt(run_id, Path(folder)))
    metrics = measure_prompt(bench, winner)
    version, champion, why_not = _measure_champion(bench)
    title = str(best.user_attrs[TITLE])
    shown = {_with_doubt(f"champion v{version}", why_not): champion} if champion else {}
    systems = {**baselines, **shown, f"winner, {title}": metrics}
    _show(systems)
    tracker.log_evaluation(sweep.run_id, systems)
    tracker.log_winner(run_id, metrics)
    return Evaluation(
        trial=best.number,
        run_id=run_id,
        title=title,
        systems=systems,
        winner=metrics,
        champion=None if why_not else champion,
        champion_version=version,
        not_measured=why_not,
    )


@task(retries=1, retry_condition_fn=may_retry)
def require_registered(experiment: ExperimentSpec, version: str) -> None:
    """Refuse a version that is not there before anything is measured, which takes minutes."""
    require_tracking()
    load_registered(experiment.name, version)


@task(retries=1, retry_condition_fn=may_retry, log_prints=True)
def evaluate_registered(
    experiment: ExperimentSpec, data: str, baselines: dict[str, Metrics], version: str
) -> dict[str, Metrics]:
    """A registered prompt on the test split, in one table with the baselines; recorded as a run of its own."""
    close_earlier_try()
    name = f"{experiment.name} {version}"
    watcher().stage(f"measuring {name} on the test split")
    prepared = load_prepared(Path(data))
    prompt = load_registered(experiment.name, version)
    bench = Workbench(experiment, prepared)
    shown = _with_doubt(name, OTHER_SPLITS if may_have_seen_test(bench, prompt) else "")
    systems = {**baselines, shown: measure_prompt(bench, prompt)}
    Tracker(experiment).record_evaluation(f"evaluate {name}", experiment, prepared, systems, flow_tags())
    _show(systems)
    return systems


def _show(systems: dict[str, Metrics]) -> None:
    """The systems in one table on the page of the flow run."""
    name = next(iter(systems.values())).objective.name.capitalize()
    create_markdown_artifact(key="result", markdown=describe_table(systems), description=f"{name} on the test split")


def _with_doubt(name: str, doubt: str) -> str:
    return f"{name} ({doubt})" if doubt else name


def _measure_champion(bench: Workbench) -> tuple[int | None, Metrics | None, str]:
    """Version and metrics of the champion, and why they do not count, where they do not."""
    version = champion_version(bench.experiment.name)
    if version is None:
        return None, None, ""
    try:
        prompt = load_registered(bench.experiment.name, str(version))
        return version, measure_prompt(bench, prompt), OTHER_SPLITS if may_have_seen_test(bench, prompt) else ""
    except UserError as error:
        return version, None, str(error)
