"""Where state and caches live, and where the records go.

State (MLflow, Optuna and Prefect databases, artifacts) stays in `.softprompt/` of the working directory, or in
`SOFTPROMPT_HOME`. Caches (fetched packages, converted weights, prepared data) stay in the user's cache folder, or
in `SOFTPROMPT_CACHE`. A tracking server or study storage that the user has configured is used instead of ours.
"""

import os
import re
import ssl
import urllib.request
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError

from softprompt.errors import UserError

_SECRET = re.compile(r"(?<=://)[^\s/:@]*(?::\S*)?(?=@)|(?<=password=)[^\s&]*")
_PROBE_SECONDS = 10


def state_home() -> Path:
    """The absolute folder of the state."""
    return Path(os.environ.get("SOFTPROMPT_HOME") or ".softprompt").absolute()


def cache_home() -> Path:
    """The absolute folder of the caches."""
    fallback = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "softprompt"
    return Path(os.environ.get("SOFTPROMPT_CACHE") or fallback).absolute()


def tracking_uri() -> str:
    """The user's `MLFLOW_TRACKING_URI`, else a SQLite file in the state folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{tracking_file()}"


def tracking_file() -> Path:
    """The SQLite file of the tracking store that is ours."""
    return state_home() / "mlflow.db"


def artifact_root() -> Path:
    """Where MLflow artifacts go when the tracking store is ours."""
    return state_home() / "artifacts"


def checkpoint_home() -> Path:
    """Where the states of trials under way are: `SOFTPROMPT_CHECKPOINTS`, as on a disk that lanes share, else ours."""
    return Path(os.environ.get("SOFTPROMPT_CHECKPOINTS") or state_home() / "sweeps").absolute()


def study_storage() -> str:
    """The user's `SOFTPROMPT_STORAGE` (of SQLite or PostgreSQL), else a SQLite file in the state folder."""
    return os.environ.get("SOFTPROMPT_STORAGE") or f"sqlite:///{state_home() / 'optuna.db'}"


def require_writable(folder: Path, variable: str) -> None:
    """Make the folder and prove that it can be written; UserError says why not and which variable moves it."""
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"softprompt" * 4096)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}); free it up or set {variable} to another folder"
        ) from None
    finally:
        with suppress(OSError):
            probe.unlink()


def without_secrets(text: str) -> str:
    """A text as it may be shown: of the URIs in it, user and password are masked."""
    return _SECRET.sub("***", text)


def tracking_server() -> str | None:
    """The address of the user's tracking server, without user and password; None where a database is tracked to."""
    uri = tracking_uri()
    if not uri.startswith(("http://", "https://")):
        return None
    return without_secrets(uri).replace("***@", "").rstrip("/")


def require_tracking() -> None:
    """UserError at once where the tracking server does not answer: MLflow would try again in silence for minutes."""
    server = tracking_server()
    if server is None:
        return
    try:
        urllib.request.urlopen(f"{server}/health", timeout=_PROBE_SECONDS).close()
    except HTTPError:
        return  # an answer as well, as of a proxy that wants a password
    except (OSError, ValueError, HTTPException) as error:
        reason = error.reason if isinstance(error, URLError) else error
        if isinstance(reason, ssl.SSLError):
            return  # answers; whose certificates are trusted is between the user and MLflow
        raise UserError(
            f"MLFLOW_TRACKING_URI: {server} does not answer ({reason}); start that server, or correct the address"
        ) from None


def owns_tracking() -> bool:
    """Whether the tracking store is ours: the user has configured none."""
    return not os.environ.get("MLFLOW_TRACKING_URI")
