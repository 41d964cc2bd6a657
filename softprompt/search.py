"""The space, the study, ask and tell.

Optuna holds the study; here stand the translation of the space, the reuse of a result that is asked for twice, and the
order in which a trial changes its state. Everything that is decided is decided from what the study holds, and written
in an order that lets another process take over after any of the writes. Nothing here trains or logs.
"""

import re
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

import optuna
from optuna.pruners import BasePruner
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import BaseTrial, FixedTrial, FrozenTrial, TrialState

from softprompt.errors import UserError
from softprompt.pruning import Halving
from softprompt.sampling import Sampler
from softprompt.spec import (
    BudgetSpec,
    Choices,
    ExperimentSpec,
    FloatRange,
    HalvingPruner,
    IntRange,
    MedianPruner,
    SearchSpec,
)

TITLE = "title"
"""Attribute of a trial: its settings in words."""
VAL_LOSS = "val_loss"
"""Attribute of a trial: the validation loss at its best rung."""
REASON = "reason"
"""Attribute of a trial: why it ended."""
PASSED = "passed"
"""Attribute of a trial: the step of the last rung that it has passed."""
DUPLICATE_OF = "duplicate_of"
"""Attribute of a trial that asked for what another had: that one's number. It was not trained and does not count."""
SURPLUS = "surplus"
"""Attribute of a trial that was asked for beside the last of the budget. It was not trained and does not count."""
_COMPLETE = "complete"
"""Attribute of a study that has all of its starting points."""
_PATIENCE = 50
"""Duplicates in a row after which the space counts as exhausted."""
_NUMBERS = re.compile(r"[-+]?(\d+(\.\d+)?(e[-+]?\d+)?|\b(nan|inf)\b)", re.IGNORECASE)

Params = dict[str, Any]

# What Optuna would print of studies and trials, the watcher shows.
optuna.logging.set_verbosity(optuna.logging.WARNING)


class HopelessSweep(UserError):
    """A search that comes to nothing, however often it is gone on with."""


def create_study(name: str, storage: str | BaseStorage, experiment: ExperimentSpec) -> None:
    """Make the study, with the experiment's starting points first in line.

    Until it is complete nobody can load it; what a death has left half made is completed when it is called again.
    """
    direction = experiment.labels.objective.direction
    study = optuna.create_study(study_name=name, storage=storage, direction=direction, load_if_exists=True)
    if _COMPLETE in study.user_attrs:
        return
    study.set_user_attr("experiment", experiment.name)
    study.set_user_attr("fingerprint", experiment.fingerprint)
    for point in experiment.search.start[len(study.get_trials(deepcopy=False)) :]:
        study.enqueue_trial(experiment.search.place(point))
    study.set_user_attr(_COMPLETE, True)


def load_study(name: str, storage: str | BaseStorage, experiment: ExperimentSpec) -> optuna.Study:
    """The study with its sampler and pruner.

    Raises KeyError where there is none of this name, or one that was never completed.
    """
    search = experiment.search
    sampler = Sampler(startup_trials=search.startup_trials, seed=experiment.seed)
    study = optuna.load_study(study_name=name, storage=storage, sampler=sampler, pruner=_pruner(search))
    if _COMPLETE not in study.user_attrs:
        raise KeyError(f"the study {name} was never completed")
    return study


def _pruner(search: SearchSpec) -> BasePruner:
    pruner = search.pruner
    if isinstance(pruner, HalvingPruner):
        return Halving(pruner.first_rung, pruner.factor, competes=lambda trial: DUPLICATE_OF not in trial.user_attrs)
    if isinstance(pruner, MedianPruner):
        return optuna.pruners.MedianPruner(n_startup_trials=pruner.startup_trials, n_warmup_steps=0)
    return optuna.pruners.NopPruner()


def ask(
    study: optuna.Study, search: SearchSpec, budget: BudgetSpec, claim: Callable[[int], bool] = lambda number: True
) -> tuple[optuna.Trial, Params] | None:
    """The next trial to train and its settings.

    None where the trials of the budget have been asked for, or where the space is exhausted. With several lanes a
    trial that counts now may turn out to be a duplicate, so that there is one to ask for again.

    Args:
        study: as loaded.
        search: the space.
        budget: how many trials there are to be.
        claim: takes a trial by its number for this lane, unless another has it. On SQLite two lanes that ask in one
            instant get the same starting point from Optuna.
    """
    while not (is_spent(study, budget) or is_exhausted(study)):
        trial = study.ask()
        asked = _settle(study, trial, search, budget) if claim(trial.number) else None
        if asked is not None:
            return asked
    return None


