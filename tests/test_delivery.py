"""Reports brought to a real server over a cable that is cut, and to the local store."""

import math
import os
import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import DatasetInput, Metric, Run

from softprompt.checkpoint import Ending
from softprompt.data import PreparedData
from softprompt.delivery import Delivery, TrialReport
from softprompt.history import Entry
from softprompt.home import tracking_file, tracking_uri
from softprompt.progress import Lines, watched_by
from softprompt.spec import ExperimentSpec
from softprompt.storage import create_stores
from softprompt.sweep import Sweep
from softprompt.tracking import Tracker, end_run
from tests.cable import Cable
from tests.mlflow_server import MlflowServer
from tests.tiny import tiny_experiment

PARAMS = {"length": 4, "initialization": "labels", "learning_rate": 0.1}
FINISHED = Ending(outcome="finished", reason="", score=0.9, val_loss=0.3, steps=12, seconds=1.5)
_names = (f"delivered-{n}" for n in count())


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> ExperimentSpec:
    return tiny_experiment(tmp_path_factory.mktemp("delivery"), name="tiny-delivery")


@pytest.fixture
def told() -> Iterator[list[str]]:
    """What a person is told."""
    lines: list[str] = []
    with watched_by(Lines(lines.append)):
        yield lines


class Scene:
    """A sweep, its trials as they are on the disk, and deliveries of them."""

    def __init__(self, experiment: ExperimentSpec, folder: Path) -> None:
        sizes = {"train": 8, "validation": 4, "test": 4}
        data = PreparedData(folder, "d" * 64, "rows.csv", sizes, {split: {} for split in sizes}, {}, None)
        self.tracker = Tracker(experiment)
        self.experiment, self.data, self.folder = experiment, data, folder
        name = next(_names)
        self.sweep = Sweep(name=name, run_id=self.tracker.start_sweep(name, experiment, data, {}))
        self.delivered: list[TrialReport] = []
        self._open: list[Delivery] = []

    def start(self, tracker: Tracker | None = None) -> Delivery:
        delivery = Delivery(tracker or self.tracker, self.sweep, self.data, self.delivered.append)
        self._open.append(delivery)
        return delivery

    def end(self) -> None:
        for delivery in self._open:
            delivery.close(patience=0)

    def prompt(self) -> Path:
        folder = self.folder / "prompt"
        folder.mkdir(exist_ok=True)
        for name in ("adapter.json", "numbers.bin"):
            (folder / name).write_bytes(name.encode() * 400)
        return folder

    def report(self, steps: int, *, number: int = 0, ending: Ending | None = None, **changes: Any) -> TrialReport:
        """A trial at a step, scored every sixth."""
        history = make_history(steps, number)
        report = TrialReport(number, "labels · P=4 · lr 0.1", PARAMS, history, len(history), ending)
        return replace(report, prompt=self.prompt() if ending else None, **changes)

    def runs(self) -> list[Run]:
        client = MlflowClient(tracking_uri())
        asked = f"tags.`mlflow.parentRunId` = '{self.sweep.run_id}'"
        return list(client.search_runs([self.tracker.experiment_id], asked))

    def run(self) -> Run:
        (run,) = self.runs()
        return run


def make_history(steps: int, number: int = 0) -> list[Entry]:
    history = []
    for step in range(1, steps + 1):
        now = 1_700_000_000_000 + 1000 * step + number
        history.append(Entry("train_loss", 1 / step if step < 11 else math.nan, step, now))
        if step % 6 == 0:
            history += [Entry("val_accuracy", step / 100, step, now + 1), Entry("val_loss", 0.5, step, now + 1)]
    return history


