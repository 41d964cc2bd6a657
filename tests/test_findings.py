"""What `softprompt device` finds, with a tiny model on the CPU; how fast that is, is the machine's business."""

import json
from pathlib import Path

import torch

from softprompt.device import activation_bytes, memory
from softprompt.findings import find_device, find_model
from softprompt.workbench import Workbench
from tests.tiny import tiny_backbone, tiny_experiment


def test_a_device_and_a_model_on_it(tmp_path: Path):
    found = find_device(torch.device("cpu"))
    whole = find_model(Workbench(tiny_experiment(tmp_path), backbone=tiny_backbone()), found)
    assert whole.model is not None
    assert whole.model.choice.slots == 1
    assert whole.model.deviation < 1e-4
    assert whole.model.examples_per_second > 0
    assert 0 < whole.model.peak_share < 1
    assert json.loads(json.dumps(whole.as_json()))["model"]["composition"] == "shared prefix, layers written out"
    assert list(found.lines()) == ["device", "memory", "versions", "matmul peak"]
    assert list(whole.lines())[4:] == ["experiment", "attention", "composition", "slots", "training"]


def test_memory_is_the_machines():
    free, total = memory(torch.device("cpu"))
    assert 0 < free < total


def test_what_a_pass_saves_is_counted_once_and_without_the_weights():
    weight, x = torch.zeros(100, 100), torch.zeros(50, 100, requires_grad=True)

    def run() -> None:
        (x @ weight).exp().sum().backward()

    assert activation_bytes(run, torch.device("cpu"), [weight]) == 50 * 100 * 4  # the exponential
    assert activation_bytes(run, torch.device("cpu"), []) == 50 * 100 * 4 + 100 * 100 * 4
