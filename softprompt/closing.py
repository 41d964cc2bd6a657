"""Records whose process ended without closing them: runs of MLflow, and trials of Optuna.

Nothing here judges whether a process is at work on another machine: only what a flow run that is over left behind is
closed, and what a process of this machine did that is gone.
"""

import socket

import psutil
from mlflow import MlflowClient
from mlflow.entities import Run

from softprompt.history import Outcome
from softprompt.home import owns_tracking, require_tracking, tracking_file, tracking_uri
from softprompt.search import fail_running
from softprompt.storage import study_store
from softprompt.tracking import FLOW_RUN, HOST, OUTCOME, PARENT_RUN, PID, STUDY, end_run


def close_open_runs(flow_run_id: str, outcome: Outcome, reason: str) -> None:
    """Close every run that a flow run left without an outcome: sweep, trials, evaluation; and its trials in Optuna.

    The status does not tell: MLflow sets a sweep's to FINISHED already when a version is registered from it.
    """
    if owns_tracking() and not tracking_file().exists():
        return  # a mistake ended the flow before there was any record, and MLflow would make the file
    require_tracking()
    client = MlflowClient(tracking_uri=tracking_uri())
    _close(client, _find_open(client, FLOW_RUN, flow_run_id), outcome, reason)


def close_abandoned_runs() -> None:
    """Close what sweeps and evaluations on this machine left open whose process is gone, as after a kill."""
    client = MlflowClient(tracking_uri=tracking_uri())
    for parent in _find_open(client, HOST, socket.gethostname()):
        if not psutil.pid_exists(int(parent.data.tags[PID])):
            trials = _find_open(client, PARENT_RUN, parent.info.run_id)
            _close(client, [*trials, parent], "failed", "its process is gone")


def _find_open(client: MlflowClient, tag: str, value: str) -> list[Run]:
    everywhere = [e.experiment_id for e in client.search_experiments()]
    asked = f"tags.`{tag}` = '{value}' and tags.`{OUTCOME}` IS NULL"
    return list(client.search_runs(everywhere, asked, max_results=5000))


def _close(client: MlflowClient, runs: list[Run], outcome: Outcome, reason: str) -> None:
    for run in runs:
        end_run(client, run.info.run_id, outcome, reason)
    for study in {run.data.tags[STUDY] for run in runs if STUDY in run.data.tags}:
        fail_running(study, study_store())