def says(run: Run, folder: Path) -> dict[str, Any]:
    """All that a run says, but for its id."""
    client = MlflowClient(tracking_uri())
    artifacts = Path(client.download_artifacts(run.info.run_id, "", str(folder)))
    return {
        "run": (run.info.run_name, run.info.status, run.info.start_time, run.info.end_time),
        "params": run.data.params,
        "tags": {k: v for k, v in run.data.tags.items() if k not in ("mlflow.parentRunId", "optuna.study")},
        "inputs": [(i.dataset.name, i.dataset.digest, i.tags[0].value) for i in inputs(run)],
        "metrics": {key: values(run, key) for key in run.data.metrics},
        "artifacts": {str(p.relative_to(artifacts)): p.read_bytes() for p in artifacts.rglob("*") if p.is_file()},
    }


def inputs(run: Run) -> list[DatasetInput]:
    assert run.inputs is not None
    return run.inputs.dataset_inputs


def values(run: Run, key: str) -> list[tuple[int, int, str]]:
    history = MlflowClient(tracking_uri()).get_metric_history(run.info.run_id, key)
    return sorted((m.step, m.timestamp, repr(m.value)) for m in history)


def until(condition: Callable[[], Any]) -> None:
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it does not come about")


@pytest.fixture
def scene(cable: Cable, experiment: ExperimentSpec, tmp_path: Path) -> Iterator[Scene]:
    """On the server."""
    scene = Scene(experiment, tmp_path)
    yield scene
    scene.end()


@pytest.fixture
def at_home(experiment: ExperimentSpec, tmp_path: Path) -> Iterator[Scene]:
    """On the local store."""
    create_stores()
    scene = Scene(experiment, tmp_path)
    yield scene
    scene.end()


def expect(report: TrialReport) -> dict[str, list[tuple[int, int, str]]]:
    """The metrics of a report."""
    entries = list(report.history[: report.length])
    if report.ending:
        summary = {"best_val_accuracy": report.ending.score, "seconds": report.ending.seconds}
        entries += [Entry(k, v, report.ending.steps, entries[-1].time_ms) for k, v in summary.items() if v is not None]
    keys = {e.key for e in entries}
    return {key: sorted((e.step, e.time_ms, repr(e.value)) for e in entries if e.key == key) for key in keys}


@pytest.mark.parametrize("place", ["scene", "at_home"])
def test_a_run_says_what_the_reports_say(place, request, tmp_path):
    scene = request.getfixturevalue(place)
    delivery, last = scene.start(), scene.report(12, ending=FINISHED)
    for steps in (0, 3, 8):
        delivery.put(scene.report(steps))
        delivery.flush()
    assert scene.run().info.status == "RUNNING"
    delivery.put(last)
    assert delivery.flush() == delivery.pending == []
    run = scene.run()
    said = says(run, tmp_path)
    assert said["metrics"] == expect(last)
    assert said["params"] == {k: str(v) for k, v in PARAMS.items()}
    assert {split for _, _, split in said["inputs"]} == {"train", "validation"}
    assert sorted(said["artifacts"]) == ["prompt/adapter.json", "prompt/numbers.bin"]
    assert (run.info.run_name, run.info.status) == ("labels · P=4 · lr 0.1", "FINISHED")
    assert run.info.end_time == last.history[-1].time_ms
    assert run.data.tags["softprompt.outcome"] == "finished"
    assert "softprompt.reason" not in run.data.tags
    assert scene.tracker.find_trial_run(scene.sweep.name, 0) == run.info.run_id
    assert scene.tracker.find_trial_run(scene.sweep.name, 1) is None
    assert scene.delivered[-1] is last


def test_a_run_begins_and_ends_when_its_trial_did(scene):
    delivery, report = scene.start(), scene.report(12, ending=FINISHED)
    delivery.put(report)
    delivery.flush()
    info = scene.run().info
    assert (info.start_time, info.end_time) == (report.history[0].time_ms, report.history[-1].time_ms)


