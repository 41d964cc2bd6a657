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
from urllib.parse import unquote, urlsplit, urlunsplit

from softprompt.errors import UserError

_SECRET = re.compile(r"(?<=://)[^\s/:@]*(?::\S*)?(?=@)|(?<=password=)[^\s&]*")
_SERVER = ("http://", "https://")
_CREDENTIALS = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "PREFECT_API_AUTH_STRING",
    "PREFECT_API_KEY",
    "SOFTPROMPT_UI_AUTH",
)
"""Variables whose value, or what stands behind its colon, is shown to nobody."""
_PROBE_SECONDS = 10


def state_home() -> Path:
    """The absolute folder of the state."""
    return Path(os.environ.get("SOFTPROMPT_HOME") or ".softprompt").absolute()


def cache_home() -> Path:
    """The absolute folder of the caches."""
    fallback = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "softprompt"
    return Path(os.environ.get("SOFTPROMPT_CACHE") or fallback).absolute()


def tracking_uri() -> str:
    """The user's `MLFLOW_TRACKING_URI`, else a SQLite file in the state folder.

    User and password of a server's address go into the variables that MLflow has for them, and out of the address:
    MLflow repeats it in its errors, and those reach logs and records. UserError where a database's address is none.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        return f"sqlite:///{tracking_file()}"
    if not uri.startswith(_SERVER):
        if "://" in uri:
            _check_database(uri, "MLFLOW_TRACKING_URI")
        return uri
    whole = urlsplit(uri)
    user, at, place = whole.netloc.rpartition("@")
    if not at:
        return uri
    name, _, password = user.partition(":")
    if not password:
        raise UserError(
            f"MLFLOW_TRACKING_URI: {without_secrets(uri)} holds a user without a password, and MLflow needs both; "
            "write http://user:password@host, or set MLFLOW_TRACKING_TOKEN and leave it out of the address"
        )
    os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(name), unquote(password)
    os.environ["MLFLOW_TRACKING_URI"] = urlunsplit(whole._replace(netloc=place))
    return os.environ["MLFLOW_TRACKING_URI"]


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
    """The user's `SOFTPROMPT_STORAGE` (of SQLite or PostgreSQL), else a SQLite file in the state folder.

    UserError where it is no URL of a database.
    """
    url = os.environ.get("SOFTPROMPT_STORAGE")
    if not url:
        return f"sqlite:///{state_home() / 'optuna.db'}"
    _check_database(url, "SOFTPROMPT_STORAGE")
    return url


def _check_database(url: str, variable: str) -> None:
    """Before a library is given it: their errors repeat the whole of what they cannot read."""
    from sqlalchemy.engine import make_url  # slow, and of no use to those who have set nothing
    from sqlalchemy.exc import ArgumentError

    try:
        make_url(url)
    except (ArgumentError, ValueError):
        raise UserError(
            f"{variable}: is no URL of a database; write it as postgresql://user:password@host:port/name"
        ) from None


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
    """A text as it may be shown: user and password of the URIs in it are masked, and the environment's credentials."""
    for secret in _secrets():
        text = text.replace(secret, "***")
    return _SECRET.sub("***", text)


def _secrets() -> set[str]:
    """The credentials of the environment, which may stand in a text outside of any URI."""
    values = [os.environ.get(name, "") for name in _CREDENTIALS]
    found = {part for value in values for part in (value, value.rpartition(":")[2])}
    for name in ("MLFLOW_TRACKING_URI", "SOFTPROMPT_STORAGE"):
        with suppress(ValueError):
            found.add(urlsplit(os.environ.get(name, "")).password or "")
    return {secret for secret in found if len(secret) >= 6}  # a shorter one would be part of many a word


def tracking_server() -> str | None:
    """The address of the user's tracking server, without user and password; None where a database is tracked to."""
    uri = tracking_uri()
    return uri.rstrip("/") if uri.startswith(_SERVER) else None


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
