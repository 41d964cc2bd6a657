"""The deployments: what Prefect would ignore in silence, and what must agree with other files."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.cli.deploy._models import DeploymentConfig, PrefectYamlModel, RawScheduleConfig, WorkPoolConfig
from prefect.flows import load_flow_from_entrypoint
from prefect.utilities.schema_tools import validate

from flows.environment import QUIET
from flows.retune import retune
from flows.sweep import sweep

ROOT = Path(__file__).parents[1]
TREE: dict[str, Any] = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))
DEPLOYMENTS = {deployment["name"]: deployment for deployment in TREE["deployments"]}


SWEEPS = {name: deployment for name, deployment in DEPLOYMENTS.items() if name != "tune-lane"}


def _schema(flow: Any = sweep) -> dict[str, Any]:
    from prefect.utilities.callables import parameter_schema

    return parameter_schema(flow.fn).model_dump_for_openapi()


def _keys(model: Any) -> set[str]:
    return {field.alias or name for name, field in model.model_fields.items()}


def test_form_is_filled_with_the_default_experiment():
    experiment = yaml.safe_load((ROOT / "experiments/movie-sentiment.yaml").read_text(encoding="utf-8"))
    assert TREE["definitions"]["experiment"] == experiment, (
        "copy experiments/movie-sentiment.yaml into prefect.yaml, below `experiment:`, indented by four spaces"
    )


def test_all_are_deployed_with_the_same_experiment():
    assert set(DEPLOYMENTS) == {"sweep", "nightly-sweep", "nightly-retune", "tune-lane"}
    for deployment in DEPLOYMENTS.values():
        assert deployment["parameters"] == {"experiment": TREE["definitions"]["experiment"]}


def test_top_level_has_no_unknown_key():
    assert set(TREE) <= _keys(PrefectYamlModel) | {"definitions"}


@pytest.mark.parametrize("deployment", DEPLOYMENTS.values(), ids=DEPLOYMENTS)
def test_deployment_has_no_unknown_key(deployment: dict[str, Any]):
    assert set(deployment) <= _keys(DeploymentConfig)
    assert set(deployment["work_pool"]) <= _keys(WorkPoolConfig)
    for schedule in deployment.get("schedules", []):
        assert set(schedule) <= _keys(RawScheduleConfig)
        assert schedule["slug"], "without one, every deploy would undo a pause"
    DeploymentConfig.model_validate(deployment)


@pytest.mark.parametrize("deployment", SWEEPS.values(), ids=SWEEPS)
def test_one_run_at_a_time_on_our_pool(deployment: dict[str, Any]):
    assert deployment["concurrency_limit"] == {"limit": 1, "collision_strategy": "ENQUEUE"}
    assert (deployment["work_pool"]["name"], deployment["work_pool"]["work_queue_name"]) == ("softprompt", "search")


def test_lanes_do_not_wait_for_the_sweep_that_they_join():
    lane = DEPLOYMENTS["tune-lane"]
    assert "concurrency_limit" not in lane
    search = TREE["definitions"]["work_pool"]
    assert lane["work_pool"] == {"name": "softprompt-lanes", "job_variables": search["job_variables"]}


def test_nightly_sweep_runs_at_two():
    assert DEPLOYMENTS["nightly-sweep"]["schedules"] == [{"slug": "nightly", "cron": "0 2 * * *", "timezone": "UTC"}]
    assert "schedules" not in DEPLOYMENTS["sweep"]


def test_nightly_retune_runs_at_four():
    assert DEPLOYMENTS["nightly-retune"]["schedules"] == [{"slug": "retune", "cron": "0 4 * * *", "timezone": "UTC"}]


def test_worker_runs_as_quietly_as_the_command_line():
    assert TREE["definitions"]["work_pool"]["job_variables"]["env"] == QUIET


@pytest.mark.parametrize("deployment", DEPLOYMENTS.values(), ids=DEPLOYMENTS)
def test_entrypoint_is_the_flow(deployment: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    assert load_flow_from_entrypoint(deployment["entrypoint"]).name == deployment["name"].removeprefix("nightly-")


@pytest.mark.parametrize("flow", [sweep, retune], ids=lambda flow: flow.name)
def test_parameters_satisfy_the_schema_of_the_form(flow: Any):
    assert validate({"experiment": TREE["definitions"]["experiment"]}, _schema(flow), raise_on_error=True) == []


@pytest.mark.parametrize("flow", [sweep, retune], ids=lambda flow: flow.name)
def test_every_field_of_the_form_is_described(flow: Any):
    schema = _schema(flow)
    undescribed = [
        f"{title}.{name}"
        for title, part in schema["definitions"].items()
        for name, field in part.get("properties", {}).items()
        if not field.get("description") and name != "kind"
    ]
    assert all(field["description"] for field in schema["properties"].values())
    assert undescribed == []


def test_bounds_reach_the_form():
    parts = _schema()["definitions"]
    assert parts["TrainingSpec"]["properties"]["steps"]["minimum"] == 1
    assert parts["ExperimentSpec"]["properties"]["seed"]["exclusiveMaximum"] == 2**32
    assert parts["ExperimentSpec"]["additionalProperties"] is False
    assert parts["ExperimentSpec"]["properties"]["precision"]["enum"] == ["bfloat16", "float32", "int8", "int4"]
