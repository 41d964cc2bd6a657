"""Where the records go: what is shown of it, and whether it answers."""

import os
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

from softprompt.errors import UserError
from softprompt.home import require_tracking, study_storage, tracking_server, tracking_uri, without_secrets


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("sqlite:////home/a@b/mlflow.db", "sqlite:////home/a@b/mlflow.db"),
        ("http://mlflow.example:5000/at", "http://mlflow.example:5000/at"),
        ("https://me:pa:ss@mlflow.example", "https://***@mlflow.example"),
        ("https://token@mlflow.example", "https://***@mlflow.example"),
        ("postgresql+psycopg2://me:pa/s@s@db.example/x", "postgresql+psycopg2://***@db.example/x"),
        ("postgresql://db.example/x?user=me&password=secret&a=b", "postgresql://db.example/x?user=me&password=***&a=b"),
        ("API request to http://me:pass@m.example/api failed", "API request to http://***@m.example/api failed"),
    ],
)
def test_passwords_are_not_shown(uri: str, shown: str):
    assert without_secrets(uri) == shown


def test_a_server_that_does_not_answer_is_told_at_once_and_without_its_password(free_port, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{free_port}/")
    assert tracking_server() == f"http://127.0.0.1:{free_port}"
    with pytest.raises(
        UserError, match=rf"^MLFLOW_TRACKING_URI: http://127.0.0.1:{free_port} does not answer \(.*; start"
    ):
        require_tracking()


@pytest.mark.parametrize("uri", ["http://", "http://nobody:port"])
def test_an_address_that_is_none_is_told(uri: str, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(UserError, match="does not answer"):
        require_tracking()


@pytest.mark.parametrize("status", [200, 401, 404, 500])
def test_any_answer_is_one(status: int, monkeypatch):
    class Answering(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answering) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{server.server_port}")
        require_tracking()
        server.shutdown()


def test_a_database_is_not_asked(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:secret@nowhere.example/x")
    require_tracking()


def test_user_and_password_of_a_server_are_taken_out_of_its_address(monkeypatch):
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "another")  # put back after the test
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:p%40ss:word@mlflow.example:5000/at?x=y")
    assert tracking_uri() == os.environ["MLFLOW_TRACKING_URI"] == "https://mlflow.example:5000/at?x=y"
    assert os.environ["MLFLOW_TRACKING_USERNAME"] == "me"
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == "p@ss:word"
    assert without_secrets("refused p@ss:word") == "refused ***"


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("MLFLOW_TRACKING_URI", "http://secret-token@mlflow.example"),
        ("MLFLOW_TRACKING_URI", "postgresql://me:secret-word@db.example:port/x"),
        ("SOFTPROMPT_STORAGE", "postgresql://me:secret-word@db.example:port/x"),
        ("SOFTPROMPT_STORAGE", "secret-word@db"),
    ],
)
def test_an_address_that_no_library_can_read_is_told_without_its_password(variable: str, value: str, monkeypatch):
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=rf"^{variable}: ") as told:
        tracking_uri() if variable == "MLFLOW_TRACKING_URI" else study_storage()
    assert "secret" not in str(told.value)


def test_a_credential_is_masked_wherever_it_stands(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    monkeypatch.setenv("SOFTPROMPT_STORAGE", "postgresql://me:in-the-url@db.example/x")
    monkeypatch.setenv("SOFTPROMPT_UI_AUTH", "me:of-the-pages")
    text = "token hf_abcdefgh, word 'in-the-url' and of-the-pages"
    assert without_secrets(text) == "token ***, word '***' and ***"