def reopen(
    study: optuna.Study, number: int, search: SearchSpec, budget: BudgetSpec
) -> tuple[optuna.Trial, Params] | None:
    """Take up a trial that was left running, at whatever point; its settings are those that it would have had.

    None where there is nothing to train: it has ended, or it is told now to be a duplicate or surplus.
    """
    frozen = study.get_trials(deepcopy=False)[number]
    if frozen.state != TrialState.RUNNING:
        return None
    return _settle(study, optuna.Trial(study, frozen._trial_id), search, budget)  # no public way leads to the id


def _settle(
    study: optuna.Study, trial: optuna.Trial, search: SearchSpec, budget: BudgetSpec
) -> tuple[optuna.Trial, Params] | None:
    """Give a trial its settings, or end it where it is not to be trained; each step may have been done before."""
    if _is_surplus(study, trial, budget):
        trial.set_user_attr(SURPLUS, True)
        study.tell(trial, state=TrialState.FAIL)
        return None
    params = suggest(trial, search)
    twin = _twin(study, trial)
    if twin is not None:
        _tell_duplicate(study, trial, twin)
        return None
    return trial, params


def _is_surplus(study: optuna.Study, trial: optuna.Trial, budget: BudgetSpec) -> bool:
    """Whether as many trials of lower numbers count as there are in the budget.

    Of those there never come to be more, so that no more than the budget are trained, however many ask at once.
    """
    if SURPLUS in trial.user_attrs:
        return True
    return budget.trials is not None and sum(t.number < trial.number for t in counted(study)) >= budget.trials


def suggest(trial: BaseTrial, search: SearchSpec) -> Params:
    """A trial's settings: `length`, `initialization`, `learning_rate`, `method`, and the kind's, as `uniform.bound`.

    `dropout`, and of prompt tuning `max_norm` and `reparameterization` with the settings of its kind, stand there if
    any trial may have them.
    """
    params: Params = {"length": _value(trial, "length", search.length)}
    params["initialization"] = _kind(trial, "initialization", search.initialization)
    params["learning_rate"] = _value(trial, "learning_rate", search.learning_rate)
    params["method"] = _value(trial, "method", search.method)
    params |= _own(trial, params["initialization"], search.initialization)
    if search.dropout:
        params["dropout"] = _value(trial, "dropout", search.dropout)
    if params["method"] == "prefix_tuning":
        return params
    if search.max_norm:
        params["max_norm"] = _value(trial, "max_norm", search.max_norm)
    if any(spec.kind != "none" for spec in search.reparameterization):
        params["reparameterization"] = _kind(trial, "reparameterization", search.reparameterization)
        params |= _own(trial, params["reparameterization"], search.reparameterization)
    return params


def params_of(trial: FrozenTrial, search: SearchSpec) -> Params:
    """The settings that a trial of the study was given, those that are held fixed included."""
    return suggest(FixedTrial(trial.params), search)


def _kind(trial: BaseTrial, name: str, specs: Sequence[Any]) -> Any:
    return _value(trial, name, Choices[str](choices=tuple(spec.kind for spec in specs)))


def _own(trial: BaseTrial, kind: str, specs: Sequence[Any]) -> Params:
    """The settings of a kind, each under its full name."""
    chosen = next(spec for spec in specs if spec.kind == kind)
    return {f"{kind}.{name}": _value(trial, f"{kind}.{name}", getattr(chosen, name)) for name in chosen.settings}


def _value(trial: BaseTrial, name: str, spec: Any) -> Any:
    if isinstance(spec, IntRange):
        return trial.suggest_int(name, spec.low, spec.high, log=spec.log)
    if isinstance(spec, FloatRange):
        return trial.suggest_float(name, spec.low, spec.high, log=spec.log)
    if isinstance(spec, Choices):
        return trial.suggest_categorical(name, list(spec.choices))
    return spec


