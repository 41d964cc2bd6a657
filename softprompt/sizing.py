"""How many prompts a lane trains side by side (K), and the memory that this takes: measured, not looked up.

A trial's result does not depend on K, so K may differ from machine to machine. On a CPU more prompts side by side
gain little and every score comes later, so K is 1 without a measurement. On a GPU K is doubled while that gains
something and the memory allows it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from softprompt.batch import Example
from softprompt.device import activation_bytes, memory, time_run
from softprompt.passes import Work
from softprompt.training import Slot, step
from softprompt.workbench import Workbench

_GAIN = 1.05
"""How many times faster twice the prompts have to be, counted in examples, to be worth it."""
_SHARE = 0.8
"""Share of the free memory that a step may take: a batch may be longer than those that were measured."""
_MOST = 256
"""Prompts side by side at the most, as the experiment's `execution.slots`."""
_STEPS = 5
"""Steps that are timed for each K."""


@dataclass(frozen=True)
class Choice:
    """How many prompts are trained side by side, and why."""

    slots: int
    why: str
    rates: dict[int, float] = field(default_factory=dict)
    """Examples a second for each K that was tried."""

    def __str__(self) -> str:
        tried = ", ".join(f"{rate:.3g} with {slots}" for slots, rate in self.rates.items())
        return f"{self.slots}, {self.why}" + (f" (examples/s: {tried})" if tried else "")


def choose_slots(bench: Workbench) -> Choice:
    """The number that the experiment gives, or what this device is quickest with."""
    device, asked, trials = bench.backbone.device, bench.experiment.execution.slots, bench.experiment.budget.trials
    if asked != "auto":
        return Choice(asked, "as execution.slots says")
    if device.type == "cpu":
        return Choice(1, "as on a CPU more gain little and every score comes later")
    fitting = max(1, int(_SHARE * memory(device)[0] / estimate_memory(bench).of_a_slot))
    return try_slots(lambda slots: _measure_rate(bench, slots), fitting=fitting, most=min(_MOST, trials or _MOST))


def try_slots(measure: Callable[[int], float], *, fitting: int, most: int) -> Choice:
    """Double K while that gains something.

    Args:
        measure: examples a second with K prompts side by side.
        fitting: K that the memory holds.
        most: K that there is use for, such as the trials of the budget.
    """
    rates = {1: measure(1)}
    best = 1
    while best < min(fitting, most):
        twice = min(2 * best, fitting, most)
        rates[twice] = measure(twice)
        if rates[twice] < _GAIN * rates[best]:
            return Choice(best, f"as {twice} gain less than {_GAIN - 1:.0%}", rates)
        best = twice
    return Choice(best, "as there is no use for more" if best == most else "as no more fit the memory", rates)


def running(bench: Workbench, slots: int) -> list[Slot]:
    """As many prompts in training, of the greatest length that the experiment asks for."""
    method = bench.experiment.search.methods[0]
    params = {"method": method, "length": bench.experiment.longest, "initialization": "normal", "learning_rate": 0.001}
    return [bench.start(params, seed=[bench.experiment.seed, n]) for n in range(slots)]


def _measure_rate(bench: Workbench, slots: int) -> float:
    trained = running(bench, slots)
    seconds = time_run(lambda: step(bench.backbone, trained), bench.backbone.device, times=_STEPS)
    return slots * bench.experiment.training.batch_size / seconds


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that training takes."""

    weights: int
    """The frozen model."""
    row: int
    """A row of a step, of the longest inputs that there are."""
    prompt: int
    """A prompt of a step, whatever the number of its rows."""
    state: int
    """A prompt between steps: its vectors, their gradient and the two moments of AdamW."""
    rows: int
    """B, rows of a step for each prompt."""

    @property
    def of_a_slot(self) -> int:
        """What each prompt that is trained adds."""
        return self.state + self.prompt + self.rows * self.row

    def describe(self, slots: int, free: int) -> str:
        """The estimate for K prompts side by side, beside what is free now that the weights are loaded."""
        needed = slots * self.of_a_slot
        told = (
            f"weights {_size(self.weights)}; a step about {_size(needed)} more, {_size(self.row)} a row and "
            f"{_size(self.prompt + self.state)} a prompt; {_size(free)} are free"
        )
        return told if needed <= free else f"{told}: too few, lower training.batch_size or execution.slots"


def estimate_memory(bench: Workbench) -> MemoryEstimate:
    """What training takes, from two small steps on the longest rows."""
    model, training = bench.backbone.model, bench.experiment.training
    frozen = [*model.parameters(), *model.buffers()]
    longest = sorted(bench.examples, key=lambda e: len(e.inputs) + len(e.target))[-4:]
    two, four = (_bytes_of_step(bench, frozen, rows) for rows in (longest[-2:], longest))
    row = max(1, (four - two) // max(1, len(longest) - 2))
    return MemoryEstimate(
        weights=sum(tensor.numel() * tensor.element_size() for tensor in frozen),
        row=row,
        prompt=max(0, two - 2 * row),
        state=4 * 4 * bench.longest_prompt.numel(),
        rows=training.batch_size,
    )


def _bytes_of_step(bench: Workbench, frozen: list[Tensor], rows: Sequence[Example]) -> int:
    backbone = bench.backbone
    prompt = bench.longest_prompt.to(backbone.device).requires_grad_()

    work = Work([prompt], [rows], bench.loss)
    return activation_bytes(lambda: bench.passes.run(backbone, work), backbone.device, frozen)


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
