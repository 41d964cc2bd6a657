"""A sweep as a whole: begun, found again after an interruption, driven by one process at a time, and ended.

The ledger knows which sweeps are open. A row there is the first that is written of a sweep, and everything after it
may be written again: killed at any instant, the next start finds the row and goes on.
"""

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from uuid import uuid4

from pydantic import BaseModel, ConfigDict

from softprompt import search
from softprompt.closing import abandon
from softprompt.errors import UserError
from softprompt.home import checkpoint_home
from softprompt.ledger import Ledger, SweepRow, open_ledger
from softprompt.progress import watcher
from softprompt.spec import ExperimentSpec
from softprompt.storage import study_store
from softprompt.tracking import Tracker
from softprompt.workbench import Workbench

SWEEP = "sweep"
"""What is leased by the process that drives a sweep."""


class Sweep(BaseModel):
    """Where a sweep's records are: what every lane needs to join it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """Name of the Optuna study and of the parent run."""
    run_id: str
    """MLflow id of the parent run."""
    resumed: bool = False
    """Whether it was begun by an earlier process, which did not end it."""


def begin_sweep(bench: Workbench, tags: Mapping[str, str], *, new: bool = False) -> Sweep:
    """The open sweep of the same experiment, rows and weights, gone on with, or a new one; this process drives it.

    Args:
        bench: the experiment, with its data and model.
        tags: what the parent run carries beside its own tags.
        new: whether to give up an open one and begin anew.

    Raises UserError where another process is driving it.
    """
    ledger, experiment = open_ledger(), bench.experiment
    Tracker(experiment).require_experiment()  # before anything is written, or given up
    identity = _identify(bench)
    for row in ledger.open_sweeps(experiment.name):
        if row.identity != identity:
            continue
        _take(ledger, row.name)
        if not new:
            return _open(bench, row, tags, resumed=True)
        abandon(row)
        ledger.end_sweep(row.name)
        shutil.rmtree(checkpoint_home() / row.name, ignore_errors=True)
    # Two sweeps may begin in one second.
    name = f"{experiment.name}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{uuid4().hex[:4]}"
    row = SweepRow(name=name, experiment=experiment.name, identity=identity, run_id="", seconds=0.0)
    ledger.add_sweep(row)
    _take(ledger, name)
    return _open(bench, row, tags, resumed=False)


def find_open(experiment: ExperimentSpec, name: str | None = None) -> Sweep:
    """The open sweep of an experiment, or the one of this name.

    Raises UserError where there is none, or several to choose from.
    """
    rows = {row.name: row for row in open_ledger().open_sweeps(experiment.name) if row.run_id}
    if name is not None:
        if name not in rows:
            raise UserError(
                f"--sweep {name}: is no open sweep of {experiment.name}; open are {', '.join(rows) or 'none'}"
            )
        return Sweep(name=name, run_id=rows[name].run_id, resumed=True)
    # Of several that are open, the one of this very experiment.
    own = {n: r for n, r in rows.items() if json.loads(r.identity)["experiment"] == experiment.fingerprint} or rows
    if not own:
        raise UserError(
            f"{experiment.name} has no open sweep; start one with `softprompt sweep`, and give this lane the same "
            "MLFLOW_TRACKING_URI and SOFTPROMPT_STORAGE"
        )
    if len(own) > 1:
        raise UserError(f"{experiment.name} has several open sweeps; choose one with --sweep: {', '.join(own)}")
    return find_open(experiment, next(iter(own)))


def require_same(sweep: Sweep, bench: Workbench) -> None:
    """UserError where an experiment, its rows or its model are not those that a sweep was opened with."""
    row = open_ledger().find_sweep(sweep.name)
    theirs, own = json.loads(row.identity) if row else {}, json.loads(_identify(bench))
    advice = {
        "experiment": "give this lane the file that the sweep was started with",
        "rows": "give this machine the same data files",
        "model": "give this machine the same weights",
        "tokenizer": "give this machine the same tokenizer files",
    }
    for part, words in advice.items():
        if theirs.get(part) != own[part]:
            found = str(theirs.get(part, "none"))[:12]
            raise UserError(
                f"the {part} here has the hash {own[part][:12]}, and {sweep.name} was opened with {found}; {words}"
            )


def _identify(bench: Workbench) -> str:
    """What two sweeps have in common that are the same."""
    backbone = bench.backbone
    parts = {"experiment": bench.experiment.fingerprint, "rows": bench.data.digest}
    parts |= {"model": backbone.weights_sha256, "tokenizer": backbone.tokenizer_sha256}
    return json.dumps(parts, sort_keys=True)


def _open(bench: Workbench, row: SweepRow, tags: Mapping[str, str], *, resumed: bool) -> Sweep:
    """Make what is not there yet of a sweep's records."""
    search.create_study(row.name, study_store(), bench.experiment)
    tracker = Tracker(bench.experiment)
    run_id = tracker.start_sweep(row.name, bench.experiment, bench.data, tags)
    if resumed:
        tracker.reopen_sweep(run_id, tags)
    open_ledger().name_run(row.name, run_id)
    return Sweep(name=row.name, run_id=run_id, resumed=resumed)


def _take(ledger: Ledger, name: str) -> None:
    """Hold the lease of a sweep; that of a process elsewhere is watched for a while to see whether it still moves."""
    deadline, told = time.monotonic() + 1.5 * ledger.patience, False
    while not ledger.claim(name, SWEEP):
        holder = ledger.holder_of(name, SWEEP)
        if holder is not None and (holder.here or time.monotonic() > deadline):
            raise UserError(
                f"{name} is at work already, in process {holder.pid} on {holder.host}; wait for it, help it with "
                "`softprompt lane`, or begin another one with --new once it has ended"
            )
        if not told:
            watcher().stage(f"{name} was begun elsewhere; seeing whether it is still at work")
            told = True
        time.sleep(0.5)


@contextmanager
def driving(sweep: Sweep) -> Iterator[None]:
    """Keep the lease of a sweep alive inside the block, and let go of it afterwards."""
    ledger = open_ledger()
    try:
        with ledger.beating():
            yield
    except search.HopelessSweep:
        ledger.end_sweep(sweep.name)
        raise
    finally:
        ledger.let_go(sweep.name, [SWEEP])


def close_sweep(experiment: ExperimentSpec, sweep: Sweep) -> None:
    """Record that a sweep has come to its end: it is not gone on with."""
    Tracker(experiment).end(sweep.run_id, "finished")
    open_ledger().end_sweep(sweep.name)
    shutil.rmtree(checkpoint_home() / sweep.name, ignore_errors=True)
