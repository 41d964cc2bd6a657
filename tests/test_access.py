"""Who may reach the pages: real servers, asked with the right password, with a wrong one and with none."""

import base64
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from flows.access import open_access
from flows.environment import prepare_environment
from flows.ui import serve_pages
from softprompt.errors import UserError
from tests.test_ui import free_ports, read_until

COMMAND = [sys.executable, "-c", "from flows.cli import main; main()"]
AUTH = "somebody:a-password:with-a-colon"
needs_wtf = pytest.mark.skipif(find_spec("flask_wtf") is None, reason="the extra `auth` is not installed")


def ask(address: str, auth: str = "", body: object = None, **headers: str) -> int:
    """The status of the answer."""
    if auth:
        headers["Authorization"] = f"Basic {base64.b64encode(auth.encode()).decode()}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


@dataclass
class Served:
    """The command `softprompt ui` at work."""

    home: Path
    mlflow: str
    prefect: str
    optuna: str
    output: str
    process: psutil.Process

    def listening(self) -> dict[int, str]:
        """By port, the address that one of its processes listens on."""
        connections = [c for child in self.process.children(recursive=True) for c in child.net_connections()]
        return {c.laddr.port: c.laddr.ip for c in connections if c.status == "LISTEN"}


@pytest.fixture(scope="module", params=["0.0.0.0"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    home, ports = tmp_path_factory.mktemp("home"), free_ports(3)
    options = [f"--{name}-port={port}" for name, port in zip(("mlflow", "prefect", "optuna"), ports, strict=True)]
    environment = {k: v for k, v in os.environ.items() if k != "PREFECT_HOME"}
    with subprocess.Popen(
        [*COMMAND, "ui", "--host", request.param, *options],
        env=environment | {"SOFTPROMPT_HOME": str(home), "SOFTPROMPT_UI_AUTH": AUTH},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            mlflow, prefect, optuna = (f"http://127.0.0.1:{port}" for port in ports)
            output = read_until(process, "Ctrl-C")
            yield Served(home, mlflow, prefect, optuna, output, psutil.Process(process.pid))
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
            assert not (home / "ui-users").exists()


@pytest.fixture(scope="module")
def open_prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Prefect server as `softprompt ui` starts it on loopback by default."""
    port, environment = free_ports(1)[0], {"PREFECT_HOME": str(tmp_path_factory.mktemp("prefect"))}
    with subprocess.Popen(
        [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)],
        env=os.environ | environment | open_access("127.0.0.1").prefect(port),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        address = f"http://127.0.0.1:{port}"
        try:
            while process.poll() is None:
                with suppress(OSError):
                    if ask(f"{address}/api/health") == 200:
                        break
                time.sleep(0.2)
            yield address
        finally:
            process.terminate()


@needs_wtf
def test_mlflow_and_prefect_listen_where_they_are_told_and_the_dashboard_does_not(served: Served):
    by_page = [served.listening()[int(a.rpartition(":")[2])] for a in (served.mlflow, served.prefect, served.optuna)]
    assert by_page == ["0.0.0.0", "0.0.0.0", "127.0.0.1"]
    assert "asks for no password, so it stays on 127.0.0.1" in served.output
    assert ask(served.optuna) == 200


@needs_wtf
@pytest.mark.parametrize(
    ("page", "path", "body"),
    [
        ("mlflow", "/", None),
        ("mlflow", "/api/2.0/mlflow/experiments/search", {"max_results": 1}),
        ("mlflow", "/ajax-api/2.0/mlflow/experiments/search", {"max_results": 1}),
        ("mlflow", "/api/2.0/mlflow-artifacts/artifacts?path=", None),
        ("prefect", "/api/admin/version", None),
        ("prefect", "/api/hello", None),
        ("prefect", "/api/collections/views/aggregate-worker-metadata", None),
    ],
)
def test_who_has_no_password_or_another_one_is_refused(served: Served, page: str, path: str, body: object):
    address = getattr(served, page) + path
    assert ask(address, body=body) == 401
    for wrong in ("somebody:another-password", "admin:password1234", "admin:a-password:with-a-colon", "somebody:"):
        assert ask(address, wrong, body) == 401
    assert ask(address, AUTH, body) == 200


@needs_wtf
def test_a_foreign_page_in_a_browser_of_this_machine_gets_nothing_from_mlflow(served: Served):
    search, body = f"{served.mlflow}/api/2.0/mlflow/experiments/search", {"max_results": 1}
    assert ask(search, AUTH, body, Host="evil.example") == 403
    assert ask(search, AUTH, body, Origin="http://evil.example") == 403
    assert ask(search, AUTH, body, Origin=served.mlflow) == 200
    assert ask(search, AUTH, body, Host="localhost:9999") == 200  # a tunnel


@needs_wtf
def test_a_foreign_page_gets_nothing_from_prefect_even_where_it_asks_for_no_password(open_prefect: str):
    def told(origin: str) -> str | None:
        request = urllib.request.Request(f"{open_prefect}/api/admin/version", headers={"Origin": origin})
        with urllib.request.urlopen(request, timeout=30) as answer:
            allowed: str | None = answer.headers["Access-Control-Allow-Origin"]
            return allowed

    assert told("http://evil.example") is None
    assert told(open_prefect) == open_prefect
    # What a page may send without asking first: the answer stays hidden from it, but what it asks for would be done.
    assert ask(f"{open_prefect}/api/flows/", body={"name": "planted"}, Origin="http://evil.example") == 403


@needs_wtf
def test_the_password_is_in_no_file_no_output_and_no_argument(served: Served):
    secrets = [AUTH.encode(), AUTH.partition(":")[2].encode(), base64.b64encode(AUTH.encode())]
    files = {file: file.read_bytes() for file in served.home.rglob("*") if file.is_file()}
    assert {"mlflow.ini", "users.db", "mlflow.log", "prefect.log", "prefect.db"} <= {file.name for file in files}
    assert [file for file, content in files.items() if any(secret in content for secret in secrets)] == []
    arguments = [" ".join(p.cmdline()) for p in (served.process, *served.process.children(recursive=True))]
    assert not [line for line in [served.output, *arguments] if "a-password" in line]
    assert (served.home / "ui-users").stat().st_mode & 0o777 == 0o700


@needs_wtf
def test_a_flow_of_the_same_state_reports_there_with_the_password_and_is_told_where_it_lacks_one(served: Served):
    flow = (
        "from flows.environment import prepare_environment; prepare_environment()\n"
        "from prefect import flow, runtime\n"
        "@flow\n"
        "def reporting():\n    print('reported', runtime.flow_run.id)\n"
        "reporting()"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PREFECT_HOME"} | {"SOFTPROMPT_HOME": str(served.home)}

    def run(**own: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-c", flow]
        return subprocess.run(command, env=environment | own, capture_output=True, text=True, timeout=120)

    done = run(SOFTPROMPT_UI_AUTH=AUTH)
    number = done.stdout.partition("reported ")[2].strip()
    assert ask(f"{served.prefect}/api/flow_runs/{number}", AUTH) == 200, done.stderr
    assert "SOFTPROMPT_UI_AUTH: `softprompt ui` serves this state" in run().stderr
    assert "set it to what it was started with" in run(SOFTPROMPT_UI_AUTH="somebody:another-password").stderr


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "10.0.0.7"])
def test_another_interface_without_a_password_is_refused_before_anything_starts(
    host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SOFTPROMPT_HOME", str(tmp_path / "home"))
    with pytest.raises(UserError, match=rf"--host {host}: others can reach .* SOFTPROMPT_UI_AUTH=user:password"):
        serve_pages(host=host)
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("host", ["", "::", "nowhere.example", "127.0.0.1:80", "256.0.0.1", "127.0.0.1 --app-name x"])
def test_what_is_no_address_is_refused(host: str):
    with pytest.raises(UserError, match="is no IPv4 address"):
        open_access(host)


@pytest.mark.parametrize("auth", ["just-a-password", ":a-long-password", "somebody:brief", "a:line\nbroken-12345"])
def test_a_setting_that_is_none_is_refused_and_not_repeated(auth: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SOFTPROMPT_UI_AUTH", auth)
    with pytest.raises(UserError, match=r"SOFTPROMPT_UI_AUTH: ") as told:
        open_access("127.0.0.1")
    assert (auth.partition(":")[2] or auth) not in str(told.value)


def test_where_mlflow_cannot_ask_for_a_password_it_is_told_how_to_mend_that(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SOFTPROMPT_UI_AUTH", AUTH)
    monkeypatch.setitem(sys.modules, "flask_wtf", None)
    with pytest.raises(UserError, match=r"pip install 'softprompt\[auth\]'"):
        open_access("127.0.0.1")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.8.8.8"])
def test_loopback_needs_no_password(host: str):
    assert open_access(host).auth is None


def test_without_a_server_a_password_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SOFTPROMPT_HOME", str(tmp_path))
    monkeypatch.setenv("SOFTPROMPT_UI_AUTH", AUTH)
    prepare_environment()
    assert "PREFECT_API_URL" not in os.environ
    assert "PREFECT_API_AUTH_STRING" not in os.environ
