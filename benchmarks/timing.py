"""Clocks, turns, and the machine that they are taken on."""

import platform
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch


def timed(run: Callable[[], object]) -> float:
    """Seconds of a call, all work of the device included."""
    began = now()
    run()
    return now() - began


def now() -> float:
    """Seconds on a clock, when all work of the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Stopwatch:
    """Seconds of one side's work: only what happens inside `running` counts, and of that nothing inside `paused`."""

    def __init__(self) -> None:
        self._counted = 0.0
        self._began: float | None = None

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return self._counted + (0.0 if self._began is None else now() - self._began)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count."""
        self._began = now()
        try:
            yield
        finally:
            self._counted, self._began = self.seconds, None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count, inside of `running`."""
        self._counted, self._began = self.seconds, None
        try:
            yield
        finally:
            self._began = now()


Point = tuple[int, float, float]
"""Steps, seconds and validation accuracy of a prompt in training."""


def ratio(peer: float | None, ours: float | None) -> float | None:
    """How many times as long the peer takes; None where one of the two did not get there."""
    return round(peer / ours, 2) if peer and ours else None


def in_turns(rounds: int, ours: Callable[[], float], peers: Callable[[], float]) -> dict[str, Any]:
    """Both sides by turns; the ratio is the median of the rounds' ratios."""
    pairs = [(ours(), peers()) for _ in range(rounds)]
    for our, peer in pairs:
        print(f"  ours {our:7.2f}   PEFT {peer:7.2f}   ratio {our / peer:.2f}", flush=True)
    return {
        "ours": round(median(our for our, _ in pairs), 2),
        "peft": round(median(peer for _, peer in pairs), 2),
        "ratio": round(median(our / peer for our, peer in pairs), 2),
        "rounds": [[round(our, 2), round(peer, 2)] for our, peer in pairs],
    }


def measure_peak(device: torch.device, size: int) -> float:
    """FLOP/s of the best of some bfloat16 products of square matrices."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / min(timed(lambda: a @ b) for _ in range(8))


def describe_device(device: torch.device) -> tuple[str, str]:
    """The device in words, and as the name of a file."""
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{_processor()}, {torch.get_num_threads()} threads"
    )
    return name, re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
