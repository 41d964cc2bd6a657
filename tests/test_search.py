"""The study: which trials are asked for, in which order, and how often."""

from itertools import count
from pathlib import Path

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import MedianPruner, NopPruner
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState

from softprompt import search
from softprompt.errors import UserError
from softprompt.pruning import Halving
from softprompt.spec import BudgetSpec, ExperimentSpec, StartPoint, load_experiment

DEFAULT = Path(__file__).parent.parent / "experiments" / "movie-sentiment.yaml"
pytestmark = pytest.mark.filterwarnings("error")  # what a user would see, be it ours or Optuna's


@pytest.fixture
def storage() -> InMemoryStorage:
    return InMemoryStorage()


@pytest.fixture
def open_study(storage):
    """Make and load a study of the default experiment with overrides."""
    names = (f"study-{n}" for n in count())

    def make(*overrides: str) -> tuple[optuna.Study, ExperimentSpec]:
        experiment = load_experiment(DEFAULT, list(overrides))
        name = next(names)
        search.create_study(name, storage, experiment)
        return search.load_study(name, storage, experiment), experiment

    return make


FINITE = (
    "search.length={choices: [2, 4]}",
    "search.learning_rate=0.01",
    "search.initialization=[{kind: labels}, {kind: uniform}]",
    "search.start=[]",
)
"""Four points."""


ENDLESS = BudgetSpec(minutes=1e6)
METHODS = "search.method={choices: [prompt_tuning, prefix_tuning]}"


def ask(study: optuna.Study, experiment: ExperimentSpec) -> tuple[optuna.Trial, search.Params]:
    asked = search.ask(study, experiment.search, ENDLESS)
    assert asked is not None
    return asked


def reopen(study: optuna.Study, experiment: ExperimentSpec, number: int) -> tuple[optuna.Trial, search.Params]:
    opened = search.reopen(study, number, experiment.search, ENDLESS)
    assert opened is not None
    return opened


def test_the_space_is_translated_with_its_bounds_and_scales(open_study):
    study, experiment = open_study("search.initialization.0.bound={low: 0.1, high: 0.9}")
    for _ in range(12):
        study.tell(ask(study, experiment)[0], 0.5)
    seen = {name: d for t in study.trials for name, d in t.distributions.items()}
    assert seen == {
        "length": IntDistribution(1, 64, log=True),
        "initialization": CategoricalDistribution(("uniform", "normal", "vocabulary", "text", "labels")),
        "learning_rate": FloatDistribution(0.003, 0.1, log=True),
        "uniform.bound": FloatDistribution(0.1, 0.9),
    }


def test_settings_of_a_kind_stand_only_beside_it_and_constants_are_not_suggested(open_study):
    study, experiment = open_study("search.initialization.0.bound={low: 0.1, high: 0.9}", "search.start=[]")
    expected = {"uniform": {"uniform.bound"}, "normal": {"normal.scale"}, "vocabulary": {"vocabulary.most_common"}}
    expected |= {"text": {"text.text"}, "labels": set()}
    for kind, own in expected.items():
        study.enqueue_trial({"initialization": kind, "learning_rate": 0.05, "length": 3})
        trial, params = ask(study, experiment)
        assert {k for k in params if "." in k} == own
        assert {k for k in trial.params if "." in k} == own & {"uniform.bound"}
    assert params == {"length": 3, "initialization": "labels", "learning_rate": 0.05, "method": "prompt_tuning"}


def test_further_settings_stand_beside_those_where_any_trial_may_have_them(open_study):
    kinds = "search.reparameterization=[{kind: none}, {kind: residual, bottleneck: {choices: [4, 8]}}]"
    norms, dropout = "search.max_norm={choices: [null, 2.0]}", "search.dropout={choices: [false, true]}"
    study, experiment = open_study(kinds, norms, dropout, "search.start=[]", "search.startup_trials=100")
    seen = []
    for _ in range(30):
        trial, params = ask(study, experiment)
        study.tell(trial, 0.5)
        assert ("residual.bottleneck" in params) == (params["reparameterization"] == "residual")
        seen.append(params)
    found = {name: {params.get(name) for params in seen} for name in ("reparameterization", "max_norm", "dropout")}
    assert found == {"reparameterization": {"none", "residual"}, "max_norm": {None, 2.0}, "dropout": {False, True}}
    assert {params.get("residual.bottleneck") for params in seen} == {None, 4, 8}


