"""What `softprompt device` finds: the device by itself, and an experiment's model on it. Nothing is recorded."""

from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from softprompt.device import driver_version, matmul_peak, memory, name_of, time_run
from softprompt.sizing import Choice, choose_slots, running
from softprompt.training import step
from softprompt.workbench import Workbench

_STEPS = 10
"""Steps that are timed."""


@dataclass(frozen=True)
class ModelFindings:
    """An experiment's model on a device."""

    experiment: str
    attention: str
    """The model's own attention, as transformers names it."""
    composition: str
    deviation: float
    """How far the composition is from the formula, relative to what the prompts change; `Backbone.deviation`."""
    choice: Choice
    """K, the prompts that a lane would train side by side."""
    examples_per_second: float
    """In training with K prompts side by side, of the experiment's greatest length."""
    peak_share: float
    """Share of the measured matrix-multiply peak in that training."""


@dataclass(frozen=True)
class Findings:
    """A device, and an experiment's model on it where one was given."""

    device: str
    name: str
    memory_bytes: int
    free_bytes: int
    driver: str | None
    cuda: str | None
    torch: str
    transformers: str
    matmul_bfloat16_flops: float
    """Measured FLOP/s."""
    matmul_float32_flops: float
    model: ModelFindings | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain values by name."""
        return asdict(self)

    def lines(self) -> dict[str, str]:
        """What a person reads, by subject."""
        versions = {"torch": self.torch, "transformers": self.transformers, "driver": self.driver, "CUDA": self.cuda}
        lines = {
            "device": f"{self.device}, {self.name}",
            "memory": f"{self.memory_bytes / 1e9:.1f} GB, {self.free_bytes / 1e9:.1f} GB of them free",
            "versions": ", ".join(f"{name} {found}" for name, found in versions.items() if found),
            "matmul peak": f"{self.matmul_bfloat16_flops / 1e9:,.0f} GFLOP/s in bfloat16, "
            f"{self.matmul_float32_flops / 1e9:,.0f} in float32",
        }
        return lines if self.model is None else lines | _model_lines(self.model)


def _model_lines(model: ModelFindings) -> dict[str, str]:
    return {
        "experiment": model.experiment,
        "attention": model.attention,
        "composition": f"{model.composition} (deviation {model.deviation:.2g})",
        "slots": str(model.choice),
        "training": f"{model.examples_per_second:.3g} examples/s, {model.peak_share:.0%} of the matmul peak",
    }


def find_device(device: torch.device) -> Findings:
    """Measure a device by itself; a few seconds."""
    free, total = memory(device)
    return Findings(
        device=str(device),
        name=name_of(device),
        memory_bytes=total,
        free_bytes=free,
        driver=driver_version(),
        cuda=torch.version.cuda,
        torch=version("torch"),
        transformers=version("transformers"),
        matmul_bfloat16_flops=matmul_peak(device, torch.bfloat16),
        matmul_float32_flops=matmul_peak(device, torch.float32),
    )


def find_model(bench: Workbench, found: Findings) -> Findings:
    """The findings of a device with those of an experiment's model on it, which is loaded there."""
    backbone, choice = bench.backbone, choose_slots(bench)
    trained = running(bench, choice.slots)
    counter = FlopCounterMode(display=False)
    with counter:
        step(backbone, trained)
    seconds = time_run(lambda: step(backbone, trained), backbone.device, times=_STEPS)
    wide = backbone.model.dtype == torch.float32
    peak = found.matmul_float32_flops if wide else found.matmul_bfloat16_flops
    model = ModelFindings(
        experiment=f"{bench.experiment.name}, {bench.experiment.precision}",
        attention=str(backbone.model.config._attn_implementation),
        composition=backbone.composition.name,
        deviation=backbone.deviation(backbone.composition),
        choice=choice,
        examples_per_second=choice.slots * bench.experiment.training.batch_size / seconds,
        peak_share=counter.get_total_flops() / seconds / peak,
    )
    return replace(found, model=model)
