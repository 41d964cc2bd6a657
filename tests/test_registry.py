"""Versions, the alias, and a registered prompt in use, over a real tracking store."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from softprompt.data import prepare
from softprompt.errors import UserError
from softprompt.evaluation import Metrics, measure, measure_targets
from softprompt.home import cache_home, owns_tracking, state_home, tracking_uri
from softprompt.prediction import Predictor
from softprompt.prompt import SoftPrompt
from softprompt.registry import CHAMPION, champion_version, decide, load_registered, register
from softprompt.tracking import Tracker
from softprompt.tuning import tune
from softprompt.workbench import Workbench
from tests.tiny import tiny_experiment

PARAMS = {"length": 4, "initialization": "labels", "learning_rate": 0.1}
ROWS = [{"text": "a great and moving film"}, {"text": "a dull waste of time"}]
_studies = count()
_names = (f"registered-{n}" for n in count())


def right(rows: int, *, of: int = 10) -> Metrics:
    """Metrics of a system that has the first rows right."""
    return measure([0] * of, [0] * rows + [1] * (of - rows))


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Workbench:
    experiment = tiny_experiment(tmp_path_factory.mktemp("registry"), name="tiny-registry")
    return Workbench(experiment, prepare(experiment, cache_home()))


@pytest.fixture(scope="module")
def prompt(bench: Workbench) -> SoftPrompt:
    return tune(bench, PARAMS)


@pytest.fixture(scope="module")
def enter(bench: Workbench, prompt: SoftPrompt, tmp_path_factory) -> Callable[..., int]:
    """Make a version of a prompt on a run of its own; returns the version's number."""
    state_home().mkdir(parents=True, exist_ok=True)
    folder = prompt.save(tmp_path_factory.mktemp("prompt") / "prompt")
    tracker = Tracker(bench.experiment)

    def entered(name: str, metrics: Metrics | None = None) -> int:
        run_id = tracker.start_sweep(f"{name}-{next(_studies)}", bench.experiment, bench.data, {})
        return register(name, run_id, folder, metrics or right(7))

    return entered


@pytest.fixture(scope="module")
def name(enter: Callable[..., int]) -> str:
    """A registered model with a champion."""
    name = next(_names)
    decide(name, enter(name), right(7), None)
    return name


def test_the_first_version_becomes_champion_an_equal_one_waits_and_a_better_one_takes_over(enter):
    name = next(_names)
    assert champion_version(name) is None
    first = decide(name, enter(name), right(7), None)
    assert (first.version, first.promoted, first.reason) == (1, True, "the first version, with 70.0% on 10 test rows")
    equal = decide(name, enter(name), right(7), right(7), measured=1)
    assert (equal.promoted, champion_version(name)) == (False, 1)
    assert equal.reason == "70.0% on 10 test rows is not better than champion v1 with 70.0%"
    better = decide(name, enter(name), right(8), right(7), measured=1)
    assert (better.promoted, champion_version(name)) == (True, 3)
    assert better.reason == "80.0% on 10 test rows is better than champion v1 with 70.0%"
    worse = decide(name, enter(name), right(2), right(8), measured=3)
    assert (worse.promoted, champion_version(name)) == (False, 3)
    stored = MlflowClient(tracking_uri()).get_model_version(name, "2")
    assert stored.tags["softprompt.decision"] == "kept back"
    assert stored.tags["softprompt.reason"] == equal.reason
    assert stored.description == equal.reason


def test_of_texts_the_lower_loss_is_the_better_one(enter):
    def loss(nats: float) -> Metrics:
        return measure_targets(np.array([-nats, -nats]), [1, 1], np.array([False, False]))

    name = next(_names)
    decide(name, enter(name, loss(2.0)), loss(2.0), None)
    worse = decide(name, enter(name, loss(2.5)), loss(2.5), loss(2.0), measured=1)
    assert worse.reason == (
        "2.5000 nats per token on 2 test rows is not better than champion v1 with 2.0000 nats per token"
    )
    assert not decide(name, enter(name, loss(2.0)), loss(2.0), loss(2.0), measured=1).promoted
    assert decide(name, enter(name, loss(1.5)), loss(1.5), loss(2.0), measured=1).promoted


def test_where_the_alias_was_taken_away_the_next_version_is_not_called_the_first(enter):
    name = next(_names)
    decide(name, enter(name), right(7), None)
    MlflowClient(tracking_uri()).delete_registered_model_alias(name, CHAMPION)
    decision = decide(name, enter(name), right(6), None)
    assert (decision.version, decision.promoted) == (2, True)
    assert decision.reason == "there is no champion at present, with 60.0% on 10 test rows"


def test_a_champion_that_cannot_be_measured_keeps_the_alias(enter):
    name = next(_names)
    decide(name, enter(name), right(1), None)
    kept = decide(name, enter(name), right(9), None, measured=1, why_not="it belongs to another base model")
    assert (kept.promoted, champion_version(name)) == (False, 1)
    assert kept.reason == "champion v1 could not be measured on these rows: it belongs to another base model"


