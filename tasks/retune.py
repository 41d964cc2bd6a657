"""What a retune does before it searches: look for news, tell drift, and choose where to start from."""

from pathlib import Path

from prefect import task
from prefect.artifacts import create_markdown_artifact

from softprompt.data import load_prepared
from softprompt.drift import Drift
from softprompt.progress import watcher
from softprompt.retuning import News, Start, find_news, tell_drift, warm_start
from softprompt.spec import ExperimentSpec
from softprompt.storage import create_stores
from softprompt.sweep import Sweep
from softprompt.tracking import Tracker
from softprompt.workbench import Workbench
from tasks.policy import flow_tags, may_retry


@task(retries=2, retry_delay_seconds=5, retry_condition_fn=may_retry, log_prints=True)
def look_for_news(experiment: ExperimentSpec, data: str) -> News:
    """Whether the rows are other ones than those of the champion and of the last retune."""
    news = find_news(experiment, load_prepared(Path(data)))
    if news.champion is None:
        watcher().stage(f"{experiment.name} has no champion yet: this retune is a sweep")
    else:
        watcher().stage(news.nothing_new or f"the rows are new since champion v{news.champion}")
    return news


@task(retries=2, retry_delay_seconds=5, retry_condition_fn=may_retry, log_prints=True)
def record_nothing_new(experiment: ExperimentSpec, data: str, news: News) -> None:
    """Leave a small record of a retune that had nothing to do, in MLflow and on the page of the flow run."""
    create_stores()
    Tracker(experiment).record_nothing_new(load_prepared(Path(data)), news.nothing_new, flow_tags())
    create_markdown_artifact(key="retune", markdown=f"{news.nothing_new}.", description="What the retune found and did")


@task(retries=1, retry_condition_fn=may_retry, log_prints=True)
def measure_drift(experiment: ExperimentSpec, data: str, news: News) -> Drift | None:
    """How the rows and the champion's score on them differ from what they were; None where there is no champion."""
    if news.champion is None:
        return None
    watcher().stage(f"measuring champion v{news.champion} on the new rows")
    drift = tell_drift(Workbench(experiment, load_prepared(Path(data))), news.champion)
    watcher().stage(drift.verdict)
    create_markdown_artifact(key="drift", markdown=drift.describe(), description="The new rows and the champion's")
    return drift


@task(retries=1, retry_condition_fn=may_retry, log_prints=True)
def choose_start(experiment: ExperimentSpec, data: str, news: News, earlier: int) -> ExperimentSpec:
    """The experiment with the champion and the best earlier settings to start from; as it is where there are none."""
    if news.champion is None:
        return experiment
    start: Start = warm_start(Workbench(experiment, load_prepared(Path(data))), news.champion, earlier=earlier)
    watcher().stage(start.told)
    return start.experiment


@task(retries=2, retry_delay_seconds=5, retry_condition_fn=may_retry, log_prints=True)
def record_retune(experiment: ExperimentSpec, data: str, sweep: Sweep, drift: Drift | None) -> None:
    """Mark the sweep's run as a retune, with what has drifted."""
    Tracker(experiment).log_retune(sweep.run_id, load_prepared(Path(data)), drift)
