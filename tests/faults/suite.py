"""Runs the scenarios on all cores, and tells what became of them.

Two processes that hold nothing but the imports take scenarios in turn; each scenario runs in children of theirs.
"""

import contextlib
import hashlib
import importlib
import importlib.metadata
import json
import os
import platform
import random
import resource
import shutil
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import sqlalchemy.orm

from softprompt.storage import create_stores
from tests.faults import scenarios, services, subject
from tests.faults.children import Home, ask, end_with_parent
from tests.faults.comparison import compare
from tests.faults.scenarios import KINDS, Case, Kind, Stage, Stuck

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "faults.json"
DOCS = RESULTS.parents[2] / "docs" / "operating.md"
LEAST = 200
"""Faults that a whole run injects at least."""


@dataclass(frozen=True)
class Settings:
    """What is run."""

    seed: int
    count: int
    """Faults to inject, about."""
    only: str
    """Part of the name of the kinds that are run; empty for all."""
    lanes: int
    """Processes that run scenarios."""
    keep: Path | None = None
    """Folder for the state and the log of what was not survived."""
    record: bool = False
    """Whether the table of a whole run goes into the results and the docs."""

    @classmethod
    def from_environment(cls) -> "Settings":
        """`FAULTS_SEED`, `FAULTS_COUNT`, `FAULTS_ONLY`, `FAULTS_KEEP` and `FAULTS_RECORD`."""
        return cls(
            seed=int(os.environ.get("FAULTS_SEED", "0")),
            count=int(os.environ.get("FAULTS_COUNT", "0")),
            only=os.environ.get("FAULTS_ONLY", ""),
            lanes=max(1, min(4, os.cpu_count() or 1)),
            keep=Path(os.environ["FAULTS_KEEP"]).absolute() if os.environ.get("FAULTS_KEEP") else None,
            record=bool(os.environ.get("FAULTS_RECORD")),
        )


@dataclass(frozen=True)
class Row:
    """What became of the faults of one kind."""

    kind: str
    tried: int = 0
    survived: int = 0
    """Faults of sweeps that ended as their twin did."""
    lost: int = 0
    """Records of the twin that are missing."""
    doubled: int = 0
    """Records that the twin has not, or not so often."""
    failed: int = 0
    """Sweeps that did not end as their twin did, or not in the way in which they have to."""

    def __add__(self, other: "Row") -> "Row":
        return Row(
            self.kind,
            self.tried + other.tried,
            self.survived + other.survived,
            self.lost + other.lost,
            self.doubled + other.doubled,
            self.failed + other.failed,
        )


@dataclass(frozen=True)
class Job:
    """One scenario to play."""

    kind: Kind
    round: int
    faults: int


def plan(settings: Settings, *, postgres: bool) -> list[Job]:
    """The scenarios to play, dearest first; where another count is asked for, more or fewer sweeps of each kind."""
    usual = sum(kind.sweeps * kind.faults for kind in KINDS)
    factor = settings.count / usual if settings.count else 1.0
    chosen = [k for k in KINDS if settings.only.lower() in k.name.lower() and (postgres or not k.postgres)]
    return [Job(k, n, k.faults) for k in chosen for n in range(max(1, round(k.sweeps * factor)))]


def run(settings: Settings, folder: Path) -> int:
    """Run the suite in a folder of its own; returns the exit status."""
    began = time.monotonic()
    stage = _prepare(folder)
    jobs = plan(settings, postgres=stage.postgres is not None)
    print(f"FAULTS_SEED={settings.seed}, {len(jobs)} sweeps on {settings.lanes} processes", flush=True)
    if stage.postgres is None:
        print("PostgreSQL is not installed, or may not be run: its faults are left out", flush=True)
    weights = _tree_digest(folder / "experiment" / "model")
    _measure_twins(stage, folder, commands=any(j.kind.scenario is scenarios.command_interrupted for j in jobs))
    rows = _share_out(stage, settings, jobs, folder)
    if _tree_digest(folder / "experiment" / "model") != weights:
        print("the files of the base model have changed", flush=True)
        return 1
    return _conclude(settings, rows, time.monotonic() - began)


def _prepare(folder: Path) -> Stage:
    """Everything that is the same for all, in memory or in files, before anything is forked."""
    experiment = subject.make_experiment(folder / "experiment")
    single = subject.make_experiment(folder / "experiment", trials=1)
    template = Home.make(folder / "template", None)
    ask(template, create_stores)
    stage = Stage(subject.prepare(experiment), subject.prepare(single), template.state, services.find_postgres())
    first = scenarios.finish(scenarios.sweep(stage, Home.make(folder / "first", template.state), single=True))
    for name in [
        "mlflow.server.fastapi_app",
        *first["imported"],
    ]:  # what is imported when it is needed, is needed by every child
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    sqlalchemy.orm.configure_mappers()
    return stage


def _measure_twins(stage: Stage, folder: Path, *, commands: bool) -> None:
    """The undisturbed sweeps; and a second one of each, which has to be the same, or nothing could be told from any."""
    stage.twin = scenarios.measure_twin(stage, Home.make(folder / "twin", stage.template))
    again = scenarios.measure_twin(stage, Home.make(folder / "twin-again", stage.template))
    stage.twin_of_single = scenarios.measure_twin(stage, Home.make(folder / "single", stage.template), single=True)
    difference = compare(stage.twin.facts, again.facts)
    if difference:
        raise SystemExit("two undisturbed sweeps differ:\n" + "\n".join(difference.lines()))
    twin = stage.twin
    print(f"twin: {len(twin.facts)} records, {twin.seconds:.1f} s; two undisturbed ones are equal", flush=True)
    if commands:
        home = Home.make(folder / "command", stage.template)
        scenarios.run_command(stage, home)
        stage.twin_of_command = scenarios.read(home, stage.bench.experiment.name)
        print(f"twin of the whole command: {len(stage.twin_of_command)} records", flush=True)


