"""What is left open by a death, in a real tracking store and a real study."""

import socket
import subprocess
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import optuna
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from optuna.trial import TrialState

from softprompt import search
from softprompt.closing import abandon, close_abandoned_runs, close_open_runs, is_dead
from softprompt.data import PreparedData
from softprompt.home import tracking_uri
from softprompt.ledger import SweepRow, open_ledger
from softprompt.spec import ExperimentSpec
from softprompt.storage import create_stores, study_store
from softprompt.sweep import Sweep
from softprompt.tracking import Tracker, reopen_run
from tests.tiny import tiny_experiment

_flows = (f"flow-{n}" for n in count())


class Left:
    """A sweep with two trials in training, whose process is gone."""

    def __init__(self, experiment: ExperimentSpec, data: PreparedData, *, goes_on: bool = True) -> None:
        self.flow = next(_flows)
        self.experiment, self.tracker = experiment, Tracker(experiment)
        self.client = MlflowClient(tracking_uri())
        search.create_study(self.flow, study_store(), experiment)
        run_id = self.tracker.start_sweep(self.flow, experiment, data, {"prefect.flow_run_id": self.flow})
        self.sweep = Sweep(name=self.flow, run_id=run_id)
        open_ledger().add_sweep(SweepRow(self.flow, experiment.name, "the same", run_id))
        if not goes_on:
            open_ledger().end_sweep(self.flow)
        for _ in range(2):
            number = self.study.ask().number
            self.tracker.start_trial(self.sweep.run_id, study=self.sweep.name, number=number, name="a trial")

    @property
    def study(self) -> optuna.Study:
        return search.load_study(self.sweep.name, study_store(), self.experiment)

    @property
    def states(self) -> list[TrialState]:
        return [trial.state for trial in self.study.trials]

    @property
    def parent(self) -> Run:
        return self.client.get_run(self.sweep.run_id)

    @property
    def trials(self) -> list[Run]:
        found = [self.tracker.find_trial_run(self.sweep.name, number) for number in range(2)]
        return [self.client.get_run(run_id) for run_id in found if run_id]

    @property
    def ends(self) -> set[tuple[Any, ...]]:
        """Status, outcome and reason of the trials and of the sweep."""
        tags = ("softprompt.outcome", "softprompt.reason")
        return {(r.info.status, *(r.data.tags.get(tag) for tag in tags)) for r in (*self.trials, self.parent)}

    def own(self, host: str, pid: int) -> None:
        for tag, value in {"softprompt.host": host, "softprompt.pid": str(pid)}.items():
            self.client.set_tag(self.sweep.run_id, tag, value)


@pytest.fixture(scope="module")
def leave(tmp_path_factory) -> Callable[..., Left]:
    create_stores()
    folder = tmp_path_factory.mktemp("closing")
    experiment = tiny_experiment(folder, name="tiny-closing")
    sizes = {"train": 8, "validation": 4, "test": 4}
    data = PreparedData(folder, "d" * 64, "rows.csv", sizes, {split: {} for split in sizes}, {}, None)
    return lambda **how: Left(experiment, data, **how)


@pytest.fixture
def gone() -> int:
    """The id of a process that is no more."""
    with subprocess.Popen(["true"]) as process:
        process.wait()
    return process.pid


def test_a_sweep_that_can_go_on_is_interrupted_whatever_befell_it_and_its_trials_stay_as_they_are(leave):
    left = leave()
    close_open_runs(left.flow, "failed", "the machine went down")
    reason = "the machine went down; `softprompt sweep` goes on with it"
    assert left.ends == {("KILLED", "interrupted", reason)}
    assert left.states == [TrialState.RUNNING] * 2


def test_what_cannot_go_on_is_closed_as_its_end_wants_it(leave):
    left = leave(goes_on=False)
    close_open_runs(left.flow, "failed", "gone")
    assert left.ends == {("FAILED", "failed", "gone")}
    assert left.states == [TrialState.FAIL] * 2


def test_trials_are_found_by_their_sweep(leave):
    left, other = leave(), leave()
    assert all("prefect.flow_run_id" not in trial.data.tags for trial in left.trials)
    close_open_runs(left.flow, "interrupted", "cancelled")
    assert other.ends == {("RUNNING", None, None)}


def test_a_sweep_that_another_flow_run_goes_on_with_is_not_closed_by_the_first(leave):
    left = leave()
    left.tracker.reopen_sweep(left.sweep.run_id, {"prefect.flow_run_id": "the second"})
    close_open_runs(left.flow, "failed", "late")
    assert left.ends == {("RUNNING", None, None)}


def test_only_what_a_process_of_this_machine_left_is_closed_where_it_is_gone(leave, gone):
    dead, living, elsewhere = leave(), leave(), leave()
    dead.own(socket.gethostname(), gone)
    elsewhere.own("another.example", gone)
    close_abandoned_runs()
    assert dead.ends == {("KILLED", "interrupted", "its process is gone; `softprompt sweep` goes on with it")}
    assert dead.states == [TrialState.RUNNING] * 2
    assert living.ends == elsewhere.ends == {("RUNNING", None, None)}


def test_a_process_is_dead_if_it_is_known_to_be(gone):
    assert is_dead(socket.gethostname(), gone)
    assert not is_dead("another.example", gone)
    assert not is_dead(socket.gethostname(), 1)


def test_an_interrupted_run_can_be_opened_again(leave):
    left = leave()
    close_open_runs(left.flow, "interrupted", "cancelled")
    for run in (*left.trials, left.parent):
        reopen_run(left.client, run.info.run_id)
        reopen_run(left.client, run.info.run_id)  # as after a lost answer
    assert left.ends == {("RUNNING", None, None)}


def test_a_sweep_that_is_given_up_ends_in_mlflow_and_in_optuna(leave):
    left, closed = leave(), leave()
    left.tracker.end(left.trials[0].info.run_id, "finished")
    close_open_runs(closed.flow, "interrupted", "cancelled")
    for each in (left, closed):
        abandon(each.sweep)
        assert each.states == [TrialState.FAIL] * 2
    given_up = ("KILLED", "interrupted", "given up for a new sweep")
    assert left.ends == {("FINISHED", "finished", None), given_up}
    assert closed.ends == {given_up}


def test_what_was_ended_keeps_its_end_and_what_mlflow_alone_finished_is_open(leave):
    left = leave()
    left.tracker.end(left.trials[0].info.run_id, "pruned", "too far behind")
    left.client.set_terminated(left.sweep.run_id, "FINISHED")  # as registering a version does
    close_open_runs(left.flow, "interrupted", "cancelled")
    assert left.parent.info.status == "KILLED"
    assert left.trials[0].data.tags["softprompt.reason"] == "too far behind"


def test_closing_what_is_not_there_makes_no_store(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("SOFTPROMPT_HOME", str(tmp_path))
    close_open_runs("a flow run", "failed", "a mistake")
    assert not list(tmp_path.iterdir())
