"""Lanes on a real Ray of this machine; skipped where the extra is not installed."""

from pathlib import Path

import pytest

from softprompt.errors import UserError
from softprompt.sweep import Sweep
from tasks.ray_lanes import run_on_ray
from tests.tiny import tiny_experiment


def test_the_number_of_lanes_on_a_cluster_is_given(tmp_path: Path):
    execution = {"device": "cpu", "lanes": "auto", "ray": "local"}
    with pytest.raises(UserError, match=r"^execution\.lanes: auto counts .*; with execution\.ray, give a number"):
        run_on_ray(tiny_experiment(tmp_path, execution=execution), Sweep(name="x", run_id="y"), on_end=print)


def test_a_sweep_trains_its_trials_on_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
):
    pytest.importorskip("prefect_ray", reason="the extra `ray` is not installed")
    request.getfixturevalue("prefect_server")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    from flows.sweep import sweep

    execution = {"device": "cpu", "lanes": 2, "ray": "local"}
    result = sweep(tiny_experiment(tmp_path, name="tiny-ray", budget={"trials": 3}, execution=execution))
    assert len({record.number for record in result.trials}) == len(result.trials) == 3
    assert {record.outcome for record in result.trials} <= {"finished", "pruned"}
    assert result.decision.version == 1
