"""The faults: each scenario brings one sweep to its end through some of them, and says how many there were.

A scenario is given a case: what all share, its own state and random stream, and how many faults to inject. It raises
`Stuck` where the product does not do what it has to in the face of the fault; then the records are compared.
"""

import contextlib
import ctypes
import fcntl
import json
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from softprompt.workbench import Workbench
from tests.faults import hooks, services, subject
from tests.faults.children import Child, Home, Hook, ask
from tests.faults.comparison import Difference, Fact, compare
from tests.faults.records import read_facts

ENDS_WITHIN = 10.0
"""Seconds in which a sweep that is asked to stop has stopped."""
_PATIENCE = 1.5
_LIMIT = 90.0


class Stuck(Exception):
    """The product has failed at something that it has to survive."""


@dataclass
class Twin:
    """What an undisturbed sweep leaves."""

    facts: list[Fact]
    seconds: float
    """How long it takes."""
    start: float
    """How long until its first step."""
    calls: dict[str, int]
    """How often it passes each point."""


@dataclass
class Stage:
    """What all scenarios share; made before anything is forked."""

    bench: Workbench
    single: Workbench
    """The same with one trial."""
    template: Path
    """A state with empty databases."""
    postgres: Path | None
    twin: Twin | None = None
    twin_of_single: Twin | None = None
    twin_of_command: list[Fact] | None = None


@dataclass
class Case:
    """One sweep that is to be disturbed, and what became of it."""

    stage: Stage
    home: Home
    draw: random.Random
    faults: int
    """How many are to be injected."""
    single: bool = False
    """Whether the sweep has one trial."""
    struck: int = 0
    """How many were injected."""
    difference: Difference = field(default_factory=Difference)

    @property
    def twin(self) -> Twin:
        """The undisturbed one."""
        twin = self.stage.twin_of_single if self.single else self.stage.twin
        assert twin is not None
        return twin

    @property
    def instant(self) -> float:
        """Seconds from the begin of a process to a fault, of which so many wear out one sweep, more or less."""
        start, seconds = self.twin.start, self.twin.seconds
        return self.draw.uniform(0.3 * start, start + 1.8 * (seconds - start) / self.faults)

    def sweep(self, *extra: Hook) -> Child:
        """A process that begins the sweep, or goes on with it."""
        return sweep(self.stage, self.home, extra, single=self.single)

    def read(self) -> list[Fact]:
        """The facts as they are now."""
        return read(self.home, self.stage.bench.experiment.name)

    @contextlib.contextmanager
    def compared(self, twin: Sequence[Fact] | None = None) -> Iterator[None]:
        """Compare with the twin when the block ends, also where it does with an error."""
        try:
            yield
        finally:
            self.difference = compare(self.twin.facts if twin is None else twin, self.read())


Scenario = Callable[[Case], None]


def sweep(stage: Stage, home: Home, extra: Sequence[Hook] = (), *, single: bool = False) -> Child:
    """A process that begins the sweep, or goes on with it."""
    bench = stage.single if single else stage.bench
    return Child(home, lambda: subject.run_sweep(bench), [hooks.slowed(subject.STEP, 0.004), *extra])


def finish(child: Child) -> Any:
    """Wait until a sweep has ended by itself; Stuck where it does not, or fails."""
    if not child.wait(_LIMIT):
        child.kill()
        raise Stuck(f"did not end within {_LIMIT:g} s; {child.home.last_words()}")
    if child.ended != 0:
        raise Stuck(f"ended with {child.ended}: {child.home.last_words()}")
    if not child.result["same weights"]:
        raise Stuck("the base weights have changed")
    return child.result


def read(home: Home, experiment: str) -> list[Fact]:
    """The facts of a home."""
    return [tuple(fact) for fact in ask(home, lambda: read_facts(experiment))]


def measure_twin(stage: Stage, home: Home, *, single: bool = False) -> Twin:
    """Run a sweep undisturbed."""
    count = hooks.count_calls([p for p in subject.POINTS if _exists(p)])
    first = Path(home.folder, "first-step")
    child = sweep(stage, home, [count, _note_first(first)], single=single)
    result = finish(child)
    seconds = time.monotonic() - child.began
    bench = stage.single if single else stage.bench
    start = float(first.read_text()) - child.began
    return Twin(read(home, bench.experiment.name), seconds, start, result["calls"])


