"""What both sides of a measurement are given. Imports nothing but the engine: peak memory is measured with it alone."""

from dataclasses import dataclass

import torch
from torch import Tensor

from softprompt.batch import Example
from softprompt.training import BatchOrder, Settings, Slot

Rows = tuple[list[tuple[int, ...]], list[int]]
"""Validation rows: their inputs as token ids, and the index of each one's label."""


@dataclass(frozen=True)
class Start:
    """Where a prompt starts, the rows that it is trained on, and how."""

    prompt: Tensor
    """`[P, H]`."""
    examples: list[Example]
    settings: Settings

    def slot(self, device: torch.device) -> Slot:
        """The prompt in our training."""
        return Slot(self.prompt, self.examples, self.settings, device)

    def rows(self, steps: int) -> list[Example]:
        """The examples of the first steps in the order in which a slot takes them, B for each step."""
        lengths = [len(e.inputs) for e in self.examples]
        order = BatchOrder(lengths, self.settings.batch_size, self.settings.seed)
        return [self.examples[i] for n in range(steps) for i in order[n]]


def steady(*, batch_size: int = 16, seed: int = 0) -> Settings:
    """Settings under which every step is like the one before, and none is the last."""
    return Settings(
        steps=10**6,
        batch_size=batch_size,
        learning_rate=0.01,
        schedule="constant",
        warmup_steps=0,
        weight_decay=0.0,
        clip_norm=1.0,
        seed=seed,
    )
