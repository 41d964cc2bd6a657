"""Tune K prompts through one frozen model.

A `Slot` is one prompt being tuned: its vectors, its own AdamW, schedule, data order and random stream. `step` runs the
slots that it is given through one forward and one backward pass; a slot's result depends neither on its neighbours nor
on K, to rounding. A slot's whole state follows from its settings, its data and the number of its steps.

The loss of a slot is the mean cross-entropy of its target tokens (the words of labels, or texts), over the vocabulary.
What a prompt is worth, and when to stop it, is decided elsewhere.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from softprompt.backbone import Backbone
from softprompt.composition import Batch, Example, collate, lift

_WINDOW = 64
"""Batches whose examples are sorted by length together: long enough for full batches of like length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How one prompt is tuned."""

    steps: int
    batch_size: int
    learning_rate: float
    schedule: Literal["constant", "linear", "cosine"]
    warmup_steps: int
    weight_decay: float
    clip_norm: float
    seed: int

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of the step with this index: up linearly over the warm-up, then by the schedule."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        factor = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
        return self.learning_rate * factor[self.schedule]


class BatchOrder:
    """Which examples make up batch n: a pure function of the lengths, the batch size, the seed and n.

    Every epoch is a new permutation, in which examples of like length are brought together so that little is padding,
    and the batches are shuffled again. The last batch of an epoch may be short.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self._lengths = np.asarray(lengths)
        self._size = batch_size
        self._seed = seed
        self._per_epoch = math.ceil(len(lengths) / batch_size)
        self._epoch = -1
        self._batches: list[list[int]] = []

    def __getitem__(self, n: int) -> list[int]:
        epoch, position = divmod(n, self._per_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._shuffle(epoch)
        return self._batches[position]

    def _shuffle(self, epoch: int) -> list[list[int]]:
        random = np.random.default_rng([self._seed, epoch])
        order = random.permutation(len(self._lengths))
        window = _WINDOW * self._size
        batches: list[list[int]] = []
        for start in range(0, len(order), window):
            part = order[start : start + window]
            part = part[np.argsort(self._lengths[part], kind="stable")]
            batches += [part[i : i + self._size].tolist() for i in range(0, len(part), self._size)]
        return [batches[i] for i in random.permutation(len(batches))]


class Slot:
    """One prompt being tuned on a list of examples."""

    def __init__(self, initial: Tensor, examples: Sequence[Example], settings: Settings, device: torch.device) -> None:
        self.settings = settings
        self.prompt = nn.Parameter(initial.detach().to(device, torch.float32, copy=True))
        """`[P, H]`, float32."""
        self.steps_done = 0
        self._examples = examples
        self._order = BatchOrder([len(e.inputs) + len(e.target) for e in examples], settings.batch_size, settings.seed)
        self._optimizer = torch.optim.AdamW(
            [self.prompt], lr=settings.learning_rate, weight_decay=settings.weight_decay
        )

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.steps_done >= self.settings.steps

    def next_examples(self) -> list[Example]:
        """The batch of the coming step."""
        return [self._examples[i] for i in self._order[self.steps_done]]

    def update(self) -> None:
        """One optimizer step with the gradient at hand, its norm clipped."""
        nn.utils.clip_grad_norm_([self.prompt], self.settings.clip_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = self.settings.learning_rate_at(self.steps_done)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.steps_done += 1


def step(backbone: Backbone, slots: Sequence[Slot]) -> Tensor:
    """One training step of every slot, in one forward and one backward pass.

    Returns the K losses before the step, `[K]`, in nats per target token, on the model's device. A slot whose loss is
    not finite is left as it was, and does not touch the others.
    """
    batches = [slot.next_examples() for slot in slots]
    owner = [k for k, batch in enumerate(batches) for _ in batch]
    logits, batch = forward(backbone, [slot.prompt for slot in slots], [e for batch in batches for e in batch], owner)
    tokens = nn.functional.cross_entropy(logits.float(), batch.targets, reduction="none")
    losses = _mean_by_owner(tokens, batch.owner[batch.rows], len(slots))
    losses.sum().backward()
    for slot, finite in zip(slots, torch.isfinite(losses).tolist(), strict=True):
        if finite:
            slot.update()
        else:
            slot.prompt.grad = None
    return losses.detach()


def forward(
    backbone: Backbone, prompts: Sequence[Tensor], examples: Sequence[Example], owner: Sequence[int]
) -> tuple[Tensor, Batch]:
    """Logits `[M, V]` of N examples at their target tokens, each after its prompt, and where those are."""
    common, examples = lift(examples)
    batch = collate(examples, owner, pad=backbone.pad, device=backbone.device)
    opening = backbone.embed(common)
    return backbone.composition(backbone.model, [torch.cat([prompt, opening]) for prompt in prompts], batch), batch


def _mean_by_owner(values: Tensor, owner: Tensor, count: int) -> Tensor:
    zeros = values.new_zeros(count)
    return zeros.index_add(0, owner, values) / zeros.index_add(0, owner, torch.ones_like(values))
