"""The space, the study, ask and tell.

Optuna holds the study; here stand the translation of the space, the reuse of a result that is asked for twice, and the
order in which a trial changes its state. Nothing here trains or logs.
"""

import json
import warnings
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner
from optuna.samplers import TPESampler
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from softprompt.errors import UserError
from softprompt.spec import Choices, ExperimentSpec, FloatRange, HalvingPruner, IntRange, MedianPruner, SearchSpec

RUN_ID = "run_id"
"""Attribute of a trial: its run in MLflow."""
TITLE = "title"
"""Attribute of a trial: its settings in words."""
VAL_LOSS = "val_loss"
"""Attribute of a trial: the validation loss at its best rung."""
REASON = "reason"
"""Attribute of a trial: why it ended."""
DUPLICATE_OF = "duplicate_of"
"""Attribute of a trial that asked for what another had: that one's number. It was not trained and does not count."""
_PATIENCE = 50
"""Duplicates in a row after which the space counts as exhausted."""

Params = dict[str, Any]

# What Optuna would print of studies and trials, the watcher shows.
optuna.logging.set_verbosity(optuna.logging.WARNING)


def create_study(name: str, storage: str | BaseStorage, experiment: ExperimentSpec) -> None:
    """Make the study, with the experiment's starting points first in line."""
    study = optuna.create_study(study_name=name, storage=storage, direction=experiment.labels.objective.direction)
    study.set_user_attr("experiment", experiment.name)
    study.set_user_attr("fingerprint", experiment.fingerprint)
    for point in experiment.search.start:
        study.enqueue_trial(point.model_dump(exclude_none=True))


def load_study(name: str, storage: str | BaseStorage, experiment: ExperimentSpec) -> optuna.Study:
    """The study with its sampler and pruner."""
    with warnings.catch_warnings():
        # `group` is what makes a multivariate TPE model a conditional space; it has been experimental since 2.8.
        warnings.simplefilter("ignore", ExperimentalWarning)
        sampler = TPESampler(
            multivariate=True,
            group=True,
            constant_liar=True,
            n_startup_trials=experiment.search.startup_trials,
            seed=experiment.seed,
        )
    return optuna.load_study(study_name=name, storage=storage, sampler=sampler, pruner=_pruner(experiment))


def _pruner(experiment: ExperimentSpec) -> BasePruner:
    pruner = experiment.search.pruner
    if isinstance(pruner, HalvingPruner):
        return optuna.pruners.SuccessiveHalvingPruner(
            min_resource=pruner.first_rung, reduction_factor=pruner.factor, min_early_stopping_rate=0
        )
    if isinstance(pruner, MedianPruner):
        return optuna.pruners.MedianPruner(n_startup_trials=pruner.startup_trials, n_warmup_steps=0)
    return optuna.pruners.NopPruner()


def ask(study: optuna.Study, search: SearchSpec) -> tuple[optuna.Trial, Params] | None:
    """The next trial to train and its settings; None where the space has nothing new to offer."""
    for _ in range(_PATIENCE):
        trial = study.ask()
        params = suggest(trial, search)
        twin = _twin(study, trial)
        if twin is None:
            return trial, params
        _tell_duplicate(study, trial, twin)
    return None


def suggest(trial: optuna.Trial, search: SearchSpec) -> Params:
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


def _kind(trial: optuna.Trial, name: str, specs: Sequence[Any]) -> Any:
    return _value(trial, name, Choices[str](choices=tuple(spec.kind for spec in specs)))


def _own(trial: optuna.Trial, kind: str, specs: Sequence[Any]) -> Params:
    """The settings of a kind, each under its full name."""
    chosen = next(spec for spec in specs if spec.kind == kind)
    names = [name for name in type(chosen).model_fields if name != "kind"]
    return {f"{kind}.{name}": _value(trial, f"{kind}.{name}", getattr(chosen, name)) for name in names}


def _value(trial: optuna.Trial, name: str, spec: Any) -> Any:
    if isinstance(spec, IntRange):
        return trial.suggest_int(name, spec.low, spec.high, log=spec.log)
    if isinstance(spec, FloatRange):
        return trial.suggest_float(name, spec.low, spec.high, log=spec.log)
    if isinstance(spec, Choices):
        return trial.suggest_categorical(name, list(spec.choices))
    return spec


def _twin(study: optuna.Study, trial: optuna.Trial) -> FrozenTrial | None:
    key = _key(trial.params)
    for other in counted(study):
        if other.number < trial.number and _key(other.params) == key and other.state != TrialState.FAIL:
            return other
    return None


def _key(params: Params) -> str:
    return json.dumps(params, sort_keys=True)


def _tell_duplicate(study: optuna.Study, trial: optuna.Trial, twin: FrozenTrial) -> None:
    trial.set_user_attr(DUPLICATE_OF, twin.number)
    if twin.state == TrialState.COMPLETE:
        study.tell(trial, twin.value)
        return
    for step, value in twin.intermediate_values.items():
        trial.report(value, step)
    study.tell(trial, state=TrialState.PRUNED)


def counted(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that count towards the budget: asked for, and no duplicate."""
    trials = study.get_trials(deepcopy=False)
    return [t for t in trials if t.state != TrialState.WAITING and DUPLICATE_OF not in t.user_attrs]


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

    Raises UserError where no trial finished.
    """
    finished = [t for t in counted(study) if t.state == TrialState.COMPLETE]
    if not finished:
        raise UserError(f"no trial of {study.study_name} finished; look at the reasons of the failed ones")
    sign = 1 if study.direction == StudyDirection.MINIMIZE else -1
    return min(finished, key=lambda t: (sign * (t.value or 0.0), t.user_attrs[VAL_LOSS], t.number))
