"""MLflow, Prefect and the Optuna dashboard over one state, served by one command.

Each is a process of its own, in its own process group, so that all of it ends with us. Nothing here listens beyond this
machine unless it is told to, and a server that the user has configured is named, not started a second time.
"""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from flows.access import AUTH, LOOPBACK, Access, mlflow_users, open_access
from flows.environment import configured_server, prepare_environment, served_api, served_note
from softprompt.errors import UserError
from softprompt.home import artifact_root, state_home, study_storage, tracking_server, tracking_uri, without_secrets

_DASHBOARD = (
    "import os, sys; from optuna_dashboard import run_server; "
    "run_server(os.environ['SOFTPROMPT_STORAGE'], host=sys.argv[1], port=int(sys.argv[2]))"
)
"""Its own command takes the storage, which may hold a password, as an argument only."""
_HERE = Access(LOOPBACK, None)
_START_SECONDS = 180
_STOP_SECONDS = 4


@dataclass(frozen=True)
class _Page:
    """One server: how it is started, and when it is there."""

    name: str
    shows: str
    port: int
    option: str
    """The option of `softprompt ui` that moves it to another port."""
    health: str
    arguments: tuple[str, ...]
    """What follows `python`; nothing secret, as everyone on the machine can read it."""
    environment: dict[str, str] = field(default_factory=dict)
    access: Access = _HERE

    @property
    def address(self) -> str:
        """For a person's browser."""
        return f"http://{self.access.shown}:{self.port}"

    @property
    def near(self) -> str:
        """For a process of this machine."""
        return f"http://{self.access.near}:{self.port}"

    @property
    def log(self) -> Path:
        return state_home() / "logs" / f"{self.option.removeprefix('--').removesuffix('-port')}.log"

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(self.near + self.health, timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


def serve_pages(
    *, host: str = LOOPBACK, mlflow_port: int = 5000, prefect_port: int = 4200, optuna_port: int = 8080
) -> None:
    """Serve the pages until Ctrl-C, SIGTERM or SIGHUP.

    Args:
        host: IPv4 address for MLflow and Prefect; what is not loopback needs SOFTPROMPT_UI_AUTH in the environment.
        mlflow_port: port of MLflow; nothing is started where `MLFLOW_TRACKING_URI` names a server.
        prefect_port: port of Prefect; nothing is started where a Prefect server is configured.
        optuna_port: port of the Optuna dashboard.

    Raises UserError, before anything is started, where a port is taken, the state is served already or others could
    come in unasked, and SystemExit(1) where a server does not start or ends by itself.
    """
    access = open_access(host)
    served = served_api()
    if served:
        raise UserError(f"this state is served already, with Prefect on {served}; stop the other `softprompt ui` first")
    pages = _pages(access, mlflow_port, prefect_port, optuna_port)
    _require_free(pages)
    prepare_environment()
    from softprompt.storage import create_stores  # imports MLflow, which reads the environment

    create_stores()
    with ExitStack() as stack:
        stack.enter_context(signals_interrupt())
        _serve(pages, stack)


def _serve(pages: list[_Page], stack: ExitStack) -> None:
    try:
        for name, address in _addresses_elsewhere().items():
            _say(f"{name:<17} {address} (your own server)")
        _say(f"starting {', '.join(page.name for page in pages)}")
        stack.enter_context(mlflow_users())
        running = [(page, stack.enter_context(_process(page))) for page in pages]
        stack.callback(_ask_to_end, [process for _, process in running])
        _await_answers(running)
        for page, process in running:
            if page.name == "Prefect":
                stack.enter_context(_note(f"{page.near}/api", process.pid))
        _say("Ctrl-C stops them")
        while True:
            _check_alive(running)
            time.sleep(0.5)
    except KeyboardInterrupt:
        _say("stopping")


def _pages(access: Access, mlflow_port: int, prefect_port: int, optuna_port: int) -> list[_Page]:
    """The servers to start: those that the user has not got."""
    elsewhere = _addresses_elsewhere()
    asking, safe = access.mlflow(mlflow_port)
    every = [
        _Page(
            "MLflow",
            "runs, metrics and registered prompts",
            mlflow_port,
            "--mlflow-port",
            "/health",
            ("-m", "mlflow", "server", "--host", access.host, "--port", str(mlflow_port), "--workers", "1", *asking),
            {
                "MLFLOW_BACKEND_STORE_URI": tracking_uri(),
                "MLFLOW_ARTIFACTS_DESTINATION": artifact_root().as_uri(),
                # The job runner is for agents and traces: eight processes that we never use.
                "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
                **safe,
            },
            access,
        ),
        _Page(
            "Prefect",
            "flow runs, deployments and schedules",
            prefect_port,
            "--prefect-port",
            "/api/health",
            ("-m", "prefect", "server", "start", "--host", access.host, "--port", str(prefect_port)),
            access.prefect(prefect_port),
            access,
        ),
        _Page(
            "Optuna dashboard",
            "the search" if access == _HERE else f"the search; it asks for no password, so it stays on {LOOPBACK}",
            optuna_port,
            "--optuna-port",
            "/",
            ("-c", _DASHBOARD, LOOPBACK, str(optuna_port)),
            {"SOFTPROMPT_STORAGE": study_storage()},
        ),
    ]
    return [page for page in every if page.name not in elsewhere]


def _addresses_elsewhere() -> dict[str, str]:
    """The servers of the user's own, by name."""
    found = {}
    server = tracking_server()
    if server:
        found["MLflow"] = server
    if configured_server():
        from prefect.settings import get_current_settings

        found["Prefect"] = without_secrets(str(get_current_settings().ui_url))
    return found


def _require_free(pages: list[_Page]) -> None:
    taken: dict[int, _Page] = {}
    for page in pages:
        if page.port in taken:
            raise UserError(
                f"port {page.port} is asked for twice, for {taken[page.port].name} and for {page.name}; "
                f"give another one with {page.option}"
            )
        taken[page.port] = page
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((page.access.host, page.port))
            except OSError as error:
                raise UserError(
                    f"port {page.port} for {page.name} cannot be used on {page.access.host} ({error.strerror}); "
                    f"give another one with {page.option}, or another --host"
                ) from None


@contextmanager
def _process(page: _Page) -> Iterator[subprocess.Popen[bytes]]:
    """A server and all that it starts, ended together when the block ends."""
    page.log.parent.mkdir(parents=True, exist_ok=True)
    # Its log is the only place where a server can say why it ended.
    dropped = ("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "MLFLOW_LOGGING_LEVEL", "PREFECT_API_URL", AUTH)
    environment = {k: v for k, v in os.environ.items() if k not in dropped} | page.environment
    with page.log.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, *page.arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        _end(process)


def _ask_to_end(processes: list[subprocess.Popen[bytes]]) -> None:
    """All at once, so that their grace periods run side by side."""
    for process in processes:
        _signal_group(process, signal.SIGTERM)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask the group to end, and after a grace period end it."""
    _signal_group(process, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_SECONDS)
    _signal_group(process, signal.SIGKILL)
    process.wait()


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _await_answers(running: list[tuple[_Page, subprocess.Popen[bytes]]]) -> None:
    """Print each address once its server answers."""
    deadline = time.monotonic() + _START_SECONDS
    waiting = [page for page, _ in running]
    while waiting:
        _check_alive(running)
        for page in [page for page in waiting if page.answers()]:
            _say(f"{page.name:<17} {page.address}  {page.shows}")
            waiting.remove(page)
        if time.monotonic() > deadline:
            _fail(waiting[0], f"did not answer within {_START_SECONDS} seconds")
        time.sleep(0.3)


def _check_alive(running: list[tuple[_Page, subprocess.Popen[bytes]]]) -> None:
    for page, process in running:
        if process.poll() is not None:
            _fail(page, f"ended by itself with exit code {process.returncode}")


def _fail(page: _Page, what: str) -> None:
    lines = page.log.read_text(encoding="utf-8", errors="replace").splitlines()
    told = "\n  ".join([f"{page.name} {what}; the end of {page.log}:", *lines[-10:]])
    print(without_secrets(told), file=sys.stderr, flush=True)
    raise SystemExit(1)


@contextmanager
def _note(address: str, process: int) -> Iterator[None]:
    """Tell sweeps that start meanwhile where to report."""
    served_note().write_text(f"{address} {process}\n", encoding="utf-8")
    try:
        yield
    finally:
        served_note().unlink(missing_ok=True)


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """Make what ends a process otherwise unasked an interrupt, and let none of them disturb the ending."""
    caught = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def interrupt(number: int, frame: FrameType | None) -> None:
        for each in caught:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = [signal.signal(number, interrupt) for number in caught]
    try:
        yield
    finally:
        for number, handler in zip(caught, before, strict=True):
            signal.signal(number, handler)


def _say(text: str) -> None:
    print(text, flush=True)
