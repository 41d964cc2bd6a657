"""prefect.yaml against a real server and a real worker: launched by hand, and by the clock."""

import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest
import yaml
from mlflow import MlflowClient

from softprompt.comparison import measure_prompt
from softprompt.registry import decide, register
from softprompt.spec import ExperimentSpec
from softprompt.storage import create_stores
from softprompt.tracking import FLOW_RUN, PARENT_RUN, Tracker
from softprompt.tuning import tune
from softprompt.workbench import Workbench
from tests.test_retune import add_other_rows
from tests.test_ui import free_ports
from tests.tiny import tiny_experiment

ROOT = Path(__file__).parents[1]
SECONDS = 240


OPEN = """
import sys
from softprompt.spec import ExperimentSpec
from softprompt.storage import create_stores
from softprompt.sweep import begin_sweep
from softprompt.workbench import Workbench

create_stores()
begin_sweep(Workbench(ExperimentSpec.model_validate_json(sys.argv[1])), {})
"""
"""Opens a sweep and leaves its trials to others."""


class Site:
    """A state folder with a server, and the environment of whoever works with it."""

    def __init__(self, folder: Path) -> None:
        (port,) = free_ports(1)
        self.folder = folder
        self.api = f"http://127.0.0.1:{port}/api"
        keep = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        self.environment = keep | {
            "SOFTPROMPT_HOME": str(folder / "state"),
            "PREFECT_HOME": str(folder / "prefect"),
            "PREFECT_API_URL": self.api,
            "PREFECT_SERVER_API_PORT": str(port),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
        }

    def prefect(self, *arguments: str) -> str:
        command = [sys.executable, "-m", "prefect", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @contextmanager
    def running(self, *arguments: str) -> Iterator[Path]:
        log = self.folder / f"{arguments[0]}.log"
        with log.open("wb") as stream:
            command = [sys.executable, "-m", "prefect", *arguments]
            process = subprocess.Popen(
                command, cwd=ROOT, env=self.environment, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream
            )
            try:
                yield log
            finally:
                process.terminate()
                try:
                    process.wait(15)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

    def post(self, path: str, body: dict[str, Any]) -> Any:
        return self.call("POST", path, body)

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data, headers = None if body is None else json.dumps(body).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(self.api + path, data, headers, method=method)
        for attempt in count(1):
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    return json.loads(answer.read() or "null")
            except HTTPError as error:
                # A busy server asks to be called again, as Prefect's own client does.
                if error.code != 503 or attempt == 20:
                    raise
                time.sleep(1)

    def await_health(self) -> None:
        for _ in range(SECONDS * 4):
            try:
                urllib.request.urlopen(f"{self.api}/health", timeout=5).close()
                return
            except OSError:
                time.sleep(0.25)
        raise AssertionError("the server did not answer")

    def create_pools(self) -> None:
        """As the head of prefect.yaml says."""
        self.prefect("work-pool", "create", "softprompt", "--type", "process")
        self.prefect("work-queue", "create", "search", "--pool", "softprompt", "--limit", "1")
        self.prefect("work-pool", "create", "softprompt-lanes", "--type", "process")

    def await_completed(
        self, deployment: str, log: Path, wanted: Callable[[dict[str, Any]], bool] = lambda run: True
    ) -> dict[str, Any]:
        """The first run of a deployment that completes, and is wanted."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            runs = self.post("/flow_runs/filter", {"deployments": {"name": {"any_": [deployment]}}})
            for run in runs:
                assert run["state_type"] not in ("FAILED", "CRASHED"), log.read_text()
                if run["state_type"] == "COMPLETED" and wanted(run):
                    return dict(run)
            time.sleep(0.5)
        raise AssertionError(f"no run of {deployment} completed: {log.read_text()}")

    def log_lines(self, run: dict[str, Any]) -> list[str]:
        lines = self.post("/logs/filter", {"logs": {"flow_run_id": {"any_": [run["id"]]}}})
        return [line["message"] for line in lines]


def _every_minute(folder: Path, name: str, experiment: dict[str, Any]) -> Path:
    """A copy of prefect.yaml whose one schedule is that of a deployment, every minute, with a tiny experiment."""
    tree = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))
    for deployment in tree["deployments"]:
        deployment["parameters"] = {"experiment": experiment}
        schedules = deployment.pop("schedules", [])
        if deployment["name"] == name:
            deployment["schedules"] = [schedules[0] | {"cron": "* * * * *"}]
    file = folder / "prefect.yaml"
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return file


@pytest.mark.timeout(400)
def test_launched_and_scheduled_runs_complete_on_a_worker(tmp_path: Path):
    site = Site(tmp_path)
    experiment = tiny_experiment(tmp_path / "tiny", budget={"trials": 1}).model_dump(mode="json")
    with site.running("server", "start"):
        site.await_health()
        site.create_pools()
        file = _every_minute(tmp_path, "nightly-sweep", experiment)
        site.prefect("deploy", "--all", "--no-prompt", "--prefect-file", str(file))
        site.prefect("deployment", "run", "sweep/sweep", "--params", json.dumps({"experiment": experiment}))
        with site.running("worker", "start", "--pool", "softprompt", "--limit", "1") as log:
            launched = site.await_completed("sweep", log)
            scheduled = site.await_completed("nightly-sweep", log)
        lines = site.log_lines(launched)
        joined = tiny_experiment(tmp_path / "joined", name="tiny-joined", budget={"trials": 2}).model_dump(mode="json")
        opened = subprocess.run([sys.executable, "-c", OPEN, json.dumps(joined)], cwd=ROOT, env=site.environment)
        assert opened.returncode == 0
        site.prefect("deployment", "run", "tune-lane/tune-lane", "--params", json.dumps({"experiment": joined}))
        with site.running("worker", "start", "--pool", "softprompt-lanes", "--limit", "1") as log:
            site.await_completed("tune-lane", log)

    assert not launched["auto_scheduled"]
    assert scheduled["auto_scheduled"]
    assert any("validation accuracy" in line for line in lines)
    assert not any("LOAD_" in line for line in lines), "the log is for people"
    _check_records(site, {launched["id"], scheduled["id"]})
    _check_lane(site)


@pytest.mark.timeout(600)
def test_scheduled_retunes_end_early_without_new_rows_and_tell_drift_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    site = Site(tmp_path)
    experiment = tiny_experiment(tmp_path / "tiny", name="tiny-retune", budget={"trials": 1})
    monkeypatch.setenv("SOFTPROMPT_HOME", site.environment["SOFTPROMPT_HOME"])
    _make_champion(experiment)
    with site.running("server", "start"):
        site.await_health()
        site.create_pools()
        file = _every_minute(tmp_path, "nightly-retune", experiment.model_dump(mode="json"))
        site.prefect("deploy", "--all", "--no-prompt", "--prefect-file", str(file))
        _check_one_at_a_time(site)
        with site.running("worker", "start", "--pool", "softprompt", "--limit", "2") as log:
            quiet = site.await_completed("nightly-retune", log)
            add_other_rows(tmp_path / "tiny" / "rows.csv")
            busy = site.await_completed("nightly-retune", log, lambda run: run["id"] != quiet["id"])
        lines = site.log_lines(busy)

    assert quiet["auto_scheduled"]
    assert quiet["state"]["message"].startswith("nothing new: the rows are those of champion v1")
    assert busy["auto_scheduled"]
    assert any(line.startswith("drift: label shares (p ") for line in lines)
    assert any(line.startswith("a warm start from champion v1") for line in lines)
    client = MlflowClient(f"sqlite:///{site.folder}/state/mlflow.db")
    experiments = [e.experiment_id for e in client.search_experiments()]
    retunes = client.search_runs(experiments, "tags.`softprompt.role` = 'retune'")
    outcomes = {run.data.tags[FLOW_RUN]: run.data.tags["softprompt.outcome"] for run in retunes}
    assert (outcomes[quiet["id"]], outcomes[busy["id"]]) == ("nothing new", "finished")
    assert len(client.search_model_versions("name = 'tiny-retune'")) == 2


def _make_champion(experiment: ExperimentSpec) -> None:
    """As a sweep leaves it."""
    create_stores()
    bench, tracker = Workbench(experiment), Tracker(experiment)
    prompt = tune(bench, {"length": 4, "initialization": "labels", "learning_rate": 0.1})
    run_id = tracker.start_sweep("first", experiment, bench.data, {})
    measured = measure_prompt(bench, prompt)
    tracker.log_evaluation(run_id, {"winner": measured})
    with tempfile.TemporaryDirectory() as folder:
        version = register(experiment.name, run_id, prompt.save(Path(folder) / "prompt"), measured)
    assert decide(experiment.name, version, measured, None).promoted
    tracker.end(run_id, "finished")


def _check_one_at_a_time(site: Site) -> None:
    """Of runs of two deployments that are due, a worker gets one."""
    made = []
    for name in ("sweep/sweep", "retune/nightly-retune"):
        deployment = site.call("GET", f"/deployments/name/{name}")["id"]
        made.append(site.post(f"/deployments/{deployment}/create_flow_run", {"state": {"type": "SCHEDULED"}})["id"])
    due = site.post("/work_pools/softprompt/get_scheduled_flow_runs", {})
    assert len({run["flow_run"]["id"] for run in due}) == 1
    for flow_run in made:
        site.call("DELETE", f"/flow_runs/{flow_run}")


def _check_records(site: Site, flow_runs: set[str]) -> None:
    client = MlflowClient(f"sqlite:///{site.folder}/state/mlflow.db")
    (experiment,) = [e.experiment_id for e in client.search_experiments() if e.name == "tiny-sentiment"]
    runs = client.search_runs([experiment])
    sweeps = {run.data.tags[FLOW_RUN]: run for run in runs if PARENT_RUN not in run.data.tags}
    assert flow_runs <= set(sweeps)
    for flow_run in flow_runs:
        trials = [run for run in runs if run.data.tags.get(PARENT_RUN) == sweeps[flow_run].info.run_id]
        assert [run.info.status for run in (sweeps[flow_run], *trials)] == ["FINISHED", "FINISHED"]
    assert client.get_model_version_by_alias("tiny-sentiment", "champion")


def _check_lane(site: Site) -> None:
    client = MlflowClient(f"sqlite:///{site.folder}/state/mlflow.db")
    (experiment,) = [e.experiment_id for e in client.search_experiments() if e.name == "tiny-joined"]
    trials = client.search_runs([experiment], f"tags.`{PARENT_RUN}` != ''")
    assert [run.info.status in ("FINISHED", "KILLED") for run in trials] == [True, True]
    assert len({run.data.tags[PARENT_RUN] for run in trials}) == 1
