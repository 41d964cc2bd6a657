"""A PostgreSQL server of this state folder: for studies, runs and flows that several machines write at once.

It listens on loopback, asks for the password that is kept in the state folder, and ends with the block that started it.
Its programs are the machine's own; nothing is installed.
"""

import os
import pwd
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from softprompt.errors import UserError

USER = "softprompt"
DATABASES = ("mlflow", "studies", "prefect")
"""One for each, as each keeps a history of its tables under the same name."""
_START_SECONDS = 60
_STOP_SECONDS = 10


def find_programs() -> Path | None:
    """The folder of PostgreSQL's programs; None where it is not installed."""
    on_path = shutil.which("initdb")
    if on_path:
        return Path(on_path).resolve().parent
    # Debian keeps them beside the path.
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: int(p.parent.name))
    return installed[-1] if installed else None


@contextmanager
def serve_postgres(folder: Path, port: int) -> Iterator[str]:
    """Start the server of a folder, made on first use; gives the address with user and password, without a database.

    Raises UserError where PostgreSQL is not installed or does not start.
    """
    programs = find_programs()
    if programs is None:
        raise UserError(
            "PostgreSQL is not installed here; install it, or set SOFTPROMPT_POSTGRES to the address of a server, as "
            "postgresql://user:password@host:5432"
        )
    owner = _owner()
    data, password, log = folder / "data", folder / "password", folder / "log"
    _make_folder(folder, owner)
    if not password.exists():
        password.touch(mode=0o600)
        password.write_text(secrets.token_urlsafe(24))
        _give(password, owner)
    _make_data(programs, data, password, owner)
    options = ("-D", str(data), "-p", str(port), "-h", "127.0.0.1", "-k", "")
    with log.open("wb") as stream:
        server = subprocess.Popen(
            [programs / "postgres", *options],
            user=owner,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        address = f"postgresql://{USER}:{password.read_text()}@127.0.0.1:{port}"
        _await_answer(server, address, log)
        yield address
    finally:
        with suppress(ProcessLookupError):
            server.send_signal(signal.SIGINT)  # SIGTERM would wait for every client to leave
        try:
            server.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _make_data(programs: Path, data: Path, password: Path, owner: str | None) -> None:
    """The data folder of a server, if it is not there; what an interrupted start has left of one is removed."""
    if (data / "PG_VERSION").exists():
        return
    shutil.rmtree(data, ignore_errors=True)
    access = ("-U", USER, "-A", "scram-sha-256", "--pwfile", str(password))
    command = [str(programs / "initdb"), "-D", str(data), *access, "-E", "UTF8", "--locale=C"]
    _require(subprocess.run(command, user=owner, cwd=data.parent, capture_output=True, text=True))


def make_databases(address: str) -> None:
    """Make those of our databases that a server has not got."""
    import psycopg2

    connection = psycopg2.connect(f"{address}/postgres")
    try:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute("SELECT datname FROM pg_database")
            there = {name for (name,) in cursor.fetchall()}
            for name in set(DATABASES) - there:
                cursor.execute(f'CREATE DATABASE "{name}"')
    finally:
        connection.close()


def database(address: str, name: str, *, driver: str = "") -> str:
    """The address of one database, as SQLAlchemy takes it."""
    parts = urlsplit(address)
    return urlunsplit(parts._replace(scheme=f"postgresql{f'+{driver}' if driver else ''}", path=f"/{name}"))


def _owner() -> str | None:
    """PostgreSQL refuses to run as root: then it is the user that its package has made."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam("postgres").pw_name
    except KeyError:
        raise UserError("PostgreSQL does not run as root; start this as another user") from None


def _make_folder(folder: Path, owner: str | None) -> None:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _give(folder, owner)
    if owner and subprocess.run(["test", "-w", str(folder)], user=owner, cwd="/", check=False).returncode:
        raise UserError(f"{folder}: cannot be reached by the user {owner}; set SOFTPROMPT_HOME to another folder")


def _give(path: Path, owner: str | None) -> None:
    if owner:
        shutil.chown(path, owner)


def _require(done: "subprocess.CompletedProcess[str]") -> None:
    if done.returncode:
        raise UserError(f"PostgreSQL cannot make its data folder: {(done.stderr or done.stdout).strip()}")


def _await_answer(server: "subprocess.Popen[bytes]", address: str, log: Path) -> None:
    import psycopg2

    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            psycopg2.connect(f"{address}/postgres", connect_timeout=5).close()
            return
        except psycopg2.OperationalError:
            if server.poll() is not None or time.monotonic() > deadline:
                last = log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
                raise UserError(f"PostgreSQL does not start ({last}); its log is {log}") from None
        time.sleep(0.1)
