import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import IO

import psutil
import pytest
from sqlalchemy import create_engine, text

from softprompt.ledger import Ledger, SweepRow
from tests.cutting import cutting
from tests.postgres import PostgresServer, postgres

SWEEP = "movies-20260101-000000-abcd"
ROUNDS = 25
RACERS = 4
HOLDER = """
import sys
from softprompt.ledger import Ledger
url, host, patience, *subjects = sys.argv[1:]
ledger = Ledger(url, patience=float(patience), _host=host or None)
for subject in subjects:
    assert ledger.claim({sweep!r}, subject)
with ledger.beating():
    print("claimed", flush=True)
    for subject in sys.stdin:
        print(ledger.holds({sweep!r}, subject.strip()), flush=True)
"""


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with postgres() as running:
        yield running


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'studies.db'}"
    server: PostgresServer = request.getfixturevalue("server")
    engine = create_engine(server.url)
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE IF EXISTS softprompt_leases, softprompt_sweeps"))
    engine.dispose()
    return server.url


def lines(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


@contextmanager
def holder(url: str, *subjects: str, host: str = "", patience: float = 60.0) -> Iterator[subprocess.Popen[str]]:
    """A process that holds leases, beats them, and answers whether it holds a subject."""
    command = [sys.executable, "-c", HOLDER.format(sweep=SWEEP), url, host, str(patience), *subjects]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert lines(process.stdout).readline() == "claimed\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def soon(happened: Callable[[], bool]) -> bool:
    """Whether it happens, asked again and again for a time that no machine is too slow for."""
    for _ in range(600):
        if happened():
            return True
        time.sleep(0.1)
    return False


def race(url: str, subjects: list[str], gate: Barrier, results: "Queue[list[tuple[str, str]]]") -> None:
    gate.wait()
    ledger = Ledger(url)
    won = []
    for subject in subjects:
        gate.wait()
        if ledger.claim(SWEEP, subject):
            won.append((subject, ledger.holder))
    results.put(won)


def winners(url: str, subjects: list[str]) -> dict[str, list[str]]:
    """Who got each subject, of processes that ask for it at the same moment."""
    context = multiprocessing.get_context("spawn")
    gate, results = context.Barrier(RACERS), context.Queue()
    racers = [context.Process(target=race, args=(url, subjects, gate, results)) for _ in range(RACERS)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(150)
        assert racer.exitcode == 0
    won = [result for _ in racers for result in results.get()]
    return {subject: [who for what, who in won if what == subject] for subject in subjects}


def test_of_processes_that_race_for_a_lease_one_wins(url: str):
    """New leases on a new database, whose tables they make at once, and those of a process that was killed."""
    fresh = [f"trial {n}" for n in range(ROUNDS)]
    assert {subject: len(who) for subject, who in winners(url, fresh).items()} == dict.fromkeys(fresh, 1)
    stale = [f"stale {n}" for n in range(ROUNDS)]
    with holder(url, *stale) as process:
        process.kill()
        process.wait()
        won = winners(url, stale)
    assert {subject: len(who) for subject, who in won.items()} == dict.fromkeys(stale, 1)
    engine = create_engine(url)
    with engine.connect() as connection:
        rows = connection.execute(text("SELECT subject, holder, beat FROM softprompt_leases")).all()
    engine.dispose()
    assert {row.subject: [row.holder] for row in rows if row.subject in stale} == won
    assert {row.beat for row in rows} == {0}


def test_a_killed_process_is_succeeded_at_once_and_a_living_one_never(url: str):
    with holder(url, "trial 3") as process:
        ledger = Ledger(url)
        assert not ledger.claim(SWEEP, "trial 3")
        assert not ledger.holds(SWEEP, "trial 3")
        process.send_signal(signal.SIGSTOP)  # a process of this machine that is only slow lives
        assert not ledger.claim(SWEEP, "trial 3")
        process.kill()
        assert soon(lambda: psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE)  # its parent has not looked
        assert ledger.claim(SWEEP, "trial 3")
        assert ledger.holds(SWEEP, "trial 3")


def test_a_process_elsewhere_that_stands_still_loses_its_lease_and_finds_out(url: str):
    patience = 3.0
    with holder(url, "trial 3", host="elsewhere", patience=patience) as process:
        ledger = Ledger(url, patience=patience)
        until = time.monotonic() + 2 * patience
        while time.monotonic() < until:
            assert not ledger.claim(SWEEP, "trial 3")
            time.sleep(0.2)
        process.send_signal(signal.SIGSTOP)
        assert soon(lambda: ledger.claim(SWEEP, "trial 3"))
        process.send_signal(signal.SIGCONT)
        lines(process.stdin).write("trial 3\n")
        lines(process.stdin).flush()
        assert lines(process.stdout).readline() == "False\n"
        assert ledger.holds(SWEEP, "trial 3")


def test_a_gap_between_two_looks_is_not_taken_for_a_death(url: str):
    """As when the database was away: its holder could not beat either."""
    assert Ledger(url, _host="elsewhere").claim(SWEEP, "trial 3")
    ledger = Ledger(url, patience=0.6)
    assert not ledger.claim(SWEEP, "trial 3")
    time.sleep(1.5)
    assert not ledger.claim(SWEEP, "trial 3")
    assert soon(lambda: ledger.claim(SWEEP, "trial 3"))


def test_an_earlier_ledger_of_this_process_is_known_by_its_beat(url: str):
    earlier = Ledger(url, patience=0.6)
    assert earlier.claim(SWEEP, "trial 3")
    later = Ledger(url, patience=0.6)
    assert not later.claim(SWEEP, "trial 3")
    assert soon(lambda: later.claim(SWEEP, "trial 3"))
    assert not earlier.holds(SWEEP, "trial 3")


@pytest.mark.parametrize("pid", [os.getpid(), os.getppid()], ids=["mine", "another's"])
def test_a_process_id_that_was_given_again_is_not_the_holder(url: str, pid: int):
    ledger = Ledger(url)
    assert Ledger(url).claim(SWEEP, "trial 3")
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE softprompt_leases SET pid = :pid, born = 1.0"), {"pid": pid})
    engine.dispose()
    assert ledger.claim(SWEEP, "trial 3")


def test_a_clock_that_jumps_changes_nothing(url: str, monkeypatch: pytest.MonkeyPatch):
    now = time.time()
    jumps = iter(range(10**9))
    with holder(url, "trial 3"), holder(url, "trial 4", host="elsewhere", patience=3.0) as elsewhere:
        ledger = Ledger(url, patience=3.0)
        assert ledger.claim(SWEEP, "trial 5")
        monkeypatch.setattr(time, "time", lambda: now + 86_400 * (-1) ** next(jumps))
        # What the kernel derives from the clock, when it is set: the time of day at which the machine started.
        monkeypatch.setattr("psutil._pslinux.boot_time", lambda: 12_345.0)
        for _ in range(5):
            assert not ledger.claim(SWEEP, "trial 3")
            assert not ledger.claim(SWEEP, "trial 4")
            assert ledger.holds(SWEEP, "trial 5")
            time.sleep(0.1)
        assert not Ledger(url).claim(SWEEP, "trial 5")
        elsewhere.kill()
        assert soon(lambda: ledger.claim(SWEEP, "trial 4"))


def test_leases_are_given_back_by_who_has_them(url: str):
    mine, other = Ledger(url), Ledger(url)
    assert mine.claim(SWEEP, "sweep")
    assert mine.claim(SWEEP, "sweep")  # again is nothing new
    assert mine.claim(SWEEP, "trial 1")
    assert other.claim(SWEEP, "trial 2")
    other.release(SWEEP, "trial 1")
    assert sorted(mine.leased(SWEEP)) == ["sweep", "trial 1", "trial 2"]
    assert mine.leased("another") == []
    mine.release(SWEEP, "sweep")
    assert sorted(mine.leased(SWEEP)) == ["trial 1", "trial 2"]
    mine.let_go(SWEEP, ["trial 1", "trial 2"])
    assert mine.leased(SWEEP) == ["trial 2"]
    assert not mine.holds(SWEEP, "trial 1")


def test_the_open_sweeps_of_an_experiment_are_found(url: str):
    ledger = Ledger(url)
    first, second = (SweepRow(f"movies-{n}", "movies", f"identity {n}", f"run {n}") for n in (1, 2))
    for row in (second, first, SweepRow("tweets-1", "tweets", "identity 1", "run 3")):
        ledger.add_sweep(row)
    assert Ledger(url).open_sweeps("movies") == [first, second]
    ledger.spend("movies-2", 30.0)
    ledger.spend("movies-2", 20.0)
    assert ledger.find_sweep("movies-2") == SweepRow("movies-2", "movies", "identity 2", "run 2", 30.0)
    ledger.add_sweep(second)  # again is nothing new, whatever was spent
    with pytest.raises(ValueError, match="there is another sweep of the name movies-2"):
        ledger.add_sweep(SweepRow("movies-2", "movies", "another", "run 2"))
    ledger.end_sweep("movies-2")
    assert ledger.open_sweeps("movies") == [first]
    assert ledger.find_sweep("movies-2") is not None
    assert ledger.find_sweep("movies-3") is None


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_a_database_that_restarts_costs_nobody_a_lease(server: PostgresServer, mode: str):
    patience = 3.0
    with holder(server.url, f"trial {mode}", host="elsewhere", patience=patience) as process:
        ledger = Ledger(server.url, patience=patience)
        claims: list[bool] = []
        over = threading.Event()

        def ask() -> None:
            while not over.wait(0.1):
                claims.append(ledger.claim(SWEEP, f"trial {mode}"))

        asking = threading.Thread(target=ask)
        asking.start()
        assert soon(lambda: len(claims) >= 3)
        server.stop(mode)
        time.sleep(1.5 * patience)
        server.start()
        before = len(claims)
        assert soon(lambda: len(claims) > before + patience / 0.1)
        over.set()
        asking.join()
        assert not any(claims)
        lines(process.stdin).write(f"trial {mode}\n")
        lines(process.stdin).flush()
        assert lines(process.stdout).readline() == "True\n"


def test_a_claim_whose_answer_is_lost_holds(server: PostgresServer):
    with cutting(server.url) as way:
        ledger = Ledger(way.url)
        with holder(server.url, "cut stale") as process:
            process.kill()
            process.wait()
            for subject in ("cut new", "cut stale"):
                way.armed = True
                assert ledger.claim(SWEEP, subject)
                assert ledger.holds(SWEEP, subject)
        row = SweepRow("cut", "movies", "identity", "run")
        way.armed = True
        ledger.add_sweep(row)
        assert ledger.find_sweep("cut") == row
        assert way.cuts == 3


def test_the_end_of_a_process_does_not_wait_for_a_database(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("softprompt.ledger._RELEASE_SECONDS", 0.5)
    with postgres() as server:
        ledger = Ledger(server.url)
        assert ledger.claim(SWEEP, "trial 3")
        with ledger.beating():
            server.stop()
            ledger.let_go(SWEEP, ["trial 3"])
            assert ledger.may_hold(SWEEP, "trial 3"), "nobody else can have it"
