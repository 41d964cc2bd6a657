"""Which prompts of old trials are kept: those of the best, and those that something else was made from.

Only the artifact folder of the prompt is deleted. The trial's run with its settings and metrics stays, and says so.
"""

from collections.abc import Callable
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.store.entities.paged_list import PagedList

from softprompt.home import tracking_uri
from softprompt.spec import ExperimentSpec
from softprompt.sweep import Sweep
from softprompt.tracking import BEST_VAL, OUTCOME, PARENT_RUN, PROMPT, TRIAL, WINNER

REMOVED = "softprompt.prompt_removed"
"""Tag of a trial whose prompt was deleted: by which rule."""
_PAGE = 1000


def prune_prompts(experiment: ExperimentSpec, sweep: Sweep, keep: int | None) -> list[str]:
    """Delete the prompts of a sweep's trials beyond the best, and return the runs that had them.

    The best are those of the best validation score; of equal ones the earliest. Whatever its score, a prompt is kept
    that won its sweep or that a version of a registered model came from; and so is that of a trial that has not ended.

    Args:
        experiment: what was searched.
        sweep: where its records are.
        keep: how many prompts stay; None keeps all.
    """
    if keep is None:
        return []
    client, objective = MlflowClient(tracking_uri()), experiment.labels.objective
    score = f"{BEST_VAL}{objective.key}"
    ended = [run for run in trials_of(client, sweep) if OUTCOME in run.data.tags and score in run.data.metrics]
    ended.sort(key=lambda run: (-objective.gain(run.data.metrics[score]), int(run.data.tags[TRIAL])))
    origins = _origins(client)
    beyond = [run for run in ended[keep:] if not {REMOVED, WINNER} & run.data.tags.keys()]
    beyond = [run for run in beyond if not any(run.info.run_id in origin for origin in origins)]
    for run in beyond:
        _delete_prompt(run.info.artifact_uri)
        client.set_tag(run.info.run_id, REMOVED, f"execution.keep_prompts: {keep}")
    return [run.info.run_id for run in beyond]


def _delete_prompt(place: str) -> None:
    repository: Any = get_artifact_repository(place, tracking_uri=tracking_uri())
    repository.delete_artifacts(PROMPT)


def trials_of(client: MlflowClient, sweep: Sweep) -> list[Run]:
    """The runs of a sweep's trials, the latest first."""
    where = [client.get_run(sweep.run_id).info.experiment_id]
    asked = f"tags.`{PARENT_RUN}` = '{sweep.run_id}'"
    return _all(lambda token: client.search_runs(where, asked, max_results=_PAGE, page_token=token))


def _origins(client: MlflowClient) -> set[str]:
    """The runs and places that versions of all registered models came from."""
    versions = _all(lambda token: client.search_model_versions(max_results=_PAGE, page_token=token))
    return {origin for version in versions for origin in (version.run_id, version.source) if origin}


def _all(page: Callable[[str | None], PagedList[Any]]) -> list[Any]:
    found = page(None)
    rows = list(found)
    while token := found.token:
        found = page(token)
        rows += found
    return rows
