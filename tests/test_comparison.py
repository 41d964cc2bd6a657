"""What a prompt is compared with, on a tiny model."""

from dataclasses import replace

import pytest
import torch

from softprompt.comparison import (
    INSTRUCTION,
    MAJORITY,
    NO_PROMPT,
    TFIDF,
    measure_baselines,
    measure_prompt,
)
from softprompt.data import prepare
from softprompt.errors import UserError
from softprompt.evaluation import LabelMetrics, measure_scores
from softprompt.exposure import may_have_seen_test
from softprompt.inference import Classifier
from softprompt.prediction import Predictor
from softprompt.prompt import SoftPrompt
from softprompt.tuning import tune
from softprompt.workbench import Split, Workbench
from tests.tiny import tiny_backbone, tiny_experiment

PARAMS = {"length": 3, "initialization": "labels", "learning_rate": 0.1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("comparison")


@pytest.fixture(scope="module")
def bench(folder) -> Workbench:
    experiment = tiny_experiment(folder)
    return Workbench(experiment, prepare(experiment, folder / "cache"), tiny_backbone())


@pytest.fixture(scope="module")
def prompt(bench) -> SoftPrompt:
    return tune(bench, PARAMS)


def classified(bench: Workbench, vectors: torch.Tensor, split: Split) -> LabelMetrics:
    """Metrics of a prompt by way of the classifier."""
    scores = Classifier(bench.backbone, vectors, list(bench.target.labels.values())).score(split.inputs)
    return measure_scores([list(bench.target.labels).index(answer) for answer in split.answers], scores)


def with_instruction(bench: Workbench, instruction: str) -> Workbench:
    evaluation = bench.experiment.evaluation.model_copy(update={"instruction": instruction})
    return Workbench(bench.experiment.model_copy(update={"evaluation": evaluation}), bench.data, bench.backbone)


def test_the_baselines_answer_the_same_rows(bench):
    systems = measure_baselines(bench)
    assert list(systems) == [MAJORITY, TFIDF, NO_PROMPT, INSTRUCTION]
    assert {m.rows for m in systems.values()} == {60}
    assert [m.numbers["illegal"] is None for m in systems.values()] == [True, True, False, False]


def test_the_majority_is_that_of_the_training_rows(bench):
    majority = measure_baselines(bench)[MAJORITY]
    train, test = bench.split("train").answers, bench.split("test").answers
    most = max(set(train), key=train.count)
    assert majority.correct == [answer == most for answer in test]
    assert (majority.numbers["macro_f1"] or 1) < 0.5


def test_tfidf_finds_the_words_that_tell(bench):
    assert measure_baselines(bench)[TFIDF].score > 0.9


def test_tfidf_takes_signs_where_no_row_has_a_word(tmp_path):
    faces = ("☹", "negative"), ("☺", "positive")
    rows = "".join(f"{face} {n // 10} {n % 10},{label}\n" for n in range(60) for face, label in faces)
    experiment = tiny_experiment(tmp_path, splits={"validation": 20, "test": 30}, template="{text}")
    (tmp_path / "rows.csv").write_text("text,label\n" + rows)
    signs = Workbench(experiment, prepare(experiment, tmp_path / "cache"), tiny_backbone())
    assert measure_baselines(signs)[TFIDF].score > 0.9


def test_no_prompt_is_a_prompt_of_no_vectors(bench):
    split = bench.split("test")
    nothing = torch.zeros(0, bench.backbone.hidden_size)
    assert measure_baselines(bench)[NO_PROMPT] == classified(bench, nothing, split)


def test_an_instruction_changes_what_the_model_says(bench):
    systems = measure_baselines(bench)
    assert systems[INSTRUCTION].log_loss != systems[NO_PROMPT].log_loss


def test_braces_in_an_instruction_are_text(bench):
    other = with_instruction(bench, 'Answer as {"label": x} or {text}: ')
    measured = measure_baselines(other)[INSTRUCTION]
    template = 'Answer as {{"label": x}} or {{text}}: ' + bench.experiment.template
    room = len(other.backbone.tokenizer.encode(other.experiment.evaluation.instruction))
    split = other.split("test", template=template, max_tokens=other.experiment.training.max_tokens + room)
    assert '{"label": x} or {text}: Review:' in other.backbone.tokenizer.decode(list(split.inputs[0]))
    assert measured == classified(other, torch.zeros(0, other.backbone.hidden_size), split)


def test_a_long_instruction_takes_no_tokens_from_the_inputs(bench, monkeypatch):
    other = with_instruction(bench, "Is this review positive or negative? " * 8)
    real, seen = other.measure, []

    def measure(prompt, split):
        seen.append(split.inputs)
        return real(prompt, split)

    monkeypatch.setattr(other, "measure", measure)
    measure_baselines(other)
    texts = [[str(other.backbone.tokenizer.decode(list(row))) for row in inputs] for inputs in seen]
    assert texts[0] == [text[text.index("Review:") :] for text in texts[1]]
    assert len(seen[1][0]) > other.experiment.training.max_tokens


def test_a_prompt_is_measured_with_its_own_template_and_words(bench, prompt):
    measured = measure_prompt(bench, prompt)
    split = bench.split("test")
    assert measured == classified(bench, prompt.vectors, split)
    assert measure_prompt(bench, replace(prompt, template="{text}?")).log_loss != measured.log_loss


def test_a_prompt_is_measured_with_its_own_limit_of_tokens(bench, prompt):
    short = replace(prompt, max_tokens=10)
    rows = bench.data.split("test").to_list()
    predicted = Predictor(bench.backbone, short).predict(rows)
    right = [p.label == row["label"] for p, row in zip(predicted, rows, strict=True)]
    assert measure_prompt(bench, short).correct == right
    assert measure_prompt(bench, short).log_loss != measure_prompt(bench, prompt).log_loss


def test_the_order_of_a_prompts_labels_does_not_matter(bench, prompt):
    turned = replace(prompt, words=dict(reversed(prompt.words.items())))
    assert measure_prompt(bench, turned) == measure_prompt(bench, prompt)


def test_a_prompt_with_other_labels_is_refused(bench, prompt):
    with pytest.raises(UserError, match=r"answers with the labels yes, no, the experiment asks for negative, positive"):
        measure_prompt(bench, replace(prompt, words={"yes": " yes", "no": " no"}))


def test_a_prompt_of_another_model_is_refused(bench, prompt):
    with pytest.raises(UserError, match="belongs to another base model"):
        measure_prompt(bench, replace(prompt, weights_sha256="0" * 64))


def test_a_prompt_that_needs_another_column_is_refused(bench, prompt):
    with pytest.raises(UserError, match="reads the column 'headline', which the experiment's template does not name"):
        measure_prompt(bench, replace(prompt, template="{headline}: {text}"))


def test_a_prompt_has_not_seen_the_test_rows_of_its_own_splits_nor_of_fewer_ones(bench, prompt, folder):
    assert not may_have_seen_test(bench, prompt)
    assert not may_have_seen_test(carved_anew(bench, folder, splits={"validation": 60, "test": 40}), prompt)


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"splits": {"validation": 40, "test": 70}}], ids=lambda c: next(iter(c))
)
def test_a_prompt_of_other_splits_may_have_seen_test_rows(bench, prompt, folder, change):
    other = carved_anew(bench, folder, **change)
    assert may_have_seen_test(other, prompt)
    assert not may_have_seen_test(other, tune(other, PARAMS))
    assert may_have_seen_test(bench, replace(prompt, provenance={}))


def carved_anew(bench: Workbench, folder, **change) -> Workbench:
    experiment = tiny_experiment(folder, **change)
    return Workbench(experiment, prepare(experiment, folder / "cache"), bench.backbone)


def test_a_test_split_that_the_data_names_is_the_users_to_keep_apart(bench, prompt):
    named = Workbench(bench.experiment, replace(bench.data, test_bound=None), bench.backbone)
    assert not may_have_seen_test(named, replace(prompt, provenance={}))
