"""What the suite knows of the product: how a sweep is begun or gone on with, and where in it a process may die.

Everything else in this folder speaks of processes, signals, servers and facts only.
"""

import math
import sys
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from softprompt.home import tracking_uri
from softprompt.lane import Lane, open_sweep
from softprompt.spec import ExperimentSpec
from softprompt.store import create_stores
from softprompt.tracking import OUTCOME, PARENT_RUN, Tracker
from softprompt.workbench import Workbench
from tests.faults.children import Hook
from tests.faults.hooks import calls, wrap
from tests.tiny import tiny_experiment

STEP = "softprompt.lane:step"
"""One step of training."""
POINTS = (
    "optuna.study:Study.ask",
    "optuna.trial:Trial.suggest_float",
    "optuna.trial:Trial.report",
    "optuna.trial:Trial.should_prune",
    "optuna.study:Study.tell",
    "sqlalchemy.engine.default:DefaultDialect.do_commit",
    "os:replace",
    "os:fsync",
    "softprompt.checkpoint:Checkpoints.save",
    "softprompt.checkpoint:Checkpoints.load",
    "softprompt.checkpoint:Checkpoints.close",
    "softprompt.checkpoint:Checkpoints.remove",
    "softprompt.ledger:Ledger.claim",
    "softprompt.ledger:Ledger.release",
    "softprompt.ledger:Ledger.end_sweep",
    "softprompt.delivery:Delivery.put",
    "softprompt.delivery:Delivery.flush",
    "mlflow:MlflowClient.create_run",
    "mlflow:MlflowClient.log_batch",
    "mlflow:MlflowClient.log_artifacts",
    "mlflow:MlflowClient.set_tag",
    "mlflow:MlflowClient.set_terminated",
)
"""Calls just before and just after which a process dies: together, between any two records that belong together."""
SAVED = "softprompt.checkpoint:Checkpoints.save"
LEDGER = "softprompt.ledger:Ledger.__init__"
CHECKPOINTS = "sweeps/*/trial-*/*.safetensors"
"""Where in a state the checkpoints are."""
TRIALS = 7
"""Trials of the experiment; the third asks for what the first has, and does not count."""


def make_experiment(folder: Path, *, trials: int = TRIALS) -> ExperimentSpec:
    """Seven trials of at most 24 steps on a tiny Llama: five finish, two are pruned; a duplicate beside."""
    first = {"length": 4, "initialization": "labels", "learning_rate": 0.02}
    second = {"length": 2, "initialization": "normal", "learning_rate": 0.1}
    plain = tiny_experiment(folder).model_dump(mode="json")
    search = plain["search"] | {
        "start": [first, second, first],
        "learning_rate": {"low": 0.02, "high": 0.5, "log": True},
        "pruner": {"kind": "halving", "first_rung": 6, "factor": 2},
        "initialization": [{"kind": "normal"}, {"kind": "labels"}, {"kind": "vocabulary"}],
    }
    training = plain["training"] | {"steps": 24}
    return tiny_experiment(folder, name="tiny-faults", search=search, training=training, budget={"trials": trials})


def prepare(experiment: ExperimentSpec) -> Workbench:
    """The experiment with its model loaded, before any process is forked."""
    bench = Workbench(experiment)
    _ = bench.examples, bench.passes, bench.loss, bench.labels
    return bench


def run_sweep(bench: Workbench) -> dict[str, Any]:
    """Begin the sweep or go on with it, until it is over; what is over is left alone."""
    create_stores()
    if not _is_over(bench.experiment):
        sweep = open_sweep(bench.experiment, bench.data, {})
        Lane(bench, sweep).run()
        Tracker(bench.experiment).end(sweep.run_id, "finished")
    backbone = bench.backbone
    return {
        "same weights": backbone.weights_in_memory_sha256() == backbone.weights_sha256,
        "calls": dict(calls),
        "imported": sorted(sys.modules),
    }


def _is_over(experiment: ExperimentSpec) -> bool:
    client = MlflowClient(tracking_uri())
    place = client.get_experiment_by_name(experiment.name)
    runs = client.search_runs([place.experiment_id]) if place else []
    return any(PARENT_RUN not in r.data.tags and r.data.tags.get(OUTCOME) == "finished" for r in runs)


def not_finite_in(number: int) -> Hook:
    """Plant numbers that are not finite in one trial: its first update is infinite, and so is what follows."""

    def around(real: Any) -> Any:
        def start(bench: Workbench, params: dict[str, Any], *, seed: Any) -> Any:
            planted = params | {"learning_rate": math.inf} if seed[1] == number else params
            return real(bench, planted, seed=seed)

        return start

    return lambda: wrap("softprompt.workbench:Workbench.start", around)
