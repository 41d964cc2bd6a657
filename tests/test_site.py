"""PostgreSQL, the pages and workers, started for real by one command and ended with it."""

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg2
import pytest

from flows.postgres import DATABASES, find_programs
from tests.test_cli import COMMAND, call, sentence
from tests.test_ui import answers, free_ports, read_until

ROOT = Path(__file__).parents[1]


@pytest.fixture
def home() -> Iterator[Path]:
    """A state folder that the user whom PostgreSQL runs as can reach."""
    with tempfile.TemporaryDirectory(prefix="softprompt-site-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder) / "state"


def test_servers_of_the_user_are_not_doubled():
    said = sentence(call("up", MLFLOW_TRACKING_URI="http://mlflow.example:5000"))
    assert "unset them for `softprompt up`" in said


@pytest.mark.skipif(find_programs() is None, reason="PostgreSQL is not installed")
@pytest.mark.timeout(300)
def test_one_command_serves_everything_on_loopback_and_ends_all_of_it(home: Path):
    postgres, *ports = free_ports(4)
    options = [f"--{name}-port={port}" for name, port in zip(("mlflow", "prefect", "optuna"), ports, strict=True)]
    process = subprocess.Popen(
        [*COMMAND, "up", "--workers", "1", f"--postgres-port={postgres}", *options],
        env={k: v for k, v in os.environ.items() if k != "PREFECT_HOME"} | {"SOFTPROMPT_HOME": str(home)},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        output = read_until(process, "Ctrl-C")
        file = home / "servers.env"
        assert file.stat().st_mode & 0o777 == 0o600
        told = dict(line.removeprefix("export ").split("=", 1) for line in file.read_text().splitlines())
        users = {name: value.strip("'") for name, value in told.items()}
        assert users["MLFLOW_TRACKING_URI"] == f"http://127.0.0.1:{ports[0]}"
        assert users["PREFECT_API_URL"] == f"http://127.0.0.1:{ports[1]}/api"
        assert answers(users["MLFLOW_TRACKING_URI"] + "/health")

        password = (home / "postgres" / "password").read_text()
        children = psutil.Process(process.pid).children(recursive=True)
        assert password not in output + " ".join(word for child in children for word in child.cmdline())
        listening = [c.laddr.ip for each in children for c in each.net_connections("inet") if c.status == "LISTEN"]
        assert set(listening) == {"127.0.0.1"}
        with pytest.raises(psycopg2.OperationalError, match="password"):
            psycopg2.connect(users["SOFTPROMPT_STORAGE"].replace(password, "guessed"))
        connection = psycopg2.connect(users["SOFTPROMPT_STORAGE"])
        with connection.cursor() as cursor:
            cursor.execute("SELECT datname FROM pg_database")
            assert set(DATABASES) <= {name for (name,) in cursor.fetchall()}
        connection.close()

        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, process.stderr.read() if process.stderr else ""
        assert not psutil.wait_procs(children, timeout=10)[1]
        assert not file.exists()
    finally:
        process.kill()
        process.communicate()
