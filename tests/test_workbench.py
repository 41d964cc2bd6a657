"""What the trials of an experiment share: rows as tokens, and slots that start as they are asked to."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from softprompt.backbone import Backbone
from softprompt.batch import Example
from softprompt.data import prepare
from softprompt.errors import UserError
from softprompt.inference import Classifier
from softprompt.loss import OverLabels, OverVocabulary
from softprompt.passes import Passes
from softprompt.spec import Choices, validate_experiment
from softprompt.workbench import Workbench
from tests.tiny import tiny_backbone, tiny_experiment


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    folder = tmp_path_factory.mktemp("bench")
    experiment = tiny_experiment(folder)
    return Workbench(experiment, prepare(experiment, folder / "cache"))


def test_a_split_is_the_rows_in_their_order(bench: Workbench) -> None:
    split, rows = bench.split("validation"), bench.data.split("validation")
    assert len(split.inputs) == len(split.answers) == 40
    for row, tokens, answer in zip(rows, split.inputs, split.answers, strict=True):
        assert bench.backbone.tokenizer.decode(list(tokens)) == f"Review: {row['text']}\nSentiment:"
        assert answer == row["label"]
    assert bench.split("validation") is split


def test_another_template_is_another_split(bench: Workbench) -> None:
    plain = bench.split("test", template="{text}")
    assert bench.split("test", template="{text}") is plain
    assert bench.split("test").inputs != plain.inputs
    assert bench.split("test").answers == plain.answers


def test_long_inputs_are_cut_and_counted(tmp_path: Path) -> None:
    experiment = tiny_experiment(tmp_path)
    short = experiment.model_copy(update={"training": experiment.training.model_copy(update={"max_tokens": 12})})
    split = Workbench(short, prepare(short, tmp_path / "cache")).split("train")
    assert max(map(len, split.inputs)) == 12
    assert 0 < split.cut <= 140


def test_a_template_without_room_is_told_before_anything_is_trained(tmp_path: Path) -> None:
    experiment = tiny_experiment(tmp_path, template="Is this review of a film good or bad? {text}")
    short = experiment.model_copy(update={"training": experiment.training.model_copy(update={"max_tokens": 8})})
    with pytest.raises(UserError, match=r"training\.max_tokens: the template alone takes \d+ tokens"):
        Workbench(short, prepare(short, tmp_path / "cache"), tiny_backbone())


def test_examples_end_with_the_tokens_of_their_label(bench: Workbench) -> None:
    split = bench.split("train")
    assert len(bench.examples) == 140
    assert bench.examples[5] == Example(split.inputs[5], bench.target.labels[split.answers[5]])


PARAMS: list[dict[str, Any]] = [
    {"initialization": "uniform", "uniform.bound": 0.25},
    {"initialization": "normal", "normal.scale": 0.5},
    {"initialization": "vocabulary", "vocabulary.most_common": 100},
    {"initialization": "text", "text.text": "a good film"},
    {"initialization": "labels"},
]


@pytest.mark.parametrize("params", PARAMS, ids=lambda params: params["initialization"])
def test_a_slot_starts_by_its_parameters_and_its_seed(bench: Workbench, params: dict[str, Any]) -> None:
    params = {"length": 9, "learning_rate": 0.1, **params}
    one, same, other = (bench.start(params, seed=seed) for seed in ([0, 1], [0, 1], [0, 2]))
    assert one.prompt.shape == (9, 32)
    assert torch.equal(one.prompt, same.prompt)
    assert one.settings == same.settings
    assert one.next_examples() == same.next_examples()
    assert not torch.equal(one.prompt, other.prompt)
    assert one.next_examples() != other.next_examples()
    assert one.settings.learning_rate == 0.1


@pytest.mark.parametrize("params", PARAMS, ids=lambda params: params["initialization"])
def test_a_prefix_starts_as_the_soft_prompt_of_its_initialization(bench: Workbench, params: dict[str, Any]) -> None:
    params = {"length": 9, "learning_rate": 0.1, **params}
    soft = bench.start(params, seed=[0, 1])
    prefix = bench.start(params | {"method": "prefix_tuning"}, seed=[0, 1])
    assert prefix.prompt.shape == (2, 2, 2, 9, 8)
    assert prefix.next_examples() == soft.next_examples()
    inputs = bench.split("train").inputs[:20]
    labels = list(bench.target.labels.values())
    classifiers = [Classifier(bench.backbone, slot.prompt, labels) for slot in (soft, prefix)]
    expected, found = (classifier.score(inputs).log_probabilities for classifier in classifiers)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["prefix_tuning", {"choices": ["prompt_tuning", "prefix_tuning"]}])
def test_a_model_that_takes_no_prefix_is_told_before_anything_is_trained(bench: Workbench, method: Any) -> None:
    tree = bench.experiment.model_dump()
    tree["search"] |= {"method": method, "start": []}
    with pytest.raises(UserError, match=r"search\.method: prefix_tuning needs .* this mamba model does not; use"):
        Workbench(validate_experiment(tree, "asked"), bench.data, tiny_backbone("mamba"))


def test_settings_of_a_kind_reach_it(bench: Workbench) -> None:
    slot = bench.start({"length": 50, "learning_rate": 0.1, **PARAMS[0]}, seed=[0])
    assert 0.2 < slot.prompt.abs().max() <= 0.25


def test_further_settings_reach_the_slot(bench: Workbench) -> None:
    usual = {"length": 3, "learning_rate": 0.1, "initialization": "normal"}
    further = {"reparameterization": "residual", "residual.bottleneck": 7, "max_norm": 0.5, "dropout": True}
    plain, slot = (bench.start(usual | more, seed=[0]) for more in ({"reparameterization": "none"}, further))
    assert (plain.settings.bottleneck, plain.settings.max_norm, plain.settings.dropout) == (None, None, False)
    mean = bench.backbone.embed(range(len(bench.backbone.embeddings))).norm(dim=1).mean().item()
    assert (slot.settings.bottleneck, slot.settings.dropout) == (7, True)
    assert slot.settings.max_norm == pytest.approx(mean / 2)
    assert slot.prompt.norm(dim=1).max() <= mean / 2 + 1e-5 < plain.prompt.norm(dim=1).max()


def changed(bench: Workbench, part: str, backbone: Backbone | None = None, **fields: object) -> Workbench:
    spec = getattr(bench.experiment, part).model_copy(update=fields)
    return Workbench(bench.experiment.model_copy(update={part: spec}), bench.data, backbone or bench.backbone)


def test_the_loss_is_the_one_asked_for(bench: Workbench) -> None:
    params = {"length": 3, "learning_rate": 0.1, "initialization": "labels"}
    slots = [other.start(params, seed=[0]) for other in (bench, changed(bench, "training", loss="labels"))]
    assert [type(slot.loss) for slot in slots] == [OverVocabulary, OverLabels]


def test_passes_are_as_the_execution_has_them(bench: Workbench) -> None:
    assert bench.passes == Passes(1024)
    other = changed(bench, "execution", micro_batch_tokens=77, gradient_checkpointing=True)
    assert other.passes == Passes(77, gradient_checkpointing=True)
    assert other.passes is other.passes


def test_dropout_of_a_model_without_any_is_refused(bench: Workbench) -> None:
    for asked in (True, Choices[bool](choices=(False, True))):
        with pytest.raises(
            UserError, match=r"^search\.dropout: the model has no dropout, its rates are zero; take it out$"
        ):
            changed(bench, "search", dropout=asked)
        changed(bench, "search", tiny_backbone("gpt2"), dropout=asked)
    changed(bench, "search", dropout=Choices[bool](choices=(False,)))


@pytest.mark.parametrize(
    ("params", "told"),
    [
        (
            {"length": 2, "learning_rate": 0.1, "initialization": "labels", "reparameterization": "lora"},
            "no reparameterization 'lora'; use none or residual",
        ),
        ({"length": 2, "learning_rate": 0.1, "initialization": "zeros"}, "no initialization 'zeros'; use one of unif"),
        ({"length": 2, "learning_rate": 0.1, "initialization": "Backbone"}, "no initialization 'Backbone'; use one of"),
        (
            {"length": 2, "learning_rate": 0.1, "initialization": "labels", "method": "lora"},
            "no method 'lora'; use one of prompt_tuning, prefix_tuning",
        ),
        ({"length": 2, "initialization": "labels"}, "'learning_rate' is missing, found length, initialization"),
        ({"initialization": "labels", "learning_rate": 0.1}, "'length' is missing"),
        ({}, "'length' is missing, found none"),
    ],
)
def test_parameters_that_start_no_slot_are_refused(bench: Workbench, params: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        bench.start(params, seed=[0])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_prompt_input_and_label_fit_into_the_model(bench: Workbench, kind: str) -> None:
    def try_with(max_tokens: int) -> None:
        training = bench.experiment.training.model_copy(update={"max_tokens": max_tokens})
        Workbench(bench.experiment.model_copy(update={"training": training}), bench.data, tiny_backbone(kind))

    label = max(map(len, bench.target.labels.values()))
    try_with(256 - 8 - label)
    told = rf"search\.length: up to 8 vectors, training\.max_tokens={249 - label} .* 257 positions, .* has 256; lower"
    with pytest.raises(UserError, match=told):
        try_with(249 - label)


def test_an_instruction_that_leaves_no_room_is_told_before_anything_is_trained(bench: Workbench) -> None:
    evaluation = bench.experiment.evaluation.model_copy(update={"instruction": "a film " * 200})
    long = bench.experiment.model_copy(update={"evaluation": evaluation})
    with pytest.raises(UserError, match=r"evaluation\.instruction: .* has 256 positions; shorten it"):
        Workbench(long, bench.data, bench.backbone)


def test_an_empty_prompt_scores_the_model_itself(bench: Workbench) -> None:
    inputs = bench.split("validation").inputs[:3]
    scores = Classifier(bench.backbone, torch.zeros(0, 32), list(bench.target.labels.values())).score(inputs)
    for row, found in zip(inputs, scores.log_probabilities, strict=True):
        with torch.no_grad():
            expected = bench.backbone.model(torch.tensor([row])).logits[0, -1].log_softmax(0)
        assert found.tolist() == pytest.approx(
            [expected[ids[0]].item() for ids in bench.target.labels.values()], rel=1e-4
        )