@pytest.mark.parametrize("away", ["from the first moment", "in the middle", "at the end"])
def test_what_an_outage_kept_back_is_delivered_after_it(scene, cable, tmp_path, told, away):
    delivery, last = scene.start(), scene.report(12, ending=FINISHED)
    for moment, report in (
        ("from the first moment", scene.report(3)),
        ("in the middle", scene.report(8)),
        ("at the end", last),
    ):
        if moment == away:
            cable.cut()
        delivery.put(report)
        if cable.whole:
            delivery.flush()
    until(lambda: told)
    assert delivery.flush(wait=False) == [0]
    cable.mend()
    delivery.flush()
    assert says(scene.run(), tmp_path)["metrics"] == expect(last)
    assert len(told) == 2
    assert told[0].startswith(f"the tracking server {cable.uri} is away; training goes on")
    assert told[1] == f"the tracking server {cable.uri} is back; what was not recorded has been delivered"


def deliver_over_cuts(scene: Scene, cable: Cable, rng: random.Random, cuts: int) -> None:
    """Deliver a trial in six reports, the answers being cut off at random places."""
    delivery, begun = scene.start(), cable.cuts
    for steps in (1, 3, 6, 8, 12, 12):
        delivery.put(scene.report(steps, ending=FINISHED if steps == 12 else None))
        for _ in range(cuts):
            cable.cut_after(rng.choice([0, 1, rng.randrange(1500), rng.randrange(6000)]))
            until(lambda: not cable.whole or not delivery.flush(wait=False))
            cable.mend()
        delivery.flush()
    assert cable.cuts > begun


@pytest.mark.parametrize("seed", range(3))
def test_fifty_cuts_at_random_places_lose_and_double_nothing(scene, cable, tmp_path, seed):
    rng = random.Random(seed)
    deliver_over_cuts(scene, cable, rng, cuts=3)
    report = scene.report(12, ending=FINISHED)
    said = says(scene.run(), tmp_path / "cut")
    assert said["metrics"] == expect(report)
    assert said == undisturbed(scene, tmp_path / "whole")


def undisturbed(scene: Scene, folder: Path) -> dict[str, Any]:
    """What the run of a trial says that was delivered without any fault."""
    twin = Scene(scene.experiment, scene.folder)
    delivery = twin.start()
    for steps in (1, 12):
        delivery.put(twin.report(steps, ending=FINISHED if steps == 12 else None))
        delivery.flush()
    twin.end()
    return says(twin.run(), folder)


def test_a_cut_at_any_place_of_a_delivery_loses_and_doubles_nothing(scene, cable, tmp_path):
    """From the first answer to the last, so that every kind of request is among those whose answer is lost."""
    expected, delivery = undisturbed(scene, tmp_path / "whole"), scene.start()
    del expected["tags"]["optuna.trial"]
    for number in count():
        cable.cut_after(800 * number)
        delivery.put(replace(scene.report(12, ending=FINISHED), number=number))
        until(lambda: not cable.whole or not delivery.pending)
        done = cable.whole
        cable.mend()
        delivery.flush()
        if done:
            break
    runs = {int(run.data.tags.pop("optuna.trial")): run for run in scene.runs()}
    assert len(runs) == len(scene.runs()) == number + 1 > 10
    for number, run in runs.items():
        assert says(run, tmp_path / str(number)) == expected


def test_several_trials_share_an_outage(scene, cable, told):
    delivery = scene.start()
    delivery.put(scene.report(3, number=2))
    delivery.flush()
    cable.cut()
    for other in range(4):
        delivery.put(scene.report(12, number=other, ending=FINISHED))
    until(lambda: told)
    cable.mend()
    delivery.flush()
    runs = scene.runs()
    assert {run.data.tags["optuna.trial"]: run.info.status for run in runs} == dict.fromkeys("0123", "FINISHED")
    assert len(runs) == 4
    for run in runs:
        report = scene.report(12, number=int(run.data.tags["optuna.trial"]), ending=FINISHED)
        assert {key: values(run, key) for key in run.data.metrics} == expect(report)
    assert len(told) == 2


