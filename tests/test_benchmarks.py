"""Every measurement runs on a tiny model, gives what its record promises, and lets both sides do the same."""

import json
import re
from dataclasses import replace
from io import BytesIO

import pytest
import torch

from benchmarks import lanes, large, peer, quality, records, sweep, table
from benchmarks.engine import ROOT, measure, measure_large
from benchmarks.figure import draw
from benchmarks.sizes import QUICK
from benchmarks.start import Start
from benchmarks.subject import Subject
from benchmarks.timing import Stopwatch
from softprompt.inference import Classifier
from softprompt.spec import load_experiment
from softprompt.training import step
from tests.tiny import tiny_experiment

TINY = replace(
    QUICK,
    matrix=256,
    rounds=1,
    steps={20: 1, 100: 1},
    rows=20,
    warm_rows=4,
    score_rows=20,
    score_every=6,
    trials=3,
    rungs=(2, 4),
    trial_rows=20,
    growth_steps=1,
    lengths=(1, 20),
    peer_lengths=(20,),
    batches=(4, 16),
    sides=(1, 2),
    inputs=(8, 16),
)
ROW = 1.001 / 20
"""In float32 the sides differ by rounding, by which at most one row of the twenty falls the other way."""
SMALL = large.Shape(
    config={
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
    batch_size=4,
    inputs=8,
)
# PEFT asks every model for an attribute that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def subject(tmp_path_factory) -> Subject:
    return Subject(tiny_experiment(tmp_path_factory.mktemp("bench"), name="tiny-bench"))


@pytest.fixture(scope="module")
def start(subject) -> Start:
    """A trial of 12 steps with warm-up and a cosine."""
    params = {"length": 4, "initialization": "labels", "learning_rate": 0.1}
    slot = subject.bench.start(params, seed=[0, 0])
    return Start(slot.prompt.detach(), subject.bench.examples, slot.settings)


def test_both_sides_train_the_same_prompt(subject, start):
    slot, model = start.slot(subject.backbone.device), peer.wrap(subject.base, start.prompt)
    for _ in range(12):
        step(subject.backbone, [slot])
    peer.run(model, start, 12)
    assert (slot.prompt - start.prompt).norm() > 0.1 * start.prompt.norm()
    torch.testing.assert_close(peer.vectors(model).detach(), slot.prompt.detach(), rtol=1e-3, atol=1e-3)


def test_both_sides_give_the_same_scores(subject, start):
    inputs, gold = subject.validation(40)
    found = peer.score(peer.wrap(subject.base, start.prompt), inputs, subject.labels)
    expected = Classifier(subject.backbone, start.prompt, subject.labels).score(inputs)
    torch.testing.assert_close(found, torch.from_numpy(expected.log_probabilities), rtol=1e-4, atol=1e-4)
    accuracy = peer.accuracy(peer.wrap(subject.base, start.prompt), (inputs, gold), subject.labels)
    assert accuracy == pytest.approx(float((expected.predicted == torch.tensor(gold).numpy()).mean()))


def test_every_measurement_runs(subject, tmp_path):
    record = measure(subject, TINY) | measure_large(subject, TINY, SMALL)
    assert all(record[key] > 0 for key in ("train_p20", "train_p100", "infer_p100", "sweep_3", "train_1b"))
    assert all(0 <= record[key] < 1 for key in ("matmul_share", "matmul_share_1b"))
    assert record["examples_a_second"]["train_p20"]["rounds"][0][0] > 0
    assert {name: list(sides["ours"]) for name, sides in record["growth"].items()} == {
        "P": ["1", "20"],
        "B": ["4", "16"],
        "K": ["1", "2"],
        "T": ["8", "16"],
    }
    assert list(record["growth"]["P"]["peft"]) == ["20"]
    assert {side: list(used) for side, used in record["peak_memory_mb"].items()} == {
        "ours": ["20", "100"],
        "peft": ["20", "100"],
    }
    draw(record).savefig(BytesIO())
    (tmp_path / "tiny.json").write_text(json.dumps(record | {"quick": False}))
    lines = table.describe(tmp_path).splitlines()
    assert [line for line in lines if "unproven" in line and "GPU" not in line] == []


def test_the_sides_race_over_the_same_steps(subject):
    result = quality.race(subject, replace(TINY, score=2.0))  # out of reach: both go on to the end
    for side in ("ours", "peft"):
        assert [steps for steps, _, _ in result[side]["curve"]] == [6, 12]
        assert result[side]["steps"] is None
    assert result["ratio"] is None
    ours, theirs = ([score for _, _, score in result[side]["curve"]] for side in ("ours", "peft"))
    assert theirs == pytest.approx(ours, abs=ROW)

    result = quality.race(subject, replace(TINY, score=0.0))
    assert result["ours"]["steps"] == result["peft"]["steps"] == 6
    assert len(result["ours"]["curve"]) == len(result["peft"]["curve"]) == 1


def test_both_sweeps_try_the_same(subject):
    result = sweep.measure(subject, TINY)
    assert result["ours"]["best"] == pytest.approx(result["peft"]["best"], abs=ROW)
    for side in ("ours", "peft"):
        assert result[side]["best"] == max(score for _, score in result[side]["curve"]) >= result["score"]
        assert 0 < result[side]["seconds_to_score"] <= result[side]["seconds"]


def test_a_side_waits_while_the_other_has_its_turn():
    watch = Stopwatch()
    with watch.running():
        before = watch.seconds
        with watch.paused():
            waited = watch.seconds
            assert watch.seconds == waited >= before
        assert watch.seconds > waited
    ended = watch.seconds
    assert watch.seconds == ended


def test_the_docs_are_of_the_results():
    page = (ROOT / "docs" / "engine.md").read_text(encoding="utf-8")
    written = page.partition(table.BEGIN)[2].partition(table.END)[0]
    assert written.strip() == table.describe(ROOT / "benchmarks" / "results")
    figures = re.findall(r"!\[.*]\((.*)\)", written)
    assert figures
    assert all((ROOT / "docs" / figure).is_file() for figure in figures)


def test_the_records_of_both_sides_are_measured_on_one_study(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "TURNS", 1)
    experiment = load_experiment(ROOT / "experiments" / "movie-sentiment.yaml", list(records.SPACE))
    studies = records.Studies(f"sqlite:///{tmp_path}/study.db", experiment)
    studies.fill(8)
    figures = studies.compare()
    assert set(figures) == {"ask", "4 reports and tell", "list", "best trial"}
    assert all(sides.keys() == {"ours", "library", "ratio"} for sides in figures.values())
    assert len(studies.plain.trials) == 10


def test_what_is_no_measurement_of_the_engine_is_no_part_of_its_table(tmp_path):
    (tmp_path / "records.json").write_text(json.dumps({"date": "2026-01-01", "Optuna on SQLite": {}}))
    assert "unproven" in table.describe(tmp_path)


def test_table_of_lanes_is_that_of_its_record():
    page = lanes.DOCS.read_text(encoding="utf-8")
    record = json.loads(lanes.FILE.read_text(encoding="utf-8"))
    assert lanes.with_table(page, record) == page
    assert list(record["lanes"]) == ["1", "2", "4"]
