"""Several lanes of one sweep as real processes, on a tiny model."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
from mlflow import MlflowClient
from optuna.trial import TrialState

from softprompt import search
from softprompt.data import prepare
from softprompt.errors import UserError
from softprompt.home import cache_home, state_home, tracking_uri
from softprompt.progress import Lines, watched_by
from softprompt.spec import ExecutionSpec, LocalModel
from softprompt.storage import create_stores, study_store
from softprompt.sweep import begin_sweep
from softprompt.tracking import Tracker
from softprompt.trials import TrialRecord
from softprompt.workbench import Workbench
from tasks.lanes import run_lanes, share_devices
from tests.tiny import tiny_experiment

SPACE: dict[str, Any] = {
    "length": {"low": 1, "high": 8, "log": True},
    "learning_rate": {"low": 0.01, "high": 0.3, "log": True},
    "initialization": [{"kind": "normal"}, {"kind": "vocabulary"}],
    "pruner": {"kind": "none", "every": 6},
}
_names = (f"tiny-lanes-{n}" for n in count())


class Opened:
    """A sweep that is open and has not run yet."""

    def __init__(self, folder: Path, *, trials: int, lanes: int = 2, steps: int = 12) -> None:
        training = {"steps": steps, "batch_size": 4, "max_tokens": 48, "schedule": "cosine", "warmup_steps": 1}
        self.experiment = tiny_experiment(
            folder,
            name=next(_names),
            search=SPACE,
            budget={"trials": trials},
            training=training | {"weight_decay": 0.0, "clip_norm": 1.0},
            execution={"device": "cpu", "lanes": lanes},
        )
        create_stores()
        self.data = prepare(self.experiment, cache_home())
        self.sweep = begin_sweep(Workbench(self.experiment, self.data), {})
        self.records: list[TrialRecord] = []
        self.said: list[str] = []

    def run(self, on_end: Callable[[TrialRecord], None] | None = None) -> None:
        with watched_by(Lines(self.said.append)):
            run_lanes(self.experiment, self.data.path, self.sweep, on_end=on_end or self.records.append)

    @property
    def study(self) -> optuna.Study:
        return search.load_study(self.sweep.name, study_store(), self.experiment)

    @property
    def states(self) -> list[TrialState]:
        return [trial.state for trial in search.counted(self.study)]

    @property
    def statuses(self) -> list[str]:
        parts = [Tracker(self.experiment).experiment_id], f"tags.`mlflow.parentRunId` = '{self.sweep.run_id}'"
        return [run.info.status for run in MlflowClient(tracking_uri()).search_runs(*parts)]


def lanes_of(process: int) -> list[psutil.Process]:
    """The lanes' processes that a process has started."""
    children = psutil.Process(process).children(recursive=True)
    return [child for child in children if "softprompt.lane_process" in child.cmdline()]


def test_two_lanes_share_the_trials_of_a_study_in_sqlite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.get_num_threads", lambda: 6)
    opened = Opened(tmp_path, trials=6)
    seen: list[tuple[str, list[str]]] = []

    def look(record: TrialRecord) -> None:
        opened.records.append(record)
        seen.extend((lane.environ()["OMP_NUM_THREADS"], lane.cmdline()[1:]) for lane in lanes_of(os.getpid()))

    opened.run(on_end=look)
    assert len(seen) >= 2
    assert all(each == ("3", ["-m", "softprompt.lane_process"]) for each in seen), "nothing else, as a secret"
    assert {record.outcome for record in opened.records} == {"finished"}
    numbers = sorted(record.number for record in opened.records)
    assert numbers == sorted(trial.number for trial in search.counted(opened.study)), "each by one lane, and told once"
    assert len(set(numbers)) == len(numbers) == 6
    assert set(opened.states) == {TrialState.COMPLETE}
    assert opened.statuses == ["FINISHED"] * len(numbers)
    assert {line.partition(":")[0] for line in opened.said if line.startswith("lane")} == {"lane 0", "lane 1"}
    for log in (state_home() / "logs").glob(f"{opened.sweep.name}-lane-*.log"):
        assert "Traceback" not in log.read_text(encoding="utf-8")


