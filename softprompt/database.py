"""The SQL database of a search, which several processes share and which may go away for a while.

The studies and the ledger live in one database. Which addresses are taken, how a connection is opened, which faults
pass by themselves and how long they are waited for is said here, once for both. Nothing here knows what is stored.
"""

import fcntl
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import psutil
from sqlalchemy import URL, create_engine, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError
from sqlalchemy.pool import NullPool
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

from softprompt.errors import UserError
from softprompt.home import without_secrets
from softprompt.progress import watcher

OUTAGE_SECONDS = 600.0
"""How long a database may be away before what needs it fails."""
_BUSY_SECONDS = 60.0
"""How long SQLite itself waits for another writer."""
_QUIET_SECONDS = 2.0
"""An outage that is shorter is not worth a line."""
_SQLITE_PASSING = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL}
_POSTGRES_PASSING = ("08", "40", "53300", "55P03", "57P01", "57P02", "57P03", "57P05")
"""SQLSTATEs, or the class they begin with: connection, rollback, too many clients, lock, shutdown, start."""
_POSTGRES_REFUSALS_PASSING = ("starting up", "shutting down", "recovery", "not yet accepting", "too many", "slots are")
"""Words of a server that cannot take a connection now; psycopg2 gives no SQLSTATE while it connects."""
_LOCAL_FILE_SYSTEMS = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "tmpfs", "overlay", "apfs"}
_MAKING_TABLES = 0x50F7
"""Key of the advisory lock under which tables are made."""

T = TypeVar("T")


def database_url(address: str) -> URL:
    """The address of a database that processes can share; UserError for every other."""
    advice = "give SOFTPROMPT_STORAGE as postgresql://user@host/database or sqlite:////folder/file.db, or unset it"
    try:
        url = make_url(address)
    except ArgumentError:
        raise UserError(f"{without_secrets(address)} is not the address of an SQL database; {advice}") from None
    if url.get_backend_name() not in ("sqlite", "postgresql"):
        raise UserError(f"{without_secrets(address)} is neither SQLite nor PostgreSQL; {advice}")
    if is_sqlite(url) and url.database in (None, "", ":memory:"):
        raise UserError(f"{address} is in memory, where no other process finds it; {advice}")
    try:
        url.get_dialect().import_dbapi()
    except (ArgumentError, ImportError):
        raise UserError(
            f"SOFTPROMPT_STORAGE: no driver {url.drivername} is installed; run `pip install 'softprompt[postgres]'`"
        ) from None
    return url


def is_sqlite(url: URL) -> bool:
    """Whether the database is a file of SQLite."""
    return url.get_backend_name() == "sqlite"


def engine_options(url: URL) -> dict[str, Any]:
    """Arguments of `create_engine`: a connection that waits for others, and that notices a server which is gone."""
    if is_sqlite(url):
        return {"connect_args": {"timeout": _BUSY_SECONDS}}
    options = {
        "connect_timeout": 10,
        "keepalives_idle": 30,
        "keepalives_interval": 10,
        "keepalives_count": 3,
        "tcp_user_timeout": 60_000,
    }
    mine = {name: value for name, value in options.items() if name not in url.query}
    return {"pool_pre_ping": True, "connect_args": mine}


def persist(call: Callable[[], T], seconds: float = OUTAGE_SECONDS) -> T:
    """Call, and again as long as the database is away, for so many seconds; then its error is raised.

    A call whose commit was sent and not confirmed is made once more, so it must bear to have been made already.
    """
    told = False

    def tell(state: RetryCallState) -> None:
        nonlocal told
        if not told and (state.seconds_since_start or 0.0) >= _QUIET_SECONDS:
            told = True
            assert state.outcome is not None
            reason = describe_fault(state.outcome.exception())
            watcher().stage(f"the study storage does not answer ({reason}); trying again for {seconds:.0f} s")

    retrying = Retrying(
        retry=retry_if_exception(is_transient),
        wait=wait_random_exponential(multiplier=0.1, max=5.0),
        stop=stop_after_delay(seconds),
        before_sleep=tell,
        reraise=True,
    )
    result = retrying(call)
    if told:
        watcher().stage("the study storage answers again")
    return result


def is_transient(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is a fault of the database that passes by itself."""
    fault = _fault_behind(error)
    return fault is not None and _passes(fault)


def _fault_behind(error: BaseException | None) -> DBAPIError | None:
    """What the driver said first: Optuna wraps it, and may go on with the broken transaction before it gives up."""
    while error is not None and not isinstance(error, DBAPIError):
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return error


def _passes(error: DBAPIError) -> bool:
    fault = error.orig
    if isinstance(fault, sqlite3.Error):
        return getattr(fault, "sqlite_errorcode", 0) & 0xFF in _SQLITE_PASSING
    state = getattr(fault, "pgcode", None) or getattr(fault, "sqlstate", None)
    if state:
        return bool(state.startswith(_POSTGRES_PASSING))
    if error.connection_invalidated:
        return True
    # No connection came about. What the server said is for good (a wrong password), unless it is only not ready.
    words = str(fault)
    refused = "FATAL:" in words and not any(passing in words for passing in _POSTGRES_REFUSALS_PASSING)
    return isinstance(error, OperationalError) and not refused


def describe_fault(error: BaseException | None) -> str:
    """The driver's own words, in one line, without secrets."""
    fault = _fault_behind(error)
    words = str(fault.orig if fault else error)
    return without_secrets(words.strip().partition("\n")[0])


@contextmanager
def making_tables(url: URL) -> Iterator[None]:
    """One process at a time, of all that use this database: two that make the same tables break each other."""
    if is_sqlite(url):
        with Path(f"{url.database}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        return
    engine = create_engine(url, poolclass=NullPool, connect_args=engine_options(url)["connect_args"])
    with engine.begin() as connection:
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MAKING_TABLES})
        yield


def let_readers_in(url: URL) -> None:
    """Switch a SQLite file to its write-ahead log, in which nobody who reads waits for one who writes.

    The log needs memory that all processes share, so on a network's file system the file stays as it is.
    """
    if not is_sqlite(url) or not _is_local(Path(str(url.database)).absolute()):
        return
    with (
        suppress(sqlite3.OperationalError),
        closing(sqlite3.connect(str(url.database), timeout=_BUSY_SECONDS)) as connection,
    ):
        connection.execute("PRAGMA journal_mode=WAL")


def _is_local(file: Path) -> bool:
    folder = os.path.realpath(file.parent)
    over = [p for p in psutil.disk_partitions(all=True) if os.path.commonpath([folder, p.mountpoint]) == p.mountpoint]
    nearest = max(over, key=lambda p: len(p.mountpoint), default=None)
    return nearest is not None and nearest.fstype in _LOCAL_FILE_SYSTEMS
