"""A search that is killed over and over beside one that is left alone; and lanes that ask all at once."""

import os
import random
import signal
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
from optuna.storages import InMemoryStorage, RDBStorage
from optuna.trial import TrialState

from softprompt import search
from softprompt.spec import BudgetSpec, ExperimentSpec, load_experiment

DEFAULT = Path(__file__).parent.parent / "experiments" / "movie-sentiment.yaml"
SMALL = (
    "search.length={choices: [2, 8]}",
    "search.learning_rate=0.01",
    "search.initialization=[{kind: labels}, {kind: normal, scale: {low: 0.5, high: 2}}, {kind: uniform}]",
    "search.reparameterization=[{kind: none}, {kind: residual, bottleneck: {choices: [4, 8]}}]",
    "search.startup_trials=5",
    "search.pruner={kind: halving, first_rung: 30, factor: 2}",
    "budget.trials=14",
)
"""A conditional space in which some points come twice, with starting points that leave something to the search."""
STARTS = (
    "{length: 2, initialization: normal, learning_rate: 0.01}",
    *["{length: 2, initialization: labels, learning_rate: 0.01, settings: {reparameterization: none}}"] * 2,
    *["{length: 8, initialization: uniform, learning_rate: 0.01, settings: {reparameterization: none}}"] * 2,
)


@pytest.fixture(scope="module")
def experiment() -> ExperimentSpec:
    return load_experiment(DEFAULT, [*SMALL, f"search.start=[{', '.join(STARTS)}]"])


def score_of(params: search.Params, step: int) -> float:
    """A pure function of settings and step, with ties."""
    return round(random.Random(repr(sorted(params.items()))).random() * float(step**0.1), 1)


def train(study: optuna.Study, experiment: ExperimentSpec, trial: optuna.Trial, params: search.Params) -> None:
    """As a lane ends a trial, but for the training."""
    for step in experiment.rungs:
        score = score_of(params, step)
        if params["length"] == 8 and step > 60:
            trial.set_user_attr(search.REASON, f"the training loss is nan at step {step}")
            study.tell(trial, state=TrialState.FAIL)
            return
        search.report(trial, score, step)
        if step < experiment.rungs[-1] and search.falls_behind(trial, step):
            study.tell(trial, state=TrialState.PRUNED)
            return
    trial.set_user_attr(search.VAL_LOSS, 1 - score)
    study.tell(trial, score)


def unhurried(url: str) -> RDBStorage:
    """The storage, in which a write does not wait for the disk: what a process wrote outlives it in any case."""
    storage = RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 60}})
    sqlalchemy.event.listen(storage.engine, "connect", lambda c, _: c.execute("PRAGMA synchronous = OFF"))
    storage.engine.dispose()
    return storage


def live(url: str, experiment: ExperimentSpec, begin: Callable[[], None] = lambda: None) -> None:
    """One process of a search with one lane of one slot, up to the end of the budget."""
    storage = unhurried(url)
    begin()
    search.create_study("killed", storage, experiment)
    study = search.load_study("killed", storage, experiment)
    for number in search.unfinished(study):
        opened = search.reopen(study, number, experiment.search, experiment.budget)
        if opened is not None:
            train(study, experiment, *opened)
    go_on(study, experiment)


def go_on(study: optuna.Study, experiment: ExperimentSpec, claim: Callable[[int], bool] = lambda number: True) -> None:
    """Train until nothing is left to ask for."""
    while (asked := search.ask(study, experiment.search, experiment.budget, claim)) is not None:
        train(study, experiment, *asked)


def forked(run: Callable[[], None]) -> int:
    """Run it in a process of its own, which ends with 0 if it comes to the end; returns the process id."""
    child = os.fork()
    if child:
        return child
    try:
        run()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def kill_after(statements: int) -> Callable[[], None]:
    """Let SIGKILL come before one of the next statements that this process sends to its database."""

    def begin() -> None:
        left = iter(range(statements))

        @sqlalchemy.event.listens_for(sqlalchemy.Engine, "before_cursor_execute")
        def count(*_: Any) -> None:
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        # Or between the last statement of a transaction and its end.
        sqlalchemy.event.listen(sqlalchemy.Engine, "commit", count)

    return begin


