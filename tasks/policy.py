"""What the tasks share: what is worth a retry, and the ways from a Prefect page to MLflow's and back."""

from typing import Any

from prefect import Task
from prefect.client.schemas import TaskRun
from prefect.runtime import flow_run
from prefect.states import State

from softprompt.closing import close_open_runs
from softprompt.errors import UserError
from softprompt.home import tracking_server
from softprompt.tracking import FLOW_RUN


async def may_retry(task: Task[Any, Any], run: TaskRun, state: State[Any]) -> bool:
    """Whether another try could help: a user's mistake stays one."""
    try:
        await state.aresult()
    except UserError:
        return False
    except Exception:
        return True
    return False


def flow_tags() -> dict[str, str]:
    """What every MLflow run of this flow run carries."""
    return {FLOW_RUN: str(flow_run.id or "")}


def close_earlier_try() -> None:
    """Leave nothing open of an earlier try of this task or of this flow run."""
    if flow_run.id:
        close_open_runs(flow_run.id, "failed", "retried")


def run_link(experiment_id: str, run_id: str) -> str:
    """Address of a run's page in the MLflow UI: the user's server, else the one that `softprompt ui` serves."""
    return f"{tracking_server() or 'http://127.0.0.1:5000'}/#/experiments/{experiment_id}/runs/{run_id}"
