"""The experiment: what is refused, by which name, and what decides its identity."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from softprompt.errors import UserError
from softprompt.spec import BudgetSpec, ExperimentSpec, SplitSpec, load_experiment, validate_experiment

DEFAULT = Path(__file__).parent.parent / "experiments" / "movie-sentiment.yaml"


@pytest.fixture
def tree() -> dict[str, Any]:
    """The default experiment as plain values."""
    found: dict[str, Any] = yaml.safe_load(DEFAULT.read_text(encoding="utf-8"))
    return found


def refusal(*overrides: str) -> str:
    """The sentence that refuses the default experiment with these overrides."""
    with pytest.raises(UserError) as caught:
        load_experiment(DEFAULT, list(overrides))
    return str(caught.value)


def test_the_default_experiment_is_valid():
    experiment = load_experiment(DEFAULT)
    assert experiment.fields == ["text"]
    assert experiment.rungs == [20, 40, 80, 160]
    assert experiment.labels.words == {"negative": " negative", "positive": " positive"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainig={}", "trainig: no such key; check its spelling"),
        ("training.stepz=3", "training.stepz: no such key; check its spelling"),
        ("model.path=x", "model.path: no such key; check its spelling"),
        ("search.length.hihg=9", "search.length.hihg: no such key; check its spelling"),
        ("training.steps=0", "training.steps: Input should be greater than or equal to 1, found 0"),
        ("training.steps=many", "training.steps: Input should be a valid integer, unable to parse string"),
        ("training=3", "training: Input should be a valid dictionary or instance of TrainingSpec, found 3"),
        ("training.warmup_steps=160", "training: warmup_steps < steps must hold, got warmup_steps=160, steps=160"),
        ("seed=-1", "seed: Input should be greater than or equal to 0, found -1"),
        ("budget.minutes=.nan", "budget.minutes: Input should be a finite number, found nan"),
        ("budget={}", "budget: give trials, minutes or both"),
        ("name=A film", "name: String should match pattern"),
        ("precision=int2", "precision: Input should be 'bfloat16', 'float32', 'int8' or 'int4', found 'int2'"),
        ("execution.slots=0", "execution.slots: Input should be greater than or equal to 1, found 0"),
        (
            "execution.slots=1.5",
            "execution.slots: Input should be a valid integer, got a number with a fractional part",
        ),
        ("execution.slots=many", "execution.slots: Input should be 'auto', found 'many'"),
        ("execution.device=gpu", "execution.device: String should match pattern"),
        ("model.kind=zip", "model.kind: must be one of 'package', 'hub', 'local', found 'zip'"),
        ("model={}", "model.kind: is required and missing"),
        ("model={kind: hub, id: x}", "model.revision: is required and missing"),
        ("model.package=llm", "model.package: String should match pattern"),
        ("model.sha256=ff", "model.sha256: String should match pattern"),
        ("data={kind: file}", "data: give either path (one file to carve) or train (and validation, test)"),
        ("data={kind: file, path: a, test: b}", "data: path is carved into splits; name the training file train"),
        ("template=no column", "template: must name at least one column, as in '{text}'"),
        ("template='{text'", "template: expected '}' before end of string; write {{ and }} for braces"),
        ("template='{a b}'", "template: a placeholder must be a plain column name, got {a b}"),
        ("template='{text:d}'", "template: a placeholder must be a plain column name, got {text:d}"),
        ("template='{text!r}'", "template: a placeholder must be a plain column name, got {text!r}"),
        ("template='{text!x}'", "template: a placeholder must be a plain column name, got {text!x}"),
        ("template='{text:{other}}'", "template: a placeholder must be a plain column name, got {text:{other}}"),
        ("labels.bins.0.word=' '", "labels: every label needs a word of its own that is not blank, got [' ', ' pos"),
        ("labels.bins.0.word=' positive'", "labels: every label needs a word of its own that is not blank"),
        ("labels.bins.1.label=negative", "labels: every label has one bin, got ['negative', 'negative']"),
        ("labels.bins.0={label: a, word: b, min: 3, max: 2}", "labels.bins.0: min <= max must hold, got min=3, max=2"),
        ("labels={kind: column, field: l, words: {a: x}}", "labels.words: Dictionary should have at least 2 items"),
        ("labels={kind: column, field: l, words: {0: x, 1: y}}", "labels.words.0: a key must be text; put it in"),
        ("labels={kind: text, field: l}", "labels.max_new_tokens: is required and missing"),
        ("labels={kind: text, field: l, max_new_tokens: 0}", "labels.max_new_tokens: Input should be greater than"),
        (
            "labels={kind: text, field: l, max_new_tokens: 9, words: {}}",
            "labels.words: no such key; check its spelling",
        ),
        ("labels={kind: text, field: l, max_new_tokens: 9}", "search.initialization: `labels` starts from label words"),
        ("splits.test=0", "splits.test: Input should be greater than or equal to 1, found 0"),
        ("search.length=0", "search.length: Input should be greater than or equal to 1, found 0"),
        ("search.length={low: 9, high: 3}", "search.length: low <= high must hold, got low=9, high=3"),
        ("search.length={low: 0, high: 3}", "search.length: 1 <= length <= 2048 must hold, got 0 to 3"),
        ("search.length={low: 3}", "search.length.high: is required and missing"),
        ("search.length={low: 0, high: 3, log: true}", "search.length: a logarithmic range starts above zero"),
        ("search.length={choices: [4, 0]}", "search.length.choices.1: Input should be greater than or equal to 1"),
        ("search.length={choices: []}", "search.length.choices: Tuple should have at least 1 item"),
        ("search.learning_rate={low: 0, high: 1}", "search.learning_rate: only values above zero can be searched"),
        ("search.initialization=[]", "search.initialization: Tuple should have at least 1 item"),
        ("search.initialization.0.kind=zeros", "search.initialization.0.kind: must be one of 'uniform', 'normal'"),
        ("search.initialization.0.bound=-1", "search.initialization.0.bound: Input should be greater than 0, found -1"),
        ("search.initialization.0.bound={low: -1, high: 1}", "search.initialization.0.bound: only values above zero"),
        ("search.initialization.3.text=''", "search.initialization.3.text: String should have at least 1 character"),
        ("search.initialization.3.text={choices: ['']}", "search.initialization.3.text.choices.0: String should have"),
        ("search.initialization.0.kind=labels", "search: each kind of initialization stands once"),
        ("search.reparameterization=[]", "search.reparameterization: Tuple should have at least 1 item"),
        ("search.reparameterization=[{kind: mlp}]", "search.reparameterization.0.kind: must be one of 'none', 'residu"),
        ("search.reparameterization=[{kind: none}, {kind: none}]", "search: each kind of reparameterization stands"),
        (
            "search.reparameterization=[{kind: residual, bottleneck: 0}]",
            "search.reparameterization.0.bottleneck: Input",
        ),
        ("search.max_norm=0", "search.max_norm: Input should be greater than 0, found 0"),
        ("search.max_norm={low: 0, high: 1}", "search.max_norm: only values above zero can be searched"),
        (
            "search.max_norm={choices: [null, -1]}",
            "search.max_norm.choices.1: Input should be greater than 0, found -1",
        ),
        ("search.dropout=often", "search.dropout: Input should be a valid boolean"),
        ("search.dropout={choices: [true, 3]}", "search.dropout.choices.1: Input should be a valid boolean"),
        ("training.loss=accuracy", "training.loss: Input should be 'vocabulary' or 'labels', found 'accuracy'"),
        ("execution.micro_batch_tokens=0", "execution.micro_batch_tokens: Input should be greater than or equal to 1"),
        ("search.pruner.kind=median", "search.pruner.every: is required and missing (and 2 more)"),
        ("search.start.0.initialization=zeros", "search: start.0.initialization must be one of ['uniform', 'normal'"),
        ("search.method=lora", "search.method: Input should be 'prompt_tuning' or 'prefix_tuning', found 'lora'"),
        ("search.method={choices: []}", "search.method.choices: Tuple should have at least 1 item"),
        ("search.start.0.method=prefix_tuning", "search: start.0.method must be one of ['prompt_tuning'], got 'prefix"),
        ("search.start.0.length=65", "search: start.0.length=65 lies outside search.length; change one of them"),
        (
            "search.start.0.settings={normal.scale: 0.5}",
            "search: start.0.settings.normal.scale is no setting of this point; it has length, initialization, ",
        ),
        (
            "search.start.0.settings={dropout: true}",
            "search: start.0.settings.dropout=True lies outside search.dropout; change one of them",
        ),
        (
            "search.start.0={length: 20, initialization: uniform, learning_rate: 0.01, settings: {uniform.bound: 2}}",
            "search: start.0.settings.uniform.bound=2 lies outside search.initialization.0.bound; change one of them",
        ),
        (
            "search.start.0.settings={length: 20}",
            "search.start.0: settings.length: length stands beside the settings, not among them; move it",
        ),
        ("search.length=8", "search: start.0.length=20 lies outside search.length; change one of them"),
        ("search.learning_rate={choices: [1]}", "search: start.0.learning_rate=0.01 lies outside search.learning_rate"),
    ],
)
def test_a_mistake_is_named_by_its_dotted_key(override: str, message: str):
    assert refusal(override).startswith(f"{DEFAULT}: {message}")


def test_a_loss_over_labels_needs_labels():
    overrides = ["labels={kind: text, field: l, max_new_tokens: 9}", "search.initialization=[{kind: uniform}]"]
    overrides += ["search.start=[]", "training.loss=labels"]
    message = "training.loss: labels is for targets that are labels, found free text; use vocabulary"
    assert refusal(*overrides) == f"{DEFAULT}: {message}"
    assert load_experiment(DEFAULT, [*overrides[:-1], "training.loss=vocabulary"]).labels.kind == "text"


def test_a_file_with_a_date_that_is_none_is_refused(tmp_path: Path):
    (tmp_path / "dated.yaml").write_text("name: 2024-02-30\n")
    with pytest.raises(UserError, match=r"dated\.yaml: not valid YAML: day is out of range for month"):
        load_experiment(tmp_path / "dated.yaml")


@pytest.mark.parametrize("key", [k for k, f in ExperimentSpec.model_fields.items() if f.is_required()])
def test_a_missing_key_is_named(tree, key: str):
    del tree[key]
    with pytest.raises(UserError, match=rf"^tree: {key}: is required and missing$"):
        validate_experiment(tree, "tree")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "expected dotted.key=value"),
        ("=3", "expected dotted.key=value"),
        ("name=2024-02-30", "the value is not valid YAML: day is out of range for month"),
        ("seed=[", "the value is not valid YAML: line 1: "),
        ("budget={trials: 1, trials: 2}", "the value is not valid YAML: line 1: the key 'trials' stands twice"),
        ("seed.x=1", "seed holds a single value, so it has no key x"),
        ("labels.field.x.y=1", "labels.field holds a single value, so it has no key y"),
        ("labels.bins.0.word.x=1", "labels.bins.0.word holds a single value, so it has no key x"),
        ("labels.bins.7.word=x", "7 is no index of a list of 2; they are counted from 0"),
        ("labels.bins.2=x", "2 is no index of a list of 2; they are counted from 0"),
        ("labels.bins.-1.word=x", "-1 is no index of a list of 2; they are counted from 0"),
        ("labels.bins.first.word=x", "first is no index of a list of 2; they are counted from 0"),
        ("labels.bins.last=x", "last is no index of a list of 2; they are counted from 0"),
    ],
)
def test_an_override_that_leads_nowhere_is_refused(override: str, message: str):
    assert refusal(override).startswith(f"--set {override}: {message}")


def test_overrides_reach_every_depth_in_their_order():
    changes = ["labels.bins.0.word=' bad'", "execution.slots=3", "budget={minutes: 2}", "seed=1", "seed=2"]
    experiment = load_experiment(DEFAULT, changes)
    assert experiment.labels.words["negative"] == " bad"
    assert (experiment.execution.slots, experiment.budget, experiment.seed) == (3, BudgetSpec(minutes=2), 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "an experiment is a mapping of keys, found list"),
        ("", "an experiment is a mapping of keys, found NoneType"),
        ("name: [\n", "not valid YAML: line 2: "),
        ("name: !!python/object/apply:os.getcwd []\n", "not valid YAML: line 1: could not determine a constructor"),
        ("name: a\nseed: 1\nname: b\n", "not valid YAML: line 3: the key 'name' stands twice"),
        ("budget:\n  trials: 1\n  trials: 2\n", "not valid YAML: line 3: the key 'trials' stands twice"),
    ],
)
def test_a_file_that_holds_no_experiment_is_refused(tmp_path, text: str, message: str):
    file = tmp_path / "experiment.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_experiment(file)
    assert str(caught.value).startswith(f"{file}: {message}")


def test_what_is_no_readable_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="is a folder; give the path of an experiment YAML"):
        load_experiment(tmp_path)
    with pytest.raises(UserError, match="no such file; give the path of an experiment YAML"):
        load_experiment(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes("name: caf\u00e9\n".encode("latin-1"))
    with pytest.raises(UserError, match="not valid YAML: 'utf-8' codec can't decode byte 0xe9"):
        load_experiment(tmp_path / "latin.yaml")


def test_a_merged_mapping_may_say_a_key_anew(tmp_path):
    text = DEFAULT.read_text(encoding="utf-8").replace("budget: {trials: 8}", "")
    text += "\nbudget:\n  <<: {trials: 3, minutes: 5}\n  trials: 4\n"
    (tmp_path / "experiment.yaml").write_text(text, encoding="utf-8")
    assert load_experiment(tmp_path / "experiment.yaml").budget == BudgetSpec(trials=4, minutes=5)


@pytest.mark.parametrize("length", ["20", "{low: 3, high: 20, log: true}", "{choices: [20, 4]}"])
def test_the_longest_prompt_is_known_before_the_search(length: str):
    assert load_experiment(DEFAULT, ["search.start=[]", f"search.length={length}"]).search.longest == 20


LEARNED = {
    "name": "other",
    "seed": 1,
    "model": {"kind": "hub", "id": "a/b", "revision": "c"},
    "precision": "float32",
    "data": {"kind": "file", "path": "rows.csv"},
    "template": "{text}",
    "labels": {"kind": "column", "field": "l", "words": {"a": " a", "b": " b"}},
    "prompt_position": "after_bos",
    "splits": {"test": 1200, "validation": 401},
    "training.steps": 241,
    "training.weight_decay": 0.1,
    "training.loss": "labels",
    "search.start": [],
    "search.initialization.0.bound": 0.4,
    "search.pruner.first_rung": 31,
    "search.method": "prefix_tuning",
    "search.reparameterization": [{"kind": "residual"}],
    "search.max_norm": 2.0,
    "search.dropout": True,
    "budget": {"trials": 9},
    "evaluation": {"instruction": "Well?"},
}
EXECUTION = {
    "execution.device": "cpu",
    "execution.lanes": 2,
    "execution.ray": "auto",
    "execution.slots": 4,
    "execution.micro_batch_tokens": 512,
    "execution.gradient_checkpointing": True,
    "execution.compile": True,
    "execution.keep_prompts": 2,
}


def changed(path: str, value: Any) -> ExperimentSpec:
    return load_experiment(DEFAULT, [f"{path}={yaml.safe_dump(value, default_flow_style=True)}"])


@pytest.mark.parametrize("path", LEARNED)
def test_what_is_learned_decides_the_fingerprint(path: str):
    assert changed(path, LEARNED[path]).fingerprint != load_experiment(DEFAULT).fingerprint


@pytest.mark.parametrize("path", EXECUTION)
def test_where_it_runs_leaves_the_fingerprint_alone(path: str):
    there = changed(path, EXECUTION[path])
    assert there != load_experiment(DEFAULT)
    assert there.fingerprint == load_experiment(DEFAULT).fingerprint


def test_every_field_stands_on_one_side_of_the_line():
    assert {p.partition(".")[0] for p in (*LEARNED, *EXECUTION)} == set(ExperimentSpec.model_fields)


def test_the_fingerprint_forgets_how_the_file_is_written(tree):
    turned = dict(reversed(tree.items()))
    turned["search"]["initialization"][0]["bound"] = 0.5  # the default, spelt out
    assert validate_experiment(turned, "turned").fingerprint == load_experiment(DEFAULT).fingerprint


def test_an_experiment_is_frozen_and_hashable():
    experiment = load_experiment(DEFAULT)
    with pytest.raises(ValidationError, match="frozen"):
        experiment.seed = 3
    with pytest.raises(ValidationError, match="frozen"):
        experiment.training.steps = 3
    assert len({experiment.model, load_experiment(DEFAULT).model}) == 1


@pytest.mark.parametrize("overrides", [[], *([f"{k}={v}"] for k, v in EXECUTION.items()), ["search.length=20"]])
def test_an_experiment_survives_json(overrides: list[str]):
    experiment = load_experiment(DEFAULT, overrides)
    again = ExperimentSpec.model_validate_json(experiment.model_dump_json())
    assert (again, again.fingerprint) == (experiment, experiment.fingerprint)


def test_the_schema_describes_every_field():
    schema = ExperimentSpec.model_json_schema()
    parts = {"ExperimentSpec": schema, **schema["$defs"]}
    fields = {f"{part}.{name}": field for part, s in parts.items() for name, field in s["properties"].items()}
    assert len(fields) > 60
    assert [name for name, field in fields.items() if "description" not in field and "const" not in field] == []
    assert [part for part, s in parts.items() if "description" not in s or "Annotated" in s["title"]] == []


def test_one_trial_is_the_first_start():
    single = load_experiment(DEFAULT, ["search.start.0.length=3"]).with_one_trial()
    assert single.budget == BudgetSpec(trials=1)
    assert [point.length for point in single.search.start] == [3]


def test_splits_have_rows():
    with pytest.raises(ValidationError, match="train"):
        SplitSpec(validation=1, test=1, train=0)
