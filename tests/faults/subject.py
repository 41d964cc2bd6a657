"""What the suite knows of the product: how a sweep is begun or gone on with, and where in it a process may die.

Everything else in this folder speaks of processes, signals, servers and facts only.
"""

import math
import sys
from pathlib import Path
from typing import Any

import optuna

from softprompt.errors import UserError
from softprompt.lane import Lane
from softprompt.ledger import open_ledger
from softprompt.spec import ExperimentSpec
from softprompt.storage import create_stores, study_store
from softprompt.sweep import Sweep, begin_sweep, close_sweep, driving
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
    parts: dict[str, Any] = {"search": search, "training": training, "budget": {"trials": trials}}
    parts["execution"] = {"device": "cpu", "checkpoint_seconds": 0.02}  # often, so that there is one to be lost
    return tiny_experiment(folder, name="tiny-faults", **parts)


def prepare(experiment: ExperimentSpec) -> Workbench:
    """The experiment with its model loaded, before any process is forked."""
    bench = Workbench(experiment)
    _ = bench.examples, bench.passes, bench.loss, bench.target
    return bench


def run_sweep(bench: Workbench) -> dict[str, Any]:
    """Begin the sweep, go on with it, or help whoever drives it, until it is over; what is over is left alone."""
    create_stores()
    if not _is_over(bench.experiment):
        try:
            _drive(bench)
        except UserError as error:
            if "is at work already" not in str(error):
                raise
            _help(bench)
    backbone = bench.backbone
    return {
        "same weights": backbone.weights_in_memory_sha256() == backbone.weights_sha256,
        "calls": dict(calls),
        "imported": sorted(sys.modules),
    }


def _drive(bench: Workbench) -> None:
    sweep = begin_sweep(bench, {})
    with driving(sweep):
        Lane(bench, sweep).run()
        close_sweep(bench.experiment, sweep)


def _help(bench: Workbench) -> None:
    for row in open_ledger().open_sweeps(bench.experiment.name):
        Lane(bench, Sweep(name=row.name, run_id=row.run_id)).run()


def _is_over(experiment: ExperimentSpec) -> bool:
    return bool(optuna.get_all_study_names(study_store())) and not open_ledger().open_sweeps(experiment.name)


def not_finite_in(number: int) -> Hook:
    """Plant numbers that are not finite in one trial: its first update is infinite, and so is what follows."""

    def around(real: Any) -> Any:
        def start(bench: Workbench, params: dict[str, Any], *, seed: Any) -> Any:
            planted = params | {"learning_rate": math.inf} if seed[1] == number else params
            return real(bench, planted, seed=seed)

        return start

    return lambda: wrap("softprompt.workbench:Workbench.start", around)