def test_a_server_that_is_killed_and_started_again_has_everything(scene, mlflow_server: MlflowServer, tmp_path):
    delivery, last = scene.start(), scene.report(12, ending=FINISHED)
    delivery.put(scene.report(8))
    delivery.flush()
    mlflow_server.stop()
    delivery.put(last)
    mlflow_server.start()
    delivery.flush()
    assert says(scene.run(), tmp_path)["metrics"] == expect(last)


def test_a_process_that_follows_a_dead_one_goes_on_with_its_run(scene, tmp_path):
    first, last = scene.start(), scene.report(12, ending=FINISHED)
    first.put(scene.report(8))
    first.flush()
    first.close()
    earlier = scene.run()
    # As after a death before the checkpoint was saved: the same values, reached at other times.
    later = [entry._replace(time_ms=entry.time_ms + 77) for entry in last.history]
    second = scene.start()
    second.put(replace(last, history=later))
    second.flush()
    run = scene.run()
    assert run.info.run_id == earlier.info.run_id
    for key in ("train_loss", "val_accuracy", "val_loss"):
        steps = [step for step, _, _ in values(run, key)]
        assert steps == sorted({entry.step for entry in later if entry.key == key})
    third = scene.start()
    third.put(last)
    third.flush()
    assert says(scene.run(), tmp_path / "again") == says(run, tmp_path / "before")
    assert scene.delivered[-1] is last


def test_an_interrupted_run_is_running_again_with_the_next_report(scene):
    delivery = scene.start()
    delivery.put(scene.report(3))
    delivery.flush()
    end_run(MlflowClient(tracking_uri()), scene.run().info.run_id, "interrupted", "Ctrl-C")
    delivery.put(scene.report(8))
    delivery.flush()
    run = scene.run()
    assert run.info.status == "RUNNING"
    assert not {"softprompt.outcome", "softprompt.reason"} & run.data.tags.keys()


def test_a_report_that_comes_late_does_not_open_a_trial_that_has_ended(scene):
    delivery = scene.start()
    delivery.put(scene.report(12, ending=FINISHED))
    delivery.flush()
    delivery.put(scene.report(8))
    delivery.flush()
    assert scene.run().info.status == "FINISHED"


def test_of_two_runs_of_a_trial_one_is_left(scene):
    delivery = scene.start()
    delivery.put(scene.report(3))
    delivery.flush()
    (run,) = scene.runs()
    tags = {k: run.data.tags[k] for k in ("mlflow.parentRunId", "optuna.study", "optuna.trial")}
    MlflowClient(tracking_uri()).create_run(scene.tracker.experiment_id, tags=tags)
    delivery.put(scene.report(12, ending=FINISHED))
    delivery.flush()
    assert scene.run().info.run_id == run.info.run_id


def test_a_run_that_somebody_deleted_is_made_anew(scene):
    delivery, report = scene.start(), scene.report(12)
    delivery.put(scene.report(8))
    delivery.flush()
    MlflowClient(tracking_uri()).delete_run(scene.run().info.run_id)
    delivery.put(report)
    delivery.flush()
    assert {key: values(scene.run(), key) for key in scene.run().data.metrics} == expect(report)


def test_validation_is_logged_before_the_losses_and_the_prompt_before_the_end(scene, monkeypatch):
    logged, real = [], MlflowClient.log_batch

    def log_batch(client, run_id, metrics=(), params=(), tags=()):
        logged.append([metric.key for metric in metrics])
        return real(client, run_id, metrics=metrics, params=params, tags=tags)

    monkeypatch.setattr(MlflowClient, "log_batch", log_batch)
    delivery = scene.start()
    delivery.put(scene.report(2400))
    delivery.flush()
    metrics = [batch for batch in logged if batch]
    assert metrics[0] == ["val_accuracy", "val_loss"]
    assert max(map(len, metrics)) == 1000
    for batch in metrics:
        assert batch == sorted(batch, key=lambda key: key == "train_loss")


