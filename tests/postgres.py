"""A PostgreSQL of its own for a test, from the binaries that Debian installs; the test is skipped where there are none.

It never runs as root, which PostgreSQL refuses: where the tests do, it belongs to the user `postgres`.
"""

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.test_ui import free_ports

PASSWORD = "kept-in-the-url"


class Postgres:
    """A server on a port of loopback, over a folder of its own."""

    def __init__(self, binaries: Path, folder: Path, port: int, password: str) -> None:
        self._binaries, self._folder, self._port = binaries, folder, port
        self.url = f"postgresql+psycopg2://tester:{password}@127.0.0.1:{port}/postgres"

    def start(self) -> None:
        options = f"-c listen_addresses=127.0.0.1 -c port={self._port} -c unix_socket_directories='' -c fsync=off"
        self._control("start", "-o", options, "-l", str(self._folder / "log"))

    def stop(self) -> None:
        """As a machine that is shut down: whoever is connected is thrown out."""
        self._control("stop", "-m", "fast")

    def restart(self) -> None:
        self.stop()
        self.start()

    def dump(self) -> bytes:
        """All that is in it, as SQL."""
        command = [str(self._binaries / "pg_dump"), self.url.replace("+psycopg2", "")]
        return subprocess.run(command, check=True, capture_output=True).stdout

    def _control(self, *arguments: str) -> None:
        _as_nobody_special([str(self._binaries / "pg_ctl"), "-D", str(self._folder / "data"), "-w", *arguments])


@contextmanager
def postgres(password: str = PASSWORD) -> Iterator[Postgres]:
    """A running server that is gone with its data when the block ends."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        pytest.skip("no PostgreSQL in /usr/lib/postgresql")
    folder = Path(tempfile.mkdtemp(prefix="softprompt-postgres-"))
    try:
        secret = folder / "password"
        secret.write_text(password)
        if os.getuid() == 0:
            for path in (folder, secret):
                shutil.chown(path, _owner())
        initdb = [str(found[-1]), "-D", str(folder / "data"), "-U", "tester", "-A", "scram-sha-256", "-E", "UTF8"]
        _as_nobody_special([*initdb, "--pwfile", str(secret), "--no-sync"])
        server = Postgres(found[-1].parent, folder, free_ports(1)[0], password)
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _owner() -> str:
    try:
        return pwd.getpwnam("postgres").pw_name
    except KeyError:
        pytest.skip("PostgreSQL does not run as root, and there is no user postgres")


def _as_nobody_special(command: list[str]) -> None:
    user = _owner() if os.getuid() == 0 else None
    # Its own log is a file: a server that inherits a pipe keeps it open, and whoever reads it waits.
    subprocess.run(command, user=user, check=True, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
