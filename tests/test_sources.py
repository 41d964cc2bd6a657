"""The prompt that others start from: found, verified, pinned."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from softprompt.data import prepare
from softprompt.errors import UserError
from softprompt.home import cache_home, state_home, tracking_uri
from softprompt.packages import file_sha256
from softprompt.prompt import SoftPrompt
from softprompt.registry import decide, register
from softprompt.sources import open_source
from softprompt.spec import ExperimentSpec, validate_experiment
from softprompt.tracking import Tracker
from softprompt.tuning import Tuning, tune
from softprompt.workbench import Workbench
from tests.test_registry import right
from tests.tiny import tiny_experiment

PARAMS = {"length": 4, "initialization": "labels", "learning_rate": 0.1}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    experiment = tiny_experiment(tmp_path_factory.mktemp("sources"), name="tiny-sources")
    return Workbench(experiment, prepare(experiment, cache_home()))


@pytest.fixture(scope="module")
def prompt(bench: Workbench) -> SoftPrompt:
    return tune(bench, PARAMS)


@pytest.fixture(scope="module")
def folder(prompt: SoftPrompt, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prompt.save(tmp_path_factory.mktemp("saved") / "prompt")


@pytest.fixture(scope="module")
def enter(bench: Workbench, folder: Path) -> Callable[[], int]:
    """Register the prompt once more; returns the version's number."""
    state_home().mkdir(parents=True, exist_ok=True)

    def entered() -> int:
        run_id = Tracker(bench.experiment).start_sweep("sources", bench.experiment, bench.data, {})
        return register("tiny-sources", run_id, folder, right(7))

    return entered


def starting_from(source: str, experiment: ExperimentSpec, **search: Any) -> ExperimentSpec:
    tree = experiment.model_dump(mode="json")
    tree["search"] |= {"initialization": [{"kind": "prompt", "source": source}], "start": []} | search
    return validate_experiment(tree, "test")


def opened(bench: Workbench, experiment: ExperimentSpec) -> Workbench:
    return Workbench(experiment, bench.data, bench.backbone)


def test_a_trial_starts_where_the_saved_prompt_ended_and_says_so(bench, prompt, folder):
    params = PARAMS | {"initialization": "prompt", "prompt.source": str(folder)}
    tuning = Tuning(bench, params, number=0, seed=[0, 0])
    assert torch.equal(tuning.slot.prompt, prompt.vectors)
    stored = file_sha256(folder / "adapter_model.safetensors")
    assert tuning.params == params | {"source_prompt": f"{folder}, sha256 {stored}"}
    heir = tune(bench, params)
    assert heir.provenance["source_prompt"] == {"name": str(folder), "version": None, "vectors_sha256": stored}
    assert prompt.provenance["source_prompt"] is None


def test_a_prefix_starts_as_what_the_prompt_leaves_in_the_layers(bench, prompt, folder):
    params = PARAMS | {"initialization": "prompt", "prompt.source": str(folder), "method": "prefix_tuning"}
    slot = bench.start(params, seed=[0])
    assert torch.equal(slot.prompt, bench.backbone.as_prefix(prompt.vectors))


def test_an_alias_is_pinned_to_the_version_that_holds_it(bench, enter):
    first, second = enter(), enter()
    decide("tiny-sources", first, right(7), None)
    assert open_source("models:/tiny-sources@champion").version == first
    trained = opened(bench, starting_from("models:/tiny-sources@champion", bench.experiment))
    MlflowClient(tracking_uri()).set_registered_model_alias("tiny-sources", "champion", str(second))
    assert open_source("models:/tiny-sources@champion").version == second
    params = PARAMS | {"initialization": "prompt", "prompt.source": "models:/tiny-sources@champion"}
    assert tune(trained, params).provenance["source_prompt"]["version"] == first
    assert open_source(f"models:/tiny-sources/{first}").version == first


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("models:/tiny-sources@nobody", r"models:/tiny-sources@nobody: no such registered prompt"),
        ("models:/tiny-sources/99", r"models:/tiny-sources/99: no such registered prompt"),
        ("models:tiny-sources", r"is no registered prompt; write models:/NAME@ALIAS or models:/NAME/VERSION"),
        ("models:/tiny-sources/../1", r"is no registered prompt; write"),
        ("nowhere", r"nowhere: is no soft prompt"),
    ],
)
def test_a_source_that_is_not_there_is_told_before_anything_is_trained(bench, enter, source, message):
    enter()
    with pytest.raises(UserError, match=message):
        opened(bench, starting_from(source, bench.experiment))


def test_a_store_that_is_not_made_yet_is_not_made(bench, tmp_path, monkeypatch):
    monkeypatch.setenv("SOFTPROMPT_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"is not made yet; run a sweep first"):
        opened(bench, starting_from("models:/tiny-sources@champion", bench.experiment))
    assert list(tmp_path.iterdir()) == []


def test_settings_without_a_source_are_refused(bench):
    with pytest.raises(UserError, match=r"'prompt\.source' is missing"):
        bench.start(PARAMS | {"initialization": "prompt"}, seed=[0])


def test_a_prompt_of_another_base_model_is_refused_with_both_hashes(bench, prompt, tmp_path):
    replace(prompt, weights_sha256="0" * 64).save(tmp_path / "prompt")
    with pytest.raises(UserError, match=rf"belongs to another base model: .*{'0' * 64}.*{prompt.weights_sha256}"):
        opened(bench, starting_from(str(tmp_path / "prompt"), bench.experiment))


def test_a_prefix_is_refused(bench, tmp_path):
    tune(bench, PARAMS | {"method": "prefix_tuning"}).save(tmp_path / "prefix")
    with pytest.raises(UserError, match=r"is a prefix, and only a soft prompt can be started from"):
        opened(bench, starting_from(str(tmp_path / "prefix"), bench.experiment))


def test_a_prompt_of_other_splits_of_these_data_is_refused_and_one_of_other_data_is_the_users_to_judge(
    bench, prompt, folder, tmp_path
):
    other = bench.experiment.model_copy(update={"seed": 1})
    data = prepare(other, cache_home())
    with pytest.raises(UserError, match="may have been trained on rows of the test split"):
        Workbench(starting_from(str(folder), other), data, bench.backbone)
    foreign = prompt.provenance | {"experiment": "other", "dataset": {"source": "elsewhere.csv"}}
    replace(prompt, provenance=foreign).save(tmp_path / "foreign")
    Workbench(starting_from(str(tmp_path / "foreign"), other), data, bench.backbone)
