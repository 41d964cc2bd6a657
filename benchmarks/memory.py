"""Peak memory of each side's training, in a process of its own that has loaded nothing but that side.

On a GPU it is what torch had allocated at the most; on a CPU the most that was resident since the program began, from
`/proc/self/status`. Not `ru_maxrss`: Linux hands that down through `exec`, so a child would show its parent's peak.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.start import Start, steady
from softprompt.batch import Example

Train = Callable[[Start], None]


@dataclass(frozen=True)
class Job:
    """What a child is to do, as plain data."""

    folder: str
    """The model."""
    precision: str
    device: str
    lengths: tuple[int, ...]
    """Prompt lengths (P), each to be trained in its turn, the longest last."""
    steps: int
    rows: list[tuple[tuple[int, ...], tuple[int, ...]]]
    """Inputs and targets of one batch. The longest batch is what sets a peak."""


def measure(job: Job) -> dict[str, dict[str, int]]:
    """Peak MB by side and prompt length, each side in a child."""
    return {side: _in_child(side, job) for side in _SIDES}


def _in_child(side: str, job: Job) -> dict[str, int]:
    child = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", side],
        input=json.dumps(asdict(job)),
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, int] = json.loads(child.stdout.splitlines()[-1])
    return found


def peaks(side: str, job: Job) -> dict[str, int]:
    """Peak MB of this process by prompt length, after training one side's prompts in it."""
    width, train = _SIDES[side](job)
    examples = [Example(tuple(inputs), tuple(target)) for inputs, target in job.rows]
    found = {}
    for length in job.lengths:
        train(Start(torch.zeros(length, width), examples, steady(batch_size=len(examples))))
        found[str(length)] = round(_peak_bytes(torch.device(job.device)) / 1e6)
    return found


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def _load_ours(job: Job) -> tuple[int, Train]:
    from softprompt.backbone import Backbone
    from softprompt.training import step

    backbone = Backbone.load(job.folder, precision=job.precision, device=job.device)

    def train(start: Start) -> None:
        slot = start.slot(backbone.device)
        for _ in range(job.steps):
            step(backbone, [slot])

    return backbone.hidden_size, train


def _load_peft(job: Job) -> tuple[int, Train]:
    from benchmarks import peer

    base = peer.load(Path(job.folder), getattr(torch, job.precision), torch.device(job.device))
    return base.config.hidden_size, lambda start: peer.run(peer.wrap(base, start.prompt), start, job.steps)


_SIDES: dict[str, Callable[[Job], tuple[int, Train]]] = {"ours": _load_ours, "peft": _load_peft}

if __name__ == "__main__":
    print(json.dumps(peaks(sys.argv[1], Job(**json.load(sys.stdin)))))
