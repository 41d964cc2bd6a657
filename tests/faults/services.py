"""Servers that the suite starts, kills and cuts off: MLflow's, PostgreSQL's, and the cable in between."""

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import uvicorn
from mlflow.server.constants import (
    ARTIFACT_ROOT_ENV_VAR,
    ARTIFACTS_DESTINATION_ENV_VAR,
    BACKEND_STORE_URI_ENV_VAR,
    SERVE_ARTIFACTS_ENV_VAR,
)

from tests.faults.children import Child, Home, end_with_parent


def free_port() -> int:
    """A port on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


class MlflowServer:
    """MLflow's own server, forked instead of started anew: it answers within half a second."""

    def __init__(self, home: Home, database: Path) -> None:
        """A server with empty tables.

        Args:
            home: Where its log goes.
            database: A SQLite file with the tables in it, which is copied.
        """
        self._home = Home(home.folder / "server")
        self._home.folder.mkdir()
        (self._home.folder / "tmp").mkdir()
        shutil.copy(database, self._home.folder / "mlflow.db")
        self._port = free_port()
        self._child: Child | None = None
        self.start()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def port(self) -> int:
        return self._port

    def start(self) -> None:
        """Start it, and wait until it answers."""
        self._child = Child(self._home, self._serve)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
                return
            if self._child.wait(0.05):
                break
        raise RuntimeError(f"MLflow's server does not start: {self._home.last_words()}")

    def stop(self) -> None:
        """Kill it."""
        if self._child is not None:
            self._child.kill()

    close = stop

    def _serve(self) -> None:
        from mlflow.server.fastapi_app import app  # reads the environment; warns of a library of its own

        folder = self._home.folder
        os.environ |= {
            BACKEND_STORE_URI_ENV_VAR: f"sqlite:///{folder / 'mlflow.db'}",
            ARTIFACT_ROOT_ENV_VAR: "mlflow-artifacts:/",
            ARTIFACTS_DESTINATION_ENV_VAR: str(folder / "artifacts"),
            SERVE_ARTIFACTS_ENV_VAR: "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
        uvicorn.run(app, host="127.0.0.1", port=self._port, log_level="warning")


class Cable:
    """A connection that can be cut: a proxy in a process of its own, which passes bytes on to a port."""

    def __init__(self, home: Home, port: int) -> None:
        self._target = port
        self._port = free_port()
        self._here, self._there = socket.socketpair()
        self._child = Child(Home(home.folder), self._pass_on)
        self._there.close()
        self._tell("hello")

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def cut(self) -> None:
        """Cut every connection, and accept no other."""
        self._tell("cut")

    def mend(self) -> None:
        """Accept connections again."""
        self._tell("mend")

    def cut_after(self, count: int) -> None:
        """Cut every connection after so many more bytes, of both directions together; new ones are accepted."""
        self._tell(f"after {count}")

    @property
    def cuts(self) -> int:
        """How often it was cut in the midst of bytes."""
        return int(self._tell("cuts"))

    def close(self) -> None:
        """End the proxy."""
        self._child.kill()
        self._here.close()

    def _tell(self, order: str) -> str:
        self._here.sendall(f"{order}\n".encode())
        return self._here.recv(64).decode().strip()

    def _pass_on(self) -> None:
        self._here.close()
        proxy = _Proxy(self._port, self._target)
        with self._there.makefile("r") as orders:
            for order in orders:
                self._there.sendall(f"{proxy.obey(order.strip())}\n".encode())


class _Proxy:
    """Two threads for each connection, which pass bytes on until they are cut."""

    def __init__(self, port: int, target: int) -> None:
        self._target = target
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._left: int | None = None
        """Bytes until the cut."""
        self._whole = True
        self._cuts = 0
        self._listener = socket.create_server(("127.0.0.1", port), backlog=64)
        threading.Thread(target=self._accept, daemon=True).start()

    def obey(self, order: str) -> str:
        with self._lock:
            match order.split():
                case ["cut"]:
                    self._whole = False
                    self._cut()
                case ["mend"]:
                    self._whole = True
                case ["after", count]:
                    self._left = int(count)
                case ["cuts"]:
                    return str(self._cuts)
        return "done"

    def _accept(self) -> None:
        while True:
            near, _ = self._listener.accept()
            try:
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                near.close()
                continue
            with self._lock:
                if not self._whole:
                    near.close()
                    far.close()
                    continue
                self._open |= {near, far}
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(1 << 14):
                with self._lock:
                    allowed = len(piece) if self._left is None else min(len(piece), self._left)
                    sink.sendall(piece[:allowed])
                    if self._left is not None:
                        self._left -= allowed
                        if self._left == 0:
                            self._left = None
                            self._cuts += 1
                            self._cut()
        with self._lock:
            for end in (source, sink):
                self._open.discard(end)
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def _cut(self) -> None:
        for end in self._open:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._open.clear()


def find_postgres() -> Path | None:
    """Folder of Debian's newest PostgreSQL, where it is installed and may be run."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not found or (os.geteuid() == 0 and not _user()):
        return None
    return found[-1]


def _user() -> str:
    """As whom PostgreSQL runs, which refuses root."""
    with contextlib.suppress(KeyError):
        return pwd.getpwnam("postgres").pw_name
    return ""


class Postgres:
    """A PostgreSQL of one scenario; it ends with the process that has started it."""

    def __init__(self, folder: Path, programs: Path) -> None:
        """An empty database, as a user that is not root, who may reach the folder."""
        self._folder, self._programs, self._port = folder, programs, free_port()
        self._as: dict[str, Any] = {"user": _user()} if os.geteuid() == 0 else {}
        folder.mkdir()
        if self._as:
            shutil.chown(folder, _user())
        words = ["-D", "data", "-U", "postgres", "--auth=trust", "--no-sync", "-E", "UTF8"]
        subprocess.run([programs / "initdb", *words], cwd=folder, check=True, **self._as, **_QUIET)
        self.start()

    @property
    def url(self) -> str:
        return f"postgresql+psycopg2://postgres@127.0.0.1:{self._port}/postgres"

    def start(self) -> None:
        """Start it, and wait until it accepts connections."""
        settings = ["listen_addresses=127.0.0.1", "unix_socket_directories=", "fsync=off"]
        self._process = subprocess.Popen(
            [str(self._programs / "postgres"), "-D", "data", "-p", str(self._port), *(f"--{s}" for s in settings)],
            cwd=self._folder,
            preexec_fn=lambda: end_with_parent(signal.SIGQUIT),
            **self._as,
            **_QUIET,
        )
        ready = [str(self._programs / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self._port)]
        deadline = time.monotonic() + 60
        while subprocess.call(ready, **_QUIET) != 0:
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise RuntimeError("PostgreSQL does not start")
            time.sleep(0.05)

    def stop(self, mode: str = "fast") -> None:
        """Stop it: `fast` breaks off what goes on, `immediate` is as if it crashed."""
        self._process.send_signal(signal.SIGQUIT if mode == "immediate" else signal.SIGINT)
        self._process.wait(60)

    def close(self) -> None:
        """End it for good."""
        self.stop("immediate")


_QUIET: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)


def stop_group(process: "subprocess.Popen[bytes]") -> None:
    """Kill what a process that led its own group has left behind."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(60)
