"""The tables of the tracking store and of the study storage, made before anyone needs them.

Two processes that open the same empty SQLite file at the same moment break each other's migrations: a sweep and
`softprompt ui`, or two sweeps, started together in a new clone. So one makes the tables while the others wait.

Prefect's database is not among them: its server makes it, and two that start together in a new clone may still collide.
"""

import fcntl

import optuna
from mlflow import MlflowClient

from softprompt.home import owns_tracking, require_writable, state_home, study_storage, tracking_uri


def create_stores() -> None:
    """Make the databases that are ours and not there yet, and the tables of the study storage.

    Raises UserError where the state folder cannot be written.
    """
    require_writable(state_home(), "SOFTPROMPT_HOME")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with (state_home() / "stores.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        optuna.storages.get_storage(study_storage())
        if owns_tracking():
            MlflowClient(tracking_uri()).search_experiments(max_results=1)
