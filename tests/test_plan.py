"""What a plan says of an experiment; how long it takes is the machine's business."""

import re
from pathlib import Path

import pytest

from softprompt.plan import plan, plan_evaluation
from softprompt.workbench import Workbench
from tests.tiny import tiny_backbone, tiny_experiment


def bench(folder: Path, **overrides: object) -> Workbench:
    return Workbench(tiny_experiment(folder, **overrides), backbone=tiny_backbone())


@pytest.mark.parametrize("slots", [1, 3])
def test_a_plan_tells_search_and_cost(tmp_path: Path, slots: int):
    lines = plan(bench(tmp_path, execution={"device": "cpu", "slots": slots}))
    assert "length 1 to 8 (log)" in lines["search"]
    assert lines["budget"] == "4 trials"
    assert ("3 trials side by side" in lines["trial"]) == (slots == 3)
    assert lines["slots"] == f"{slots}, as execution.slots says"
    assert re.fullmatch(r"weights .*; a step about .* more, .* a row and .* a prompt; .* are free", lines["memory"])
    assert "of search if no trial is pruned" in lines["cost"]
    assert "60 test rows" in lines["cost"]


def test_a_time_budget_bounds_the_search(tmp_path: Path):
    assert "0.0001 minutes of search, its budget" in plan(bench(tmp_path, budget={"minutes": 0.0001}))["cost"]


def test_one_trial_is_its_starting_point(tmp_path: Path):
    whole = bench(tmp_path)
    single = Workbench(whole.experiment.with_one_trial(), whole.data, whole.backbone)
    assert plan(single)["search"] == "none, only search.start: labels, length 4, learning rate 0.1"


@pytest.mark.parametrize("choices", [["prefix_tuning"], ["prompt_tuning", "prefix_tuning"]])
def test_a_plan_names_the_methods(tmp_path: Path, choices: list[str]):
    space = {"length": 3, "learning_rate": 0.1, "initialization": [{"kind": "labels"}], "method": {"choices": choices}}
    space["pruner"] = {"kind": "none", "every": 6}
    point = {"length": 3, "learning_rate": 0.1, "initialization": "labels", "method": "prefix_tuning"}
    searched = plan(bench(tmp_path, search=space))["search"]
    assert searched.startswith(f"{' or '.join(choices)}; length 3; ")
    single = plan(bench(tmp_path, search=space | {"start": [point]}, budget={"trials": 1}))
    assert single["search"] == "none, only search.start: prefix_tuning, labels, length 3, learning rate 0.1"


def test_an_evaluation_trains_nothing(tmp_path: Path):
    lines = plan_evaluation(bench(tmp_path))
    assert list(lines) == ["experiment", "model", "composition", "data", "cost"]
    assert "nothing is trained" in lines["cost"]
