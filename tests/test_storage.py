import multiprocessing
import os
import re
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from inspect import getsource
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import optuna
import pytest
from mlflow import MlflowClient
from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.samplers import RandomSampler
from optuna.storages import BaseStorage, _CachedStorage
from optuna.trial import TrialState
from sqlalchemy import create_engine, event, text

from softprompt.errors import UserError
from softprompt.ledger import Ledger
from softprompt.storage import StudyStore, create_stores, study_store
from tests.cutting import cutting
from tests.postgres import postgres

LANES = 4


def together(work: Callable[..., None], *arguments: object) -> list[object]:
    """What processes answer that begin at the same moment."""
    context = multiprocessing.get_context("spawn")
    gate, answers = context.Barrier(LANES), context.Queue()
    lanes = [context.Process(target=work, args=(*arguments, gate, answers)) for _ in range(LANES)]
    for lane in lanes:
        lane.start()
    for lane in lanes:
        lane.join(150)
        assert lane.exitcode == 0
    return [answers.get() for _ in lanes]


def load(url: str) -> optuna.Study:
    return optuna.load_study(study_name="movies", storage=study_store(url), sampler=RandomSampler())


def test_processes_that_start_together_make_the_stores_once(tmp_path: Path):
    command = [sys.executable, "-c", "from softprompt.storage import create_stores; create_stores()"]
    environment = os.environ | {"SOFTPROMPT_HOME": str(tmp_path / "home")}
    processes = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    errors = [process.communicate(timeout=150)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], errors
    assert (tmp_path / "home" / "optuna.db").stat().st_size
    assert MlflowClient(f"sqlite:///{tmp_path / 'home' / 'mlflow.db'}").search_experiments()
    with closing(sqlite3.connect(tmp_path / "home" / "optuna.db")) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_every_call_of_optuna_outlasts_an_outage():
    mine = vars(StudyStore)
    assert set(BaseStorage.__abstractmethods__) <= set(mine)
    called = set(re.findall(r"self\._backend\.(\w+)\(", getsource(_CachedStorage)))
    # What `optimize` calls, which we do not use.
    heartbeat = {name for name in called if "heartbeat" in name or "stale" in name}
    assert len(called - heartbeat) > 15
    assert called - heartbeat <= set(mine)


def test_a_storage_that_is_no_database_is_refused():
    with pytest.raises(UserError, match="is not the address of an SQL database"):
        study_store("studies.log")