def test_further_settings_that_are_fixed_are_told_and_not_suggested(open_study):
    study, experiment = open_study(
        "search.reparameterization=[{kind: residual}]", "search.max_norm=2", "search.dropout=1"
    )
    trial, params = ask(study, experiment)
    further = {"reparameterization": "residual", "residual.bottleneck": 128, "max_norm": 2.0, "dropout": True}
    assert further.items() <= params.items()
    assert not set(trial.params) & {"residual.bottleneck", "max_norm", "dropout"}


def test_choices_are_suggested_as_they_are(open_study):
    study, experiment = open_study(*FINITE)
    trial, params = ask(study, experiment)
    assert trial.distributions["length"] == CategoricalDistribution((2, 4))
    assert params["learning_rate"] == 0.01
    assert "learning_rate" not in trial.params


def test_the_method_is_suggested_where_there_is_a_choice(open_study):
    study, experiment = open_study(METHODS)
    asked = [ask(study, experiment) for _ in range(8)]
    assert {params["method"] for _, params in asked} == {"prompt_tuning", "prefix_tuning"}
    assert all(trial.params["method"] == params["method"] for trial, params in asked)
    trial, params = ask(*open_study("search.method=prefix_tuning"))
    assert params["method"] == "prefix_tuning"
    assert "method" not in trial.params


def test_starting_points_come_first_in_their_order(open_study):
    one = "{length: 7, initialization: labels, learning_rate: 0.1}"
    two = "{length: 64, initialization: text, learning_rate: 0.003, method: prefix_tuning}"
    study, experiment = open_study(f"search.start=[{one}, {two}]", METHODS)
    first, second, third = (ask(study, experiment)[1] for _ in range(3))
    assert first.pop("method") in ("prompt_tuning", "prefix_tuning")
    assert first == {"length": 7, "initialization": "labels", "learning_rate": 0.1}
    assert {k: second[k] for k in first} == {"length": 64, "initialization": "text", "learning_rate": 0.003}
    assert second["method"] == "prefix_tuning"
    assert third not in (first, second)


def test_the_same_seed_suggests_the_same(open_study):
    def asked(seed: int) -> list[search.Params]:
        study, experiment = open_study(f"seed={seed}", "search.startup_trials=3")
        suggestions = []
        for n in range(8):
            trial, params = ask(study, experiment)
            study.tell(trial, 1 / (2 + n))
            suggestions.append(params)
        return suggestions

    assert asked(1) == asked(1)
    assert asked(1)[1:] != asked(2)[1:]


def test_a_starting_point_may_name_every_setting(open_study):
    kinds = "search.reparameterization=[{kind: none}, {kind: residual, bottleneck: {choices: [4, 8]}}]"
    scale, norms = "search.initialization.1.scale={low: 0.5, high: 2}", "search.max_norm={choices: [null, 2.0]}"
    own = "normal.scale: 1, max_norm: null, dropout: true, reparameterization: residual, residual.bottleneck: 8"
    point = f"{{length: 7, initialization: normal, learning_rate: 0.1, settings: {{{own}}}}}"
    dropout = "search.dropout={choices: [false, true]}"
    study, experiment = open_study(kinds, scale, norms, dropout, f"search.start=[{point}]")
    trial, params = ask(study, experiment)
    assert params == {
        "length": 7,
        "initialization": "normal",
        "learning_rate": 0.1,
        "method": "prompt_tuning",
        "normal.scale": 1.0,
        "dropout": True,
        "max_norm": None,
        "reparameterization": "residual",
        "residual.bottleneck": 8,
    }
    assert type(trial.params["normal.scale"]) is float


def test_the_settings_of_a_trial_make_a_starting_point(open_study):
    study, experiment = open_study("search.start=[]", "search.dropout={choices: [false, true]}")
    for _ in range(8):
        trial, params = ask(study, experiment)
        study.tell(trial, 0.5)
        assert search.params_of(study.trials[trial.number], experiment.search) == params
        point = StartPoint.of(params)
        assert experiment.search.place(point) == params
        assert StartPoint.model_validate_json(point.model_dump_json()) == point


