"""The records in MLflow: one parent run per sweep, one child run per trial, whose status tells its end.

Everything goes through `MlflowClient` with explicit run ids: MLflow's fluent runs belong to a thread, and a Prefect
task may run in another one. All names that a person meets in the MLflow UI stand here.
"""

import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param
from mlflow.exceptions import MlflowException

from softprompt.data import PreparedData
from softprompt.errors import UserError
from softprompt.evaluation import Metrics, describe_table
from softprompt.figures import draw_systems
from softprompt.home import artifact_root, owns_tracking, tracking_uri, without_secrets
from softprompt.spec import ExperimentSpec

PARENT_RUN = "mlflow.parentRunId"
NOTE = "mlflow.note.content"
KIND = "mlflow.experimentKind"
"""Which of its faces the MLflow UI shows: training runs, not conversations."""
TABLES = "mlflow.loggedArtifacts"
"""Which artifacts MLflow shows and loads as tables."""
FINGERPRINT = "softprompt.fingerprint"
OUTCOME = "softprompt.outcome"
REASON = "softprompt.reason"
STUDY = "optuna.study"
TRIAL = "optuna.trial"
WINNER = "softprompt.winner"
DECISION = "softprompt.decision"
FLOW_RUN = "prefect.flow_run_id"
HOST = "softprompt.host"
PID = "softprompt.pid"
"""With the host: the process that writes a sweep or an evaluation, and closes it unless it is killed."""
SLOTS = "softprompt.slots"
"""How many trials a lane has trained side by side, and why."""
PROMPT = "prompt"
"""Artifact folder of a trial's prompt."""

TRAIN_LOSS = "train_loss"
VAL, BEST_VAL, TEST = "val_", "best_val_", "test_"
"""What stands before the name of a metric, as in `best_val_accuracy`."""
SECONDS = "seconds"

Outcome = Literal["finished", "pruned", "failed", "interrupted"]
_STATUS = {"finished": "FINISHED", "pruned": "KILLED", "failed": "FAILED", "interrupted": "KILLED"}


class Tracker:
    """Writes the records of one experiment."""

    def __init__(self, experiment: ExperimentSpec) -> None:
        self._client = MlflowClient(tracking_uri=tracking_uri())
        self.experiment_id = _experiment_id(self._client, experiment.name)

    def start_sweep(self, study: str, experiment: ExperimentSpec, data: PreparedData, tags: Mapping[str, str]) -> str:
        """Create the parent run with everything that is known before the first trial; returns its id."""
        tags = {STUDY: study, FINGERPRINT: experiment.fingerprint, **_owner(), **tags}
        # Short enough for the column of MLflow's list; the experiment's name stands above it.
        name = time.strftime("sweep %m-%d %H:%M", time.gmtime())
        run_id: str = self._client.create_run(self.experiment_id, run_name=name, tags=tags).info.run_id
        self._client.log_batch(run_id, params=_params(_sweep_params(experiment, data)))
        self._client.log_inputs(run_id, [_dataset_input(data, split) for split in data.sizes])
        self._client.log_dict(run_id, experiment.model_dump(mode="json"), "experiment.yaml")
        self._client.log_dict(run_id, data.as_json(), "data.json")
        return run_id

    def start_trial(
        self,
        parent: str,
        *,
        study: str,
        number: int,
        name: str,
        params: Mapping[str, Any],
        data: PreparedData,
        tags: Mapping[str, str],
    ) -> str:
        """Create the child run of a trial; returns its id."""
        tags = {PARENT_RUN: parent, STUDY: study, TRIAL: str(number), **tags}
        run_id: str = self._client.create_run(self.experiment_id, run_name=name, tags=tags).info.run_id
        self._client.log_batch(run_id, params=_params(params))
        self._client.log_inputs(run_id, [_dataset_input(data, split) for split in ("train", "validation")])
        return run_id

    def log_metrics(self, run_id: str, metrics: Mapping[str, float], *, step: int = 0) -> None:
        """Log one value of each metric."""
        self._client.log_batch(run_id, metrics=_metrics(metrics, step))

    def log_validation(self, run_id: str, metrics: Metrics, *, step: int) -> None:
        """Record a prompt's metrics on the validation split."""
        self.log_metrics(run_id, _named(VAL, metrics), step=step)

    def log_losses(self, run_id: str, losses: list[float], *, first_step: int) -> None:
        """Log the training losses of consecutive steps."""
        now = _now()
        metrics = [Metric(TRAIN_LOSS, loss, now, first_step + n) for n, loss in enumerate(losses)]
        for start in range(0, len(metrics), 1000):  # the most that one request may carry
            self._client.log_batch(run_id, metrics=metrics[start : start + 1000])

    def log_folder(self, run_id: str, folder: Path, name: str) -> None:
        """Store a folder's files under a name."""
        self._client.log_artifacts(run_id, str(folder), name)

    def log_evaluation(self, run_id: str, systems: Mapping[str, Metrics]) -> None:
        """Record the systems on the test split, the one in question last: metrics, a table and a figure."""
        self.log_metrics(run_id, _test_metrics(list(systems.values())[-1]))
        rows = [
            {"system": name, "rows": m.rows, **m.numbers, "low": m.low, "high": m.high} for name, m in systems.items()
        ]
        # As MLflow's own log_table writes it, which would append to the table of an earlier try.
        table = {"columns": list(rows[0]), "data": [list(row.values()) for row in rows]}
        self._client.log_dict(run_id, table, "evaluation.json")
        self._client.set_tag(run_id, TABLES, json.dumps([{"path": "evaluation.json", "type": "table"}]))
        self._client.log_figure(run_id, draw_systems(systems), "evaluation.png")
        self._client.set_tag(run_id, NOTE, describe_table(dict(systems)))

    def log_winner(self, run_id: str, metrics: Metrics) -> None:
        """Mark a trial as the winner of its sweep, with its metrics on the test split."""
        self.log_metrics(run_id, _test_metrics(metrics))
        self._client.set_tag(run_id, WINNER, "true")

    def record_evaluation(
        self,
        name: str,
        experiment: ExperimentSpec,
        data: PreparedData,
        systems: Mapping[str, Metrics],
        tags: Mapping[str, str],
    ) -> None:
        """Record an evaluation apart from any sweep as a run of its own."""
        tags = {FINGERPRINT: experiment.fingerprint, **_owner(), **tags}
        run_id = self._client.create_run(self.experiment_id, run_name=name, tags=tags).info.run_id
        self._client.log_batch(run_id, params=_params(_sweep_params(experiment, data)))
        self._client.log_inputs(run_id, [_dataset_input(data, "test")])
        self.log_evaluation(run_id, systems)
        self.end(run_id, "finished")

    def log_slots(self, sweep: str, choice: str) -> None:
        """Record on the sweep how many trials a lane trains side by side, and why."""
        self._client.set_tag(sweep, SLOTS, choice)

    def log_decision(self, sweep: str, version: int, *, promoted: bool, reason: str) -> None:
        """Record on the sweep what became of its winner."""
        self._client.set_tag(sweep, DECISION, f"v{version} {'promoted' if promoted else 'kept back'}: {reason}")

    def end(self, run_id: str, outcome: Outcome, reason: str = "") -> None:
        """Close a run. Pruned and interrupted ones are KILLED, failed ones FAILED; the tags say which, and why."""
        end_run(self._client, run_id, outcome, reason)

    def fetch_prompt(self, run_id: str, target: Path) -> Path:
        """Copy a run's prompt folder to the target folder; returns where it is."""
        target.mkdir(parents=True, exist_ok=True)
        return Path(self._client.download_artifacts(run_id, PROMPT, str(target)))