def _exists(target: str) -> bool:
    try:
        hooks.wrap(target, lambda real: real)
    except (ImportError, AttributeError):
        return False
    return True


def _note_first(file: Path) -> Hook:
    """Write the time of the first step to a file."""

    def around(real: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*args: Any, **kwargs: Any) -> Any:
            if not file.exists():
                file.write_text(str(time.monotonic()))
            return real(*args, **kwargs)

        return noting

    return lambda: hooks.wrap(subject.STEP, around)


def _interrupted(sign: int) -> Scenario:
    """One sweep that a signal ends again and again, at random instants."""

    def scenario(case: Case) -> None:
        for _ in range(case.faults):
            child = case.sweep()
            if child.wait(case.instant):
                finish(child)
                return
            child.send(sign)
            case.struck += 1
            if not child.wait(ENDS_WITHIN):
                child.kill()
                raise Stuck(f"did not end within {ENDS_WITHIN:g} s of {signal.Signals(sign).name}")
        finish(case.sweep())

    return scenario


def aimed(case: Case) -> None:
    """SIGKILL just before or after calls between which the records do not agree."""
    missing = [p for p in subject.POINTS if not _exists(p)]
    if missing:
        raise Stuck(f"there is no {missing[0]}, and {len(missing) - 1} more are missing")
    usual = [point for point in subject.POINTS if case.twin.calls.get(point)]
    for n in range(case.faults):
        point = case.draw.choice(subject.POINTS if n else usual)  # some are passed only where a lane has died
        nth = case.draw.randint(1, max(1, round(1.5 * case.twin.calls.get(point, 0) / case.faults)))
        when: hooks.When = case.draw.choice(("before", "after"))
        child = case.sweep(hooks.die_at(point, nth=nth, when=when))
        if not child.wait(_LIMIT):
            child.kill()
            raise Stuck(f"did not end within {_LIMIT:g} s, nor come to call {nth} of {point}")
        if child.ended != -signal.SIGKILL:
            finish(child)
            return
        case.struck += 1
    finish(case.sweep())


def jumping_clock(case: Case) -> None:
    """A wall clock that jumps by hours, forwards and backwards, while a sweep runs."""
    length = 0.8 * case.twin.seconds
    draw = case.draw
    jumps = [(draw.uniform(0, length), draw.choice((-1, 1)) * draw.uniform(600, 6 * 3600)) for _ in range(case.faults)]
    child = case.sweep(hooks.jumping_clock(jumps))
    try:
        finish(child)
    finally:
        case.struck = sum(at < time.monotonic() - child.began for at, _ in jumps)


def server_killed(case: Case) -> None:
    """MLflow's server is killed and comes back, while a sweep goes on."""
    server = services.MlflowServer(case.home, case.stage.template / "mlflow.db")
    case.home.environment["MLFLOW_TRACKING_URI"] = server.uri
    with contextlib.closing(server), case.compared():
        child = case.sweep()
        for _ in range(case.faults):
            if child.wait(case.draw.uniform(0.2, case.twin.seconds / case.faults)):
                break
            server.stop()
            case.struck += 1
            child.wait(case.draw.uniform(0.1, 1.5))
            server.start()
        finish(child)


def cable_cut(case: Case) -> None:
    """The connections to MLflow's server are cut at random bytes, while a sweep goes on."""
    server = services.MlflowServer(case.home, case.stage.template / "mlflow.db")
    with contextlib.closing(server), contextlib.closing(services.Cable(case.home, server.port)) as cable:
        case.home.environment["MLFLOW_TRACKING_URI"] = cable.uri
        with case.compared():
            try:
                _cut(case, cable)
            finally:
                case.home.environment["MLFLOW_TRACKING_URI"] = server.uri


def _cut(case: Case, cable: services.Cable) -> None:
    child = case.sweep()
    while case.struck < case.faults and child.ended is None:
        cable.cut_after(case.draw.randint(1, 40_000))
        while cable.cuts == case.struck and not child.wait(0.05):
            pass
        case.struck = cable.cuts
        if case.draw.random() < 0.3:
            cable.cut()
            child.wait(case.draw.uniform(0.1, 1))
            cable.mend()
    finish(child)


