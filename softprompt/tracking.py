"""The records in MLflow: one parent run per sweep, one child run per trial, whose status tells its end.

Everything goes through `MlflowClient` with explicit run ids: MLflow's fluent runs belong to a thread, and a Prefect
task may run in another one. All names that a person meets in the MLflow UI stand here.

Every record may be made again after a fault that leaves it open whether the server has made it: runs are looked for by
their tags before they are created, and a metric that stands there is not logged a second time. Nothing here waits for a
server that is away: the tasks try again, and `delivery` does so for the trials.
"""

import json
import os
import re
import socket
import tempfile
import time
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from softprompt.data import PreparedData
from softprompt.drift import Drift
from softprompt.errors import UserError
from softprompt.evaluation import Metrics, describe_table
from softprompt.figures import draw_systems
from softprompt.history import Outcome
from softprompt.home import artifact_root, owns_tracking, tracking_uri, without_secrets
from softprompt.outage import calm_mlflow, insisting
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
ROLE = "softprompt.role"
"""What a run is beside a sweep, a trial or an evaluation."""
RETUNE = "retune"
"""Role of a sweep that a schedule began because of fresh data, and of the note that there were none."""
DIGEST = "softprompt.data_digest"
"""Of a retune: the digest of all rows."""
DRIFT = "softprompt.drift"
"""Of a retune: what has drifted since the champion was made."""
NOTHING_NEW = "nothing new"
"""Outcome of a retune that had nothing to do."""
SLOTS = "softprompt.slots"
"""How many trials a lane has trained side by side, and why."""
PROMPT = "prompt"
"""Artifact folder of a trial's prompt."""
CHECKPOINT = "checkpoint"
"""Artifact folder of the newest checkpoint of a trial that has not ended."""
_CHECKPOINT_FILE = re.compile(r"\d{8}-[0-9a-f]{32}\.safetensors")

BEST_VAL, TEST = "best_val_", "test_"
"""What stands before the name of a metric, as in `best_val_accuracy`."""
SECONDS = "seconds"

STATUS = {"finished": "FINISHED", "pruned": "KILLED", "failed": "FAILED", "interrupted": "KILLED"}


class SweepRecord(Protocol):
    """A sweep, by its records."""

    @property
    def name(self) -> str:
        """Name of the Optuna study."""

    @property
    def run_id(self) -> str:
        """MLflow id of the parent run."""


