"""Who reaches the pages that we serve: this machine alone, or a network, and then with a user and a password.

The password comes from the environment alone, as everyone on the machine can read a command's arguments, and no file
holds it. MLflow and Prefect ask for it wherever it is set. The Optuna dashboard cannot ask, and never leaves loopback.
"""

import ipaddress
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import psutil

from softprompt.errors import UserError
from softprompt.home import state_home

AUTH = "SOFTPROMPT_UI_AUTH"
"""Environment variable that holds `user:password`."""
LOOPBACK = "127.0.0.1"
_EVERYWHERE = "0.0.0.0"
_CONFIG = "mlflow.ini"
_SHORTEST = 12
"""Letters of a password; MLflow takes no shorter ones."""


@dataclass(frozen=True)
class Access:
    """An address to listen on, and what is asked of those who come."""

    host: str
    """IPv4 address that MLflow and Prefect listen on."""
    auth: str | None
    """`user:password` that both ask for; None where nothing is asked."""

    @property
    def near(self) -> str:
        """The address by which this machine reaches what listens."""
        return LOOPBACK if self.host == _EVERYWHERE else self.host

    @cached_property
    def shown(self) -> str:
        """The address for a person's browser."""
        outside = [address for address in _own_addresses() if not ipaddress.ip_address(address).is_loopback]
        return next(iter(outside), LOOPBACK) if self.host == _EVERYWHERE else self.host

    @cached_property
    def _names(self) -> list[str]:
        """By which names a browser may ask for the pages; another one means that it was led here by a foreign page."""
        own = [socket.gethostname(), socket.getfqdn()]
        return list(dict.fromkeys(["localhost", LOOPBACK, self.host, *_own_addresses(), *own]))

    def mlflow(self, port: int) -> tuple[tuple[str, ...], dict[str, str]]:
        """Arguments and environment of `mlflow server`, which is to run inside `mlflow_users`."""
        # Any port: a tunnel may end at another one.
        hosts = ",".join(f"{name},{name}:*" for name in self._names)
        environment = _unless_set(
            {"MLFLOW_SERVER_ALLOWED_HOSTS": hosts, "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": self._origins(port)}
        )
        if self.auth is None:
            return (), environment
        user, _, password = self.auth.partition(":")
        return ("--app-name", "basic-auth"), environment | {
            "MLFLOW_AUTH_CONFIG_PATH": str(_users() / _CONFIG),
            "MLFLOW_AUTH_ADMIN_USERNAME": user,
            "MLFLOW_AUTH_ADMIN_PASSWORD": password,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),
        }

    def prefect(self, port: int) -> dict[str, str]:
        """Environment of `prefect server start`."""
        environment = {
            "PREFECT_SERVER_API_HOST": self.host,
            "PREFECT_SERVER_API_PORT": str(port),
            **_unless_set(
                {
                    # By default, the pages it serves would look for its API on port 4200.
                    "PREFECT_UI_API_URL": f"http://{self.shown}:{port}/api",
                    # By default, a page of any site may call the API from a browser that reaches it.
                    "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": self._origins(port),
                    "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
                }
            ),
        }
        return environment | ({"PREFECT_SERVER_API_AUTH_STRING": self.auth} if self.auth else {})

    def _origins(self, port: int) -> str:
        return ",".join(f"http://{name}:{port}" for name in self._names)


def open_access(host: str) -> Access:
    """How the pages are served on an address.

    Raises UserError where it is none, where it is not loopback and no password is set, or where a password cannot be
    asked for.
    """
    try:
        address = ipaddress.IPv4Address(LOOPBACK if host == "localhost" else host)
    except ValueError:
        raise UserError(
            f"--host {host}: is no IPv4 address; give one of this machine, or {_EVERYWHERE} for all of them"
        ) from None
    auth = ui_auth()
    if auth is None and not address.is_loopback:
        raise UserError(
            f"--host {host}: others can reach that address, so {AUTH}=user:password must be set in the environment"
        )
    if auth is not None and find_spec("flask_wtf") is None:
        raise UserError(f"{AUTH}: to ask for a password, MLflow needs Flask-WTF; run: pip install 'softprompt[auth]'")
    return Access(str(address), auth)


def ui_auth() -> str | None:
    """The `user:password` that the environment holds, if any; UserError where it is none, which does not repeat it."""
    auth = os.environ.get(AUTH)
    if not auth:
        return None
    user, colon, password = auth.partition(":")
    if not (user and colon and auth.isprintable()):
        raise UserError(f"{AUTH}: must be user:password, and what is set is not; correct it")
    if len(password) < _SHORTEST:
        raise UserError(f"{AUTH}: the password has {len(password)} letters; give it {_SHORTEST} or more")
    return auth


@contextmanager
def mlflow_users() -> Iterator[None]:
    """Keep MLflow's users in a folder that nobody else can read, made anew: the setting may have changed."""
    folder = _users()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    settings = {
        "default_permission": "NO_PERMISSIONS",  # of whom the one user lets in beside itself
        "database_uri": f"sqlite:///{folder / 'users.db'}".replace("%", "%%"),
        # Each request would take the time of hashing the password, and nothing changes it while the server runs.
        "auth_cache_ttl_seconds": "3600",
    }
    config = ["[mlflow]", *(f"{key} = {value}" for key, value in settings.items()), ""]
    (folder / _CONFIG).write_text("\n".join(config), encoding="utf-8")
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _unless_set(settings: dict[str, str]) -> dict[str, str]:
    """What the user has set wins, as a proxy before the pages has another name."""
    return {name: os.environ.get(name) or value for name, value in settings.items()}


def _users() -> Path:
    return state_home() / "ui-users"


def _own_addresses() -> list[str]:
    """The IPv4 addresses of this machine."""
    return [a.address for found in psutil.net_if_addrs().values() for a in found if a.family == socket.AF_INET]