def postgres_restarted(case: Case) -> None:
    """The study's PostgreSQL is stopped, or crashes, and comes back, while a sweep goes on."""
    assert case.stage.postgres is not None
    with contextlib.closing(services.Postgres(case.home.folder / "postgres", case.stage.postgres)) as server:
        case.home.environment["SOFTPROMPT_STORAGE"] = server.url
        with case.compared():
            child = case.sweep()
            for _ in range(case.faults):
                if child.wait(case.draw.uniform(0.2, case.twin.seconds / case.faults)):
                    break
                server.stop(case.draw.choice(("fast", "immediate")))
                case.struck += 1
                child.wait(case.draw.uniform(0, 0.5))
                server.start()
            finish(child)


def killed_on_servers(case: Case) -> None:
    """SIGKILL at random instants of a sweep whose records are in PostgreSQL and on MLflow's server."""
    assert case.stage.postgres is not None
    mlflow = services.MlflowServer(case.home, case.stage.template / "mlflow.db")
    with (
        contextlib.closing(mlflow),
        contextlib.closing(services.Postgres(case.home.folder / "postgres", case.stage.postgres)) as postgres,
    ):
        case.home.environment |= {"MLFLOW_TRACKING_URI": mlflow.uri, "SOFTPROMPT_STORAGE": postgres.url}
        with case.compared():
            _interrupted(signal.SIGKILL)(case)


def full_disk(case: Case) -> None:
    """The disk of the state is full for a while; the sweep may end of it, and is then gone on with."""
    small = _mount_small(case.home.state, case.stage.template)
    try:
        with case.compared():
            _fill(case, _filled if small else _limited)
    finally:
        if small:
            subprocess.call(["umount", "-l", str(case.home.state)])


def _fill(case: Case, full: Callable[[Child], AbstractContextManager[None]]) -> None:
    for _ in range(case.faults):
        child = case.sweep()
        if child.wait(case.instant):
            finish(child)
            return
        with full(child):
            case.struck += 1
            child.wait(case.draw.uniform(0.2, 1.5))
        if not child.wait(_LIMIT):
            child.kill()
            raise Stuck("neither ended nor went on after the disk was full")
        if child.ended == 0:
            return
    finish(case.sweep())


def _mount_small(folder: Path, template: Path) -> bool:
    """Put a small file system of this process and its children in the folder's place, where that is allowed."""
    if ctypes.CDLL(None).unshare(0x00020000) != 0:  # CLONE_NEWNS: nobody else sees it, and it ends with the process
        return False
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    if subprocess.call(["mount", "--make-rprivate", "/"], **quiet) != 0:
        return False
    if subprocess.call(["mount", "-t", "tmpfs", "-o", "size=16m", "state", str(folder)], **quiet) != 0:
        return False
    shutil.copytree(template, folder, dirs_exist_ok=True)
    return True


@contextlib.contextmanager
def _filled(child: Child) -> Iterator[None]:
    """Nothing more fits on the disk of a child's state."""
    ballast = child.home.state / "ballast.lock"
    try:
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as stream:
            for size in (1 << 16, 1 << 10, 1):
                with contextlib.suppress(OSError):
                    while stream.write(bytes(size)) == size:
                        pass
        yield
    finally:
        ballast.unlink(missing_ok=True)


@contextlib.contextmanager
def _limited(child: Child) -> Iterator[None]:
    """No file of a child may grow beyond 64 KiB: the nearest to a full disk where nothing may be mounted."""
    _, most = resource.prlimit(child.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (1 << 16, most))
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (most, most))


def not_finite(case: Case) -> None:
    """One trial whose loss is not finite fails with its reason; those before it are as ever, the others end well."""
    number = case.draw.choice([n for n in range(1, subject.TRIALS) if n != 2])
    case.struck = 1
    finish(case.sweep(subject.not_finite_in(number)))
    found = case.read()
    name = f"sweep 0 trial {number}"
    if (name, "state", "FAIL") not in found:
        raise Stuck(f"{name} has not failed")
    if not any(fact[:3] == (name, "attribute", "reason") and "nan" in fact[3] for fact in found):
        raise Stuck(f"{name} does not say why it has failed")
    if (f"{name} in MLflow", "run", "FAILED", "under", "sweep 0") not in found:
        raise Stuck(f"{name} is not FAILED in MLflow")
    ends = {f[0]: f[2] for f in found if f[1] == "state"}
    if len(ends) != subject.TRIALS + 1 or any(
        end not in ("COMPLETE", "PRUNED") for n, end in ends.items() if n != name
    ):
        raise Stuck(f"the trials have ended as {ends}")
    case.difference = compare(_until(number, case.twin.facts), _until(number, found))