@pytest.mark.parametrize(("measured", "instead"), [(None, "none"), (1, "v1")])
def test_a_challenger_that_was_compared_with_another_champion_waits(enter, measured: int | None, instead: str):
    name = next(_names)
    decide(name, enter(name), right(1), None)
    decide(name, enter(name), right(5), right(1), measured=1)
    kept = decide(name, enter(name), right(4), right(1) if measured else None, measured=measured)
    assert (kept.promoted, champion_version(name)) == (False, 2)
    assert kept.reason == f"the champion changed meanwhile (v2 instead of {instead})"


def test_what_is_registered_and_decided_again_is_as_it_was(bench, enter, prompt, tmp_path):
    name = next(_names)
    decide(name, enter(name), right(1), None)
    run_id = Tracker(bench.experiment).start_sweep(f"{name}-again", bench.experiment, bench.data, {})
    versions = [register(name, run_id, prompt.save(tmp_path / f"{n}"), right(7)) for n in range(2)]
    decisions = [decide(name, version, right(7), right(1), measured=1) for version in versions]
    assert versions == [2, 2]
    assert decisions[0] == decisions[1]
    assert (decisions[0].promoted, decisions[0].verdict) == (True, "is the new champion")


@pytest.mark.parametrize("version", [CHAMPION, "1"])
def test_a_registered_prompt_is_had_again_as_it_was(name, prompt, version: str):
    found = load_registered(name, version)
    assert torch.equal(found.vectors, prompt.vectors)
    assert replace(found, vectors=prompt.vectors) == prompt


@pytest.mark.parametrize("version", ["99", "rollback"])
def test_an_unknown_version_is_refused(name, version: str):
    with pytest.raises(
        UserError, match=rf"^models:/{name}[/@]{version}: no such registered prompt in sqlite:///.*; run"
    ):
        load_registered(name, version)


def test_an_unknown_name_is_refused_and_has_no_champion(name):
    assert champion_version("nobody") is None
    with pytest.raises(UserError, match="models:/nobody@champion: no such registered prompt"):
        load_registered("nobody")


def test_the_environment_stays_the_users(enter, monkeypatch):
    assert owns_tracking()
    enter(next(_names))
    assert owns_tracking()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri())
    enter(next(_names))
    assert os.environ["MLFLOW_TRACKING_URI"] == tracking_uri()


@pytest.fixture
def store(monkeypatch) -> str:
    """MLflow set up as its user would, with pickles refused."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    monkeypatch.setattr("mlflow.tracking._tracking_service.utils._tracking_uri", None)
    return tracking_uri()


def test_what_is_stored_is_small_and_holds_no_pickle(name, store, tmp_path):
    folder = Path(mlflow.artifacts.download_artifacts(f"models:/{name}@champion", dst_path=str(tmp_path)))
    files = {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    assert sum(map(len, files.values())) < 100_000
    assert {"MLmodel", "serving.py", "artifacts/prompt/softprompt.json"} <= files.keys()
    assert [f for f in files if f.endswith((".pkl", ".pickle", ".pt", ".bin"))] == []
    assert [f for f, content in files.items() if content.startswith(b"\x80")] == []  # how a pickle begins


def test_the_model_answers_through_mlflow(name, store, bench, prompt):
    answers = mlflow.pyfunc.load_model(f"models:/{name}@champion").predict(ROWS)
    expected = Predictor(bench.backbone, prompt).predict(ROWS)
    assert [(a.label, a.probabilities) for a in answers] == [(p.label, p.probabilities) for p in expected]


@contextmanager
def served(model: str) -> Iterator[str]:
    """The address of `mlflow models serve` on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", model, "--env-manager", "local"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)],
        env={**os.environ, "PATH": path, "MLFLOW_TRACKING_URI": tracking_uri()},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, 9)  # the server is a child of what was started
        process.wait()


def ask(address: str, rows: list[dict[str, str]]) -> dict:
    request = urllib.request.Request(
        f"{address}/invocations", json.dumps({"inputs": rows}).encode(), {"Content-Type": "application/json"}
    )
    for _ in range(600):
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                found: dict = json.load(answer)
                return found
        except ConnectionError:
            time.sleep(0.1)
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ConnectionError):
                raise
            time.sleep(0.1)
    raise TimeoutError(address)


def test_the_model_answers_over_http(name, bench, prompt):
    with served(f"models:/{name}@champion") as address:
        answers = ask(address, ROWS)["predictions"]
    expected = Predictor(bench.backbone, prompt).predict(ROWS)
    assert [a["label"] for a in answers] == [p.label for p in expected]
    assert answers[0]["probabilities"] == pytest.approx(expected[0].probabilities, abs=1e-4)
