"""A real PostgreSQL server of a test's own, which it may stop, kill and start again."""

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_ACCOUNTS = ("postgres", "nobody")


class PostgresServer:
    """A server in a folder of its own, on the loopback interface."""

    def __init__(self, programs: Path, folder: Path, user: dict[str, Any], password: str) -> None:
        self._programs, self._folder, self._user = programs, folder, user
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port: int = probe.getsockname()[1]
        self.url = f"postgresql://tester{f':{password}' if password else ''}@127.0.0.1:{self.port}/postgres"
        secret = folder / "password"
        secret.write_text(password)
        secret.chmod(0o644)
        access = ("--auth", "scram-sha-256", "--pwfile", str(secret)) if password else ("--auth", "trust")
        self._run("initdb", "--pgdata", str(folder / "data"), "--username", "tester", "--no-sync", *access)

    def start(self) -> None:
        """Start, and wait until connections are taken."""
        settings = f"-p {self.port} -h 127.0.0.1 -k {self._folder} -c fsync=off"
        self._run("pg_ctl", "--options", settings, "--log", str(self._folder / "log"), *self._data, "--wait", "start")

    def stop(self, mode: str = "fast") -> None:
        """Stop: `fast` cuts the connections off, `immediate` is a crash."""
        self._run("pg_ctl", *self._data, "--mode", mode, "--wait", "stop")

    def restart(self, mode: str = "fast") -> None:
        """Stop and start at once."""
        self.stop(mode)
        self.start()

    def dump(self) -> bytes:
        """All that is in it, as SQL."""
        return subprocess.run([self._programs / "pg_dump", self.url], check=True, capture_output=True).stdout

    @property
    def running(self) -> bool:
        """Whether it has been started, and not stopped."""
        return (self._folder / "data" / "postmaster.pid").exists()

    @property
    def _data(self) -> tuple[str, str]:
        return "--pgdata", str(self._folder / "data")

    def _run(self, program: str, *arguments: str) -> None:
        # The server inherits the pipes of whoever starts it, and would hold them open.
        with (self._folder / "output").open("w+") as output:
            command = [str(self._programs / program), *arguments]
            done = subprocess.run(command, cwd=self._folder, stdout=output, stderr=output, timeout=120, **self._user)
            output.seek(0)
            assert done.returncode == 0, f"{program}: {output.read()}"


@contextmanager
def postgres(password: str = "") -> Iterator[PostgresServer]:
    """A server that runs, with a password or without; the test is skipped where there is none to be had."""
    programs = _programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed")
    user: dict[str, Any] = {}
    folder = Path(tempfile.mkdtemp(prefix="softprompt-postgres-"))
    if os.getuid() == 0:  # which PostgreSQL refuses to run as
        account = next((a for a in pwd.getpwall() if a.pw_name in _ACCOUNTS), None)
        if account is None:
            pytest.skip("PostgreSQL does not run as root, and there is no account for it")
        user = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
        os.chown(folder, account.pw_uid, account.pw_gid)
    try:
        server = PostgresServer(programs, folder, user, password)
        server.start()
        try:
            yield server
        finally:
            if server.running:
                server.stop("immediate")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _programs() -> Path | None:
    on_path = shutil.which("pg_ctl")
    if on_path and (Path(on_path).resolve().parent / "initdb").exists():
        return Path(on_path).resolve().parent
    installed = Path("/usr/lib/postgresql").glob("*/bin/pg_ctl")  # where Debian keeps it, off the path
    return max((p.parent for p in installed), default=None, key=lambda p: int(p.parent.name.partition(".")[0]))
