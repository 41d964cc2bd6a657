"""How a lane finds the sweep that it joins, and what it has to have in common with it."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest

from softprompt.errors import UserError
from softprompt.ledger import open_ledger
from softprompt.spec import ExperimentSpec
from softprompt.storage import create_stores
from softprompt.sweep import Sweep, begin_sweep, close_sweep, find_open, require_same
from softprompt.workbench import Workbench
from tests.tiny import tiny_experiment

_names = (f"tiny-joining-{n}" for n in count())


@pytest.fixture
def experiment(tmp_path: Path) -> ExperimentSpec:
    return tiny_experiment(tmp_path, name=next(_names))


@pytest.fixture
def opened() -> Callable[[ExperimentSpec], Sweep]:
    create_stores()
    return lambda experiment: begin_sweep(Workbench(experiment), {})


def test_the_open_sweep_of_an_experiment_is_found_and_may_be_joined_with_the_same(experiment, opened):
    sweep = opened(experiment)
    found = find_open(experiment)
    assert (found.name, found.run_id) == (sweep.name, sweep.run_id)
    assert find_open(experiment, sweep.name) == found
    require_same(found, Workbench(experiment))


def test_a_sweep_that_has_ended_is_not_joined(experiment, opened):
    close_sweep(experiment, opened(experiment))
    with pytest.raises(UserError, match=rf"^{experiment.name} has no open sweep; start one with `softprompt sweep`"):
        find_open(experiment)


def test_of_several_open_sweeps_one_is_to_be_chosen(experiment, opened):
    first = opened(experiment)
    row = open_ledger().find_sweep(first.name)
    assert row is not None
    open_ledger().add_sweep(replace(row, name=f"{first.name}-again", run_id="another"))
    with pytest.raises(UserError, match=r"several open sweeps; choose one with --sweep: ") as caught:
        find_open(experiment)
    assert first.name in str(caught.value)
    assert find_open(experiment, f"{first.name}-again").run_id == "another"
    with pytest.raises(UserError, match=r"^--sweep nonsense: is no open sweep of "):
        find_open(experiment, "nonsense")


def test_of_an_experiment_that_was_changed_the_sweep_of_this_very_one_is_found(experiment, opened):
    changed = experiment.model_copy(update={"seed": 5})
    sweeps = {e.seed: opened(e) for e in (experiment, changed)}
    assert find_open(changed).name == sweeps[5].name


@pytest.mark.parametrize("part", ["experiment", "rows", "model", "tokenizer"])
def test_other_rows_weights_or_settings_are_refused_in_one_sentence(experiment, opened, part: str):
    row = open_ledger().find_sweep(opened(experiment).name)
    assert row is not None
    other = json.loads(row.identity) | {part: "d" * 64}
    open_ledger().add_sweep(replace(row, name=f"{row.name}-other", identity=json.dumps(other)))
    sweep = Sweep(name=f"{row.name}-other", run_id=row.run_id)
    with pytest.raises(UserError, match=rf"^the {part} here has the hash .*, and {sweep.name} was opened with dddd"):
        require_same(sweep, Workbench(experiment))
