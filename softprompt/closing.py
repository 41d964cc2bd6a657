"""Records whose process ended without closing them.

What a sweep leaves behind is interrupted, not failed: its trials are in their checkpoints, and `softprompt sweep` goes
on with them. So its trials stay as they are in Optuna; only a sweep that is given up for a new one ends there, too.
Whatever else was left open will not go on, and is closed as its end wants it.

Nothing here judges whether a process is at work on another machine: only what a flow run that is over left behind is
closed, and what a process of this machine did that is gone.
"""

import socket

import psutil
from mlflow import MlflowClient
from mlflow.entities import Run

from softprompt.history import Outcome
from softprompt.home import owns_tracking, require_tracking, tracking_file, tracking_uri
from softprompt.ledger import open_ledger
from softprompt.search import fail_running
from softprompt.storage import study_store
from softprompt.tracking import FLOW_RUN, HOST, OUTCOME, PARENT_RUN, PID, STUDY, SweepRecord, end_run

GOES_ON = "`softprompt sweep` goes on with it"
_GIVEN_UP = "given up for a new sweep"


def close_open_runs(flow_run_id: str, outcome: Outcome, reason: str) -> None:
    """Close every run that a flow run left without an outcome: sweep, trials, evaluation.

    The status does not tell: MLflow sets a sweep's to FINISHED already when a version is registered from it.
    """
    if owns_tracking() and not tracking_file().exists():
        return  # a mistake ended the flow before there was any record, and MLflow would make the file
    require_tracking()
    client = MlflowClient(tracking_uri=tracking_uri())
    for run in _find_open(client, FLOW_RUN, flow_run_id):
        _close(client, run, outcome, reason)


def close_abandoned_runs() -> None:
    """Close what sweeps and evaluations on this machine left open whose process is gone, as after a kill."""
    client = MlflowClient(tracking_uri=tracking_uri())
    for run in _find_open(client, HOST, socket.gethostname()):
        if is_dead(run.data.tags[HOST], int(run.data.tags[PID])):
            _close(client, run, "failed", "its process is gone")


def abandon(sweep: SweepRecord) -> None:
    """End for good a sweep that could go on: its trials, in Optuna and in MLflow, and its own run."""
    fail_running(sweep.name, study_store())
    client = MlflowClient(tracking_uri=tracking_uri())
    for run in _find(client, f"tags.`{STUDY}` = '{sweep.name}'"):
        if run.data.tags.get(OUTCOME, "interrupted") == "interrupted":
            end_run(client, run.info.run_id, "interrupted", _GIVEN_UP)


def is_dead(host: str, pid: int) -> bool:
    """Whether a process is known to be gone: of another machine's nothing is known."""
    return host == socket.gethostname() and not psutil.pid_exists(pid)


def _close(client: MlflowClient, run: Run, outcome: Outcome, reason: str) -> None:
    """Close a run with its trials. Those of a sweep that can go on are interrupted, whatever befell it."""
    study = run.data.tags.get(STUDY)
    if study is not None and open_ledger().is_open(study):
        outcome, reason = "interrupted", f"{reason}; {GOES_ON}"
    elif study is not None:
        fail_running(study, study_store())
    for trial in _find_open(client, PARENT_RUN, run.info.run_id):
        end_run(client, trial.info.run_id, outcome, reason)
    end_run(client, run.info.run_id, outcome, reason)  # last: by it the others are found


def _find_open(client: MlflowClient, tag: str, value: str) -> list[Run]:
    return _find(client, f"tags.`{tag}` = '{value}' and tags.`{OUTCOME}` IS NULL")


def _find(client: MlflowClient, asked: str) -> list[Run]:
    """Runs of any experiment."""
    everywhere = [e.experiment_id for e in client.search_experiments()]
    page = client.search_runs(everywhere, asked, max_results=1000)
    found = list(page)
    while page.token:
        page = client.search_runs(everywhere, asked, max_results=1000, page_token=page.token)
        found += page
    return found
