"""The records of long searches: how the time to ask, to record and to list grows with the trials and runs there are.

Ours stands beside the library alone, in turns on the same study and the same tracking store: plain Optuna with the same
TPE and its own successive halving, and `MlflowClient` without our `Tracker`. Nothing is trained. What counts is the
ratio of the two, at each size; the milliseconds are those of the machine, and of whoever shares it.

    make bench-records
"""

import argparse
import json
import os
import pwd
import random
import shutil
import socket
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any
from uuid import uuid4

import optuna
import sqlalchemy
from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import SuccessiveHalvingPruner
from optuna.samplers import TPESampler
from optuna.storages import RDBStorage
from optuna.trial import FixedTrial, FrozenTrial, TrialState, create_trial

from benchmarks.engine import RESULTS, ROOT
from softprompt import search
from softprompt.data import PreparedData
from softprompt.home import tracking_uri
from softprompt.retention import trials_of
from softprompt.spec import BudgetSpec, ExperimentSpec, HalvingPruner, load_experiment
from softprompt.sweep import Sweep
from softprompt.tracking import PARENT_RUN, STUDY, TRIAL, Tracker

NOTE = "measured in turns on a machine that others share: the ratios are what counts, not the milliseconds"
SPACE = (
    "search.initialization=[{kind: labels}, {kind: normal, scale: {low: 0.5, high: 2}}, {kind: uniform, "
    "bound: {low: 0.1, high: 1}}]",
    "search.reparameterization=[{kind: none}, {kind: residual, bottleneck: {low: 16, high: 256, log: true}}]",
    "search.max_norm={choices: [null, 1.5, 4]}",
    "search.pruner={kind: halving, first_rung: 30, factor: 2}",
    "search.start=[]",
)
ENDLESS = BudgetSpec(trials=10**9)
SIZES = (100, 1000, 5000)
TURNS = 5
Figures = dict[str, dict[str, float]]
"""Milliseconds of each side and the ratio, by what was done."""


@dataclass
class Side:
    """What one of the two does, by name; each is timed."""

    name: str
    acts: Callable[[], Iterator[tuple[str, float]]]


def compare(ours: Side, library: Side, turns: int) -> Figures:
    """The medians of both sides' times, in milliseconds, in turns."""
    seconds: dict[str, dict[str, list[float]]] = {}
    for turn in range(turns):
        for side in (ours, library) if turn % 2 else (library, ours):
            for what, took in side.acts():
                seconds.setdefault(what, {}).setdefault(side.name, []).append(took)
    figures = {}
    for what, sides in seconds.items():
        found = {name: 1000 * median(times) for name, times in sides.items()}
        ratio = found[ours.name] / found[library.name]
        figures[what] = {name: round(value, 2) for name, value in found.items()} | {"ratio": round(ratio, 2)}
    return figures


def clocked(what: str, act: Callable[[], Any], results: list[Any]) -> tuple[str, float]:
    """Do it, keep what came of it, and say how long it took in seconds."""
    began = time.perf_counter()
    results.append(act())
    return what, time.perf_counter() - began


def score_of(params: search.Params, step: int) -> float:
    """A score that depends on the settings and grows with the steps."""
    return random.Random(repr(params)).random() * float(step**0.1)


