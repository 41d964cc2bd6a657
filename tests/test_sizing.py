"""How many trials are trained side by side, and what a step takes: by given figures, and on a tiny model."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from softprompt.device import activation_bytes
from softprompt.passes import Work
from softprompt.sizing import Choice, MemoryEstimate, choose_slots, estimate_memory, running, try_slots
from softprompt.training import step
from softprompt.workbench import Workbench
from tests.tiny import tiny_backbone, tiny_experiment


def make_bench(folder: Path, kind: str = "llama", **overrides: Any) -> Workbench:
    return Workbench(tiny_experiment(folder, **overrides), backbone=tiny_backbone(kind))


@pytest.mark.parametrize(
    ("rates", "fitting", "most", "slots", "why"),
    [
        ({1: 100, 2: 190, 4: 300, 8: 310}, 64, 64, 4, "as 8 gain less than 5%"),
        ({1: 17.5, 2: 16.5}, 64, 64, 1, "as 2 gain less than 5%"),
        ({1: 100, 2: 190, 4: 360, 6: 500}, 64, 6, 6, "as there is no use for more"),
        ({1: 100, 2: 190, 3: 280}, 3, 64, 3, "as no more fit the memory"),
        ({1: 100}, 64, 1, 1, "as there is no use for more"),
        ({1: 100}, 1, 64, 1, "as no more fit the memory"),
    ],
)
def test_slots_are_doubled_while_it_pays(rates: dict[int, float], fitting: int, most: int, slots: int, why: str):
    """Just the figures that are given are asked for, and no others."""
    assert try_slots(rates.__getitem__, fitting=fitting, most=most) == Choice(slots, why, rates)


def test_a_choice_tells_its_figures():
    assert str(try_slots({1: 100, 2: 101}.__getitem__, fitting=8, most=8)) == (
        "1, as 2 gain less than 5% (examples/s: 100 with 1, 101 with 2)"
    )


def test_a_number_is_taken_as_it_is(tmp_path: Path):
    bench = make_bench(tmp_path, execution={"device": "cpu", "slots": 3})
    assert choose_slots(bench) == Choice(3, "as execution.slots says")


def test_a_cpu_trains_one_at_a_time_without_a_measurement(tmp_path: Path):
    assert choose_slots(make_bench(tmp_path)) == Choice(1, "as on a CPU more gain little and every score comes later")


def test_prompts_that_are_measured_are_trained_as_any(tmp_path: Path):
    bench = make_bench(tmp_path)
    two = running(bench, 2)
    before = [slot.prompt.detach().clone() for slot in two]
    assert not torch.equal(*before)
    assert [slot.prompt.shape for slot in two] == [(8, 32)] * 2
    step(bench.backbone, two)
    assert [slot.steps_done for slot in two] == [1, 1]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom"])
@pytest.mark.parametrize(("slots", "rows"), [(1, 16), (3, 8), (8, 1)])
def test_the_estimate_is_near_what_a_whole_step_saves(tmp_path: Path, kind: str, slots: int, rows: int):
    """Within a fifth: two small steps tell what the whole one takes, with as many prompts and rows as asked for."""
    bench = make_bench(tmp_path, kind, search=SPACE)
    estimate = estimate_memory(bench)
    longest = sorted(bench.examples, key=lambda e: len(e.inputs) + len(e.target))[-rows:] * slots
    prompts = [torch.zeros(8, 32, requires_grad=True) for _ in range(slots)]

    work = Work(prompts, [longest[n : n + rows] for n in range(0, len(longest), rows)], bench.loss)
    step, frozen = partial(bench.passes.run, bench.backbone, work), bench.backbone.model.parameters()
    saved = activation_bytes(step, bench.backbone.device, frozen)
    assert slots * (estimate.prompt + rows * estimate.row) == pytest.approx(saved, rel=0.2)


SPACE = {
    "length": 8,
    "learning_rate": 0.1,
    "initialization": [{"kind": "labels"}],
    "pruner": {"kind": "none", "every": 6},
}


def test_weights_and_optimizer_are_counted(tmp_path: Path):
    bench = make_bench(tmp_path, search=SPACE)
    estimate = estimate_memory(bench)
    model = bench.backbone.model
    assert estimate.weights == sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    slot = running(bench, 1)[0]
    step(bench.backbone, [slot])
    (parameter,) = slot.parameterization.parameters
    moments = [m for m in slot._optimizer.state[parameter].values() if m.numel() > 1]
    assert estimate.state == sum(t.nbytes for t in (slot.prompt, slot.prompt, *moments))  # a gradient is of its size


def test_what_does_not_fit_is_said():
    estimate = MemoryEstimate(weights=270_000_000, row=60_000_000, prompt=5_000_000, state=1_000, rows=16)
    assert estimate.describe(2, free=10**10) == (
        "weights 270 MB; a step about 1.93 GB more, 60 MB a row and 5 MB a prompt; 10 GB are free"
    )
    assert estimate.describe(2, free=10**9).endswith("too few, lower training.batch_size or execution.slots")
