"""Which prompts of a sweep stay, over a real tracking store and a real tracking server."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
from mlflow import MlflowClient

from softprompt.data import PreparedData, prepare
from softprompt.evaluation import measure
from softprompt.home import cache_home, state_home, tracking_uri
from softprompt.retention import REMOVED, prune_prompts
from softprompt.spec import ExperimentSpec
from softprompt.sweep import Sweep
from softprompt.tracking import BEST_VAL, Tracker
from tests.tiny import tiny_experiment

_names = (f"kept-{n}" for n in count())


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> ExperimentSpec:
    return tiny_experiment(tmp_path_factory.mktemp("retention"), name="tiny-retention")


@pytest.fixture(scope="module")
def data(experiment: ExperimentSpec) -> PreparedData:
    return prepare(experiment, cache_home())


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[str]:
    """A tracking server that hands the artifacts on."""
    folder = tmp_path_factory.mktemp("server")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder)]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", process, folder / "log")
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


@pytest.fixture(params=["database", "server"])
def store(request, monkeypatch) -> None:
    """Where the records go: our own database, or the server."""
    state_home().mkdir(parents=True, exist_ok=True)
    if request.param == "server":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", request.getfixturevalue("server"))


def _wait_for(url: str, server: "subprocess.Popen[bytes]", log: Path) -> None:
    for _ in range(600):
        assert server.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise AssertionError(log.read_text())


@pytest.fixture
def sweep(store, experiment: ExperimentSpec, data: PreparedData) -> Sweep:
    name = next(_names)
    return Sweep(name=name, run_id=Tracker(experiment).start_sweep(name, experiment, data, {}))


@pytest.fixture
def enter(experiment: ExperimentSpec, data: PreparedData, sweep: Sweep, tmp_path: Path) -> Callable[..., str]:
    """Record a trial with a prompt; returns its run."""
    tracker, numbers = Tracker(experiment), count()
    folder = tmp_path / "prompt"
    folder.mkdir()
    (folder / "prompt.safetensors").write_bytes(b"vectors")

    def entered(score: float, *, ended: bool = True) -> str:
        number = next(numbers)
        run_id = tracker.start_trial(sweep.run_id, study=sweep.name, number=number, name=str(number))
        tracker.log_metrics(run_id, {f"{BEST_VAL}accuracy": score})
        tracker.log_folder(run_id, folder, "prompt")
        if ended:
            tracker.end(run_id, "finished")
        return run_id

    return entered


def has_prompt(run_id: str) -> bool:
    return bool(MlflowClient(tracking_uri()).list_artifacts(run_id, "prompt"))


def test_the_best_are_kept_and_of_equal_ones_the_earliest(experiment, sweep, enter):
    runs = [enter(score) for score in (0.5, 0.9, 0.7, 0.7, 0.6)]
    assert prune_prompts(experiment, sweep, 2) == [runs[3], runs[4], runs[0]]
    assert [has_prompt(run) for run in runs] == [False, True, True, False, False]
    tags = [MlflowClient(tracking_uri()).get_run(run).data.tags for run in runs]
    assert [tag.get(REMOVED) for tag in tags[:2]] == ["execution.keep_prompts: 2", None]


def test_what_was_deleted_once_is_not_deleted_again(experiment, sweep, enter):
    runs = [enter(score) for score in (0.5, 0.9)]
    assert prune_prompts(experiment, sweep, 1) == runs[:1]
    assert prune_prompts(experiment, sweep, 1) == []
    assert prune_prompts(experiment, sweep, 0) == runs[1:]


def test_the_winner_and_what_a_version_came_from_are_kept_whatever_their_score(experiment, sweep, enter):
    client, name = MlflowClient(tracking_uri()), next(_names)
    winner, version, alias, plain, open_ = (enter(0.5, ended=n < 4) for n in range(5))
    Tracker(experiment).log_winner(winner, measure([0], [0]))
    client.create_registered_model(name)
    client.create_model_version(name, f"runs:/{version}/prompt", version)
    source = f"{client.get_run(alias).info.artifact_uri}/prompt"
    number = client.create_model_version(name, source, alias).version
    client.set_registered_model_alias(name, "champion", number)
    assert prune_prompts(experiment, sweep, 0) == [plain]
    assert [has_prompt(run) for run in (winner, version, alias, plain, open_)] == [True, True, True, False, True]


def test_by_default_all_are_kept(experiment, sweep, enter):
    run = enter(0.5)
    assert prune_prompts(experiment, sweep, experiment.execution.keep_prompts) == []
    assert has_prompt(run)


def test_other_sweeps_are_left_alone(experiment, data, sweep, enter):
    run = enter(0.5)
    other = Sweep(name="other", run_id=Tracker(experiment).start_sweep("other", experiment, data, {}))
    assert prune_prompts(experiment, other, 0) == []
    assert has_prompt(run)
