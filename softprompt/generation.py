"""Write what a model says behind a prompt, token by token, until it ends the sequence. Greedy: nothing is drawn."""

from collections.abc import Sequence

import torch
from torch import Tensor

from softprompt.backbone import Backbone
from softprompt.composition import Example, collate


@torch.inference_mode()
def generate(
    backbone: Backbone,
    prompts: Sequence[Tensor],
    inputs: Sequence[Sequence[int]],
    owner: Sequence[int] | None = None,
    *,
    max_new_tokens: int,
) -> list[tuple[int, ...]]:
    """The continuation of N inputs as token ids, without the end token; `owner[n]` is the prompt of row n."""
    owner = owner or [0] * len(inputs)
    return [_write(backbone, prompts[k], tuple(row), max_new_tokens) for k, row in zip(owner, inputs, strict=True)]


def _write(backbone: Backbone, prompt: Tensor, row: tuple[int, ...], most: int) -> tuple[int, ...]:
    written: tuple[int, ...] = ()
    while len(written) < most:
        batch = collate([Example(row + written, (0,))], [0], pad=backbone.pad, device=backbone.device)
        token = int(backbone.composition(backbone.model, [prompt.to(backbone.device)], batch).argmax())
        if token == backbone.tokenizer.eos_token_id:
            break
        written += (token,)
    return written
