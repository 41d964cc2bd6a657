"""prefect.yaml against a real server and a real worker: launched by hand, and by the clock."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from softprompt.tracking import FLOW_RUN, PARENT_RUN
from tests.test_ui import free_ports
from tests.tiny import tiny_experiment

ROOT = Path(__file__).parents[1]
SECONDS = 150


OPEN = """
import sys
from softprompt.data import prepare
from softprompt.home import cache_home
from softprompt.lane import open_sweep
from softprompt.spec import ExperimentSpec
from softprompt.store import create_stores
from softprompt.workbench import Workbench
from tasks.joining import identity_tags

experiment = ExperimentSpec.model_validate_json(sys.argv[1])
create_stores()
bench = Workbench(experiment, prepare(experiment, cache_home()))
tags = identity_tags(experiment, digest=bench.data.digest, weights=bench.backbone.weights_sha256)
open_sweep(experiment, bench.data, tags)
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
        data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(self.api + path, data, headers), timeout=20) as answer:
            return json.load(answer)

    def await_health(self) -> None:
        for _ in range(SECONDS * 4):
            try:
                urllib.request.urlopen(f"{self.api}/health", timeout=5).close()
                return
            except OSError:
                time.sleep(0.25)
        raise AssertionError("the server did not answer")

    def await_completed(self, deployment: str, log: Path) -> dict[str, Any]:
        """The first run of a deployment that completes."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            runs = self.post("/flow_runs/filter", {"deployments": {"name": {"any_": [deployment]}}})
            for run in runs:
                assert run["state_type"] not in ("FAILED", "CRASHED"), log.read_text()
                if run["state_type"] == "COMPLETED":
                    return dict(run)
            time.sleep(0.5)
        raise AssertionError(f"no run of {deployment} completed: {log.read_text()}")

    def log_lines(self, run: dict[str, Any]) -> list[str]:
        lines = self.post("/logs/filter", {"logs": {"flow_run_id": {"any_": [run["id"]]}}})
        return [line["message"] for line in lines]


def _every_minute(folder: Path, experiment: dict[str, Any]) -> Path:
    """A copy of prefect.yaml whose nightly sweep is a tiny one, every minute."""
    tree = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))
    nightly = next(deployment for deployment in tree["deployments"] if deployment["name"] == "nightly-sweep")
    nightly["parameters"] = {"experiment": experiment}
    nightly["schedules"][0]["cron"] = "* * * * *"
    file = folder / "prefect.yaml"
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return file


@pytest.mark.timeout(400)
def test_launched_and_scheduled_runs_complete_on_a_worker(tmp_path: Path):
    site = Site(tmp_path)
    experiment = tiny_experiment(tmp_path / "tiny", budget={"trials": 1}).model_dump(mode="json")
    with site.running("server", "start"):
        site.await_health()
        for pool in ("softprompt", "softprompt-lanes"):
            site.prefect("work-pool", "create", pool, "--type", "process")
        file = _every_minute(tmp_path, experiment)
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
            lane = site.await_completed("tune-lane", log)

    assert not launched["auto_scheduled"]
    assert scheduled["auto_scheduled"]
    assert any("validation accuracy" in line for line in lines)
    assert not any("LOAD_" in line for line in lines), "the log is for people"
    _check_records(site, {launched["id"], scheduled["id"]})
    _check_lane(site, lane["id"])


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


def _check_lane(site: Site, flow_run: str) -> None:
    client = MlflowClient(f"sqlite:///{site.folder}/state/mlflow.db")
    (experiment,) = [e.experiment_id for e in client.search_experiments() if e.name == "tiny-joined"]
    trials = client.search_runs([experiment], f"tags.`{FLOW_RUN}` = '{flow_run}'")
    assert [run.info.status in ("FINISHED", "KILLED") for run in trials] == [True, True]
    assert len({run.data.tags[PARENT_RUN] for run in trials}) == 1