class Tracker:
    """Writes the records of one experiment."""

    def __init__(self, experiment: ExperimentSpec) -> None:
        calm_mlflow()
        self.client = MlflowClient(tracking_uri=tracking_uri())
        self.objective = experiment.labels.objective
        self._name = experiment.name

    @cached_property
    def experiment_id(self) -> str:
        """The experiment in MLflow, made where it is not there yet; UserError where somebody has deleted it."""
        return _experiment_id(self.client, self._name)

    @insisting
    def require_experiment(self) -> None:
        """UserError where somebody has deleted the experiment."""
        _ = self.experiment_id

    @insisting
    def start_sweep(self, study: str, experiment: ExperimentSpec, data: PreparedData, tags: Mapping[str, str]) -> str:
        """The parent run of a study, with everything that is known before the first trial; returns its id."""
        tags = {STUDY: study, FINGERPRINT: experiment.fingerprint, **_owner(), **tags}
        asked = f"{_tagged(STUDY, study)} and tags.`{TRIAL}` IS NULL"
        if not self._search(asked):
            # Short enough for the column of MLflow's list; the experiment's name stands above it.
            self._create(time.strftime("sweep %m-%d %H:%M", time.gmtime()), tags)
        run, *twins = sorted(self._search(asked), key=lambda run: (run.info.start_time, run.info.run_id))
        for twin in twins:  # a server that is slow to answer may have been asked twice to create it
            self.client.delete_run(twin.info.run_id)
        run_id = str(run.info.run_id)
        self.log_params(run_id, _sweep_params(experiment, data))
        self.log_inputs(run_id, data, data.sizes)
        self.client.log_dict(run_id, experiment.model_dump(mode="json"), "experiment.yaml")
        self.client.log_dict(run_id, data.as_json(), "data.json")
        return run_id

    @insisting
    def reopen_sweep(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set a sweep that was interrupted to running; it belongs to this process and carries these tags from now."""
        reopen_run(self.client, run_id)
        self.client.log_batch(run_id, tags=[RunTag(k, v) for k, v in {**_owner(), **tags}.items()])

    def start_trial(self, parent: str, *, study: str, number: int, name: str, start_ms: int | None = None) -> str:
        """The run of a trial, found or created; returns its id.

        Args:
            parent: id of the sweep's run.
            study: name of the study.
            number: of the trial in it.
            name: of the run, where it is created.
            start_ms: when the trial began, in milliseconds since 1970; None for now.
        """
        found = self.find_trial(study, number)
        if found is not None:
            return str(found.info.run_id)
        return self._create(name, {PARENT_RUN: parent, STUDY: study, TRIAL: str(number)}, start_ms)

    def find_trial(self, study: str, number: int) -> Run | None:
        """The run of a trial; of several the one that says most."""
        return min(
            self._search_trial(study, number),
            key=lambda run: (-len(run.data.metrics), -len(run.data.params), run.info.start_time, run.info.run_id),
            default=None,
        )

    def find_trial_run(self, study: str, number: int) -> str | None:
        """The id of a trial's run; None where there is none yet."""
        found = self.find_trial(study, number)
        return None if found is None else str(found.info.run_id)

    def drop_twins(self, study: str, number: int, *, keep: str) -> None:
        """Delete the other runs of a trial: a server that is slow to answer may have been asked twice to create it."""
        for run in self._search_trial(study, number):
            if run.info.run_id != keep:
                self.client.delete_run(run.info.run_id)

    def _search_trial(self, study: str, number: int) -> list[Run]:
        return self._search(f"{_tagged(STUDY, study)} and {_tagged(TRIAL, str(number))}")

    def _search(self, asked: str) -> list[Run]:
        return list(self.client.search_runs([self.experiment_id], asked))

    def _create(self, name: str, tags: Mapping[str, str], start_ms: int | None = None) -> str:
        run = self.client.create_run(self.experiment_id, run_name=name, tags=dict(tags), start_time=start_ms)
        return str(run.info.run_id)

    def log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        """Log settings; MLflow refuses one that differs from what stands there."""
        self.client.log_batch(run_id, params=[Param(k, str(v)) for k, v in params.items()])

    def log_inputs(self, run_id: str, data: PreparedData, splits: Collection[str]) -> None:
        """Log the splits of the data that a run works on."""
        self.client.log_inputs(run_id, [_dataset_input(data, split) for split in splits])

    def log_metrics(self, run_id: str, metrics: Mapping[str, float], *, step: int = 0) -> None:
        """Log one value of each metric."""
        now = _now()
        self.client.log_batch(run_id, metrics=[Metric(k, float(v), now, step) for k, v in metrics.items()])

    def _log_once(self, run_id: str, metrics: Mapping[str, float]) -> None:
        """Log metrics that have one value for the whole run; where it stands there, it is not logged again."""
        there = self.client.get_run(run_id).data.metrics
        self.log_metrics(run_id, {k: v for k, v in metrics.items() if there.get(k) != v})

    def log_folder(self, run_id: str, folder: Path, name: str) -> None:
        """Store a folder's files under a name."""
        self.client.log_artifacts(run_id, str(folder), name)

    @insisting
    def log_evaluation(self, run_id: str, systems: Mapping[str, Metrics]) -> None:
        """Record the systems on the test split, the one in question last: metrics, a table and a figure."""
        self._log_once(run_id, _test_metrics(list(systems.values())[-1]))
        rows = [
            {"system": name, "rows": m.rows, **m.numbers, "low": m.low, "high": m.high} for name, m in systems.items()
        ]
        # As MLflow's own log_table writes it, which would append to the table of an earlier try.
        table = {"columns": list(rows[0]), "data": [list(row.values()) for row in rows]}
        self.client.log_dict(run_id, table, "evaluation.json")
        self.client.set_tag(run_id, TABLES, json.dumps([{"path": "evaluation.json", "type": "table"}]))
        self.client.log_figure(run_id, draw_systems(systems), "evaluation.png")
        self.client.set_tag(run_id, NOTE, describe_table(dict(systems)))

    @insisting
    def log_winner(self, run_id: str, metrics: Metrics) -> None:
        """Mark a trial as the winner of its sweep, with its metrics on the test split."""
        self._log_once(run_id, _test_metrics(metrics))
        self.client.set_tag(run_id, WINNER, "true")

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
        run_id = self._create(name, tags)
        self.log_params(run_id, _sweep_params(experiment, data))
        self.log_inputs(run_id, data, ["test"])
        self.log_evaluation(run_id, systems)
        self.end(run_id, "finished")

    @insisting
    def log_retune(self, sweep: str, data: PreparedData, drift: Drift | None) -> None:
        """Mark a sweep as a retune, with the drift since the champion was made, where there is a champion."""
        self.client.set_tag(sweep, ROLE, RETUNE)
        self.client.set_tag(sweep, DIGEST, data.digest)
        if drift is not None:
            self.client.set_tag(sweep, DRIFT, drift.verdict)
            self._log_once(sweep, drift.metrics)
            self.client.log_dict(sweep, drift.model_dump(mode="json"), "drift.json")
            self.client.log_text(sweep, drift.describe(), "drift.md")

    def record_nothing_new(self, data: PreparedData, why: str, tags: Mapping[str, str]) -> str:
        """Record a retune that had nothing to do as a small run of its own: a schedule that is alive is seen to be."""
        name = time.strftime(f"{NOTHING_NEW} %m-%d %H:%M", time.gmtime())
        tags = {ROLE: RETUNE, DIGEST: data.digest, NOTE: why, REASON: why, **tags}
        run_id = self._create(name, tags)
        self.client.set_terminated(run_id)
        self.client.set_tag(run_id, OUTCOME, NOTHING_NEW)  # last: a run without it counts as open
        return run_id

    @insisting
    def log_slots(self, sweep: str, choice: str) -> None:
        """Record on the sweep how many trials a lane trains side by side, and why."""
        self.client.set_tag(sweep, SLOTS, choice)

    @insisting
    def log_decision(self, sweep: str, version: int, *, promoted: bool, reason: str) -> None:
        """Record on the sweep what became of its winner."""
        self.client.set_tag(sweep, DECISION, f"v{version} {'promoted' if promoted else 'kept back'}: {reason}")

    @insisting
    def end(self, run_id: str, outcome: Outcome, reason: str = "") -> None:
        """Close a run. Pruned and interrupted ones are KILLED, failed ones FAILED; the tags say which, and why."""
        end_run(self.client, run_id, outcome, reason)

    @insisting
    def fetch_prompt(self, run_id: str, target: Path) -> Path:
        """Copy a run's prompt folder to the target folder; returns where it is."""
        target.mkdir(parents=True, exist_ok=True)
        return Path(self.client.download_artifacts(run_id, PROMPT, str(target)))

    def store_checkpoint(self, run_id: str, file: Path) -> None:
        """Store a checkpoint with a trial's run, in the place of those before it."""
        self.client.log_artifact(run_id, str(file), CHECKPOINT)
        self.drop_checkpoints(run_id, keep=file.name)

    def drop_checkpoints(self, run_id: str, *, keep: str = "") -> None:
        """Delete the checkpoints of a trial's run, but for one."""
        run = self.client.get_run(run_id)
        artifacts: Any = get_artifact_repository(run.info.artifact_uri, tracking_uri=tracking_uri())
        there = artifacts.list_artifacts(CHECKPOINT)
        if there and not keep:
            artifacts.delete_artifacts(CHECKPOINT)
            return
        for file in there:
            if PurePosixPath(file.path).name != keep:
                artifacts.delete_artifacts(file.path)

    def fetch_checkpoints(self, study: str, number: int, folder: Path) -> list[Path]:
        """Copy the checkpoints that are stored with a trial's run to a folder, whole or not at all; returns the files.

        What is not named as a checkpoint stays where it is. Whether a file is what its name says is for the loader to
        verify.
        """
        run_id = self.find_trial_run(study, number)
        if run_id is None:
            return []
        folder.mkdir(parents=True, exist_ok=True)
        fetched = []
        with tempfile.TemporaryDirectory(dir=folder) as place:
            for file in self.client.list_artifacts(run_id, CHECKPOINT):
                name = PurePosixPath(file.path).name
                if _CHECKPOINT_FILE.fullmatch(name):
                    fetched.append(Path(self.client.download_artifacts(run_id, f"{CHECKPOINT}/{name}", place)))
            return [file.replace(folder / file.name) for file in fetched]


def end_run(client: MlflowClient, run_id: str, outcome: Outcome, reason: str, end_ms: int | None = None) -> None:
    """Close a run with its outcome, now or at a time in milliseconds since 1970."""
    if reason:
        client.set_tag(run_id, REASON, without_secrets(reason))
    else:
        _remove_tag(client, run_id, REASON)  # of an interruption
    client.set_terminated(run_id, STATUS[outcome], end_ms)
    client.set_tag(run_id, OUTCOME, outcome)  # last: a run without it counts as open


def reopen_run(client: MlflowClient, run_id: str) -> None:
    """Set a run that was interrupted to running."""
    _remove_tag(client, run_id, OUTCOME)  # first: a run without it counts as open
    _remove_tag(client, run_id, REASON)
    client.update_run(run_id, status="RUNNING")


def _remove_tag(client: MlflowClient, run_id: str, tag: str) -> None:
    if tag not in client.get_run(run_id).data.tags:
        return
    try:
        client.delete_tag(run_id, tag)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # it may go while the answer is lost on its way
            raise


def _tagged(tag: str, value: str) -> str:
    """A condition of MLflow's search, which knows no way to escape a quote."""
    if "'" in value:
        raise ValueError(f"{value!r} cannot be searched for in MLflow")
    return f"tags.`{tag}` = '{value}'"


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


def model_name(experiment: ExperimentSpec) -> str:
    """What names the base model in a sweep's record."""
    base = experiment.model.model_dump(mode="json")
    return str(base.get("id") or base.get("path") or base["package"])


def _sweep_params(experiment: ExperimentSpec, data: PreparedData) -> dict[str, Any]:
    return {
        "model": model_name(experiment),
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


def _now() -> int:
    return int(time.time() * 1000)