def same_again(study: optuna.Study, experiment: ExperimentSpec, trial: optuna.Trial) -> search.Params:
    """Ask for a trial's point once more; the next one that is really new."""
    study.enqueue_trial(trial.params)
    return ask(study, experiment)[1]


def test_the_twin_of_a_finished_trial_gets_its_score_and_is_not_trained(open_study):
    study, experiment = open_study()
    trial, params = ask(study, experiment)
    study.tell(trial, 0.8)
    assert same_again(study, experiment, trial) != params
    twin = study.trials[1]
    assert (twin.state, twin.value, twin.user_attrs) == (TrialState.COMPLETE, 0.8, {search.DUPLICATE_OF: 0})


def test_the_twin_of_a_pruned_trial_is_pruned_with_its_rungs(open_study):
    study, experiment = open_study()
    trial, params = ask(study, experiment)
    trial.report(0.5, 30)
    trial.report(0.6, 60)
    study.tell(trial, state=TrialState.PRUNED)
    assert same_again(study, experiment, trial) != params
    twin = study.trials[1]
    assert (twin.state, twin.intermediate_values) == (TrialState.PRUNED, {30: 0.5, 60: 0.6})


def test_the_twin_of_a_running_trial_is_not_trained_beside_it(open_study):
    study, experiment = open_study()
    trial, params = ask(study, experiment)
    assert same_again(study, experiment, trial) != params
    assert [t.state for t in study.trials] == [TrialState.RUNNING, TrialState.PRUNED, TrialState.RUNNING]


def test_the_twin_of_a_failed_trial_is_tried_again(open_study):
    study, experiment = open_study()
    trial, params = ask(study, experiment)
    study.tell(trial, state=TrialState.FAIL)
    assert same_again(study, experiment, trial) == params


def test_settings_that_stand_for_themselves_are_no_twins(open_study):
    study, experiment = open_study()
    for kind in ("uniform", "normal"):
        study.enqueue_trial({"length": 5, "initialization": kind, "learning_rate": 0.01})
    assert len({ask(study, experiment)[1]["initialization"] for _ in range(3)}) == 3


def test_a_finite_space_ends(open_study):
    study, experiment = open_study(*FINITE)
    points = []
    while (asked := search.ask(study, experiment.search, ENDLESS)) is not None:
        study.tell(asked[0], 0.5)
        points.append((asked[1]["length"], asked[1]["initialization"]))
    assert sorted(points) == [(2, "labels"), (2, "uniform"), (4, "labels"), (4, "uniform")]
    assert len(search.counted(study)) == 4
    assert not [t for t in study.trials if t.state == TrialState.RUNNING]


def test_a_space_of_one_point_ends(open_study):
    study, experiment = open_study(
        "search.length=2", "search.learning_rate=0.01", "search.initialization=[{kind: labels}]", "search.start=[]"
    )
    trial, params = ask(study, experiment)
    assert params == {"length": 2, "initialization": "labels", "learning_rate": 0.01, "method": "prompt_tuning"}
    study.tell(trial, 0.5)
    assert search.ask(study, experiment.search, ENDLESS) is None


def test_waiting_and_duplicate_trials_do_not_count(open_study):
    study, experiment = open_study()
    assert len(study.trials) == 1  # the starting point waits
    assert search.counted(study) == []
    trial, _ = ask(study, experiment)
    same_again(study, experiment, trial)
    study.tell(trial, state=TrialState.FAIL)
    assert [t.number for t in search.counted(study)] == [0, 2]


@pytest.mark.parametrize(
    ("pruner", "kind"),
    [
        ("{kind: halving, first_rung: 10, factor: 3}", Halving),
        ("{kind: median, every: 10}", MedianPruner),
        ("{kind: none, every: 10}", NopPruner),
    ],
)
def test_the_pruner_is_the_one_asked_for(open_study, pruner: str, kind: type):
    study, _ = open_study(f"search.pruner={pruner}")
    assert type(study.pruner) is kind


