"""The pages, served for real over a state in which nothing has run yet."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from flows.environment import served_note
from flows.ui import serve_pages
from softprompt.errors import UserError

SERVE = "import sys; from flows.ui import serve_pages; serve_pages(**{k: int(v) for k, v in zip(('mlflow_port', \
'prefect_port', 'optuna_port'), sys.argv[1:])})"


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def start(home: Path, ports: list[int], **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", SERVE, *map(str, ports)],
        env={k: v for k, v in os.environ.items() if k != "PREFECT_HOME"} | {"SOFTPROMPT_HOME": str(home)} | environment,
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def read_until(process: "subprocess.Popen[str]", text: str) -> str:
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"ended before {text!r}: {seen}{process.stderr.read() if process.stderr else ''}")


def answers(address: str) -> bool:
    with urllib.request.urlopen(address, timeout=20) as answer:
        return bool(answer.status == 200)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[int], "subprocess.Popen[str]", str]]:
    home, ports = tmp_path_factory.mktemp("home") / "not there yet", free_ports(3)
    with start(home, ports) as process:
        try:
            yield home, ports, process, read_until(process, "Ctrl-C")
        finally:
            process.terminate()


def test_three_pages_answer_over_an_empty_state_and_end_with_the_command(served):
    home, (mlflow, prefect, optuna), process, output = served
    for port, health in ((mlflow, "/health"), (prefect, "/api/health"), (optuna, "/")):
        assert f"http://127.0.0.1:{port}" in output
        assert answers(f"http://127.0.0.1:{port}{health}")
    assert answers(f"http://127.0.0.1:{mlflow}/")
    assert answers(f"http://127.0.0.1:{optuna}/api/studies")
    with urllib.request.urlopen(f"http://127.0.0.1:{prefect}/ui-settings", timeout=20) as settings:
        assert f"http://127.0.0.1:{prefect}/api".encode() in settings.read()
    assert (home / "prefect-api-url").read_text().split()[0] == f"http://127.0.0.1:{prefect}/api"
    assert (home / "prefect" / "prefect.db").is_file()

    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 3
    assert not [c for c in children if "optuna.db" in " ".join(c.cmdline())]  # nor the password of another storage
    assert {c.laddr.ip for child in children for c in child.net_connections() if c.status == "LISTEN"} == {"127.0.0.1"}
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert time.monotonic() - began < 10
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    assert not (home / "prefect-api-url").exists()


def test_page_that_ends_by_itself_ends_all_with_its_reason(tmp_path: Path):
    process = start(tmp_path, free_ports(3), PREFECT_API_DATABASE_CONNECTION_URL="nonsense://nowhere")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "Prefect ended by itself" in errors
    assert "nonsense" in errors
    assert not (tmp_path / "prefect-api-url").exists()


@pytest.mark.parametrize(
    ("option", "place"), [("--mlflow-port", 0), ("--prefect-port", 1), ("--optuna-port", 2)], ids=lambda x: str(x)
)
def test_port_in_use_is_refused_before_anything_starts(option, place, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("SOFTPROMPT_HOME", str(tmp_path / "home"))
    ports = free_ports(3)
    with socket.create_server(("127.0.0.1", ports[place])), pytest.raises(UserError) as caught:
        serve_pages(mlflow_port=ports[0], prefect_port=ports[1], optuna_port=ports[2])
    assert str(ports[place]) in str(caught.value)
    assert option in str(caught.value)
    assert not (tmp_path / "home").exists()


def test_one_port_for_two_pages_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SOFTPROMPT_HOME", str(tmp_path))
    with pytest.raises(UserError, match="asked for twice"):
        serve_pages(mlflow_port=5999, prefect_port=5999, optuna_port=5998)


def test_servers_of_the_user_are_named_and_not_started(tmp_path: Path):
    own = {"MLFLOW_TRACKING_URI": "http://mlflow.example:5000", "PREFECT_API_URL": "http://prefect.example:4200/api"}
    process = start(tmp_path, free_ports(3), **own)
    output = read_until(process, "Ctrl-C")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert "http://mlflow.example:5000 (your own server)" in output
    assert "http://prefect.example:4200 (your own server)" in output
    assert not (tmp_path / "prefect-api-url").exists()
    assert {log.name for log in (tmp_path / "logs").iterdir()} == {"optuna.log"}


def test_state_that_is_served_is_not_served_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    class Healthy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    monkeypatch.setenv("SOFTPROMPT_HOME", str(tmp_path))
    with HTTPServer(("127.0.0.1", 0), Healthy) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        served_note().write_text(f"http://127.0.0.1:{server.server_port}/api {os.getpid()}")
        with pytest.raises(UserError, match="served already"):
            serve_pages()
        server.shutdown()
