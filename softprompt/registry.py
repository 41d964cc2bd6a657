"""Registered prompts: versions, the alias `champion`, and the rule by which it moves.

A version holds the prompt's folder and a file of code; never a pickle, never the base model.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from importlib.metadata import version as installed
from io import StringIO
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from pydantic import BaseModel, ConfigDict

from softprompt.errors import UserError
from softprompt.evaluation import Metrics
from softprompt.home import tracking_uri, without_secrets
from softprompt.packages import file_sha256
from softprompt.prompt import SoftPrompt
from softprompt.tracking import DECISION, PROMPT, REASON, TEST

CHAMPION = "champion"
PROMPT_SHA256 = "softprompt.prompt_sha256"
"""Hash of a version's `softprompt.json`, which holds that of the vectors: the files may lie where others can write."""


class Decision(BaseModel):
    """Whether the challenger took the alias, and why."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """Registered model."""
    version: int
    """The challenger's version."""
    promoted: bool
    reason: str

    @property
    def verdict(self) -> str:
        """What became of the version, as the end of a sentence that names it."""
        return "is the new champion" if self.promoted else "does not become champion"


def champion_version(name: str) -> int | None:
    """The version that holds the alias `champion`; None where there is none yet."""
    return version_of(name, CHAMPION)


def version_of(name: str, alias: str) -> int | None:
    """The version that holds an alias; None where there is none."""
    client = MlflowClient(tracking_uri())
    try:
        return int(client.get_model_version_by_alias(name, alias).version)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def champions() -> list[str]:
    """The names of the registered prompts that have a champion."""
    models = MlflowClient(tracking_uri()).search_registered_models(max_results=1000)
    return sorted(model.name for model in models if CHAMPION in model.aliases)


def load_registered(name: str, alias_or_version: str = CHAMPION) -> SoftPrompt:
    """The prompt of a registered model, by alias or by version number.

    Raises UserError where there is no such model or version, or where its files are not those that were registered.
    """
    client = MlflowClient(tracking_uri())
    numbered = alias_or_version.isdecimal()
    uri = f"models:/{name}{'/' if numbered else '@'}{alias_or_version}"
    with tempfile.TemporaryDirectory() as folder, _fluent():
        try:
            if numbered:
                version = client.get_model_version(name, alias_or_version)
            else:
                version = client.get_model_version_by_alias(name, alias_or_version)
            found = mlflow.artifacts.download_artifacts(
                artifact_uri=f"models:/{name}/{version.version}", dst_path=folder
            )
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            raise UserError(
                f"{uri}: no such registered prompt in {without_secrets(tracking_uri())}; run a sweep first, or set "
                "MLFLOW_TRACKING_URI"
            ) from None
        prompt = SoftPrompt.load(Path(found) / "artifacts" / PROMPT)
        if file_sha256(Path(found) / "artifacts" / PROMPT / "softprompt.json") != version.tags.get(PROMPT_SHA256):
            raise UserError(
                f"{uri}: its files in the artifact store are not those that were registered; register the prompt anew"
            )
        return prompt


def register(name: str, run_id: str, prompt_folder: Path, metrics: Metrics) -> int:
    """Make a version of a prompt's folder, logged on a run that goes on to be its source; returns its number.

    A run has one version: asked again, as by a retry, the one that is there is returned.
    """
    client = MlflowClient(tracking_uri())
    found = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
    version = int(found[0].version) if found else _log(name, run_id, prompt_folder, metrics)
    client.set_model_version_tag(name, str(version), PROMPT_SHA256, file_sha256(prompt_folder / "softprompt.json"))
    return version


def _log(name: str, run_id: str, prompt_folder: Path, metrics: Metrics) -> int:
    code = "serving.py" if SoftPrompt.load(prompt_folder).words else "serving_text.py"
    # MLflow prints what it does to the error output, and has no switch for it.
    with redirect_stderr(StringIO()), _fluent(), mlflow.start_run(run_id=run_id):
        logged = mlflow.pyfunc.log_model(
            name=name,
            python_model=str(Path(__file__).with_name(code)),
            artifacts={PROMPT: str(prompt_folder)},
            pip_requirements=[f"{n}=={installed(n)}" for n in ("softprompt", "mlflow")],
            registered_model_name=name,
        )
        mlflow.log_metrics({f"{TEST}{metrics.objective.key}": metrics.score}, model_id=logged.model_id)
    return int(logged.registered_model_version)


@contextmanager
def _fluent() -> Iterator[None]:
    """Our store for MLflow's fluent functions, which leave it in the environment as if the user had configured it."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(tracking_uri())
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)  # type: ignore[arg-type]


def decide(
    name: str,
    version: int,
    challenger: Metrics,
    champion: Metrics | None,
    *,
    measured: int | None = None,
    why_not: str = "",
) -> Decision:
    """Give the challenger the alias if there is no champion, or if it is better on the same test rows.

    Decided again, as by a retry, a version that took the alias keeps it with the reason that is recorded.

    Args:
        name: registered model.
        version: the challenger's version.
        challenger: its metrics on the test split.
        champion: the champion's metrics on the same rows; None where there is none to compare with.
        measured: version of that champion; one that holds the alias by now instead of it keeps it.
        why_not: why the champion could not be measured, where there is one; the alias then stays.
    """
    client = MlflowClient(tracking_uri())
    holder = champion_version(name)
    if holder == version:
        recorded = client.get_model_version(name, str(version)).tags.get(REASON, "")
        return Decision(name=name, version=version, promoted=True, reason=recorded)
    if holder is None:
        alone = len(client.search_model_versions(f"name = '{name}'")) == 1
        why = "the first version" if alone else "there is no champion at present"
        promoted, reason = True, f"{why}, with {_told(challenger)}"
    elif holder != measured:
        instead = "none" if measured is None else f"v{measured}"
        promoted, reason = False, f"the champion changed meanwhile (v{holder} instead of {instead})"
    elif champion is None:
        promoted, reason = False, f"champion v{holder} could not be measured on these rows: {why_not}"
    else:
        promoted, reason = _compare(challenger, champion, holder)
    for key, value in ((DECISION, "promoted" if promoted else "kept back"), (REASON, reason)):
        client.set_model_version_tag(name, str(version), key, value)
    client.update_model_version(name, str(version), description=reason)
    if promoted:
        # Last: who finds the alias finds the reason beside it.
        client.set_registered_model_alias(name, CHAMPION, str(version))
    return Decision(name=name, version=version, promoted=promoted, reason=reason)


def _compare(challenger: Metrics, champion: Metrics, holder: int) -> tuple[bool, str]:
    """Whether the challenger is better than the champion, and that in words."""
    objective = challenger.objective
    better = objective.gain(challenger.score) > objective.gain(champion.score)
    return better, (
        f"{_told(challenger)} is {'better' if better else 'not better'} than "
        f"champion v{holder} with {objective.show(champion.score)}"
    )


def _told(metrics: Metrics) -> str:
    return f"{metrics.objective.show(metrics.score)} on {metrics.rows} test rows"