def scored(study: optuna.Study, experiment: ExperimentSpec, *scores: float) -> list[bool]:
    """Whether a new trial would be pruned at each of its rungs."""
    trial, _ = ask(study, experiment)
    verdicts = []
    for rung, score in zip(experiment.rungs, scores, strict=False):
        search.report(trial, score, rung)
        verdicts.append(search.falls_behind(trial, rung))
    study.tell(trial, scores[-1])
    return verdicts


def test_halving_stops_all_but_the_best_half_at_each_rung(open_study):
    study, experiment = open_study("search.pruner={kind: halving, first_rung: 30, factor: 2}")
    assert scored(study, experiment, 0.6, 0.7, 0.8) == [False, False, False]
    assert scored(study, experiment, 0.5) == [True]
    assert scored(study, experiment, 0.65, 0.6) == [False, True]


def test_the_median_pruner_waits_for_its_startup_trials(open_study):
    study, experiment = open_study("search.pruner={kind: median, every: 60, startup_trials: 2}")
    assert [scored(study, experiment, s) for s in (0.6, 0.5, 0.4, 0.7)] == [[False], [False], [True], [False]]


def test_the_best_trial_breaks_ties_by_loss_then_by_age(open_study):
    study, experiment = open_study()
    for score, loss in ((0.7, 0.1), (0.8, 0.4), (0.8, 0.3), (0.8, 0.3)):
        trial, _ = ask(study, experiment)
        trial.set_user_attr(search.VAL_LOSS, loss)
        study.tell(trial, score)
    pruned, _ = ask(study, experiment)
    pruned.report(0.9, 30)
    study.tell(pruned, state=TrialState.PRUNED)
    assert search.best_trial(study).number == 2


FREE_TEXT = (
    "labels={kind: text, field: id, max_new_tokens: 8}",
    "search.initialization=[{kind: uniform}, {kind: normal}]",
    "search.start=[]",
)


def test_of_free_text_the_lowest_loss_is_best_and_the_highest_is_pruned(open_study):
    study, experiment = open_study(*FREE_TEXT, "search.pruner={kind: median, every: 80, startup_trials: 2}")
    assert [scored(study, experiment, s) for s in (3.0, 2.0, 2.8, 1.0)] == [[False], [False], [True], [False]]
    study, experiment = open_study(*FREE_TEXT)
    for loss in (3.0, 1.0, 2.0):
        trial, _ = ask(study, experiment)
        trial.set_user_attr(search.VAL_LOSS, loss)
        study.tell(trial, loss)
    assert search.best_trial(study).number == 1


def test_without_a_finished_trial_there_is_no_best(open_study):
    study, experiment = open_study()
    study.tell(ask(study, experiment)[0], state=TrialState.FAIL)
    with pytest.raises(UserError, match=r"no trial of .* finished; look at the reasons of the failed ones"):
        search.best_trial(study)


def test_a_study_that_was_left_half_made_is_completed_and_until_then_not_there(storage):
    starts = [f"{{length: {n}, initialization: labels, learning_rate: 0.01}}" for n in (3, 4, 5)]
    experiment = load_experiment(DEFAULT, [f"search.start=[{', '.join(starts)}]"])
    half = optuna.create_study(study_name="half", storage=storage, direction="maximize")
    half.enqueue_trial(experiment.search.place(experiment.search.start[0]))
    with pytest.raises(KeyError, match="the study half was never completed"):
        search.load_study("half", storage, experiment)
    for _ in range(2):
        search.create_study("half", storage, experiment)
    study = search.load_study("half", storage, experiment)
    assert [ask(study, experiment)[1]["length"] for _ in range(3)] == [3, 4, 5]
    assert len(study.trials) == 3


def test_a_score_is_reported_once_and_in_silence(open_study):
    study, experiment = open_study()
    trial, _ = ask(study, experiment)
    search.report(trial, 0.5, 30)
    search.report(trial, 0.6, 30)
    again, _ = reopen(study, experiment, trial.number)
    search.report(again, 0.7, 30)
    assert study.trials[0].intermediate_values == {30: 0.5}


