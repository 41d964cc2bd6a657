"""All that many lanes need, started by one command and ended together: PostgreSQL, the pages over it, and workers.

The pages are those of `softprompt ui`. What a sweep or a lane has to know is written to a file that only its owner can
read, for a shell to source, and never printed, as it holds a password.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path

from flows.environment import QUIET, configured_server, served_note
from flows.postgres import database, make_databases, serve_postgres
from flows.ui import signals_interrupt
from softprompt.errors import UserError
from softprompt.home import state_home, tracking_server

POOLS = ("softprompt", "softprompt-lanes")
"""The work pools of prefect.yaml: one for sweeps, one for the lanes that join them."""
_COMMAND = (sys.executable, "-c", "from flows.cli import main; main()")
_STOP_SECONDS = 15


def serve_site(*, workers: int, postgres_port: int, options: Sequence[str] = ()) -> None:
    """Serve until Ctrl-C, SIGTERM or SIGHUP, or until a part ends by itself.

    Args:
        workers: workers for lanes; beside them there is one for sweeps.
        postgres_port: port of PostgreSQL; none is started where `SOFTPROMPT_POSTGRES` is the address of a server.
        options: what `softprompt ui` is given, as its ports.

    Raises UserError where PostgreSQL is missing or servers of the user's own are configured, and SystemExit(1) where a
    part ends by itself.
    """
    if tracking_server() or configured_server() or os.environ.get("SOFTPROMPT_STORAGE"):
        raise UserError(
            "MLFLOW_TRACKING_URI, SOFTPROMPT_STORAGE or PREFECT_API_URL is set, and servers of your own are used as "
            "they are; unset them for `softprompt up`, or start what is missing with `softprompt ui`"
        )
    with ExitStack() as stack:
        stack.enter_context(signals_interrupt())
        try:
            _serve(workers, postgres_port, options, stack)
        except KeyboardInterrupt:
            print("stopping", flush=True)


def _serve(workers: int, postgres_port: int, options: Sequence[str], stack: ExitStack) -> None:
    given = os.environ.get("SOFTPROMPT_POSTGRES")
    own = nullcontext(given) if given else serve_postgres(state_home() / "postgres", postgres_port)
    address = stack.enter_context(own)
    make_databases(address)
    print("PostgreSQL        " + ("your own server" if given else f"127.0.0.1:{postgres_port}"), flush=True)
    stores = {
        "MLFLOW_TRACKING_URI": database(address, "mlflow"),
        "SOFTPROMPT_STORAGE": database(address, "studies"),
        "PREFECT_API_DATABASE_CONNECTION_URL": database(address, "prefect", driver="asyncpg"),
    }
    pages = stack.enter_context(_process([*_COMMAND, "ui", *options], os.environ | stores, stdout=subprocess.PIPE))
    users = {"SOFTPROMPT_STORAGE": stores["SOFTPROMPT_STORAGE"], **_await_pages(pages)}
    environment = os.environ | QUIET | users
    for pool in POOLS:
        _run(["work-pool", "create", pool, "--type", "process", "--overwrite"], environment)
    running = {"the pages": pages}
    for number, pool in enumerate([POOLS[0], *[POOLS[1]] * workers]):
        log = state_home() / "logs" / f"worker-{number}.log"
        command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--limit", "1"]
        running[f"worker {number}"] = stack.enter_context(_process(command, environment, log=log))
    with _written(state_home() / "servers.env", users) as file:
        print(f"workers           1 for sweeps, {workers} for lanes", flush=True)
        print(f"in other terminals: source {os.path.relpath(file)}; Ctrl-C stops all of it", flush=True)
        while True:
            for name, process in running.items():
                if process.poll() is not None:
                    print(f"softprompt: {name} ended by itself; see {state_home() / 'logs'}", file=sys.stderr)
                    raise SystemExit(1)
            time.sleep(0.5)


def _await_pages(pages: "subprocess.Popen[str]") -> dict[str, str]:
    """Show what `softprompt ui` says until all of its pages answer; where MLflow and Prefect are."""
    assert pages.stdout is not None
    mlflow = None
    for line in pages.stdout:
        if line.startswith("Ctrl-C"):
            break
        print(line, end="", flush=True)
        name, _, rest = line.partition("http")
        if name.strip() == "MLflow":
            mlflow = "http" + rest.split()[0]
    else:
        raise SystemExit(1)  # it has said why on standard error
    assert mlflow is not None
    # It says no more than that it stops; but a full pipe would stop it for good.
    threading.Thread(target=pages.stdout.read, daemon=True).start()
    return {"MLFLOW_TRACKING_URI": mlflow, "PREFECT_API_URL": served_note().read_text(encoding="utf-8").split()[0]}


def _run(arguments: list[str], environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "prefect", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, start_new_session=True)
    if done.returncode:
        raise RuntimeError(f"prefect {' '.join(arguments)}: {(done.stderr or done.stdout).strip()}")


@contextmanager
def _process(
    command: list[str], environment: dict[str, str], *, stdout: int | None = None, log: Path | None = None
) -> Iterator["subprocess.Popen[str]"]:
    """A process in a session of its own, ended with the block: first asked, then made to."""
    with log.open("wb") if log else nullcontext() as stream:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stream or stdout,
            stderr=stream,
            text=True,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def _written(file: Path, variables: dict[str, str]) -> Iterator[Path]:
    """A file for a shell to source, while the servers are there."""
    with suppress(FileNotFoundError):
        file.unlink()  # an earlier one may be open to others
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as stream:
        stream.writelines(f"export {name}='{value}'\n" for name, value in variables.items())
    try:
        yield file
    finally:
        file.unlink(missing_ok=True)
