"""Lanes on a Ray cluster: each is a Prefect task that Ray places on a node with a free GPU, or a free core.

What a node needs, it has by itself: this package, the data's files, and addresses and credentials in the environment in
which Ray was started there. None of it is sent, as Ray shows the environment of its jobs.
"""

from collections.abc import Callable

from prefect import task
from prefect.futures import PrefectFuture

from softprompt.data import prepare
from softprompt.errors import UserError
from softprompt.home import cache_home
from softprompt.lane import Lane
from softprompt.progress import watcher
from softprompt.spec import ExperimentSpec
from softprompt.sweep import Sweep, require_same
from softprompt.trials import TrialRecord
from softprompt.workbench import Workbench

LOCAL = "local"
"""The address that stands for a Ray of this machine alone, started and ended with the sweep."""


@task(name="ray_lane", log_prints=True)
def train_lane(experiment: ExperimentSpec, sweep: Sweep) -> list[TrialRecord]:
    """Train trials of an open sweep with the data and the weights that this node has, which must be the sweep's."""
    bench = Workbench(experiment, prepare(experiment, cache_home()))
    require_same(sweep, bench)
    records: list[TrialRecord] = []
    Lane(bench, sweep, on_end=records.append).run()
    return records


def run_on_ray(experiment: ExperimentSpec, sweep: Sweep, *, on_end: Callable[[TrialRecord], None]) -> None:
    """Train trials in `execution.lanes` lanes on the cluster at `execution.ray`, until no lane finds any left.

    Raises UserError where the extra is missing or the number of lanes is not given, and what the last lane failed with
    where none came to its end.
    """
    execution = experiment.execution
    if execution.lanes == "auto":
        raise UserError("execution.lanes: auto counts this machine's GPUs; with execution.ray, give a number")
    try:
        from prefect_ray import RayTaskRunner
        from prefect_ray.context import remote_options
    except ImportError:
        raise UserError("execution.ray: needs the extra `ray`, as in: pip install 'softprompt[ray]'") from None
    address = None if execution.ray == LOCAL else execution.ray
    own = experiment.model_copy(update={"execution": execution.model_copy(update={"ray": None, "lanes": 1})})
    place = {"num_cpus": 1, "num_gpus": 0 if execution.device == "cpu" else 1}
    runner = RayTaskRunner(address=address, init_kwargs=None if address else {"include_dashboard": False})
    with runner, remote_options(**place):
        lanes = [runner.submit(train_lane, {"experiment": own, "sweep": sweep}) for _ in range(execution.lanes)]
        _await_lanes(lanes, on_end)


def _await_lanes(lanes: list[PrefectFuture[list[TrialRecord]]], on_end: Callable[[TrialRecord], None]) -> None:
    errors = []
    for number, lane in enumerate(lanes):
        try:
            for record in lane.result():
                on_end(record)
        except Exception as error:
            watcher().stage(f"lane {number} failed: {error}")
            errors.append(error)
    if len(errors) == len(lanes):
        raise errors[-1]