def _until(number: int, facts: Sequence[Fact]) -> list[Fact]:
    """What the trials before one have left."""
    before = {f"sweep 0 trial {n}" for n in range(number)}
    return [fact for fact in facts if fact[0].removesuffix(" in MLflow") in before]


def raced(case: Case) -> None:
    """Two lanes begin at once where one has died, and both find its trial."""
    first = case.sweep()
    if first.wait(case.draw.uniform(case.twin.start, case.twin.seconds)):
        finish(first)
        return
    first.kill()
    case.struck = 1
    racers = [case.sweep(hooks.count_calls([subject.STEP])) for _ in range(2)]
    trained = [finish(racer)["calls"].get(subject.STEP, 0) for racer in racers]
    if all(trained):
        raise Stuck(f"both trained the trial, for {trained[0]} and {trained[1]} steps")


def stopped_beyond_patience(case: Case) -> None:
    """A lane on another machine stands still until its trial is taken up, and then goes on as if nothing had been."""
    short = hooks.default_of(subject.LEDGER, patience=_PATIENCE)
    still = case.sweep(short, hooks.host_named("elsewhere"))
    if still.wait(case.draw.uniform(case.twin.start, case.twin.seconds)):
        finish(still)
        return
    _stop_between_transactions(still, case.home.state)
    case.struck = 1
    try:
        finish(case.sweep(short))
    finally:
        still.send(signal.SIGCONT)
    finish(still)


def _stop_between_transactions(child: Child, state: Path) -> None:
    """Stop a process where it holds no lock of a SQLite file: with one, nobody could go on, whatever they do."""
    while True:
        child.send(signal.SIGSTOP)
        while psutil.Process(child.pid).status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
            time.sleep(0.001)
        try:
            for file in state.glob("*.db"):
                with closing(sqlite3.connect(file, timeout=0.05)) as connection:
                    connection.execute("BEGIN EXCLUSIVE")  # a reader, too, stops whoever wants to write
                    connection.rollback()
            for file in state.glob("*.db.lock"):
                with file.open() as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except (sqlite3.OperationalError, BlockingIOError):
            child.send(signal.SIGCONT)
            time.sleep(0.01)


def torn(case: Case) -> None:
    """The newest checkpoint of a lane that died is cut short, altered, gone, or that of another trial."""
    stolen: Path | None = None
    for _ in range(case.faults):
        child = case.sweep(hooks.die_at(subject.SAVED, nth=case.draw.randint(2, 5), when="after"))
        if not child.wait(_LIMIT):
            child.kill()
            raise Stuck(f"did not end within {_LIMIT:g} s")
        if child.ended != -signal.SIGKILL:
            finish(child)
            return
        found = sorted(case.home.state.glob(subject.CHECKPOINTS), key=lambda f: (f.stat().st_mtime_ns, f.name))
        if not found:
            raise Stuck("there is no checkpoint")
        _tear(found[-1], stolen, case.draw)
        case.struck += 1
        for file in found[:1]:
            if file.exists():
                stolen = case.home.folder / file.name
                shutil.copy(file, stolen)
    finish(case.sweep())


def _tear(newest: Path, stolen: Path | None, draw: random.Random) -> None:
    """Do one of the things that happen to files."""
    whole = newest.read_bytes()
    way = draw.choice(("short", "flipped", "empty", "gone", "foreign" if stolen else "short"))
    if way == "short":
        newest.write_bytes(whole[: draw.randrange(1, len(whole))])
    elif way == "flipped":
        place = draw.randrange(len(whole))
        newest.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << draw.randrange(8))]) + whole[place + 1 :])
    elif way == "empty":
        newest.write_bytes(b"")
    elif way == "gone":
        newest.unlink()
    else:
        assert stolen is not None
        newest.unlink()
        step, _, digest = newest.name.partition("-")
        shutil.copy(stolen, newest.with_name(f"{step}-{stolen.name.partition('-')[2] or digest}"))


