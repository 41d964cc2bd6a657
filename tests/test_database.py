import sqlite3
import threading
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError

from softprompt.database import database_url, engine_options, is_transient, let_readers_in, making_tables, persist
from softprompt.errors import UserError
from softprompt.progress import Lines, watched_by
from tests.postgres import postgres


def journal_mode(file: Path) -> str:
    with sqlite3.connect(file) as connection:
        mode: str = connection.execute("PRAGMA journal_mode").fetchone()[0]
    connection.close()
    return mode


def ask(url: str) -> None:
    engine = create_engine(database_url(url), **engine_options(database_url(url)))
    try:
        with engine.connect() as connection:
            connection.execute(text("SELECT 1"))
    finally:
        engine.dispose()


@pytest.mark.parametrize(
    ("address", "complaint"),
    [
        ("studies.log", "is not the address of an SQL database; give SOFTPROMPT_STORAGE as postgresql://"),
        ("redis://u:secret@host/0", r"^redis://\*\*\*@host/0 is neither SQLite nor PostgreSQL; give"),
        ("postgres://host/name", "is neither SQLite nor PostgreSQL"),
        ("sqlite://", "is in memory, where no other process finds it"),
        ("sqlite:///:memory:", "is in memory, where no other process finds it"),
        ("postgresql+nodriver://host/name", r"no driver postgresql\+nodriver is installed; run `pip install"),
    ],
)
def test_an_address_that_processes_cannot_share_is_refused(address: str, complaint: str):
    with pytest.raises(UserError, match=complaint) as refused:
        database_url(address)
    assert "secret" not in str(refused.value)


def test_what_the_user_says_of_a_connection_stays(tmp_path: Path):
    options = engine_options(database_url("postgresql://u@host/name?connect_timeout=3"))
    assert "connect_timeout" not in options["connect_args"]
    assert options["connect_args"]["keepalives_idle"] == 30


def test_a_locked_file_is_waited_for(tmp_path: Path):
    file = tmp_path / "shared.db"
    held = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
    held.execute("CREATE TABLE t (x INTEGER)")
    held.execute("BEGIN EXCLUSIVE")
    engine = create_engine(f"sqlite:///{file}", connect_args={"timeout": 0})

    def write() -> None:
        with engine.begin() as connection:
            connection.execute(text("INSERT INTO t VALUES (1)"))

    with pytest.raises(OperationalError, match="locked"):
        persist(write, seconds=0.3)
    release = threading.Timer(0.5, lambda: held.execute("COMMIT"))
    release.start()
    persist(write, seconds=60)
    release.join()
    assert held.execute("SELECT count(*) FROM t").fetchone() == (1,)
    held.close()
    engine.dispose()


def test_a_fault_that_does_not_pass_is_raised_at_once(tmp_path: Path):
    calls, engine = [], create_engine(f"sqlite:///{tmp_path / 'shared.db'}")

    def wrong() -> None:
        calls.append(1)
        with engine.connect() as connection:
            connection.execute(text("SELECT * FROM absent"))

    with pytest.raises(OperationalError, match="no such table"):
        persist(wrong)
    assert len(calls) == 1
    engine.dispose()


def test_a_server_that_is_away_is_waited_for_and_told_of_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("softprompt.database._QUIET_SECONDS", 0.0)
    said: list[str] = []
    with postgres() as server, watched_by(Lines(said.append)):
        server.stop()
        with pytest.raises(OperationalError) as away:
            ask(server.url)
        assert is_transient(away.value)
        start = threading.Timer(1.0, server.start)
        start.start()
        persist(lambda: ask(server.url))
        start.join()
    assert len(said) == 2
    assert said[0].startswith("the study storage does not answer (connection to server at")
    assert said[1] == "the study storage answers again"


def test_what_a_server_refuses_for_good_is_not_tried_again():
    with postgres() as server:
        for wrong in (server.url.replace("/postgres", "/absent"), server.url.replace("tester", "stranger")):
            with pytest.raises(OperationalError, match="does not exist") as refused:
                persist(lambda wrong=wrong: ask(wrong))  # type: ignore[misc]
            assert not is_transient(refused.value)


def test_a_file_on_this_machine_has_a_log_and_one_on_a_network_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    let_readers_in(database_url(f"sqlite:///{tmp_path / 'here.db'}"))
    assert journal_mode(tmp_path / "here.db") == "wal"
    mounts = [SimpleNamespace(mountpoint="/", fstype="ext4"), SimpleNamespace(mountpoint=str(tmp_path), fstype="nfs4")]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: mounts)
    let_readers_in(database_url(f"sqlite:///{tmp_path / 'there.db'}"))
    assert journal_mode(tmp_path / "there.db") == "delete"


@pytest.mark.parametrize("backend", ["sqlite", "postgresql"])
def test_tables_are_made_by_one_at_a_time(tmp_path: Path, backend: str):
    if backend == "sqlite":
        _one_at_a_time(f"sqlite:///{tmp_path / 'shared.db'}")
    else:
        with postgres() as server:
            _one_at_a_time(server.url)


def _one_at_a_time(url: str) -> None:
    inside, most, gate = [], [], threading.Barrier(4)

    def make() -> None:
        gate.wait()
        with making_tables(database_url(url)):
            inside.append(1)
            most.append(len(inside))
            threading.Event().wait(0.05)
            inside.pop()

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1, 1]