def test_only_what_is_new_is_sent(scene, monkeypatch):
    sent, real = [], MlflowClient.log_batch

    def log_batch(client, run_id, metrics=(), params=(), tags=()):
        sent.append(len(metrics))
        return real(client, run_id, metrics=metrics, params=params, tags=tags)

    history = make_history(3000)
    delivery = scene.start()
    delivery.put(TrialReport(0, "long", PARAMS, history, 3990))
    delivery.flush()
    monkeypatch.setattr(MlflowClient, "log_batch", log_batch)
    delivery.put(TrialReport(0, "long", PARAMS, history, 3995))
    delivery.flush()
    assert sent == [5]


def test_what_mlflow_refuses_is_told_once_and_holds_up_nothing_else(scene, told):
    first = scene.start()
    first.put(scene.report(3))
    first.flush()
    first.close()
    second = scene.start()
    bad = [Entry("loss%", 0.5, step, 1_700_000_000_000 + step) for step in (1, 2, 3)]
    for length in (2, 3):
        history = [*make_history(6)[:3], *bad[:length], *make_history(6)[3:]]
        params = PARAMS | {"length": 5, "method": "prompt_tuning"}
        second.put(replace(scene.report(0), params=params, history=history, length=len(history)))
        second.flush()
    run = scene.run()
    assert run.data.params == {k: str(v) for k, v in PARAMS.items()} | {"method": "prompt_tuning"}
    assert {key: values(run, key) for key in run.data.metrics} == expect(scene.report(6))
    assert len(told) == 2
    assert told[0].startswith("the setting length of trial 0 is not recorded in MLflow: INVALID_PARAMETER_VALUE: Chang")
    assert told[1].startswith("metric loss% of trial 0 is not recorded in MLflow: INVALID_PARAMETER_VALUE: Invalid")


def test_a_trial_whose_prompt_is_not_taken_is_not_announced_as_delivered(scene, told):
    delivery = scene.start()
    delivery.put(replace(scene.report(12, ending=FINISHED), prompt=scene.folder / "gone"))
    delivery.flush()
    assert (scene.run().info.status, scene.run().data.tags.get("softprompt.outcome")) == ("FINISHED", None)
    assert scene.delivered == []
    assert told == [f"the prompt of trial 0 is not recorded in MLflow: {scene.folder / 'gone'} is not there"]
    delivery.close()
    another = scene.start()  # of the next process
    another.put(scene.report(12, ending=FINISHED))
    another.flush()
    assert scene.run().data.tags["softprompt.outcome"] == "finished"
    assert len(scene.delivered) == 1


def test_a_listener_that_fails_is_told_of_and_fails_alone(scene, told):
    delivery = Delivery(scene.tracker, scene.sweep, scene.data, lambda report: [].pop())
    delivery.put(scene.report(12, ending=FINISHED))
    assert delivery.flush() == delivery.close() == []
    assert scene.run().info.status == "FINISHED"
    assert told == ["after trial 0 was recorded: IndexError: pop from empty list"]


HANGING = """
import time
from types import SimpleNamespace
from softprompt.history import Entry
from softprompt.delivery import Delivery, TrialReport
from softprompt.tracking import Tracker

experiment = SimpleNamespace(name="hanging", labels=SimpleNamespace(objective=None))
delivery = Delivery(Tracker(experiment), SimpleNamespace(name="a", run_id="b"), None)
delivery.put(TrialReport(0, "a", {}, [Entry("train_loss", 0.5, 1, 1)], 1))
time.sleep(1)
print(delivery.pending, delivery.flush(wait=False), delivery.close(patience=1))
"""