def test_an_address_where_nobody_answers_is_told_at_the_start(free_port: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("softprompt.storage._FIRST_SECONDS", 0.3)
    monkeypatch.setenv("SOFTPROMPT_STORAGE", f"postgresql://me:secret@127.0.0.1:{free_port}/studies")
    with pytest.raises(UserError, match=r"^SOFTPROMPT_STORAGE: postgresql://\*\*\*@127.*refused.*; start that") as told:
        create_stores()
    assert "secret" not in str(told.value)


def take_waiting(url: str, gate: Barrier, answers: "Queue[list[int]]") -> None:
    study = load(url)
    gate.wait()
    answers.put([study.ask().number for _ in range(5)])


def test_a_waiting_trial_is_taken_by_one_process(tmp_path: Path):
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    study = optuna.create_study(study_name="movies", storage=study_store(url))
    for place in range(5 * LANES):
        study.enqueue_trial({"x": place})
    taken = [number for numbers in together(take_waiting, url) for number in numbers]  # type: ignore[attr-defined]
    assert sorted(taken) == list(range(5 * LANES))


def train(url: str, gate: Barrier, answers: "Queue[list[str]]") -> None:
    store, ledger, faults = study_store(url), Ledger(url, patience=0.3), []
    for engine in (store.engine, ledger._engine):
        event.listen(engine, "handle_error", lambda context: faults.append(str(context.original_exception)))
    study = optuna.load_study(study_name="movies", storage=store, sampler=RandomSampler())
    gate.wait()
    with ledger.beating():
        for _ in range(8):
            one_trial(study, ledger)
    answers.put(faults)


def one_trial(study: optuna.Study, ledger: Ledger) -> None:
    trial = study.ask()
    assert ledger.claim("movies", f"trial {trial.number}")
    value = trial.suggest_float("x", 0, 1)
    for step in range(5):
        trial.report(value, step)
        assert ledger.holds("movies", f"trial {trial.number}")
    trial.set_user_attr("run_id", "run")
    study.tell(trial, value)
    ledger.release("movies", f"trial {trial.number}")


def test_several_lanes_share_a_file_without_a_lock_error(tmp_path: Path):
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    study = optuna.create_study(study_name="movies", storage=study_store(url))
    assert together(train, url) == [[]] * LANES
    assert sorted(trial.number for trial in study.trials) == list(range(8 * LANES))
    assert {trial.state for trial in study.trials} == {TrialState.COMPLETE}
    assert {len(trial.intermediate_values) for trial in study.trials} == {5}
    assert Ledger(url).leased("movies") == []


def test_a_study_goes_on_where_its_database_restarts():
    with postgres() as server:
        study = optuna.create_study(study_name="movies", storage=study_store(server.url), sampler=RandomSampler())
        ledger = Ledger(server.url, patience=1.0)
        over, done, failed = threading.Event(), [], []

        def lane() -> None:
            try:
                with ledger.beating():
                    while not over.is_set():
                        one_trial(study, ledger)
                        done.append(1)
            except Exception as error:
                failed.append(error)

        def trains(more: int) -> bool:
            goal = len(done) + more
            for _ in range(600):
                if failed or len(done) >= goal:
                    break
                time.sleep(0.05)
            return not failed

        training = threading.Thread(target=lane)
        training.start()
        try:
            for mode in ("fast", "immediate", "immediate"):
                assert trains(2), failed
                server.stop(mode)
                time.sleep(0.5)
                server.start()
            assert trains(2), failed
        finally:
            over.set()
            training.join()
        assert not failed
        told = [trial for trial in load(server.url).trials if trial.state == TrialState.COMPLETE]
        assert len(told) == len(done)
        assert {(len(t.intermediate_values), t.user_attrs["run_id"], len(t.params)) for t in told} == {(5, "run", 1)}
        assert {t.state for t in study.trials} <= {TrialState.COMPLETE, TrialState.RUNNING}


def test_a_connection_that_breaks_within_a_call_costs_nothing():
    """Between two queries of one transaction, with which Optuna then tries to go on."""
    with postgres() as server:
        store, other = study_store(server.url), create_engine(server.url)
        study = optuna.create_study(study_name="movies", storage=store, sampler=RandomSampler())
        study.tell(study.ask(), 0.5)
        breaks: list[str] = []

        def terminate(connection: object, cursor: Any, statement: str, *rest: object) -> None:
            if "FROM trial_values" in statement and not breaks:
                breaks.append(statement)
                with other.begin() as admin:
                    admin.execute(
                        text("SELECT pg_terminate_backend(:pid)"), {"pid": cursor.connection.info.backend_pid}
                    )

        event.listen(store.engine, "before_cursor_execute", terminate)
        assert [trial.value for trial in store.get_all_trials(study._study_id)] == [0.5]
        assert breaks
        other.dispose()


def test_a_change_whose_answer_is_lost_is_made_once():
    with postgres() as server, cutting(server.url) as way:
        store = study_store(way.url)

        def cut(change: Callable[[], object]) -> None:
            before = way.cuts
            way.armed = True
            change()
            assert way.cuts == before + 1

        cut(lambda: optuna.create_study(study_name="movies", storage=store))
        assert len(store.get_all_studies()) == 1
        with pytest.raises(DuplicatedStudyError):
            optuna.create_study(study_name="movies", storage=store)
        study = optuna.load_study(study_name="movies", storage=store, sampler=RandomSampler())
        trial = study.ask()
        cut(lambda: trial.suggest_float("x", 0, 1))
        cut(lambda: trial.report(0.5, 3))
        cut(lambda: trial.set_user_attr("run_id", "run"))
        cut(lambda: store.set_trial_state_values(trial._trial_id, TrialState.COMPLETE, [0.5]))
        with pytest.raises(UpdateFinishedTrialError):
            store.set_trial_state_values(trial._trial_id, TrialState.COMPLETE, [0.5])
        (told,) = load(server.url).trials
        assert (told.state, told.value, told.intermediate_values) == (TrialState.COMPLETE, 0.5, {3: 0.5})
        assert (told.user_attrs, list(told.params)) == ({"run_id": "run"}, ["x"])
        # The one that may be made twice: what was lost runs, and nobody trains it.
        cut(study.ask)
        states = [t.state for t in load(server.url).trials]
        assert states.count(TrialState.COMPLETE) == 1
        assert set(states[1:]) == {TrialState.RUNNING}
