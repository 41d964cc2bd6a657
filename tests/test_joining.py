"""How a lane finds the sweep that it joins, and what it has to have in common with it."""

from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from softprompt.data import prepare
from softprompt.errors import UserError
from softprompt.home import cache_home
from softprompt.lane import Sweep, open_sweep
from softprompt.spec import ExperimentSpec
from softprompt.store import create_stores
from softprompt.tracking import FINGERPRINT, Tracker
from tasks.joining import DATA, WEIGHTS, find_sweep, identity_tags, require_same
from tests.tiny import tiny_experiment

OWN = {FINGERPRINT: "a" * 64, DATA: "b" * 64, WEIGHTS: "c" * 64}
_names = (f"tiny-joining-{n}" for n in count())


@pytest.fixture
def experiment(tmp_path: Path) -> ExperimentSpec:
    return tiny_experiment(tmp_path, name=next(_names))


@pytest.fixture
def opened() -> Callable[[ExperimentSpec], Sweep]:
    def make(experiment: ExperimentSpec) -> Sweep:
        create_stores()
        data = prepare(experiment, cache_home())
        return open_sweep(experiment, data, identity_tags(experiment, digest=data.digest, weights="c" * 64))

    return make


def test_the_open_sweep_of_an_experiment_is_found_with_what_it_was_opened_with(experiment, opened):
    sweep = opened(experiment)
    found = find_sweep(experiment)
    assert (
        (found.name, found.run_id)
        == (sweep.name, sweep.run_id)
        == (find_sweep(experiment, sweep.name).name, sweep.run_id)
    )
    require_same(found, sweep.tags)


def test_a_sweep_that_has_ended_is_not_joined(experiment, opened):
    Tracker(experiment).end(opened(experiment).run_id, "finished")
    with pytest.raises(UserError, match=rf"^{experiment.name} has no open sweep in sqlite.*start one with `softprompt"):
        find_sweep(experiment)


def test_of_several_open_sweeps_one_is_to_be_chosen(experiment, opened):
    first, second = opened(experiment), opened(experiment)
    with pytest.raises(UserError, match=r"several open sweeps; choose one with --sweep: ") as caught:
        find_sweep(experiment)
    assert first.name in str(caught.value)
    assert find_sweep(experiment, second.name).run_id == second.run_id
    with pytest.raises(UserError, match=r"^--sweep nonsense: is no open sweep of "):
        find_sweep(experiment, "nonsense")


def test_of_an_experiment_that_was_changed_the_sweep_of_this_very_one_is_found(experiment, opened):
    changed = experiment.model_copy(update={"seed": 5})
    sweeps = {e.seed: opened(e) for e in (experiment, changed)}
    assert find_sweep(changed).name == sweeps[5].name


@pytest.mark.parametrize(("tag", "what"), [(FINGERPRINT, "experiment"), (DATA, "rows"), (WEIGHTS, "model")])
def test_other_rows_weights_or_settings_are_refused_in_one_sentence(tag: str, what: str):
    sweep = Sweep(name="tiny-1", run_id="r", tags=OWN)
    require_same(sweep, OWN)
    with pytest.raises(UserError, match=rf"^the {what} here has the hash dddddddddddd, and tiny-1 was opened with "):
        require_same(sweep, OWN | {tag: "d" * 64})
