"""Tune K prompts through one frozen model.

A `Slot` is one prompt being tuned: its parameters, its own AdamW, schedule, data order and random stream. `step` does
one step of all the slots that it is given, in as few forward and backward passes as memory and caches allow; a slot's
result depends neither on its neighbours nor on K nor on how a step is cut, to rounding. Learning rate, batch and random
draws of a step follow from the settings and the step's index alone: parameters, moments and the count of steps are a
slot's whole state.

The loss of a slot is a mean over terms. What a prompt is worth, and when to stop it, is decided elsewhere.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from softprompt.backbone import Backbone
from softprompt.batch import Example
from softprompt.loss import Loss, OverVocabulary
from softprompt.parameterization import Direct, Parameterization, Residual, cap_norms
from softprompt.passes import Passes, Work

_MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of a parameter, in its shape, beside its own count `step`."""
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
    bottleneck: int | None = None
    """Width of the network of residual reparameterisation; None is none."""
    max_norm: float | None = None
    """Longest norm of a vector: after every update, what is longer is scaled down to it."""
    dropout: bool = False
    """Whether the frozen model drops out in training."""

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
    """One prompt being tuned on a list of examples, for a loss.

    `initial` is the prompt to begin with, in any shape that the composition takes.
    """

    def __init__(
        self,
        initial: Tensor,
        examples: Sequence[Example],
        settings: Settings,
        device: torch.device,
        loss: Loss = OverVocabulary(),  # noqa: B008, a value
    ) -> None:
        self.settings = settings
        self.loss = loss
        self.parameterization = _parameterize(initial, settings, device)
        self.steps_done = 0
        self._cap_norms()
        self._examples = examples
        self._order = BatchOrder([len(e.inputs) + len(e.target) for e in examples], settings.batch_size, settings.seed)
        self._optimizer = torch.optim.AdamW(
            self.parameterization.parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay
        )

    @property
    def prompt(self) -> Tensor:
        """The prompt as it stands, `[P, H]` in float32, without a graph."""
        return self.parameterization.fold().detach()

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.steps_done >= self.settings.steps

    def next_examples(self) -> list[Example]:
        """The batch of the coming step."""
        return [self._examples[i] for i in self._order[self.steps_done]]

    def update(self) -> None:
        """One optimizer step with the gradient at hand, its norm clipped."""
        nn.utils.clip_grad_norm_(self.parameterization.parameters, self.settings.clip_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = self.settings.learning_rate_at(self.steps_done)
        self._optimizer.step()
        self._cap_norms()
        self.forget()
        self.steps_done += 1

    def forget(self) -> None:
        """Drop the gradient at hand."""
        self._optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """All that its steps have changed, by name: copies on the CPU, which later steps leave alone."""
        tensors = {f"parameterization.{name}": tensor for name, tensor in self.parameterization.state.items()}
        for index, kept in self._optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in kept.items()}
        tensors["steps_done"] = torch.tensor(self.steps_done)
        return {name: _copy(tensor) for name, tensor in tensors.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state that `state` gave, of a slot with the same settings and examples, to the same bits.

        Raises ValueError, and changes nothing, where names, shapes, types or the count of steps do not fit this slot.
        """
        steps_done = _read_count(state, self.settings.steps)
        _require_like(state, self._shapes(steps_done))
        with torch.no_grad():
            for name, tensor in self.parameterization.state.items():
                tensor.copy_(state[f"parameterization.{name}"])
        kept = {
            index: {
                "step": state[f"optimizer.{index}.step"].clone(),
                # laid out in memory as the parameter is, which may be a view
                **{name: torch.zeros_like(p).copy_(state[f"optimizer.{index}.{name}"]) for name in _MOMENTS},
            }
            for index, p in enumerate(self.parameterization.parameters)
            if steps_done
        }
        self._optimizer.load_state_dict(self._optimizer.state_dict() | {"state": kept})
        self.forget()
        self.steps_done = steps_done

    def _shapes(self, steps_done: int) -> dict[str, Tensor]:
        """Tensors of the names, shapes and types that a state after so many steps has."""
        like = {f"parameterization.{name}": tensor for name, tensor in self.parameterization.state.items()}
        if steps_done:  # AdamW keeps nothing before its first step
            for index, parameter in enumerate(self.parameterization.parameters):
                like[f"optimizer.{index}.step"] = torch.zeros(())
                like |= {f"optimizer.{index}.{name}": parameter for name in _MOMENTS}
        return like | {"steps_done": torch.tensor(0)}

    def _cap_norms(self) -> None:
        if self.settings.max_norm is not None:
            self.parameterization.move(cap_norms(self.prompt, self.settings.max_norm))


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _read_count(state: Mapping[str, Tensor], most: int) -> int:
    count = state.get("steps_done")
    if count is None or count.dtype != torch.int64 or count.shape or not 0 <= count.item() <= most:
        found = "none" if count is None else f"{count.dtype} {list(count.shape) or count.item()}"
        raise ValueError(f"steps_done must be one int64 from 0 to {most}, found {found}")
    return int(count.item())


def _require_like(state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
    if missing := sorted(like.keys() - state.keys()):
        raise ValueError(f"the tensor {missing[0]} is missing")
    if unknown := sorted(state.keys() - like.keys()):
        raise ValueError(f"the tensor {unknown[0]!r:.80} is not known here")
    for name, expected in like.items():
        found = state[name]
        if (found.shape, found.dtype) != (expected.shape, expected.dtype):
            raise ValueError(
                f"{name} must be {expected.dtype} of shape {list(expected.shape)}, "
                f"found {found.dtype} of {list(found.shape)}"
            )


def _parameterize(initial: Tensor, settings: Settings, device: torch.device) -> Parameterization:
    if settings.bottleneck is None:
        return Direct(initial, device)
    generator = torch.Generator().manual_seed(settings.seed)
    return Residual(initial, settings.bottleneck, generator, device)


def step(backbone: Backbone, slots: Sequence[Slot], passes: Passes | None = None) -> Tensor:
    """One training step of every slot.

    Where memory runs out, `passes` are halved for good, and the step begins anew. Returns the K losses before the step,
    `[K]`, in nats per term of the loss, on the model's device. A slot whose loss is not finite is left as it was,
    and does not touch the others. Raises UserError where a single example is too much for the memory.
    """
    losses = _differentiate(backbone, slots, passes or Passes.usual(backbone.device))
    for slot, finite in zip(slots, torch.isfinite(losses).tolist(), strict=True):
        if finite:
            slot.update()
        else:
            slot.forget()
    return losses


def _differentiate(backbone: Backbone, slots: Sequence[Slot], passes: Passes) -> Tensor:
    """The losses `[K]`; their gradients are left with the slots."""
    groups = _share(slots)
    while True:
        losses = torch.zeros(len(slots), device=backbone.device)
        works = [_gather([slots[k] for k in group]) for group in groups]
        try:
            for group, work in zip(groups, works, strict=True):
                losses[group] = passes.run(backbone, work)
            return losses
        except torch.OutOfMemoryError:
            pass  # until the handler is left, its traceback holds the tensors of the pass
        passes.halve(works)
        for slot in slots:
            slot.forget()


def _share(slots: Sequence[Slot]) -> list[list[int]]:
    """Which slots share passes: those of one loss; with dropout each by itself, so that its draws are its own."""
    groups: dict[Loss | int, list[int]] = {}
    for k, slot in enumerate(slots):
        groups.setdefault(k if slot.settings.dropout else slot.loss, []).append(k)
    return list(groups.values())


def _gather(slots: Sequence[Slot]) -> Work:
    """The coming step of slots that share passes."""
    first = slots[0]
    draws = np.random.SeedSequence([first.settings.seed, first.steps_done]).generate_state(1)
    return Work(
        [slot.parameterization.fold() for slot in slots],
        [slot.next_examples() for slot in slots],
        first.loss,
        dropout_seed=int(draws[0]) if first.settings.dropout else None,
    )
