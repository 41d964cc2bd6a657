"""What a device has and does: its name and memory, the speed of its matrix products, what a pass takes of both.

Everything is measured on the device itself; nothing is looked up by name.
"""

import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def name_of(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} threads"


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def driver_version() -> str | None:
    """Version of the NVIDIA driver; None where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    return next(iter(answer.stdout.split()), None) if answer.returncode == 0 else None


def memory(device: torch.device) -> tuple[int, int]:
    """Bytes that are free, and bytes in all."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        # What torch holds and does not use is free for us.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), total
    machine = psutil.virtual_memory()
    return machine.available, machine.total


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_run(run: Callable[[], object], device: torch.device, *, times: int = 1) -> float:
    """Seconds of a run, the mean of some, after one to warm up."""
    run()
    wait(device)
    began = time.perf_counter()
    for _ in range(times):
        run()
    wait(device)
    return (time.perf_counter() - began) / times


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best of some products of square matrices, as large as the device wants them."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(time_run(lambda: a @ b, device) for _ in range(5))


def activation_bytes(run: Callable[[], object], device: torch.device, frozen: Iterable[Tensor]) -> int:
    """Bytes that a pass takes beyond what is there before it.

    On a GPU the most that is taken at any time; on a CPU, whose memory is not counted so, what is saved for the
    backward pass.

    Args:
        run: a forward and a backward pass.
        device: where.
        frozen: tensors that are there anyway, as the weights.
    """
    if device.type != "cuda":
        return _saved_bytes(run, frozen)
    run()  # the libraries take their own workspace once
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before


def _saved_bytes(run: Callable[[], object], frozen: Iterable[Tensor]) -> int:
    there = {tensor.untyped_storage().data_ptr() for tensor in frozen}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    return sum(size for place, size in saved.items() if place not in there)