def test_a_server_that_hangs_holds_up_neither_the_training_nor_the_end_of_the_process(cable):
    cable.hang()
    ended = subprocess.run(
        [sys.executable, "-c", HANGING],
        env=os.environ | {"MLFLOW_HTTP_REQUEST_TIMEOUT": "100000"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert (ended.returncode, ended.stdout) == (0, "[0] [0] [0]\n"), ended.stderr


def test_closing_ends_the_thread_where_the_server_is_away(scene, cable, told):
    delivery = scene.start()
    cable.cut()
    delivery.put(scene.report(3))
    until(lambda: told)
    assert delivery.close() == [0]
    assert not delivery._thread.is_alive()


def test_closing_delivers_what_is_waiting_where_the_server_is_there(scene):
    delivery = scene.start()
    delivery.put(scene.report(3))
    assert delivery.close() == []
    assert not delivery._thread.is_alive()
    assert scene.run().data.metrics["train_loss"] == 1 / 3


def test_a_locked_database_is_waited_for(at_home, monkeypatch):
    delivery, report = at_home.start(), at_home.report(12, ending=FINISHED)
    other = sqlite3.connect(tracking_file(), check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    release = Timer(3, other.rollback)
    release.start()
    delivery.put(report)
    delivery.flush()
    release.join()
    other.close()
    assert {key: values(at_home.run(), key) for key in at_home.run().data.metrics} == expect(report)


def test_the_newest_checkpoint_lies_with_the_run_until_the_trial_ends(scene, tmp_path):
    delivery = scene.start()
    names = [f"{step:08d}-{str(step) * 32}.safetensors" for step in (3, 6)]
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
        delivery.put(scene.report(int(name[:8]), checkpoint=tmp_path / name))
        delivery.flush()
    run_id = scene.run().info.run_id
    MlflowClient(tracking_uri()).log_text(run_id, "nothing", "checkpoint/other.txt")
    (fetched,) = scene.tracker.fetch_checkpoints(scene.sweep.name, 0, tmp_path / "elsewhere")
    assert fetched == tmp_path / "elsewhere" / names[1]
    assert fetched.read_bytes() == names[1].encode()
    assert list(fetched.parent.iterdir()) == [fetched]
    assert scene.tracker.fetch_checkpoints(scene.sweep.name, 1, tmp_path / "elsewhere") == []
    delivery.put(scene.report(12, ending=FINISHED))
    delivery.flush()
    assert [f.path for f in MlflowClient(tracking_uri()).list_artifacts(run_id)] == ["prompt"]


def test_checkpoints_stay_on_the_disk_where_there_is_no_server(at_home, tmp_path):
    delivery = at_home.start()
    file = tmp_path / f"{3:08d}-{'3' * 32}.safetensors"
    file.write_bytes(b"3")
    delivery.put(at_home.report(3, checkpoint=file))
    delivery.flush()
    assert MlflowClient(tracking_uri()).list_artifacts(at_home.run().info.run_id) == []


def test_no_credential_is_told(scene, cable, told, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", cable.uri.replace("://", "://somebody:hunter2@"))
    delivery = scene.start(Tracker(scene.experiment))
    cable.cut()
    delivery.put(scene.report(3))
    until(lambda: told)
    assert "is away" in told[0]
    assert "hunter2" not in told[0]


def test_the_parent_run_is_found_again_and_its_records_are_not_doubled(scene):
    again = scene.tracker.start_sweep(scene.sweep.name, scene.experiment, scene.data, {})
    assert again == scene.sweep.run_id
    run = MlflowClient(tracking_uri()).get_run(again)
    assert len(inputs(run)) == 3


def test_a_run_of_many_metrics_is_compared_by_key_and_step(scene):
    client = MlflowClient(tracking_uri())
    run_id = scene.tracker.start_trial(scene.sweep.run_id, study=scene.sweep.name, number=0, name="a")
    client.log_batch(run_id, metrics=[Metric("train_loss", 0.25, 1, 2)])
    delivery = scene.start()
    delivery.put(scene.report(3))
    delivery.flush()
    assert [(step, value) for step, _, value in values(scene.run(), "train_loss")] == [
        (1, "1.0"),
        (2, "0.25"),
        (3, repr(1 / 3)),
    ]
