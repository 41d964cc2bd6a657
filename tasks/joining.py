"""How a lane from elsewhere comes into an open sweep: found by name, and joined only with what it was opened with.

Lanes meet in the study's storage and the tracking server alone. A lane with other rows, other weights or another
experiment would put scores into the study that compare with none there, so it is refused.
"""

from pathlib import Path

from prefect import task

from softprompt.data import load_prepared
from softprompt.home import require_tracking
from softprompt.progress import watcher
from softprompt.spec import ExperimentSpec
from softprompt.sweep import Sweep, find_open, require_same
from softprompt.workbench import Workbench
from tasks.policy import may_retry
from tasks.prepare import describe_data


@task(retries=2, retry_delay_seconds=5, retry_condition_fn=may_retry, log_prints=True)
def join_study(experiment: ExperimentSpec, data: str, name: str | None = None) -> Sweep:
    """Find the open sweep, and see that model and data here are those that it was opened with."""
    require_tracking()
    sweep = find_open(experiment, name)
    watcher().stage(describe_data(data))
    watcher().stage("loading the model")
    require_same(sweep, Workbench(experiment, load_prepared(Path(data))))
    watcher().stage(f"joining {sweep.name}")
    return sweep