def _twin(study: optuna.Study, trial: optuna.Trial) -> FrozenTrial | None:
    """The earlier trial with the same settings, unless it failed."""
    trials: list[FrozenTrial] = study.get_trials(deepcopy=False)
    own = trials[trial.number]
    if DUPLICATE_OF in own.user_attrs:
        return trials[int(own.user_attrs[DUPLICATE_OF])]
    if own.intermediate_values:
        return None  # it has been in training, and nothing that others did since then takes that back
    earlier = (t for t in trials[: trial.number] if t.params == own.params and is_counted(t))
    return next((t for t in earlier if t.state != TrialState.FAIL), None)


def _tell_duplicate(study: optuna.Study, trial: optuna.Trial, twin: FrozenTrial) -> None:
    trial.set_user_attr(DUPLICATE_OF, twin.number)
    if twin.state == TrialState.COMPLETE:
        study.tell(trial, twin.value)
        return
    for step, value in twin.intermediate_values.items():
        report(trial, value, step)
    study.tell(trial, state=TrialState.PRUNED)


def report(trial: optuna.Trial, score: float, step: int) -> None:
    """Tell the study a trial's score after a step; what it was told before stays."""
    # Optuna ignores a second score as well, but warns of it; the list of all trials would tell, and grows with them.
    if step not in trial._cached_frozen_trial.intermediate_values:
        trial.report(score, step)


def falls_behind(trial: optuna.Trial, step: int) -> bool:
    """Whether a trial stops at the rung whose score it has reported.

    That it passed is noted, so that scores which others report later do not stop it when it comes to the rung again.
    """
    if trial.user_attrs.get(PASSED, 0) >= step:
        return False
    if trial.should_prune():
        return True
    trial.set_user_attr(PASSED, step)
    return False


def counted(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that count towards the budget: asked for, and neither duplicate nor surplus."""
    return [t for t in study.get_trials(deepcopy=False) if is_counted(t)]


def is_counted(trial: FrozenTrial) -> bool:
    """Whether a trial was asked for, and is neither duplicate nor surplus."""
    attrs = trial.user_attrs
    return trial.state != TrialState.WAITING and DUPLICATE_OF not in attrs and SURPLUS not in attrs


def unfinished(study: optuna.Study) -> list[int]:
    """The numbers of the trials that somebody trains, or has left."""
    return [t.number for t in study.get_trials(deepcopy=False, states=[TrialState.RUNNING])]


def is_spent(study: optuna.Study, budget: BudgetSpec) -> bool:
    """Whether as many trials count as the budget has."""
    return budget.trials is not None and len(counted(study)) >= budget.trials


def is_exhausted(study: optuna.Study) -> bool:
    """Whether the space has nothing new to offer: all of the latest trials were duplicates."""
    asked = [t for t in study.get_trials(deepcopy=False) if SURPLUS not in t.user_attrs]
    latest = takewhile(lambda t: DUPLICATE_OF in t.user_attrs, reversed(asked))
    return len(list(latest)) >= _PATIENCE


def fail_running(name: str, storage: str | BaseStorage) -> None:
    """Tell that the trials which are still running have failed: nobody is left to end them."""
    try:
        study = optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        return  # it was in another storage, or is deleted
    for trial in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
        study.tell(trial.number, state=TrialState.FAIL)


def best_trial(study: optuna.Study) -> FrozenTrial:
    """The finished trial of the best score; of equal ones that of the lowest validation loss, then the earliest.

    Raises HopelessSweep where no trial finished.
    """
    finished = [t for t in counted(study) if t.state == TrialState.COMPLETE]
    if not finished:
        raise HopelessSweep(f"no trial of {study.study_name} finished; look at the reasons of the failed ones")
    sign = 1 if study.direction == StudyDirection.MINIMIZE else -1
    return min(finished, key=lambda t: (sign * (t.value or 0.0), t.user_attrs[VAL_LOSS], t.number))


def common_cause(study: optuna.Study, *, least: int = 3) -> str | None:
    """Why every trial that ended has failed, if they all have, at least so many, and for one reason.

    Reasons that differ in their numbers alone, as in the step at which it happened, are one; the first is returned.
    """
    ended = [t for t in counted(study) if t.state.is_finished()]
    reasons = [t.user_attrs.get(REASON, "") for t in ended if t.state == TrialState.FAIL]
    alike = {_NUMBERS.sub("0", reason) for reason in reasons}
    return reasons[0] or None if len(reasons) == len(ended) >= least and len(alike) == 1 else None
