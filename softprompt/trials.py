"""How trials ended, as the study has it: told once, and read back for the tables of a flow that was interrupted."""

import optuna
from optuna.trial import FrozenTrial, TrialState
from pydantic import BaseModel, ConfigDict

from softprompt import search
from softprompt.checkpoint import Ending
from softprompt.history import Outcome
from softprompt.objective import Objective


class TrialRecord(BaseModel):
    """How a trial ended."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int
    title: str
    outcome: Outcome
    reason: str
    score: float | None
    """Best score on the validation split, as the experiment's objective has it."""
    steps: int
    seconds: float


_ENDING = "ending"
"""Attribute of a trial: how it ended."""


def tell(study: optuna.Study, trial: optuna.Trial, ending: Ending) -> None:
    """Tell the study how a trial ended, which it lets nobody tell a second time: UpdateFinishedTrialError."""
    trial.set_user_attr(_ENDING, ending.model_dump(mode="json"))
    if ending.val_loss is not None:
        trial.set_user_attr(search.VAL_LOSS, ending.val_loss)
    if ending.reason:
        trial.set_user_attr(search.REASON, ending.reason)
    if ending.outcome == "finished" and ending.score is not None:
        study.tell(trial, ending.score)
    else:
        study.tell(trial, state=TrialState.PRUNED if ending.outcome == "pruned" else TrialState.FAIL)


def ending_of(trial: FrozenTrial) -> Ending:
    """How a trial ended, of one that has."""
    return Ending.model_validate(trial.user_attrs[_ENDING])


def record_of(trial: FrozenTrial) -> TrialRecord:
    """A trial that has ended, for a table."""
    ending = ending_of(trial)
    title = str(trial.user_attrs[search.TITLE])
    return TrialRecord(number=trial.number, title=title, **ending.model_dump(exclude={"val_loss"}))


def trial_records(study: optuna.Study) -> list[TrialRecord]:
    """The trials of a study that count and have ended, in the order of their numbers."""
    return [record_of(trial) for trial in search.counted(study) if _ENDING in trial.user_attrs]


def describe_end(record: TrialRecord, objective: Objective) -> str:
    """The end of a trial in words, as `finished with 87.2 %`."""
    score = "" if record.score is None else f" with {objective.show(record.score)}"
    why = f" ({record.reason})" if record.reason else ""
    return f"{record.outcome}{score}{why}"