def test_a_rung_once_passed_is_passed_again_whatever_others_reported_since(open_study):
    study, experiment = open_study("search.pruner={kind: halving, first_rung: 30, factor: 2}")
    first, second = (ask(study, experiment)[0] for _ in range(2))
    for trial, score in ((first, 0.5), (second, 0.9)):
        search.report(trial, score, 30)
        assert not search.falls_behind(trial, 30)
    assert first.should_prune()  # by what is known now
    again, _ = reopen(study, experiment, first.number)
    assert not search.falls_behind(again, 30)
    search.report(again, 0.5, 60)
    assert not search.falls_behind(again, 60)


def test_a_trial_that_has_been_in_training_is_no_duplicate_of_one_that_got_the_same_settings_later(open_study):
    study, experiment = open_study()
    first = study.ask()  # has a number, and no settings yet
    trained, params = ask(study, experiment)
    search.report(trained, 0.5, 30)
    study.enqueue_trial({})
    for name, distribution in trained.distributions.items():
        study._storage.set_trial_param(
            first._trial_id, name, distribution.to_internal_repr(trained.params[name]), distribution
        )
    assert reopen(study, experiment, trained.number)[1] == params


def test_what_has_ended_is_not_opened_again(open_study):
    study, experiment = open_study()
    trial, _ = ask(study, experiment)
    assert search.unfinished(study) == [0]
    study.tell(trial, 0.5)
    assert search.unfinished(study) == []
    assert search.reopen(study, 0, experiment.search, ENDLESS) is None


def test_trials_asked_for_beside_the_last_of_the_budget_are_surplus(open_study):
    study, experiment = open_study()
    budget = BudgetSpec(trials=2)
    for _ in range(4):  # as by four lanes that all looked before any of them asked
        study.ask()
    opened = [search.reopen(study, n, experiment.search, budget) is not None for n in (3, 0, 2, 1)]
    assert opened == [False, True, False, True]
    assert [(t.state, t.user_attrs) for t in study.trials[2:]] == [(TrialState.FAIL, {search.SURPLUS: True})] * 2
    assert [t.number for t in search.counted(study)] == [0, 1]
    assert search.ask(study, experiment.search, budget) is None


def test_a_trial_that_another_lane_has_claimed_is_left_to_it(open_study):
    study, experiment = open_study()
    asked = search.ask(study, experiment.search, ENDLESS, lambda number: number > 1)
    assert asked is not None
    assert asked[0].number == 2
    assert search.unfinished(study) == [0, 1, 2]


def test_a_duplicate_in_the_last_place_leaves_it_to_another(open_study):
    study, experiment = open_study()
    budget = BudgetSpec(trials=2)
    first, _ = ask(study, experiment)
    study.enqueue_trial(first.params)
    last, beside = study.ask().number, study.ask().number
    assert search.reopen(study, beside, experiment.search, budget) is None
    assert search.reopen(study, last, experiment.search, budget) is None
    assert search.DUPLICATE_OF in study.trials[last].user_attrs
    asked = search.ask(study, experiment.search, budget)
    assert asked is not None
    assert [t.number for t in search.counted(study)] == [0, asked[0].number]


def failed(study: optuna.Study, experiment: ExperimentSpec, reason: str) -> None:
    trial, _ = ask(study, experiment)
    trial.set_user_attr(search.REASON, reason)
    study.tell(trial, state=TrialState.FAIL)


def test_where_every_trial_fails_for_one_reason_it_is_the_common_cause(open_study):
    study, experiment = open_study()
    for value in ("nan", "inf"):
        failed(study, experiment, f"the training loss is {value} at step 12")
        assert search.common_cause(study) is None
    failed(study, experiment, "the training loss is -1.5e+30 at step 7")
    assert search.common_cause(study) == "the training loss is nan at step 12"
    failed(study, experiment, "out of memory")
    assert search.common_cause(study) is None


def test_one_trial_that_finished_or_was_pruned_rules_a_common_cause_out(open_study):
    for end in ({"values": 0.5}, {"state": TrialState.PRUNED}):
        study, experiment = open_study()
        for _ in range(3):
            failed(study, experiment, "out of memory")
        assert search.common_cause(study) == "out of memory"
        study.tell(ask(study, experiment)[0], **end)
        assert search.common_cause(study) is None
