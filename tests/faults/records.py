"""Reads the records of a state as facts: the study, the runs of MLflow, the leases, and the files that lie about.

Left out is only what differs between two undisturbed sweeps of one experiment: ids, names with the time in them, clock
times and durations. Of these it is told that they are there.
"""

import hashlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import optuna
import sqlalchemy
from mlflow import MlflowClient
from mlflow.entities import Run
from optuna.trial import FrozenTrial

from softprompt import search
from softprompt.home import artifact_root, owns_tracking, state_home, study_storage, tracking_uri
from softprompt.tracking import HOST, PARENT_RUN, PID, SECONDS, STUDY, TRIAL
from tests.faults.comparison import Fact

_VOLATILE_TAGS = {HOST, PID, PARENT_RUN, STUDY, "mlflow.user"}
_VOLATILE_PREFIXES = ("mlflow.source", "prefect.", "mlflow.log-model")
_DURATIONS = (SECONDS,)
_COMPARED = ("prompt/", "experiment.yaml", "data.json", "evaluation.json")
"""Artifacts whose content decides; of others (figures, the served model with its time of birth) only the place."""
_KEPT = re.compile(r"\.db(-wal|-shm|-journal)?$|\.lock$|^artifacts/|^prefect/|^logs/")
"""Files of a state that are no leftovers."""


def read_facts(experiment: str) -> list[Fact]:
    """All facts of the state that the environment names.

    Args:
        experiment: Name of the experiment in MLflow.
    """
    studies = optuna.get_all_study_summaries(storage=study_storage(), include_best_trial=False)
    names = [s.study_name for s in sorted(studies, key=lambda s: s._study_id)]
    runs = _Runs(experiment, names)
    facts = [fact for n, name in enumerate(names) for fact in _study_facts(name, f"sweep {n}", runs)]
    facts += [fact for run in runs.found for fact in runs.facts(run)]
    facts += _lease_facts()
    facts += _file_facts(names, {run.info.run_id for run in runs.found})
    return facts


def _study_facts(name: str, label: str, runs: "_Runs") -> Iterator[Fact]:
    study = optuna.load_study(study_name=name, storage=study_storage())
    yield label, "study", str(study.direction.name)
    for trial in study.get_trials(deepcopy=False):
        for fact in _trial_facts(trial, runs):
            yield f"{label} trial {trial.number}", *fact
    finished = [t for t in search.counted(study) if t.state == optuna.trial.TrialState.COMPLETE]
    if finished:
        yield label, "best trial", str(search.best_trial(study).number)


def _trial_facts(trial: FrozenTrial, runs: "_Runs") -> Iterator[Fact]:
    yield "state", trial.state.name
    yield "value", repr(trial.value)
    for key, value in trial.params.items():
        yield "asked", key, repr(value)
    for step, value in trial.intermediate_values.items():
        yield "reported", str(step), repr(value)
    for key, value in trial.user_attrs.items():
        if key == "ending":
            value = {name: part for name, part in value.items() if name != "seconds"}
        yield "attribute", key, repr(value)


class _Runs:
    """The runs of an experiment in MLflow."""

    def __init__(self, experiment: str, studies: list[str]) -> None:
        self._client = MlflowClient(tracking_uri())
        self._studies = {name: f"sweep {n}" for n, name in enumerate(studies)}
        place = self._client.get_experiment_by_name(experiment)
        found = list(self._client.search_runs([place.experiment_id], max_results=5000)) if place else []
        self.found: list[Run] = found
        self._labels = {run.info.run_id: self._name(run) for run in found}

    def label(self, run_id: str) -> str:
        """Whose run it is."""
        return self._labels.get(run_id, "no run")

    def _name(self, run: Run) -> str:
        tags = run.data.tags
        sweep = self._studies.get(tags.get(STUDY, ""), "no sweep")
        return f"{sweep} trial {tags[TRIAL]}" if TRIAL in tags else sweep

    def facts(self, run: Run) -> Iterator[Fact]:
        """One run: its end, parameters, tags, inputs, the history of every metric, and its artifacts."""
        label = f"{self.label(run.info.run_id)} in MLflow"
        parent = run.data.tags.get(PARENT_RUN)
        yield label, "run", run.info.status, "under", "none" if parent is None else self.label(parent)
        for key, text in run.data.params.items():
            yield label, "param", key, text
        for key, text in run.data.tags.items():
            if key == "mlflow.runName":
                yield label, "name", re.sub(r"\d\d-\d\d \d\d:\d\d", "TIME", text)
            elif key not in _VOLATILE_TAGS and not key.startswith(_VOLATILE_PREFIXES):
                yield label, "tag", key, text
        for given in run.inputs.dataset_inputs if run.inputs else ():
            yield label, "input", given.dataset.name, given.dataset.digest, *(tag.value for tag in given.tags)
        for key in run.data.metrics:
            for entry in self._client.get_metric_history(run.info.run_id, key):
                value = "a time" if key in _DURATIONS else repr(entry.value)
                yield label, key, f"at {entry.step}", value
        yield from self._artifacts(run, label)

    def _artifacts(self, run: Run, label: str) -> Iterator[Fact]:
        for path in self._list(run.info.run_id, ""):
            content = ""
            if path.startswith(_COMPARED):
                with tempfile.TemporaryDirectory() as folder:
                    copy = Path(self._client.download_artifacts(run.info.run_id, path, folder))
                    content = hashlib.sha256(copy.read_bytes()).hexdigest()[:16]
            yield label, "artifact", path, content

    def _list(self, run_id: str, path: str) -> Iterator[str]:
        for item in self._client.list_artifacts(run_id, path or None):
            if item.is_dir:
                yield from self._list(run_id, item.path)
            else:
                yield item.path


def _lease_facts() -> Iterator[Fact]:
    """What lanes hold, and sweeps that count as open; nothing, once a sweep is over."""
    engine = sqlalchemy.create_engine(study_storage())
    tables = sqlalchemy.inspect(engine).get_table_names()
    with engine.connect() as connection:
        if "softprompt_leases" in tables:
            for (subject,) in connection.execute(sqlalchemy.text("SELECT subject FROM softprompt_leases")):
                yield "lease", str(subject)
        if "softprompt_sweeps" in tables:
            for (ended,) in connection.execute(sqlalchemy.text("SELECT ended FROM softprompt_sweeps")):
                yield "sweep", "over" if ended else "open"
    engine.dispose()


def _file_facts(studies: list[str], run_ids: set[str]) -> Iterator[Fact]:
    """Files in the state, and tensors among the temporary ones, that belong to nothing."""
    state = state_home()
    for file in state.rglob("*"):
        place = str(file.relative_to(state))
        if file.is_file() and not _KEPT.search(place):
            for name in studies:
                place = place.replace(name, "STUDY")
            yield "left over", place
    for file in Path(tempfile.gettempdir()).rglob("*.safetensors"):  # MLflow leaves files of its own there
        yield "left over", f"temporary {file.name}"
    if owns_tracking() and artifact_root().is_dir():
        for folder in artifact_root().iterdir():
            if folder.name not in run_ids and folder.name != "models":
                yield "left over", f"artifacts of no run {folder.name}"