def _share_out(stage: Stage, settings: Settings, jobs: Sequence[Job], folder: Path) -> list[Row]:
    """Play the scenarios in several processes, which take the next number from a pipe."""
    turns, numbers = os.pipe()
    os.write(numbers, b"".join(n.to_bytes(2, "big") for n in range(len(jobs))))
    os.close(numbers)
    results = folder / "results.jsonl"
    results.touch()
    players = []
    for _ in range(settings.lanes):
        sys.stdout.flush()
        player = os.fork()
        if player == 0:
            _play_all(stage, settings, jobs, folder, turns, results)
        players.append(player)
    os.close(turns)
    for player in players:
        os.waitpid(player, 0)
    return [Row(**json.loads(line)) for line in results.read_text().splitlines()]


def _play_all(stage: Stage, settings: Settings, jobs: Sequence[Job], folder: Path, turns: int, results: Path) -> None:
    """The life of one of these processes; it never returns."""
    end_with_parent()
    try:
        while number := os.read(turns, 2):
            n = int.from_bytes(number, "big")
            row = _play(stage, settings, jobs[n], folder / f"scenario-{n}")
            with results.open("a") as stream:
                stream.write(json.dumps(asdict(row)) + "\n")
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _play(stage: Stage, settings: Settings, job: Job, folder: Path) -> Row:
    """One scenario, and the comparison after it."""
    began, kind = time.monotonic(), job.kind
    draw = random.Random(f"{settings.seed}/{kind.name}/{job.round}")
    case = Case(stage, Home.make(folder, stage.template), draw, job.faults, kind.single)
    why = ""
    try:
        with contextlib.nullcontext() if kind.judged else case.compared():
            kind.scenario(case)
    except Stuck as stuck:
        why = str(stuck)
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
    difference, good = case.difference, not (case.difference or why)
    told = [f"{kind.name}, round {job.round}: {case.struck} faults, {'survived' if good else 'NOT survived'}"]
    told[0] += f" ({time.monotonic() - began:.0f} s)"
    told += [f"  {line}" for line in ([why] if why else []) + difference.lines()]
    if not good and settings.keep:
        kept = settings.keep / folder.name
        shutil.copytree(folder, kept, dirs_exist_ok=True)
        told.append(f"  its state and log: {kept}")
    shutil.rmtree(folder, ignore_errors=True)
    print("\n".join(told), flush=True)
    survived = case.struck if good else 0
    return Row(kind.name, case.struck, survived, len(difference.lost), len(difference.doubled), not good)


def _conclude(settings: Settings, rows: Sequence[Row], seconds: float) -> int:
    """The table, the file, the last line."""
    table = {kind.name: Row(kind.name) for kind in KINDS}
    for row in rows:
        table[row.kind] += row
    shown = [row for row in table.values() if row.tried or row.failed]
    total = sum(shown, Row("all"))
    width = max(len(row.kind) for row in [*shown, total])
    print(f"\n{'fault':<{width}}  tried  survived  lost  doubled")
    for row in [*shown, total]:
        print(f"{row.kind:<{width}}  {row.tried:>5}  {row.survived:>8}  {row.lost:>4}  {row.doubled:>7}")
    whole = not settings.only and not settings.count
    if whole and settings.record:
        _write(settings, shown, total, seconds)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"\nFAULTS_SEED={settings.seed}, {seconds:.0f} s, {used.ru_utime + used.ru_stime:.0f} s of CPU")
    if whole and total.tried < LEAST:
        print(f"fewer than {LEAST} faults were injected")
    print(f"{total.tried} faults, {total.survived} survived, {total.lost} lost, {total.doubled} doubled", flush=True)
    return int(total.failed > 0 or (whole and total.tried < LEAST))


def _write(settings: Settings, rows: Sequence[Row], total: Row, seconds: float) -> None:
    versions = {n: importlib.metadata.version(n) for n in ("mlflow", "optuna", "prefect", "torch")}
    found: dict[str, Any] = {
        "command": "make test-faults",
        "seed": settings.seed,
        "seconds": round(seconds),
        "cores": os.cpu_count(),
        "versions": {"python": platform.python_version(), **versions},
        "faults": [asdict(row) for row in rows],
        "all": asdict(replace(total, kind="all")),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    DOCS.write_text(with_table(DOCS.read_text(encoding="utf-8"), found), encoding="utf-8")


def with_table(page: str, found: dict[str, Any]) -> str:
    """The page of the docs with the table of a whole run between its two marks."""
    lines = ["| fault | tried | survived | lost | doubled |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['kind']} | {row['tried']} | {row['survived']} | {row['lost']} | {row['doubled']} |"
        for row in [*found["faults"], found["all"]]
    ]
    before, begin, rest = page.partition("<!-- faults -->\n")
    _, end, after = rest.partition("<!-- end of faults -->\n")
    return before + begin + "\n".join(lines) + "\n" + end + after


def _tree_digest(folder: Path) -> str:
    """What the files of a folder hold."""
    digest = hashlib.sha256()
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return digest.hexdigest()
