"""The comparison and the reading of records themselves: what is planted is found."""

from collections.abc import Iterator
from pathlib import Path

import mlflow
import optuna
import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric, Run
from optuna.trial import TrialState

from softprompt import search
from softprompt.data import prepare
from softprompt.home import cache_home, state_home, study_storage, tracking_uri
from softprompt.lane import Lane
from softprompt.spec import ExperimentSpec
from softprompt.sweep import begin_sweep, close_sweep
from softprompt.tracking import PARENT_RUN, TRIAL, Tracker
from softprompt.workbench import Workbench
from tests.faults.comparison import Difference, Fact, compare
from tests.faults.records import read_facts
from tests.faults.suite import Row, Settings, plan
from tests.tiny import tiny_experiment

FACTS: list[Fact] = [("trial 0", "state", "COMPLETE"), ("trial 0", "train_loss", "at 1", "2.5")]


def test_equal_records_differ_in_nothing():
    assert not compare(FACTS, reversed(FACTS))


def test_a_missing_record_is_lost():
    assert compare(FACTS, FACTS[:1]) == Difference(lost=(FACTS[1],))


def test_a_record_that_is_there_twice_is_doubled():
    assert compare(FACTS, [*FACTS, FACTS[1]]) == Difference(doubled=(FACTS[1],))


def test_a_wrong_value_is_lost_and_doubled():
    wrong = ("trial 0", "train_loss", "at 1", "2.6")
    assert compare(FACTS, [FACTS[0], wrong]) == Difference(lost=(FACTS[1],), doubled=(wrong,))


def test_a_difference_is_told_in_few_lines():
    told = Difference(lost=tuple(("a", str(n)) for n in range(9)), doubled=(("b", "c"),)).lines(most=2)
    assert told == ["lost: a · 0", "lost: a · 1", "lost: 7 more", "doubled: b · c"]


class Swept:
    """A sweep that is over, and the facts that it had then."""

    def __init__(self, experiment: ExperimentSpec) -> None:
        bench = Workbench(experiment, prepare(experiment, cache_home()))
        self.sweep = begin_sweep(bench, {})
        Lane(bench, self.sweep).run()
        close_sweep(experiment, self.sweep)
        self.experiment, self.client = experiment, MlflowClient(tracking_uri())
        self.mark()

    def mark(self) -> None:
        """Compare with what is now."""
        self.before = read_facts(self.experiment.name)

    @property
    def study(self) -> optuna.Study:
        return search.load_study(self.sweep.name, study_storage(), self.experiment)

    @property
    def trial(self) -> Run:
        """The run of the first trial."""
        runs = self.client.search_runs([Tracker(self.experiment).experiment_id], f"tags.`{TRIAL}` = '0'")
        return min(runs, key=lambda run: run.info.start_time)

    @property
    def difference(self) -> Difference:
        return compare(self.before, read_facts(self.experiment.name))


@pytest.fixture(scope="module")
def swept_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swept]:
    folder = tmp_path_factory.mktemp("compared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOFTPROMPT_HOME", str(folder / "state"))
        patch.setattr("tempfile.tempdir", str(folder / "tmp"))
        (folder / "tmp").mkdir()
        (folder / "state").mkdir()
        yield Swept(tiny_experiment(folder / "experiment", name="tiny-compared", budget={"trials": 2}))


@pytest.fixture
def swept(swept_once: Swept) -> Swept:
    """With what other tests have planted as what is right."""
    swept_once.mark()
    return swept_once


def test_what_is_planted_in_the_records_is_found(swept):
    assert not swept.difference
    run_id = swept.trial.info.run_id
    history = swept.client.get_metric_history(run_id, "train_loss")
    swept.client.log_batch(run_id, metrics=[Metric("train_loss", history[3].value, history[3].timestamp + 1, 4)])
    assert swept.difference == Difference(
        (), (("sweep 0 trial 0 in MLflow", "train_loss", "at 4", repr(history[3].value)),)
    )


def test_runs_besides_are_found_with_their_status(swept):
    tags = swept.trial.data.tags
    assert tags[PARENT_RUN] == swept.sweep.run_id
    swept.client.create_run(swept.trial.info.experiment_id, tags=tags)
    assert ("sweep 0 trial 0 in MLflow", "run", "RUNNING", "under", "sweep 0") in swept.difference.doubled
    assert not swept.difference.lost


def test_another_trial_and_another_sweep_are_found(swept):
    swept.study.ask()
    assert ("sweep 0 trial 2", "state", TrialState.RUNNING.name) in swept.difference.doubled
    search.create_study("other", study_storage(), swept.experiment)
    assert ("sweep 1", "study", "MAXIMIZE") in swept.difference.doubled


def test_a_lost_prompt_and_a_leftover_file_are_found(swept):
    folder = Path(mlflow.artifacts.download_artifacts(run_id=swept.trial.info.run_id, tracking_uri=tracking_uri()))
    next(folder.rglob("adapter_model.safetensors")).unlink()
    (state_home() / "sweeps").mkdir(exist_ok=True)
    (state_home() / "sweeps" / "00000006.safetensors").touch()
    lost, doubled = swept.difference.lost, swept.difference.doubled
    assert [fact[:3] for fact in lost] == [
        ("sweep 0 trial 0 in MLflow", "artifact", "prompt/adapter_model.safetensors")
    ]
    assert doubled == (("left over", "sweeps/00000006.safetensors"),)


def test_a_whole_run_plans_at_least_two_hundred_faults_and_can_be_cut_down():
    whole = plan(Settings(seed=0, count=0, only="", lanes=1), postgres=False)
    assert sum(job.faults for job in whole) >= 200
    some = plan(Settings(seed=0, count=0, only="torn", lanes=1), postgres=False)
    assert {job.kind.name for job in some} == {"torn checkpoint"}
    assert Row("a", 2, 1, 1, 0) + Row("a", 3, 3) == Row("a", 5, 4, 1, 0)
