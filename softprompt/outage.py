"""What MLflow says when it is away, and waiting until it is back.

MLflow by itself tries again for minutes and says nothing, or gives up at once, by the kind of call. Here one line says
that it is away and one that it is back, and what it will never do is not asked for again.
"""

import functools
import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import requests
from mlflow.exceptions import MlflowException
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_exponential

from softprompt.errors import UserError
from softprompt.home import tracking_server, without_secrets
from softprompt.progress import watcher

OUTAGE_SECONDS = 24 * 3600.0
"""How long an outage may last before a step of a flow gives up."""
DOUBTS = 5
"""Tries of what MLflow calls a bad request: it says so as well where its database lost the connection."""
_MLFLOW = {
    # By itself it would try for minutes, and say nothing. One retry at once is for a connection gone stale.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    # At the end of every run, with user and password if the address has them.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
"""How MLflow behaves in this process, where the user has not said otherwise."""

P = ParamSpec("P")
T = TypeVar("T")


def calm_mlflow() -> None:
    """Have MLflow fail fast and in silence, so that whoever calls can say what goes on."""
    for name, value in _MLFLOW.items():
        os.environ.setdefault(name, value)


def insisting(method: Callable[P, T]) -> Callable[P, T]:
    """Have a call that may be made again wait for an MLflow that is away, for up to `OUTAGE_SECONDS`."""

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        told, doubts = False, 0

        def tell(state: RetryCallState) -> None:
            nonlocal told
            if not told and state.outcome is not None:
                told = True
                error = state.outcome.exception()
                why = "" if error is None else f" ({short(cause(error))})"
                watcher().stage(f"{place()} is away; waiting until it is back{why}")

        def passes(error: BaseException) -> bool:
            nonlocal doubts
            doubts += isinstance(error, Exception) and is_bad_request(error)
            return isinstance(error, Exception) and not is_refusal(error) and doubts < DOUBTS

        retrying = Retrying(
            retry=retry_if_exception(passes),
            wait=wait_exponential(multiplier=0.5, max=30.0),
            stop=stop_after_delay(OUTAGE_SECONDS),
            before_sleep=tell,
            reraise=True,
        )
        result = retrying(method, *args, **kwargs)
        if told:
            watcher().stage(f"{place()} is back")
        return result

    return call


def is_refusal(error: Exception) -> bool:
    """Whether it is of no use to ask again. What a person can mend meanwhile, as a password, is no refusal."""
    if isinstance(error, MlflowException):
        codes = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "NOT_IMPLEMENTED")
        return error.error_code in codes
    if isinstance(error, requests.HTTPError) and error.response is not None:  # artifacts
        return error.response.status_code in (400, 404, 405, 411, 413, 414, 415, 422, 501)
    if isinstance(error, requests.RequestException):
        return False
    return isinstance(error, UserError | TypeError | ValueError | LookupError | AttributeError | NotImplementedError)


def is_bad_request(error: Exception) -> bool:
    """Whether MLflow takes the request to be wrong, which it may not be."""
    return isinstance(error, MlflowException) and error.error_code == "BAD_REQUEST"


def short(error: BaseException) -> str:
    """An error in a few words, without credentials."""
    text = without_secrets(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:299]}…"


def cause(error: BaseException) -> BaseException:
    """What an error comes from at last: what MLflow says of a broken connection fills lines."""
    inner = error.__cause__ or error.__context__
    return error if inner is None else cause(inner)


def place() -> str:
    """What the records go to, in words."""
    server = tracking_server()
    return "the tracking store" if server is None else f"the tracking server {server}"
