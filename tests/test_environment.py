"""What stands before Prefect is imported, and what does not when no flow runs."""

from pathlib import Path

import pytest

from flows.environment import configured_server, prepare_environment
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
