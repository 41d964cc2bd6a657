"""What earlier sweeps of an experiment found, read from their records in MLflow."""

from collections.abc import Callable, Iterator
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run

from softprompt.home import tracking_uri
from softprompt.spec import ExperimentSpec
from softprompt.tracking import BEST_VAL, DIGEST, OUTCOME, PARENT_RUN, RETUNE, ROLE, model_name

_READ = 500
"""Trials that are looked at, best first: beyond them none is worth to be tried again."""

Point = dict[str, Any]


def last_retuned(name: str) -> str | None:
    """Digest of the data that an experiment was last retuned on, whatever came of it; None where it never was.

    A retune that found nothing new, or that did not get to its end, does not count.
    """
    client = MlflowClient(tracking_uri())
    found = client.get_experiment_by_name(name)
    if found is None:
        return None
    asked = f"tags.`{ROLE}` = '{RETUNE}' and tags.`{OUTCOME}` = 'finished'"
    runs = client.search_runs([found.experiment_id], asked, order_by=["attributes.start_time DESC"], max_results=1)
    return runs[0].data.tags.get(DIGEST) if runs else None


def best_settings(experiment: ExperimentSpec, *, fits: Callable[[Point], bool], limit: int) -> list[Point]:
    """Settings of earlier trials on the same base model, as points to start from: the best first, no two alike.

    Only sweeps that came to their end count, so that one which is taken up again is asked for the same as before.
    Trials that started from a prompt are left out: another one stands there now.

    Args:
        experiment: the experiment of now.
        fits: whether a point lies in the space.
        limit: the most points.
    """
    found: list[Point] = []
    for run in _trials(experiment):
        if len(found) >= limit:
            break
        point = _point(run)
        if point["initialization"] != "prompt" and point not in found and fits(point):
            found.append(point)
    return found


def _trials(experiment: ExperimentSpec) -> Iterator[Run]:
    client = MlflowClient(tracking_uri())
    named = client.get_experiment_by_name(experiment.name)
    if named is None:
        return
    objective = experiment.labels.objective
    order = f"metrics.`{BEST_VAL}{objective.key}` {'DESC' if objective.direction == 'maximize' else 'ASC'}"
    asked = f"tags.`{PARENT_RUN}` != '' and tags.`{OUTCOME}` = 'finished'"
    sweeps: dict[str, bool] = {}
    for run in client.search_runs([named.experiment_id], asked, order_by=[order], max_results=_READ):
        parent = run.data.tags[PARENT_RUN]
        if parent not in sweeps:
            sweeps[parent] = _is_alike(client.get_run(parent), experiment)
        if sweeps[parent]:
            yield run


def _is_alike(sweep: Run, experiment: ExperimentSpec) -> bool:
    own = {"model": model_name(experiment), "precision": experiment.precision}
    return sweep.data.tags.get(OUTCOME) == "finished" and own.items() <= sweep.data.params.items()


def _point(run: Run) -> Point:
    params = run.data.params
    return {
        "length": int(params["length"]),
        "initialization": params["initialization"],
        "learning_rate": float(params["learning_rate"]),
        "method": params["method"],
    }
