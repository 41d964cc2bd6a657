"""The default flow on the real model, with a tiny budget: opt-in, as it needs the package index."""

import os
import time
from pathlib import Path

import pytest

from softprompt.backbone import Backbone
from softprompt.home import cache_home
from softprompt.loading import load_backbone, locate
from softprompt.prediction import Predictor
from softprompt.registry import load_registered
from softprompt.spec import load_experiment

DEFAULT = Path(__file__).parent.parent / "experiments" / "movie-sentiment.yaml"
TINY = [
    "budget.trials=2",
    "training.steps=8",
    "training.warmup_steps=1",
    "search.pruner.first_rung=4",
    "splits={test: 200, validation: 100}",
]


@pytest.fixture(scope="module")
def user_cache() -> None:
    """What an earlier run has fetched is used again where CI keeps it in `REAL_CACHE`."""
    kept = os.environ.get("REAL_CACHE")
    if kept:
        os.environ["SOFTPROMPT_CACHE"] = kept


@pytest.mark.real
def test_the_default_sweep(prefect_server, user_cache):
    from flows.sweep import sweep  # only here: it costs seconds

    experiment = load_experiment(DEFAULT, TINY)
    result = sweep(experiment)

    assert [t.number for t in result.trials] == [0, 1]
    assert {t.outcome for t in result.trials} <= {"finished", "pruned"}
    first = result.trials[0]
    assert (first.outcome, first.steps, first.title) == ("finished", 8, "trial 0: labels · P=20 · lr 0.01")

    systems = result.evaluation.systems
    assert list(systems) == [
        "majority class",
        "TF-IDF + logistic regression",
        "no prompt",
        "instruction",
        f"winner, {result.evaluation.title}",
    ]
    for metrics in systems.values():
        assert metrics.rows == len(metrics.correct) == 200
        assert 0 <= metrics.low <= metrics.score <= metrics.high <= 1
    assert systems["no prompt"].score > systems["majority class"].score
    assert (result.decision.version, result.decision.promoted) == (1, True)

    converted = locate(experiment.model, cache_home())
    stamp, began = (converted / "model.safetensors").stat().st_mtime_ns, time.monotonic()
    assert locate(experiment.model, cache_home()) == converted
    assert (converted / "model.safetensors").stat().st_mtime_ns == stamp
    assert time.monotonic() - began < 20  # hashes are verified, nothing is converted again

    prompt = load_registered(experiment.name)
    backbone = Backbone.load(converted, precision=experiment.precision)
    assert prompt.weights_sha256 == backbone.weights_sha256
    used = load_backbone(experiment.model, precision=experiment.precision, device=experiment.execution.device)
    assert used is not backbone
    assert used.weights_in_memory_sha256() == backbone.weights_in_memory_sha256()  # a sweep leaves the model alone
    praise, blame = Predictor(backbone, prompt).predict(
        [{"text": "a great and moving film"}, {"text": "a dull waste of time"}]
    )
    assert set(praise.probabilities) == {"negative", "positive"}
    assert praise.probabilities["positive"] > blame.probabilities["positive"]