def remembered(url: str, name: str) -> list[dict[str, Any]]:
    """Everything that a study holds of its trials, but for ids and times."""
    study = optuna.load_study(study_name=name, storage=url)
    kept = ("number", "state", "params", "distributions", "values", "intermediate_values", "user_attrs", "system_attrs")
    return [{key: getattr(trial, key) for key in kept} for trial in study.trials]


def test_a_search_that_is_killed_at_any_instant_has_the_trials_of_one_that_is_not(tmp_path, experiment):
    urls = [f"sqlite:///{tmp_path / name}.db" for name in ("killed", "twin")]
    for url in urls:
        RDBStorage(url)
    assert os.waitpid(forked(lambda: live(urls[1], experiment)), 0)[1] == 0
    twin = remembered(urls[1], "killed")
    # What the search has to come through is in it.
    assert {TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL} == {trial["state"] for trial in twin}
    duplicates = [trial for trial in twin if search.DUPLICATE_OF in trial["user_attrs"]]
    assert {TrialState.COMPLETE, TrialState.PRUNED} == {trial["state"] for trial in duplicates}

    draw, kills = random.Random(0), 0
    while True:
        instant = draw.randint(1, 200)
        child = forked(partial(live, urls[0], experiment, kill_after(instant)))
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
        kills += 1
    assert kills >= 40
    assert remembered(urls[0], "killed") == twin


def stop_after(trial: optuna.Trial, settings: int) -> None:
    """Have the trial raise StopIteration when it is asked for a further setting."""
    left = iter(range(settings))
    for name in ("suggest_int", "suggest_float", "suggest_categorical"):
        suggest = getattr(trial, name)
        setattr(trial, name, lambda *a, suggest=suggest, **k: (next(left), suggest(*a, **k))[1])


@pytest.mark.parametrize("ended", [0, 4, 9])
def test_a_trial_left_between_two_settings_gets_the_rest_as_if_it_had_not_been(experiment, ended: int):
    def given(settings: int) -> search.Params | None:
        storage = InMemoryStorage()
        search.create_study("left", storage, experiment)
        study = search.load_study("left", storage, experiment)
        for _ in range(ended):
            asked = search.ask(study, experiment.search, experiment.budget)
            assert asked is not None
            train(study, experiment, *asked)
        trial = study.ask()
        stop_after(trial, settings)
        with suppress(StopIteration):
            search.suggest(trial, experiment.search)
        fresh = search.load_study("left", storage, experiment)
        opened = search.reopen(fresh, trial.number, experiment.search, experiment.budget)
        return opened and opened[1]

    params = [given(settings) for settings in range(7)]
    assert params == params[:1] * 7


def is_first(mark: Path) -> bool:
    """Whether nobody has left this mark before."""
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def test_lanes_that_ask_all_at_once_train_the_budget_and_no_more(tmp_path, experiment):
    few = experiment.model_copy(update={"budget": BudgetSpec(trials=6)})
    for turn in range(2):
        folder = tmp_path / str(turn)
        folder.mkdir()
        url = f"sqlite:///{folder}/study.db"
        search.create_study("killed", url, few)
        start, go = os.pipe()

        def lane(url: str = url, start: int = start, folder: Path = folder) -> None:
            study = search.load_study("killed", unhurried(url), few)
            os.read(start, 1)
            go_on(study, few, lambda number: is_first(folder / str(number)))

        lanes = [forked(lane) for _ in range(4)]
        os.write(go, b"1234")
        assert [os.waitpid(lane, 0)[1] for lane in lanes] == [0] * 4
        study = search.load_study("killed", url, few)
        assert len(search.counted(study)) == 6
        assert not search.unfinished(study)
        assert not [t for t in study.trials if t.state == TrialState.WAITING]
        surplus = [t for t in study.trials if search.SURPLUS in t.user_attrs]
        assert all(t.state == TrialState.FAIL and not t.intermediate_values for t in surplus)
        rest = {t.number for t in study.trials if search.DUPLICATE_OF in t.user_attrs} | {t.number for t in surplus}
        assert rest | {t.number for t in search.counted(study)} == set(range(len(study.trials)))
