"""How a step is cut into forward and backward passes (micro-batches), and what each of them needs.

The cut changes no gradient, to rounding: every term of a loss has the weight that it has in the whole step. One
exception is said where it is made: with dropout, each pass draws its own. Nothing here updates a prompt.
"""

import logging
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from softprompt.backbone import Backbone
from softprompt.batch import Example, lift, send
from softprompt.checkpointing import checkpointed
from softprompt.composition import Composition
from softprompt.dropout import dropping_out
from softprompt.errors import UserError
from softprompt.loss import Loss

_log = logging.getLogger(__name__)


class Work:
    """K prompts with the examples of one step of each, for one loss."""

    def __init__(
        self,
        prompts: Sequence[Tensor],
        batches: Sequence[Sequence[Example]],
        loss: Loss,
        dropout_seed: int | None = None,
    ) -> None:
        self.prompts = prompts
        self.loss = loss
        self.dropout_seed = dropout_seed
        """What the model's dropout draws from; None where it is off. Another cut is another draw."""
        self.opening, self.examples = lift([example for batch in batches for example in batch])
        """What all inputs begin with, and the N examples without it."""
        self.owner = [k for k, batch in enumerate(batches) for _ in batch]
        self.terms = [sum(map(loss.terms, batch)) for batch in batches]
        """`[K]` terms of each prompt's loss."""
        self.lengths = [loss.tokens(example) for example in self.examples]
        """`[N]` tokens that are read for each example."""


@dataclass
class Passes:
    """The size of passes, and whether they keep what happens inside of a layer."""

    tokens: int
    """Tokens of a pass at the most, padding included; a single example may have more. Halved where memory runs out."""
    gradient_checkpointing: bool = False
    """Whether layers run again on the way back, rather than keep all that they compute."""

    @classmethod
    def usual(cls, device: torch.device) -> "Passes":
        """What suits the caches of a CPU; elsewhere as large as is of use."""
        return cls(1024 if device.type == "cpu" else 32_768)

    def run(self, backbone: Backbone, work: Work) -> Tensor:
        """The losses `[K]` without a graph; their gradients are added to what the prompts are made of.

        The states of the prompts are computed once. Their gradients are summed over the passes, in float32, and go
        through the prompts at the end.
        """
        model, parts = backbone.model, self.cut(work.lengths)
        prompts = backbone.extend(work.prompts, work.opening)
        terms = send(torch.tensor(work.terms), backbone.device)
        losses = torch.zeros(len(prompts), device=backbone.device)
        with self._composition(backbone, work.dropout_seed) as composition:
            ends, leaves, logits = prompts, prompts, partial(composition, model, prompts)
            if len(parts) > 1:
                states, ends, leaves = _cut_off(composition, composition.keep(model, prompts))
                logits = partial(composition.attend, model, states)
            gradients = [torch.zeros_like(leaf, dtype=torch.float32) for leaf in leaves]
            for part in parts:
                examples, owner = zip(*((work.examples[n], work.owner[n]) for n in part), strict=True)
                found, owners = work.loss.losses(backbone, examples, owner, logits)
                shares = torch.zeros_like(losses).index_add(0, owners, found / terms[owners])
                for total, gradient in zip(gradients, torch.autograd.grad(shares.sum(), leaves), strict=True):
                    total += gradient
                losses += shares.detach()
            torch.autograd.backward(ends, [g.to(end.dtype) for g, end in zip(gradients, ends, strict=True)])
        return losses

    def cut(self, lengths: Sequence[int]) -> list[list[int]]:
        """The rows of each pass, longest first: as few passes as the limit allows, and those of about one size."""
        count = len(_pack(lengths, self.tokens))
        if count == 1:
            return _pack(lengths, self.tokens)
        least = bisect_left(range(self.tokens), -count, key=lambda tokens: -len(_pack(lengths, tokens)))
        return _pack(lengths, least)

    def halve(self, works: Sequence[Work]) -> None:
        """Go on with passes of half the tokens that the largest of these had.

        Raises UserError where every pass has a single example.
        """
        passes = [(work, part) for work in works for part in self.cut(work.lengths)]
        if all(len(part) == 1 for _, part in passes):
            raise UserError(
                "training: a single example is too much for the device's memory; lower execution.slots, search.length "
                "or training.max_tokens, or set execution.gradient_checkpointing"
            )
        largest = max(len(part) * work.lengths[part[0]] for work, part in passes if len(part) > 1)
        self.tokens = largest // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        _log.warning("out of memory with %d tokens a pass; going on with %d", largest, self.tokens)

    @contextmanager
    def _composition(self, backbone: Backbone, dropout_seed: int | None) -> Iterator[Composition[Any]]:
        plain = dropout_seed is None and not self.gradient_checkpointing
        composition = backbone.composition if plain else backbone.native
        with ExitStack() as stack:
            if dropout_seed is not None:
                stack.enter_context(dropping_out(backbone, dropout_seed))
            if self.gradient_checkpointing:
                stack.enter_context(checkpointed(backbone.model))
            yield composition


def _cut_off(composition: Composition[Any], states: Any) -> tuple[Any, list[Tensor], list[Tensor]]:
    """The states without their past, the tensors where that ends, and those that stand for them from now on."""
    ends: list[Tensor] = []
    leaves: list[Tensor] = []

    def cut(tensor: Tensor) -> Tensor:
        ends.append(tensor)
        leaves.append(tensor.detach().requires_grad_())
        return leaves[-1]

    return composition.map(states, cut), ends, leaves


def _pack(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Rows in passes of at most so many tokens, padding included, each filled before the next is begun."""
    parts: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if parts and (len(parts[-1]) + 1) * lengths[parts[-1][0]] <= tokens:
            parts[-1].append(row)
        else:
            parts.append([row])
    return parts
