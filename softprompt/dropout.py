"""The frozen model's own dropout, active for a while and from a random stream of its own.

A model is frozen with its dropout off. Training a prompt may turn it on, as regularisation; scoring never does.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from softprompt.backbone import Backbone
from softprompt.batch import Example, collate
from softprompt.composition import concatenate


@contextmanager
def dropping_out(backbone: Backbone, seed: int) -> Iterator[None]:
    """Inside, the model drops out, drawing from this seed; backward passes belong inside too.

    After it, the model is in evaluation and the random state as it was.
    """
    devices = [backbone.device] if backbone.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        backbone.model.train()
        try:
            yield
        finally:
            backbone.model.eval()


def has_dropout(backbone: Backbone) -> bool:
    """Whether the model drops anything out in training: two draws are compared, as configs name it in many ways."""
    row = Example(tuple(range(min(16, len(backbone.embeddings)))), (0,))
    batch = collate([row], [0], pad=backbone.pad, device=backbone.device)

    def run(seed: int) -> torch.Tensor:
        with torch.inference_mode(), dropping_out(backbone, seed):
            return concatenate(backbone.model, [backbone.embed([])], batch)

    return not torch.equal(run(0), run(1))