def end_run(client: MlflowClient, run_id: str, outcome: Outcome, reason: str) -> None:
    """Close a run with its outcome."""
    if reason:
        client.set_tag(run_id, REASON, without_secrets(reason))
    client.set_terminated(run_id, _STATUS[outcome])
    client.set_tag(run_id, OUTCOME, outcome)  # last: a run without it counts as open


def _owner() -> dict[str, str]:
    return {HOST: socket.gethostname(), PID: str(os.getpid())}


def _experiment_id(client: MlflowClient, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None:
        if found.lifecycle_stage == "deleted":
            raise UserError(
                f"name: the MLflow experiment {name!r} is deleted in {without_secrets(tracking_uri())}; restore it, as "
                f"with `mlflow experiments restore --experiment-id {found.experiment_id}`, or choose another name"
            )
        return str(found.experiment_id)
    location = artifact_root().as_uri() if owns_tracking() else None
    try:
        return str(client.create_experiment(name, artifact_location=location, tags={KIND: "custom_model_development"}))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        return _experiment_id(client, name)  # another process made it meanwhile


def _sweep_params(experiment: ExperimentSpec, data: PreparedData) -> dict[str, Any]:
    base = experiment.model.model_dump(mode="json")
    return {
        "model": base.get("id") or base.get("path") or base["package"],
        "precision": experiment.precision,
        "data": data.source,
        **{f"{split}_rows": rows for split, rows in data.sizes.items()},
        **experiment.training.model_dump(),
        "seed": experiment.seed,
        **{f"budget_{k}": v for k, v in experiment.budget.model_dump(exclude_none=True).items()},
    }


def _dataset_input(data: PreparedData, split: str) -> DatasetInput:
    dataset = Dataset(
        name=f"{data.source.rpartition('/')[2]} ({split})"[:250],
        digest=data.digest[:8],
        source_type="local",
        source=json.dumps({"uri": str(data.path / f"{split}.parquet")}),
        profile=json.dumps({"rows": data.sizes[split], "sha256": data.digest, "labels": data.labels[split]}),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", split)])


def _test_metrics(metrics: Metrics) -> dict[str, float]:
    score = f"{TEST}{metrics.objective.key}"
    return _named(TEST, metrics) | {f"{score}_low": metrics.low, f"{score}_high": metrics.high}


def _named(split: str, metrics: Metrics) -> dict[str, float]:
    return {f"{split}{name}": value for name, value in metrics.numbers.items() if value is not None}


def _params(values: Mapping[str, Any]) -> list[Param]:
    return [Param(k, str(v)) for k, v in values.items()]


def _metrics(values: Mapping[str, float], step: int) -> list[Metric]:
    now = _now()
    return [Metric(k, float(v), now, step) for k, v in values.items()]


def _now() -> int:
    return int(time.time() * 1000)
