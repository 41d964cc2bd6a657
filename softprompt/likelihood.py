"""How likely a model, behind a prompt, finds targets that are given: one pass over input and target together.

At every place of a target the model is told the tokens before it, so what it prefers there is what it would say next.
Greedy decoding therefore gives a target exactly where the first choice at each of its places is the target's token,
which is known without decoding. Nothing is generated here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softprompt.backbone import Backbone
from softprompt.batch import Example, collate, lift

_ROWS, _TOKENS, _PLACES = 32, 8192, 512
"""The most rows, tokens and target tokens of a pass: a target token has logits over the whole vocabulary."""


@dataclass(frozen=True, slots=True)
class Likelihoods:
    """What the model says of N targets."""

    log_probabilities: NDArray[np.float64]
    """`[N]` log-probability of each target's tokens, in nats."""
    greedy: NDArray[np.bool_]
    """`[N]` whether the model's own first choices spell the target."""


@torch.inference_mode()
def score_targets(backbone: Backbone, prompt: Tensor, examples: Sequence[Example]) -> Likelihoods:
    """Log-probabilities of N targets after a prompt `[P, H]` or `[L, 2, G, P, D]` and their inputs, in their order."""
    log_probabilities, greedy = np.empty(len(examples)), np.empty(len(examples), bool)
    opening, rest = lift(examples)
    prompts = backbone.extend([prompt.detach().to(backbone.device)], opening)
    states = backbone.composition.keep(backbone.model, prompts)
    for rows in _passes(rest):
        batch = collate([rest[i] for i in rows], [0] * len(rows), pad=backbone.pad, device=backbone.device)
        logits = backbone.composition.attend(backbone.model, states, batch).float()
        nats = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none")
        missed = (logits.argmax(1) != batch.targets).to(nats.dtype)
        tokens = torch.stack([nats, missed]).cpu().double()
        sums = tokens.new_zeros(2, len(rows)).index_add(1, batch.rows.cpu(), tokens).numpy()
        log_probabilities[rows], greedy[rows] = -sums[0], sums[1] == 0
    return Likelihoods(log_probabilities, greedy)


def _passes(examples: Sequence[Example]) -> Iterator[list[int]]:
    """The rows in passes of like length."""
    lengths = [len(e.inputs) + len(e.target) for e in examples]
    rows: list[int] = []
    places = 0
    for row in sorted(range(len(examples)), key=lengths.__getitem__):
        full = len(rows) == _ROWS or (len(rows) + 1) * lengths[row] > _TOKENS
        if rows and (full or places + len(examples[row].target) > _PLACES):
            yield rows
            rows, places = [], 0
        rows.append(row)
        places += len(examples[row].target)
    yield rows