def test_a_killed_lane_is_told_of_and_the_others_do_its_trial(tmp_path: Path):
    opened = Opened(tmp_path, trials=5)

    def kill_one(record: TrialRecord) -> None:
        if not opened.records:
            lanes_of(os.getpid())[0].kill()
        opened.records.append(record)

    opened.run(on_end=kill_one)
    (told,) = [line for line in opened.said if "SIGKILL" in line]
    assert told.endswith("was ended by SIGKILL; the other one goes on")
    assert opened.states == [TrialState.COMPLETE] * 5
    assert sorted(record.number for record in opened.records) == list(range(5))
    assert opened.statuses == ["FINISHED"] * 5


def test_where_all_lanes_are_killed_that_is_the_error(tmp_path: Path):
    opened = Opened(tmp_path, trials=50)

    def kill_all(record: TrialRecord) -> None:
        for lane in lanes_of(os.getpid()):
            lane.kill()

    with pytest.raises(RuntimeError, match=r"lane \d was ended by SIGKILL; its log is "):
        opened.run(on_end=kill_all)
    assert not lanes_of(os.getpid())


def test_a_mistake_that_lanes_meet_stays_one_sentence(tmp_path: Path):
    opened = Opened(tmp_path, trials=2)
    nowhere = LocalModel(path=str(tmp_path / "nowhere"))
    opened.experiment = opened.experiment.model_copy(update={"model": nowhere})
    with pytest.raises(UserError, match=r"^model\.path: .*nowhere holds no config\.json; give a folder"):
        opened.run()
    assert opened.records == []
    assert len([line for line in opened.said if "failed: model.path" in line]) == 2


def test_an_error_here_ends_the_lanes(tmp_path: Path):
    opened = Opened(tmp_path, trials=50, steps=2000)
    seen: list[psutil.Process] = []

    def stop(text: str) -> None:
        opened.said.append(text)
        if "rung 1" in text and not seen:
            seen.extend(lanes_of(os.getpid()))
            raise KeyboardInterrupt

    with watched_by(Lines(stop)), pytest.raises(KeyboardInterrupt):
        run_lanes(opened.experiment, opened.data.path, opened.sweep, on_end=opened.records.append)
    assert len(seen) == 2
    assert not any(lane.is_running() for lane in seen)
    assert not [line for line in opened.said if "failed" in line or "ended" in line], "who was stopped did not fail"


RUN = """
import sys
from pathlib import Path
from softprompt.lane_process import LaneJob
from tasks.lanes import run_lanes
job = LaneJob.model_validate_json(sys.argv[1])
run_lanes(job.experiment, Path(job.data), job.sweep, on_end=print)
"""


@pytest.fixture
def parent(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process whose two lanes are in the middle of long trials."""
    from softprompt.lane_process import LaneJob

    opened = Opened(tmp_path, trials=50, steps=100_000)
    job = LaneJob(experiment=opened.experiment, data=str(opened.data.path), sweep=opened.sweep)
    command = [sys.executable, "-c", RUN, job.model_dump_json()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]) as process:
        try:
            assert process.stdout is not None
            training: set[str] = set()
            for line in process.stdout:
                if "rung 1 " in line:
                    training.add(line.partition(":")[0])
                if len(training) == 2:
                    break
            yield process
        finally:
            process.kill()


def test_lanes_end_with_the_process_that_started_them(parent: "subprocess.Popen[str]"):
    lanes = lanes_of(parent.pid)
    assert len(lanes) == 2
    parent.kill()
    _, alive = psutil.wait_procs(lanes, timeout=60)
    assert not alive


@pytest.mark.parametrize(
    ("gpus", "device", "lanes", "expected"),
    [
        (0, "auto", 1, ["auto"]),
        (0, "auto", "auto", ["auto"]),
        (0, "cpu", 3, ["cpu"] * 3),
        (4, "auto", "auto", ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]),
        (4, "cuda", 2, ["cuda:0", "cuda:1"]),
        (4, "cuda:3", "auto", ["cuda:3"]),
        (4, "auto", 1, ["auto"]),
        (4, "cpu", 2, ["cpu"] * 2),
    ],
)
def test_each_lane_has_a_device_of_its_own(
    gpus: int, device: str, lanes: Any, expected: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    assert share_devices(ExecutionSpec(device=device, lanes=lanes)) == expected


@pytest.mark.parametrize(
    ("device", "lanes", "parts"),
    [("cuda", 5, "5 lanes want a GPU each, and this machine has 4"), ("cuda:1", 2, "2 lanes cannot share cuda:1")],
)
def test_more_lanes_than_devices_are_refused(device: str, lanes: int, parts: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    with pytest.raises(UserError, match=parts):
        share_devices(ExecutionSpec(device=device, lanes=lanes))
