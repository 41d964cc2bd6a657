"""Free text as a target, on a tiny model that has learned some of it; labels are looked at in `test_comparison`."""

from dataclasses import replace

import pytest
import torch

from softprompt.backbone import Backbone
from softprompt.batch import Example
from softprompt.comparison import INSTRUCTION, NO_PROMPT, measure_baselines, measure_prompt
from softprompt.data import prepare
from softprompt.errors import UserError
from softprompt.likelihood import score_targets
from softprompt.plan import plan
from softprompt.prediction import Predictor, Writer
from softprompt.prompt import SoftPrompt
from softprompt.target import TextTarget
from softprompt.tuning import Tuning, tune
from softprompt.workbench import Workbench
from tests.tiny import tiny_backbone, tiny_experiment, tiny_model, tiny_text_experiment, tiny_tokenizer

TRAINING = {"steps": 120, "batch_size": 8, "max_tokens": 48, "schedule": "cosine", "warmup_steps": 1}
PARAMS = {"length": 8, "initialization": "vocabulary", "learning_rate": 0.05}


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Workbench:
    folder = tmp_path_factory.mktemp("target")
    training = TRAINING | {"weight_decay": 0.0, "clip_norm": 1.0}
    experiment = tiny_text_experiment(folder, training=training)
    return Workbench(experiment, prepare(experiment, folder / "cache"), tiny_backbone())


@pytest.fixture(scope="module")
def prompt(bench) -> SoftPrompt:
    return tune(bench, PARAMS)


@pytest.fixture(scope="module")
def rows(bench) -> list[dict[str, str]]:
    found: list[dict[str, str]] = bench.data.split("test").to_list()
    return found


def test_an_example_ends_with_its_text_and_the_end_or_with_the_tokens_that_fit(bench):
    tokenizer = bench.backbone.tokenizer
    for row, example in zip(bench.data.split("train").to_list(), bench.examples, strict=True):
        whole = (*tokenizer.encode(f" {row['label']}"), tokenizer.eos_token_id)
        assert example.target == whole[:8]
    assert {len(e.target) for e in bench.examples} == {2, 4, 8}
    assert bench.targets_cut == 12
    assert "0 inputs and 12 texts cut" in plan(bench)["data"]


def test_exact_match_is_what_generation_gives(bench, prompt, rows):
    measured = measure_prompt(bench, prompt)
    written = Writer(bench.backbone, prompt).write(rows)
    assert measured.correct == [text == row["label"] for text, row in zip(written, rows, strict=True)]
    assert 0 < sum(measured.correct) < 60
    assert measured.numbers["exact_match"] == sum(measured.correct) / 60


@pytest.mark.parametrize("place", [{"method": "prefix_tuning"}, {"position": "after_bos"}], ids=str)
def test_a_text_is_learned_measured_and_written_with_every_kind_of_prompt(place, bench, rows, tmp_path):
    tokenizer = tiny_tokenizer(begin=True)
    backbone = Backbone.wrap(tiny_model(), tokenizer)
    experiment = bench.experiment.model_copy(update={"prompt_position": place.get("position", "start")})
    placed = Workbench(experiment, bench.data, backbone)
    made = tune(placed, PARAMS | {"method": place.get("method", "prompt_tuning")})
    read = SoftPrompt.load(made.save(tmp_path / "prompt"))
    assert (read.method, read.position) == (place.get("method", "prompt_tuning"), experiment.prompt_position)
    measured, written = measure_prompt(placed, read), Writer(backbone, read).write(rows)
    assert measured.correct == [text == row["label"] for text, row in zip(written, rows, strict=True)]
    assert 0 < sum(measured.correct) < 60
    elsewhere = Workbench(bench.experiment, bench.data, backbone)
    assert measure_prompt(elsewhere, read) == measured


def test_a_text_that_was_cut_is_matched_by_nothing(bench, prompt, rows):
    short = TextTarget(bench.backbone, before=" ", max_new_tokens=1)
    split = bench.split("test")
    (tokens, cut), measured = short.encode(split.answers), short.measure(prompt.vectors, split.inputs, split.answers)
    examples = [Example(*row) for row in zip(split.inputs, tokens, strict=True)]
    assert score_targets(bench.backbone, prompt.vectors, examples).greedy.any()
    assert (cut, measured.exact_match, measured.tokens) == (60, 0.0, 60)


