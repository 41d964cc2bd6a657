"""One trial from its start to its prompt."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from softprompt.comparison import measure_prompt
from softprompt.data import prepare
from softprompt.evaluation import measure_scores
from softprompt.inference import Classifier
from softprompt.loading import load_backbone
from softprompt.prediction import Predictor
from softprompt.prompt import SoftPrompt
from softprompt.training import step
from softprompt.tuning import Tuning, describe, tune
from softprompt.workbench import Workbench
from tests.tiny import save_tiny, tiny_experiment

PARAMS: dict[str, Any] = {"length": 4, "initialization": "labels", "learning_rate": 0.1}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    folder = tmp_path_factory.mktemp("tuning")
    experiment = tiny_experiment(folder)
    return Workbench(experiment, prepare(experiment, folder / "cache"))


def run(bench: Workbench, tuning: Tuning) -> list[float]:
    """Train to the end, validating at every rung; the accuracies found there."""
    found = []
    while not tuning.slot.finished:
        tuning.add_loss(step(bench.backbone, [tuning.slot]).item())
        if tuning.at_rung:
            found.append(tuning.validate().score)
    return found


def test_a_trial_is_scored_at_its_rungs_and_keeps_its_best(bench: Workbench) -> None:
    tuning = Tuning(bench, PARAMS, number=3, seed=[0, 3])
    found = run(bench, tuning)
    assert len(found) == 3 == tuning.rungs_passed
    assert len(tuning.losses) == 12
    assert tuning.best is not None
    assert tuning.best.metrics.score == max(found)
    assert tuning.best.step in (3, 6, 12)
    split, labels = bench.split("validation"), bench.target.labels
    scores = Classifier(bench.backbone, tuning.prompt().vectors, list(labels.values())).score(split.inputs)
    assert measure_scores([list(labels).index(answer) for answer in split.answers], scores) == tuning.best.metrics


def test_the_best_is_not_touched_by_the_steps_after_it(bench: Workbench) -> None:
    tuning = Tuning(bench, PARAMS, number=0, seed=[0])
    step(bench.backbone, [tuning.slot])
    tuning.validate()
    assert tuning.best is not None
    before = tuning.best.vectors.clone()
    step(bench.backbone, [tuning.slot])
    assert torch.equal(tuning.best.vectors, before)
    assert not torch.equal(tuning.slot.prompt, before)


def test_tuning_twice_gives_the_same_bits(bench: Workbench) -> None:
    one, two = tune(bench, PARAMS, number=2), tune(bench, PARAMS, number=2)
    assert torch.equal(one.vectors, two.vectors)
    assert one.provenance == two.provenance
    assert not torch.equal(tune(bench, PARAMS, number=1).vectors, one.vectors)


def test_the_prompt_says_where_it_comes_from(bench: Workbench, tmp_path: Path) -> None:
    prompt = tune(bench, PARAMS, number=2)
    assert prompt.provenance["experiment"] == "tiny-sentiment"
    assert prompt.provenance["fingerprint"] == bench.experiment.fingerprint
    assert prompt.provenance["dataset"]["digest"] == bench.data.digest
    assert prompt.provenance["dataset"]["test_bound"] == bench.data.test_bound
    assert prompt.provenance["params"] == PARAMS
    assert prompt.provenance["trial"] == 2
    assert set(prompt.provenance["versions"]) == {"python", "softprompt", "torch", "transformers"}
    assert prompt.base == bench.experiment.model.model_dump()
    json.dumps(prompt.provenance)
    read = SoftPrompt.load(prompt.save(tmp_path / "prompt"))
    read.require(bench.backbone)
    assert read.provenance == prompt.provenance


def test_a_prompt_after_the_first_token_is_trained_measured_and_served_there(tmp_path: Path) -> None:
    experiment = tiny_experiment(tmp_path, prompt_position="after_bos")
    save_tiny(tmp_path / "model", begin=True)
    placed = Workbench(experiment, prepare(experiment, tmp_path / "cache"))
    row, ids = placed.data.split("train")[0], placed.examples[0].inputs
    assert [1, *ids] == placed.backbone.tokenizer.encode(f"Review: {row['text']}\nSentiment:")
    prompt = SoftPrompt.load(tune(placed, PARAMS).save(tmp_path / "prompt"))
    assert prompt.position == "after_bos"

    plain = load_backbone(experiment.model, precision="float32", device="cpu")
    rows = placed.data.split("test")
    answers = Predictor(plain, prompt).predict([{"text": row["text"]} for row in rows])
    found = [answer.label == row["label"] for answer, row in zip(answers, rows, strict=True)]
    at_start = Workbench(experiment.model_copy(update={"prompt_position": "start"}), placed.data)
    assert found == list(measure_prompt(placed, prompt).correct) == list(measure_prompt(at_start, prompt).correct)

    embeds = plain.model.get_input_embeddings()(torch.tensor([plain.tokenizer.encode("Review: dull\nSentiment:")]))[0]
    joined = torch.cat([embeds[:1], prompt.vectors, embeds[1:]])
    words = [ids[0] for ids in placed.target.labels.values()]
    with torch.no_grad():
        expected = plain.model(inputs_embeds=joined[None]).logits[0, -1, words].softmax(0)
    (answer,) = Predictor(plain, prompt).predict([{"text": "dull"}])
    assert list(answer.probabilities.values()) == pytest.approx(expected.tolist(), abs=1e-5)


def test_no_prompt_before_the_first_rung(bench: Workbench) -> None:
    with pytest.raises(RuntimeError, match="has not been validated yet"):
        Tuning(bench, PARAMS, number=0, seed=[0]).prompt()


def test_a_loss_that_is_not_finite_is_a_failure(bench: Workbench) -> None:
    tuning = Tuning(bench, PARAMS, number=0, seed=[0])
    assert tuning.failure is None
    with torch.no_grad():
        tuning.slot.prompt[0, 0] = float("nan")
    tuning.add_loss(step(bench.backbone, [tuning.slot]).item())
    assert tuning.failure == "the training loss is nan at step 1; try a lower learning rate"


def test_progress_says_how_far_it_is(bench: Workbench) -> None:
    tuning = Tuning(bench, PARAMS, number=5, seed=[0])
    tuning.add_loss(step(bench.backbone, [tuning.slot]).item())
    progress = tuning.progress()
    assert (progress.number, progress.step, progress.steps, progress.rung, progress.rungs) == (5, 1, 12, 0, 3)
    assert progress.score is None
    assert progress.loss == tuning.losses[0]


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({}, "labels · P=4 · lr 0.1"),
        ({"initialization": "uniform", "uniform.bound": 0.25}, "uniform · P=4 · lr 0.1 · bound 0.25"),
        ({"learning_rate": 0.0123456}, "labels · P=4 · lr 0.012"),
        ({"method": "prompt_tuning"}, "labels · P=4 · lr 0.1"),
        ({"method": "prefix_tuning"}, "prefix · labels · P=4 · lr 0.1"),
        (
            {"initialization": "text", "text.text": "Is this film good or is it bad?"},
            "text · P=4 · lr 0.1 · text Is this film good or is…",
        ),
        ({"reparameterization": "none", "max_norm": None, "dropout": False}, "labels · P=4 · lr 0.1"),
        (
            {"reparameterization": "residual", "residual.bottleneck": 64, "max_norm": 2.5, "dropout": True},
            "labels · P=4 · lr 0.1 · residual · bottleneck 64 · max norm 2.5 · dropout",
        ),
        ({"initialization": "text", "text.text": "Good\n or\tbad?\n"}, "text · P=4 · lr 0.1 · text Good or bad?"),
    ],
)
def test_a_trial_in_words(own: dict[str, Any], words: str) -> None:
    assert describe(PARAMS | own) == words
