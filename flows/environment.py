"""Settings that have to stand before Prefect and MLflow are imported.

Prefect is embedded: where the user has configured no server, its database lives in the state folder and a server is
started with the flow and ends with it; while `softprompt ui` runs over the same state, that server is used, so that a
sweep can be watched. A server that the user has configured, by environment or by profile, is used as it is.
"""

import os
import tomllib
import urllib.request
from base64 import b64encode
from pathlib import Path
from urllib.error import HTTPError

import psutil

from flows.access import AUTH, ui_auth
from softprompt.errors import UserError
from softprompt.home import state_home

QUIET = {
    "DO_NOT_TRACK": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
"""Holds wherever a flow runs; prefect.yaml gives the same to a worker's runs."""

_COMMAND_LINE = {
    # What goes wrong reaches the terminal as one sentence, and Prefect's records with everything.
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
}


def prepare_environment(*, state: bool = True) -> None:
    """Set what the user has not set.

    Args:
        state: whether a flow may run; without, nothing is written and no Prefect server is looked for.

    Raises UserError where Prefect's profiles cannot be read, or where `softprompt ui` asks for another password.
    """
    for name, value in (QUIET | _COMMAND_LINE).items():
        os.environ.setdefault(name, value)
    if state and not configured_server():
        os.environ.setdefault("PREFECT_HOME", str(state_home() / "prefect"))
        # Prefect's embedded server waits for ever where the folder above its home is missing.
        Path(os.environ["PREFECT_HOME"]).mkdir(parents=True, exist_ok=True)
        served = served_api()
        if served:
            _use(served)


def _use(served: str) -> None:
    """Let Prefect report to the server that `softprompt ui` serves, with the password that both have been given."""
    auth = ui_auth()
    if auth:
        os.environ["PREFECT_API_AUTH_STRING"] = auth
    token = {"Authorization": f"Basic {b64encode(auth.encode()).decode()}"} if auth else {}
    try:
        urllib.request.urlopen(urllib.request.Request(f"{served}/admin/version", headers=token), timeout=10).close()
    except HTTPError as error:
        if error.code != 401:
            raise
        raise UserError(
            f"{AUTH}: `softprompt ui` serves this state at {served} and asks for a password; set it to what it was "
            "started with"
        ) from None
    os.environ["PREFECT_API_URL"] = served


def configured_server() -> bool:
    """Whether the user points Prefect at a server of their own; UserError where its profiles cannot be read."""
    if os.environ.get("PREFECT_API_URL"):
        return True
    home = Path(os.environ.get("PREFECT_HOME") or Path.home() / ".prefect")
    file = Path(os.environ.get("PREFECT_PROFILES_PATH") or home / "profiles.toml")
    if not file.is_file():
        return False
    try:
        profiles = tomllib.loads(file.read_text(encoding="utf-8"))
        active = os.environ.get("PREFECT_PROFILE") or profiles.get("active")
        return bool(profiles.get("profiles", {}).get(active, {}).get("PREFECT_API_URL"))
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{file}: is no readable file of Prefect profiles ({error}); mend or remove it") from None


def served_note() -> Path:
    """File in which `softprompt ui` notes the address of the Prefect API that it serves, and the server's process."""
    return state_home() / "prefect-api-url"


def served_api() -> str | None:
    """The address of the Prefect API that `softprompt ui` serves over this state, if it answers.

    A note that outlived its process is not followed: by now, another state may be served on that port.
    """
    try:
        address, process = served_note().read_text(encoding="utf-8").split()
        if not psutil.pid_exists(int(process)):
            return None
        with urllib.request.urlopen(f"{address}/health", timeout=2) as answer:
            return address if answer.status == 200 else None
    except (OSError, ValueError):
        return None
