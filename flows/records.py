"""What a flow leaves behind when it does not end well: Prefect runs these hooks, maybe in another process."""

from typing import Any

from prefect.client.schemas import FlowRun
from prefect.flows import Flow
from prefect.states import State

from softprompt.closing import close_open_runs


def close_failed(flow: Flow[Any, Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Bring runs and trials of a failed or crashed flow run to their true state."""
    close_open_runs(str(flow_run.id), "failed", state.message or state.name or "")


def close_cancelled(flow: Flow[Any, Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Bring runs and trials of a cancelled flow run to their true state."""
    close_open_runs(str(flow_run.id), "interrupted", "cancelled")