def test_the_loss_is_the_mean_over_the_target_tokens_of_all_rows(bench, prompt):
    split = bench.split("test")
    targets, _ = bench.target.encode(split.answers)
    examples = [Example(*row) for row in zip(split.inputs, targets, strict=True)]
    nats = -score_targets(bench.backbone, prompt.vectors, examples).log_probabilities.sum()
    measured = measure_prompt(bench, prompt)
    assert measured.score == measured.log_loss == pytest.approx(nats / sum(map(len, targets)))
    assert measured.low < measured.score < measured.high


def test_the_baselines_of_free_text_are_those_of_the_model_alone(bench, prompt):
    systems = measure_baselines(bench)
    assert list(systems) == [NO_PROMPT, INSTRUCTION]
    split = bench.split("test")
    assert systems[NO_PROMPT] == bench.measure(torch.zeros(0, 32), split)
    assert systems[INSTRUCTION] != systems[NO_PROMPT]
    assert measure_prompt(bench, prompt).score < systems[NO_PROMPT].score


def test_the_best_rung_is_that_of_the_lowest_loss(bench, monkeypatch):
    losses = iter([3.0, 1.0, 2.0])
    real = bench.measure
    monkeypatch.setattr(bench, "measure", lambda *a: real(*a).model_copy(update={"log_loss": next(losses)}))
    tuning = Tuning(bench, PARAMS, number=0, seed=[0])
    for _ in range(3):
        tuning.validate()
    assert tuning.best is not None
    assert tuning.best.metrics.score == 1.0
    tuning.add_loss(0.5)
    assert tuning.progress().score == "loss 1.0000 nats per token"


def test_a_score_that_is_no_number_is_told(bench):
    with pytest.raises(FloatingPointError, match="the scores are nan"):
        bench.measure(torch.full((2, 32), float("nan")), bench.split("test"))


def test_a_prompt_is_measured_with_what_it_expects_before_a_text(bench, prompt):
    other = replace(prompt, before=" It is ")
    assert measure_prompt(bench, other) != measure_prompt(bench, prompt)
    experiment = bench.experiment
    labels = experiment.labels.model_copy(update={"before": " It is "})
    spelt = Workbench(experiment.model_copy(update={"labels": labels}), bench.data, bench.backbone)
    assert measure_prompt(bench, other) == measure_prompt(spelt, other)


def test_labels_and_texts_are_not_measured_by_each_other(bench, prompt, tmp_path):
    experiment = tiny_experiment(tmp_path)
    labelled = Workbench(experiment, prepare(experiment, tmp_path / "cache"), bench.backbone)
    with pytest.raises(UserError, match="the prompt answers with a text, the experiment asks for negative, positive"):
        measure_prompt(labelled, prompt)
    classifier = replace(prompt, words={"yes": " yes", "no": " no"}, before="", max_new_tokens=0)
    with pytest.raises(UserError, match="the prompt answers with the labels yes, no, the experiment asks for a text"):
        measure_prompt(bench, classifier)
    with pytest.raises(UserError, match="not with a label; open it with a Writer"):
        Predictor(bench.backbone, prompt)
    with pytest.raises(UserError, match="not with a free text; open it with a Predictor"):
        Writer(bench.backbone, classifier)


def test_free_text_has_no_words_to_start_from(bench):
    with pytest.raises(
        UserError, match=r"no initialization 'labels'; use one of uniform, normal, vocabulary, text, prompt$"
    ):
        bench.start(PARAMS | {"initialization": "labels"}, seed=[0])


def test_the_prompt_keeps_what_it_needs_to_write(bench, prompt, rows, tmp_path):
    read = SoftPrompt.load(prompt.save(tmp_path / "prompt"))
    assert (read.words, read.before, read.max_new_tokens) == ({}, " ", 8)
    read.require(bench.backbone)
    assert Writer(bench.backbone, read).write(rows[:4]) == Writer(bench.backbone, prompt).write(rows[:4])


def test_prompt_input_and_text_fit_into_the_model(bench, prompt):
    def try_with(most: int) -> None:
        labels = bench.experiment.labels.model_copy(update={"max_new_tokens": most})
        Workbench(bench.experiment.model_copy(update={"labels": labels}), bench.data, bench.backbone)

    try_with(200)
    with pytest.raises(UserError, match=r"a target of 201 tokens make 257 positions, and the model has 256"):
        try_with(201)
    replace(prompt, max_new_tokens=200).require(bench.backbone)
    with pytest.raises(UserError, match=r"max_tokens=48, max_new_tokens=201 exceed the model's 256 positions"):
        replace(prompt, max_new_tokens=201).require(bench.backbone)
