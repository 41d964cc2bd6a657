"""Slots and examples for the tests of training."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from softprompt.backbone import Backbone
from softprompt.batch import Example
from softprompt.loss import Loss, OverVocabulary
from softprompt.passes import Passes
from softprompt.training import Settings, Slot, step

Frozen = Callable[..., Backbone]
"""Makes tiny backbones that are looked after: the fixture `frozen`."""


def make_settings(**changes: Any) -> Settings:
    usual: dict[str, Any] = {
        "steps": 12,
        "batch_size": 4,
        "learning_rate": 0.05,
        "schedule": "cosine",
        "warmup_steps": 2,
    }
    return Settings(**(usual | {"weight_decay": 0.01, "clip_norm": 1.0, "seed": 0} | changes))


def draw_examples(count: int = 40, seed: int = 0) -> list[Example]:
    """Inputs of random tokens; the target says whether the first of them is a low or a high one."""
    random = np.random.default_rng(seed)
    inputs = [tuple(random.integers(3, 370, size=random.integers(2, 12)).tolist()) for _ in range(count)]
    return [Example(row, (300, 301) if row[0] < 185 else (310,)) for row in inputs]


def make_slot(
    length: int = 4,
    seed: int = 0,
    examples: list[Example] | None = None,
    loss: Loss = OverVocabulary(),  # noqa: B008, a value
    prefix: bool = False,
    **changes: Any,
) -> Slot:
    shape = (2, 2, 2, length, 8) if prefix else (length, 32)
    initial = 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    settings = make_settings(seed=seed, **changes)
    return Slot(initial, examples or draw_examples(), settings, torch.device("cpu"), loss)


def train(backbone: Backbone, slot: Slot, steps: int | None = None, passes: Passes | None = None) -> list[float]:
    """The losses of some steps of a slot alone; all that are left by default."""
    left = slot.settings.steps - slot.steps_done
    return [step(backbone, [slot], passes).item() for _ in range(left if steps is None else steps)]


MIXED: list[dict[str, Any]] = [
    {"length": 1, "seed": 1, "batch_size": 2, "learning_rate": 0.2, "schedule": "constant"},
    {"length": 7, "seed": 2, "batch_size": 5, "learning_rate": 0.01, "schedule": "linear"},
    {"length": 4, "seed": 3, "batch_size": 3, "learning_rate": 0.05, "schedule": "cosine", "clip_norm": 0.1},
]
"""Slots that differ in length, rate, batch size, schedule and clipping."""

FAMILY: list[dict[str, Any]] = [
    {"length": 3, "seed": 4, "batch_size": 3, "bottleneck": 6},
    {"length": 5, "seed": 5, "learning_rate": 0.1, "max_norm": 1.5},
    {"length": 2, "seed": 6, "dropout": True},
    {"length": 4, "seed": 7, "batch_size": 3, "bottleneck": 5, "max_norm": 1.2, "dropout": True},
]
"""Slots of all the further settings."""
