"""Which sweeps are open, and which process trains which of their trials.

A process that dies leaves its leases behind, and another takes them over: of all that try, one. Who lives is told
without a wall clock: on the same machine by the process itself, elsewhere by a counter that its holder moves. Nothing
here knows what a trial is, and nothing stops a holder that has lost its lease: it asks `holds` before it writes.
"""

import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
from sqlalchemy import (
    Boolean,
    Column,
    ColumnElement,
    Delete,
    Double,
    Insert,
    Integer,
    MetaData,
    Row,
    Select,
    String,
    Table,
    Update,
    and_,
    create_engine,
    delete,
    insert,
    select,
    update,
)
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from softprompt.database import (
    OUTAGE_SECONDS,
    database_url,
    engine_options,
    is_transient,
    let_readers_in,
    making_tables,
    persist,
)
from softprompt.home import study_storage

_RELEASE_SECONDS = 5.0
"""How long the end of a process waits for a database that is away; its leases are found dead anyway."""
_SAME_BIRTH_SECONDS = 0.05

_metadata = MetaData()
_sweeps = Table(
    "softprompt_sweeps",
    _metadata,
    Column("name", String, primary_key=True),
    Column("experiment", String, nullable=False, index=True),
    Column("identity", String, nullable=False),
    Column("run_id", String, nullable=False),
    Column("ended", Boolean, nullable=False),
    Column("seconds", Double, nullable=False),
)
_leases = Table(
    "softprompt_leases",
    _metadata,
    Column("sweep", String, primary_key=True),
    Column("subject", String, primary_key=True),
    Column("holder", String, nullable=False, index=True),
    Column("host", String, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("born", Double, nullable=False),
    Column("beat", Integer, nullable=False),
)


@dataclass(frozen=True)
class SweepRow:
    """A sweep as the ledger has it."""

    name: str
    """Name of its study and of its parent run."""
    experiment: str
    """Name of its experiment."""
    identity: str
    """What another sweep must share to be the same one."""
    run_id: str
    """MLflow id of the parent run."""
    seconds: float = 0.0
    """What it has spent of a budget in time."""


@dataclass(frozen=True)
class Holder:
    """A process that holds a lease."""

    host: str
    pid: int
    here: bool
    """Whether it is one of this machine, so that `claim` knows at once whether it lives."""


@dataclass
class _Sighting:
    """What was last seen of a lease of another machine."""

    holder: str
    beat: int
    at: float
    """When, by the monotonic clock of this process."""
    still: float = 0.0
    """Seconds over which it was seen not to move."""


class Ledger:
    """The open sweeps and the leases, in the database of the studies; to be shared by the threads of one process.

    Args:
        url: the study storage, as `study_store` takes it.
        patience: seconds after which a holder on another machine that does not move counts as dead.

    Every call outlasts an outage of the database. Raises UserError as `database_url` does.
    """

    def __init__(self, url: str, *, patience: float = 60.0, _host: str | None = None) -> None:
        self.holder = uuid4().hex
        self.patience = patience
        """Seconds after which a holder on another machine that does not move counts as dead."""
        self._host = _host or _this_host()
        self._pid = os.getpid()
        self._born = _birth(self._pid) or 0.0
        self._seen: dict[tuple[str, str], _Sighting] = {}
        self._looking = threading.Lock()
        database = database_url(url)
        self._engine = create_engine(database, **engine_options(database))

        def make() -> None:
            with making_tables(database):
                let_readers_in(database)
                _metadata.create_all(self._engine)

        persist(make)

    def claim(self, sweep: str, subject: str) -> bool:
        """Take a lease that nobody has, or whose holder is dead; whether it is ours now. Never waits for a holder.

        A holder on another machine is found dead only by one who asks again and again, at least thrice per patience.
        """
        return persist(lambda: self._claim(sweep, subject))

    def _claim(self, sweep: str, subject: str) -> bool:
        mine = {"holder": self.holder, "host": self._host, "pid": self._pid, "born": self._born, "beat": 0}
        with self._engine.connect() as connection:
            row = connection.execute(select(_leases).where(_is(sweep, subject))).one_or_none()
        if row is not None and row.holder == self.holder:
            return True
        if row is None:
            try:
                with self._engine.begin() as connection:
                    connection.execute(insert(_leases).values(sweep=sweep, subject=subject, **mine))
            except IntegrityError:
                return False  # another process was first, and it lives
            return True
        if not self._is_dead(row):
            return False
        unmoved = and_(_is(sweep, subject), _leases.c.holder == row.holder, _leases.c.beat == row.beat)
        with self._engine.begin() as connection:
            return connection.execute(update(_leases).where(unmoved).values(mine)).rowcount == 1

    def holds(self, sweep: str, subject: str, *, seconds: float = OUTAGE_SECONDS) -> bool:
        """Whether a lease is still ours: one read by its key. Once it is lost, it stays lost until it is claimed.

        A database that is away is waited for, for so many seconds.
        """
        holder = select(_leases.c.holder).where(_is(sweep, subject))

        def read() -> bool:
            with self._engine.connect() as connection:
                return connection.scalar(holder) == self.holder

        return persist(read, seconds)

    def holder_of(self, sweep: str, subject: str) -> Holder | None:
        """Who holds a lease, dead or alive; None where nobody does."""
        rows = self._read(select(_leases).where(_is(sweep, subject)))
        return Holder(rows[0].host.partition(" ")[0], rows[0].pid, rows[0].host == self._host) if rows else None

    def release(self, sweep: str, subject: str) -> None:
        """Give a lease back; nothing where it is not ours."""
        self._write(delete(_leases).where(_is(sweep, subject), _leases.c.holder == self.holder))

    def may_hold(self, sweep: str, subject: str) -> bool:
        """As `holds`, but True where the database does not say so within seconds: nobody else can claim it either."""
        with suppress(SQLAlchemyError):
            return self.holds(sweep, subject, seconds=_RELEASE_SECONDS / 2)
        return True

    def let_go(self, sweep: str, subjects: Sequence[str]) -> None:
        """Give leases back on the way out: where the database is away, they are left to be found dead."""
        mine = and_(_leases.c.sweep == sweep, _leases.c.subject.in_(subjects), _leases.c.holder == self.holder)
        try:
            self._write(delete(_leases).where(mine), _RELEASE_SECONDS)
        except SQLAlchemyError as error:
            if not is_transient(error):
                raise

    def leased(self, sweep: str) -> list[str]:
        """The subjects of a sweep that anybody holds, dead or alive."""
        return [str(row.subject) for row in self._read(select(_leases.c.subject).where(_leases.c.sweep == sweep))]

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Inside the block, a thread shows that this process lives, through outages of the database as well."""
        over = threading.Event()
        thread = threading.Thread(target=self._beat_until, args=(over,), name="softprompt-leases", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(_RELEASE_SECONDS)  # a connection that hangs holds up nobody

    def _beat_until(self, over: threading.Event) -> None:
        pause = self.patience / 6
        while not over.wait(pause):
            # One attempt at a time: what comes of it is for `holds` to tell.
            with suppress(SQLAlchemyError), self._engine.begin() as connection:
                connection.execute(
                    update(_leases).where(_leases.c.holder == self.holder).values(beat=_leases.c.beat + 1)
                )

    def add_sweep(self, row: SweepRow) -> None:
        """Open a sweep. The same one again is nothing new; ValueError for another one of its name."""
        values = {**row.__dict__, "ended": False}
        try:
            self._write(insert(_sweeps).values(values))
        except IntegrityError:
            there = self.find_sweep(row.name)
            if there is None or replace(there, seconds=row.seconds) != row:
                raise ValueError(f"there is another sweep of the name {row.name}") from None

    def open_sweeps(self, experiment: str) -> list[SweepRow]:
        """The sweeps of an experiment that have not ended, by name, which begins with when they were opened."""
        return self._find(_sweeps.c.experiment == experiment, _sweeps.c.ended.is_(False))

    def find_sweep(self, name: str) -> SweepRow | None:
        """A sweep by its name, open or ended."""
        return next(iter(self._find(_sweeps.c.name == name)), None)

    def is_open(self, name: str) -> bool:
        """Whether a sweep is there and has not ended."""
        return bool(self._find(_sweeps.c.name == name, _sweeps.c.ended.is_(False)))

    def name_run(self, name: str, run_id: str) -> None:
        """Record the parent run of a sweep, once it is there."""
        self._write(update(_sweeps).where(_sweeps.c.name == name).values(run_id=run_id))

    def end_sweep(self, name: str) -> None:
        """Close a sweep: it is not gone on with any more, and nobody holds anything of it."""

        def end() -> None:
            with self._engine.begin() as connection:
                connection.execute(update(_sweeps).where(_sweeps.c.name == name).values(ended=True))
                connection.execute(delete(_leases).where(_leases.c.sweep == name))

        persist(end)

    def spend(self, name: str, seconds: float) -> None:
        """Record how many seconds of its budget a sweep has spent; of what was ever said, the most counts."""
        more = and_(_sweeps.c.name == name, _sweeps.c.seconds < seconds)
        self._write(update(_sweeps).where(more).values(seconds=seconds))

    def _find(self, *conditions: ColumnElement[bool]) -> list[SweepRow]:
        columns = (_sweeps.c.name, _sweeps.c.experiment, _sweeps.c.identity, _sweeps.c.run_id, _sweeps.c.seconds)
        return [SweepRow(*row) for row in self._read(select(*columns).where(*conditions).order_by(_sweeps.c.name))]

    def _read(self, query: Select[Any]) -> Sequence[Row[Any]]:
        def read() -> Sequence[Row[Any]]:
            with self._engine.connect() as connection:
                return connection.execute(query).all()

        return persist(read)

    def _write(self, change: Insert | Update | Delete, seconds: float = OUTAGE_SECONDS) -> None:
        def write() -> None:
            with self._engine.begin() as connection:
                connection.execute(change)

        persist(write, seconds)

    def _is_dead(self, lease: Row[Any]) -> bool:
        if lease.host == self._host and lease.pid != self._pid:
            return not _is_alive(lease.pid, lease.born)
        if lease.host == self._host and abs(lease.born - self._born) > _SAME_BIRTH_SECONDS:
            return True  # a process before this one had its id
        # An earlier ledger of this very process is like one elsewhere: only its beat can tell.
        return self._still_for(lease) >= self.patience

    def _still_for(self, lease: Row[Any]) -> float:
        """Seconds over which a lease was seen not to move.

        Between two looks the database may have been away, so that nobody could move: a gap counts only in part.
        """
        now, key = time.monotonic(), (lease.sweep, lease.subject)
        with self._looking:
            seen = self._seen.get(key)
            if seen is None or (seen.holder, seen.beat) != (lease.holder, lease.beat):
                seen = self._seen[key] = _Sighting(lease.holder, lease.beat, now)
            seen.still += min(now - seen.at, self.patience / 3)
            seen.at = now
            return seen.still


def open_ledger() -> Ledger:
    """The ledger of this process, in the study storage that is configured."""
    return _open(study_storage(), os.getpid())


@cache
def _open(url: str, process: int) -> Ledger:
    """One for each process: a fork is another holder."""
    return Ledger(url)


def _is(sweep: str, subject: str) -> ColumnElement[bool]:
    return and_(_leases.c.sweep == sweep, _leases.c.subject == subject)


def _this_host() -> str:
    """What a process id means something in: this start of this machine, and the container in it."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


def _is_alive(pid: int, born: float) -> bool:
    birth = _birth(pid)
    return birth is not None and abs(birth - born) <= _SAME_BIRTH_SECONDS


def _birth(pid: int) -> float | None:
    """When a process began, in seconds after the machine did; None where it is gone, or waits to be buried.

    psutil gives the time of day, which it adds up from the machine's start; where the clock is set, both move.
    """
    while True:
        start = psutil.boot_time()
        try:
            process = psutil.Process(pid)
            created, status = process.create_time(), process.status()
        except psutil.NoSuchProcess:
            return None
        if status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return None
        if psutil.boot_time() == start:
            return created - start
