"""What stands before Prefect is imported, and what does not when no flow runs."""

import os
import subprocess
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from flows.environment import configured_server, prepare_environment, served_api, served_note
from softprompt.errors import UserError


def test_without_state_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PREFECT_HOME")
    monkeypatch.setenv("SOFTPROMPT_HOME", str(tmp_path / "home"))
    prepare_environment(state=False)
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("content", [b"active = ", b"profiles = 3", b"\xff"])
def test_broken_profiles_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes):
    (tmp_path / "profiles.toml").write_bytes(content)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"profiles\.toml"):
        configured_server()


def test_a_note_that_outlived_its_server_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Healthy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    monkeypatch.setenv("SOFTPROMPT_HOME", str(tmp_path))
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    with HTTPServer(("127.0.0.1", 0), Healthy) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/api"
        served_note().write_text(f"{address} {os.getpid()}\n")
        assert served_api() == address
        served_note().write_text(f"{address} {gone.pid}\n")
        assert served_api() is None
        server.shutdown()
