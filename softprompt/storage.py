"""The studies of Optuna in a database that may go away, and the tables of all stores, made before anyone needs them.

Optuna gives up at the first error of a database. Here every call waits for one that restarts, is locked or cannot be
reached, and is made again. Made twice, a call does what it does once, but for one: a trial that was created at the
very moment when the connection broke may be there without anybody who trains it. Its lease is free for any lane.

Prefect's database is not among the stores: its server makes it, and two that start together in a new clone may still
collide.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import optuna
from mlflow import MlflowClient
from optuna.exceptions import DuplicatedStudyError, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages._rdb.models import TrialModel
from optuna.study import StudyDirection
from optuna.trial import TrialState
from sqlalchemy import make_url, update
from sqlalchemy.exc import SQLAlchemyError

from softprompt.database import (
    database_url,
    describe_fault,
    engine_options,
    is_transient,
    let_readers_in,
    making_tables,
    persist,
)
from softprompt.errors import UserError
from softprompt.home import (
    owns_tracking,
    require_writable,
    state_home,
    study_storage,
    tracking_file,
    tracking_uri,
    without_secrets,
)

# Its one warning tells of every query that an outage breaks, with the whole of SQL; the watcher tells of outages.
logging.getLogger("optuna.storages._rdb.storage").setLevel(logging.ERROR)

_FIRST_SECONDS = 30.0
"""How long the study storage may take to answer for the first time: a wrong address looks like an outage."""


class StudyStore(RDBStorage):
    """Optuna's storage in SQLite or PostgreSQL, whose calls outlast an outage of the database."""

    def create_new_study(self, directions: Sequence[StudyDirection], study_name: str | None = None) -> int:
        """Make a study and return its id; one that an unconfirmed call of ours has made already is it."""
        tries = 0

        def create() -> int:
            nonlocal tries
            tries += 1
            try:
                return RDBStorage.create_new_study(self, directions, study_name)
            except DuplicatedStudyError:
                if tries == 1 or study_name is None:
                    raise
                return self.get_study_id_from_name(study_name)

        return persist(create)

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        """Set a trial's state; False where it should have begun, and another process was first."""
        tries = 0

        def set_state() -> bool:
            nonlocal tries
            tries += 1
            if state == TrialState.RUNNING and values is None and self._begin(trial_id):
                return True
            try:
                return RDBStorage.set_trial_state_values(self, trial_id, state, values)
            except UpdateFinishedTrialError:
                if tries > 1 and self._says(trial_id, state, values):
                    return True
                raise

        return persist(set_state)

    def _begin(self, trial_id: int) -> bool:
        """Take a waiting trial. Optuna reads and then writes, so on SQLite two processes could take the same one."""
        trials = TrialModel.__table__
        waiting = update(trials).where(trials.c.trial_id == trial_id, trials.c.state == TrialState.WAITING)
        begun = {"state": TrialState.RUNNING, "datetime_start": datetime.now(UTC).replace(tzinfo=None)}
        with self.engine.begin() as connection:
            return connection.execute(waiting.values(begun)).rowcount == 1

    def _says(self, trial_id: int, state: TrialState, values: Sequence[float] | None) -> bool:
        trial = self.get_trial(trial_id)
        return trial.state == state and (values is None or list(values) == trial.values)


def _persistent(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        return persist(lambda: method(*args, **kwargs))

    return call


_OF_THE_CACHE = ("_create_new_trial", "_set_trial_param", "_get_trials", "_get_best_trial_id")
"""Optuna puts a cache before every storage in a database, which calls these."""

for _name in (*(n for n in vars(BaseStorage) if n in vars(RDBStorage) and not n.startswith("_")), *_OF_THE_CACHE):
    if _name not in vars(StudyStore):
        setattr(StudyStore, _name, _persistent(getattr(RDBStorage, _name)))


def study_store(url: str | None = None) -> StudyStore:
    """The studies at an address, else at the one configured, with their tables.

    Raises UserError where the address is not one of SQLite or PostgreSQL, or its driver is not installed.
    """
    return persist(lambda: _open(url or study_storage()))


def _open(address: str) -> StudyStore:
    url = database_url(address)
    with making_tables(url):
        let_readers_in(url)
        return StudyStore(url.render_as_string(hide_password=False), engine_options(url))


def create_stores() -> None:
    """Make the databases that are ours and not there yet, and the tables of the study storage.

    Raises UserError where the state folder cannot be written, or the study storage does not answer.
    """
    require_writable(state_home(), "SOFTPROMPT_HOME")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        persist(lambda: _open(study_storage()), _FIRST_SECONDS)
    except (SQLAlchemyError, StorageInternalError) as error:
        if not is_transient(error):
            raise
        raise UserError(
            f"SOFTPROMPT_STORAGE: {without_secrets(study_storage())} does not answer ({describe_fault(error)}); "
            "start that server, or correct the address"
        ) from None
    if owns_tracking():
        with making_tables(make_url(f"sqlite:///{tracking_file()}")):
            MlflowClient(tracking_uri()).search_experiments(max_results=1)