def command_interrupted(case: Case) -> None:
    """The whole command, with Prefect and all, is killed, terminated and stopped by Ctrl-C, and gone on with."""
    with case.compared(case.stage.twin_of_command):
        for n in range(case.faults):
            _interrupt(case, (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)[n % 3])
        run_command(case.stage, case.home)


def _interrupt(case: Case, sign: signal.Signals) -> None:
    process = _command(case.stage, case.home)
    try:
        if not _has_stepped(case.home, process, case.draw.randint(1, 4)):
            raise Stuck(f"the command ended with {process.poll()} before it trained: {case.home.last_words()}")
        process.send_signal(sign)
        case.struck += 1
        process.wait(ENDS_WITHIN)
    except subprocess.TimeoutExpired:
        raise Stuck(f"the command did not end within {ENDS_WITHIN:g} s of {sign.name}") from None
    finally:
        services.stop_group(process)


def run_command(stage: Stage, home: Home) -> None:
    """`softprompt sweep`, to its end."""
    process = _command(stage, home)
    try:
        if process.wait(180) != 0:
            raise Stuck(f"the command ended with {process.returncode}: {home.last_words()}")
    except subprocess.TimeoutExpired:
        raise Stuck("the command did not end within 180 s") from None
    finally:
        services.stop_group(process)


def _command(stage: Stage, home: Home) -> "subprocess.Popen[bytes]":
    file = home.folder / "experiment.yaml"  # JSON is YAML
    file.write_text(json.dumps(stage.bench.experiment.model_dump(mode="json", exclude_none=True)))
    with home.log.open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-c", _MAIN, "sweep", str(file)],
            env=os.environ | home.variables,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


_MAIN = f"""
from tests.faults import hooks, subject
from flows.cli import main
hooks.slowed({subject.STEP!r}, 0.02)()
main()
"""


def _has_stepped(home: Home, process: "subprocess.Popen[bytes]", lines: int) -> bool:
    """Wait for so many lines about trials since the process began; False where it ends before."""
    begin = home.log.stat().st_size
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        with home.log.open("rb") as stream:
            stream.seek(begin)
            if stream.read().count(b"trial ") >= lines:
                return True
        time.sleep(0.02)
    return False


@dataclass(frozen=True)
class Kind:
    """A kind of fault, and how it is spread over sweeps."""

    name: str
    scenario: Scenario
    sweeps: int
    faults: int
    """In each sweep."""
    single: bool = False
    """Whether the sweep has one trial."""
    judged: bool = False
    """Whether the scenario compares by itself, as where its servers end with it."""
    postgres: bool = False


KINDS = (
    Kind("the whole command: SIGKILL, SIGTERM, Ctrl-C", command_interrupted, 1, 3, judged=True),
    Kind("MLflow's server killed and restarted", server_killed, 4, 3, judged=True),
    Kind("connection to MLflow cut at a random byte", cable_cut, 3, 8, judged=True),
    Kind("PostgreSQL stopped or crashed, and restarted", postgres_restarted, 4, 3, judged=True, postgres=True),
    Kind("SIGKILL at a random instant, on PostgreSQL and MLflow's server", killed_on_servers, 1, 12, judged=True,
         postgres=True),
    Kind("SIGKILL at a random instant", _interrupted(signal.SIGKILL), 3, 25),
    Kind("SIGKILL between two records", aimed, 8, 6),
    Kind("SIGTERM", _interrupted(signal.SIGTERM), 2, 5),
    Kind("Ctrl-C", _interrupted(signal.SIGINT), 2, 5),
    Kind("full disk", full_disk, 3, 3, judged=True),
    Kind("clock that jumps by hours", jumping_clock, 3, 5),
    Kind("loss that is not finite in one trial", not_finite, 4, 1, judged=True),
    Kind("two lanes racing for a stale trial", raced, 14, 1, single=True),
    Kind("torn checkpoint", torn, 4, 4),
    Kind("lane that stood still beyond its lease", stopped_beyond_patience, 4, 1, single=True),
)  # fmt: skip