class Studies:
    """One study, asked by ours and by Optuna alone."""

    def __init__(self, url: str, experiment: ExperimentSpec) -> None:
        self._experiment = experiment
        pruner = experiment.search.pruner
        assert isinstance(pruner, HalvingPruner)
        self._rungs = experiment.rungs
        self.ours = self._load(url, None, None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            sampler = TPESampler(
                multivariate=True, group=True, n_startup_trials=experiment.search.startup_trials, seed=0
            )
        halving = SuccessiveHalvingPruner(min_resource=pruner.first_rung, reduction_factor=pruner.factor)
        self.plain = self._load(url, sampler, halving)
        self._draws = random.Random(0)

    def _load(self, url: str, sampler: Any, pruner: Any) -> optuna.Study:
        storage = RDBStorage(url)
        if storage.engine.dialect.name == "sqlite":  # what is compared is not the disk
            sqlalchemy.event.listen(storage.engine, "connect", lambda c, _: c.execute("PRAGMA synchronous = OFF"))
            storage.engine.dispose()
        self._engine = storage.engine
        if sampler is None:
            search.create_study("long", storage, self._experiment)
            return search.load_study("long", storage, self._experiment)
        return optuna.load_study(study_name="long", storage=storage, sampler=sampler, pruner=pruner)

    def fill(self, size: int) -> None:
        """Bring the study to so many trials that have ended, half of them pruned, as either side leaves them."""
        for _ in range(len(self.plain.get_trials(deepcopy=False)), min(size, SIZES[0])):
            self.plain.add_trial(self._ended())
        multiply_trials(self._engine, size)

    def _ended(self) -> FrozenTrial:
        drawn = _Drawn(self._draws)
        params = search.suggest(drawn, self._experiment.search)
        scores = {rung: score_of(params, rung) for rung in self._rungs[:4]}
        finished = self._draws.random() < 0.5
        return create_trial(
            state=TrialState.COMPLETE if finished else TrialState.PRUNED,
            value=scores[self._rungs[3]] if finished else None,
            params=drawn.params,
            distributions=drawn.distributions,
            intermediate_values=scores,
            user_attrs={search.VAL_LOSS: 0.5, search.TITLE: "trial", search.PASSED: 240},
            system_attrs={f"completed_rung_{n}": score for n, score in enumerate(scores.values())},
        )

    def compare(self) -> Figures:
        """A whole trial of each side, and its lists."""
        return compare(Side("ours", self._our_trial), Side("library", self._plain_trial), TURNS)

    def _our_trial(self) -> Iterator[tuple[str, float]]:
        study, space, got = self.ours, self._experiment.search, list[Any]()
        yield clocked("ask", lambda: search.ask(study, space, ENDLESS), got)
        trial, params = got[-1]

        def record() -> None:
            for step in self._rungs[:4]:
                search.report(trial, score_of(params, step), step)
                search.falls_behind(trial, step)
            trial.set_user_attr(search.VAL_LOSS, 0.5)
            study.tell(trial, score_of(params, self._rungs[3]))

        yield clocked("4 reports and tell", record, got)
        yield clocked("list", lambda: search.counted(study), got)
        yield clocked("best trial", lambda: search.best_trial(study), got)

    def _plain_trial(self) -> Iterator[tuple[str, float]]:
        study, got = self.plain, list[Any]()

        def ask() -> tuple[optuna.Trial, search.Params]:
            trial = study.ask()
            return trial, search.suggest(trial, self._experiment.search)

        yield clocked("ask", ask, got)
        trial, params = got[-1]

        def record() -> None:
            for step in self._rungs[:4]:
                trial.report(score_of(params, step), step)
                trial.should_prune()
            trial.set_user_attr(search.VAL_LOSS, 0.5)
            study.tell(trial, score_of(params, self._rungs[3]))

        yield clocked("4 reports and tell", record, got)
        yield clocked("list", lambda: study.get_trials(deepcopy=False), got)
        yield clocked("best trial", lambda: study.best_trial, got)


class _Drawn(FixedTrial):
    """A trial whose settings are drawn at random."""

    def __init__(self, draws: random.Random) -> None:
        super().__init__({})
        self._draws = draws

    def _suggest(self, name: str, distribution: Any) -> Any:
        choices = getattr(distribution, "choices", None)
        value = self._draws.choice(choices) if choices else self._draws.uniform(distribution.low, distribution.high)
        whole = isinstance(distribution, optuna.distributions.IntDistribution)
        self._params[name] = round(value) if whole else value
        return super()._suggest(name, distribution)


class Runs:
    """The runs of one sweep, made and listed by our tracker and by the client alone."""

    def __init__(self, experiment: ExperimentSpec) -> None:
        self._client, self._tracker = MlflowClient(tracking_uri()), Tracker(experiment)
        self._data = PreparedData(
            path=Path("/nowhere"),
            digest="0" * 64,
            source="rows",
            sizes={"train": 1, "validation": 1, "test": 1},
            labels={"train": {}, "validation": {}, "test": {}},
            left_out={},
            test_bound=None,
        )
        run_id = self._tracker.start_sweep("long", experiment, self._data, {})
        self._sweep = Sweep(name="long", run_id=run_id)
        self._params = {"length": 20, "initialization": "labels", "learning_rate": 0.01, "method": "prompt_tuning"}
        self._numbers = count()
        self._made = 0

    def fill(self, size: int) -> None:
        """Bring the sweep to so many runs, as the client makes them."""
        while self._made < min(size, SIZES[0]):
            self._make_by_client()
        self._made = multiply_runs(sqlalchemy.create_engine(tracking_uri()), self._sweep, size)

    def _make_by_client(self) -> None:
        tags = {PARENT_RUN: self._sweep.run_id, STUDY: "long", TRIAL: str(next(self._numbers))}
        run_id = self._client.create_run(self._tracker.experiment_id, run_name="trial", tags=tags).info.run_id
        now = int(time.time() * 1000)
        self._client.log_batch(run_id, params=[Param(k, str(v)) for k, v in self._params.items()])
        self._client.log_batch(run_id, metrics=[Metric("val_accuracy", 0.5, now, step) for step in range(4)])
        self._client.set_terminated(run_id)
        self._made += 1

    def _make_by_tracker(self) -> None:
        number = next(self._numbers)
        run_id = self._tracker.start_trial(
            self._sweep.run_id,
            study="long",
            number=number,
            name="trial",
        )
        self._tracker.log_params(run_id, self._params)
        self._tracker.log_inputs(run_id, self._data, ("train", "validation"))
        self._tracker.log_metrics(run_id, {"val_accuracy": 0.5})
        self._tracker.end(run_id, "finished")
        self._made += 1

    def _list(self) -> list[Any]:
        asked, runs, token = f"tags.`{PARENT_RUN}` = '{self._sweep.run_id}'", list[Any](), None
        while token != "":
            page = self._client.search_runs([self._tracker.experiment_id], asked, max_results=1000, page_token=token)
            runs += page
            token = page.token or ""
        return runs

    def compare(self) -> Figures:
        """A whole run of each side, and the list of all."""

        def ours() -> Iterator[tuple[str, float]]:
            yield clocked("create, log and end a run", self._make_by_tracker, [])
            yield clocked("list the runs", lambda: trials_of(self._client, self._sweep), [])

        def library() -> Iterator[tuple[str, float]]:
            yield clocked("create, log and end a run", self._make_by_client, [])
            yield clocked("list the runs", self._list, [])

        return compare(Side("ours", ours), Side("library", library), TURNS)


def multiply_trials(engine: sqlalchemy.Engine, size: int) -> None:
    """Copy the trials of the only study, with all that belongs to them, until there are so many."""
    tables = sqlalchemy.MetaData()
    tables.reflect(engine)
    trials = tables.tables["trials"]
    belonging = [t for t in tables.tables.values() if t is not trials and "trial_id" in t.c]
    with engine.begin() as connection:
        first = connection.execute(sqlalchemy.select(sqlalchemy.func.min(trials.c.trial_id))).scalar_one()
        have = connection.execute(sqlalchemy.select(sqlalchemy.func.count()).select_from(trials)).scalar_one()
        while have < size:
            taken = min(have, size - have)
            moved = {"trial_id": have, "number": have}
            for table in (trials, *belonging):
                own = [c for c in table.c if table is trials or not c.primary_key]
                values = [c + moved[c.name] if c.name in moved else c for c in own]
                copied = sqlalchemy.select(*values).where(table.c.trial_id < first + taken)
                connection.execute(table.insert().from_select([c.name for c in own], copied))
            have += taken
        if engine.dialect.name == "postgresql":
            last = f"(SELECT max(trial_id) FROM {trials.name})"
            connection.exec_driver_sql(f"SELECT setval(pg_get_serial_sequence('trials', 'trial_id'), {last})")


def multiply_runs(engine: sqlalchemy.Engine, sweep: Sweep, size: int) -> int:
    """Copy the runs of the sweep's trials, with all that belongs to them, until there are so many; returns how many."""
    tables = sqlalchemy.MetaData()
    tables.reflect(engine)
    belonging = [tables.tables[name] for name in ("runs", "tags", "params", "metrics", "latest_metrics")]
    with engine.begin() as connection:
        tags = tables.tables["tags"]
        runs = connection.scalars(sqlalchemy.select(tags.c.run_uuid).where(tags.c.value == sweep.run_id)).all()
        copies = [(runs[n % len(runs)], uuid4().hex) for n in range(size - len(runs))]
        for table in belonging:
            rows: dict[str, list[Any]] = {}
            for row in connection.execute(sqlalchemy.select(table)).mappings():
                rows.setdefault(row["run_uuid"], []).append(dict(row))
            made = [row | {"run_uuid": new} for old, new in copies for row in rows.get(old, [])]
            if made:
                connection.execute(table.insert(), made)
    return len(runs) + len(copies)


@contextmanager
def temporary_postgres() -> Iterator[str | None]:
    """The address of a PostgreSQL that lasts as long as the block; None where none is installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    owner = _owner()
    if not found or owner is None:
        yield None
        return
    folder = Path(tempfile.mkdtemp(prefix="softprompt-postgres-"))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]

    def run(*command: str) -> None:
        user = owner if os.getuid() == 0 else None
        subprocess.run(command, user=user, check=True, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    control = str(found[-1].with_name("pg_ctl"))
    try:
        shutil.chown(folder, owner)
        run(str(found[-1]), "-D", f"{folder}/data", "-U", "bench", "-A", "trust", "-E", "UTF8", "--no-sync")
        options = f"-c listen_addresses='' -c port={port} -c unix_socket_directories={folder} -c fsync=off"
        run(control, "-D", f"{folder}/data", "-w", "-l", f"{folder}/log", "-o", options, "start")
        try:
            yield f"postgresql+psycopg2://bench@/postgres?host={folder}&port={port}"
        finally:
            run(control, "-D", f"{folder}/data", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _owner() -> str | None:
    """The user that PostgreSQL runs as: never root."""
    if os.getuid():
        return pwd.getpwuid(os.getuid()).pw_name
    try:
        return pwd.getpwnam("postgres").pw_name
    except KeyError:
        return None


def measure(sizes: Sequence[int], minutes: float) -> dict[str, Any]:
    """The figures by store and by size; a size that the time does not allow is left out, and so are the larger."""
    experiment = load_experiment(ROOT / "experiments" / "movie-sentiment.yaml", list(SPACE))
    record: dict[str, Any] = {}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as home, temporary_postgres() as postgres:
        os.environ["SOFTPROMPT_HOME"] = home
        os.environ.pop("MLFLOW_TRACKING_URI", None)  # with a store of the user's, artifacts would go there too
        urls = {"Optuna on SQLite": f"sqlite:///{home}/optuna.db", "Optuna on PostgreSQL": postgres}
        for n, (store, url) in enumerate(urls.items(), start=1):
            until = began + 60 * minutes * n / 3
            if url is not None:
                record[store] = _measure_study(Studies(url, experiment), sizes, store, until)
        record["MLflow on SQLite"] = _measure_runs(Runs(experiment), sizes, began + 60 * minutes)
    return record


def _measure_study(studies: Studies, sizes: Sequence[int], store: str, until: float) -> dict[str, Figures]:
    record: dict[str, Figures] = {}
    for size in sizes:
        if time.monotonic() > until:
            break
        studies.fill(size)
        studies.compare()  # warm: the first list reads all trials
        record[str(size)] = studies.compare()
        show(store, size, record[str(size)])
    return record


def _measure_runs(runs: Runs, sizes: Sequence[int], until: float) -> dict[str, Figures]:
    record: dict[str, Figures] = {}
    for size in sizes:
        if time.monotonic() > until:
            break
        runs.fill(size)
        record[str(size)] = runs.compare()
        show("MLflow on SQLite", size, record[str(size)])
    return record


def show(store: str, size: int, figures: Figures) -> None:
    """Print a store's figures at a size."""
    for what, sides in figures.items():
        ours, library, ratio = sides["ours"], sides["library"], sides["ratio"]
        print(
            f"{store:22} {size:6,}  {what:26} ours {ours:9.1f} ms   library {library:9.1f} ms   {ratio:5.2f}",
            flush=True,
        )


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="leave out the sizes that take longer")
    record = measure(SIZES, parser.parse_args().minutes)
    file = RESULTS / "records.json"
    written = {"date": datetime.now(UTC).date().isoformat(), "note": NOTE, "cores": os.cpu_count()} | record
    file.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    print(f"written to {file.relative_to(ROOT)}; {NOTE}")


if __name__ == "__main__":
    main()
