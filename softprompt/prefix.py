"""Prefix tuning: trained keys and values in every layer, beside soft prompts in the same batch.

    L layers   G heads of keys and values   P prompt length   D width of a head   K prompts side by side

A soft prompt is `[P, H]` and leaves keys and values in every layer as the model reads it. A prefix is these themselves,
`[L, 2, G, P, D]`: keys, as the cache holds them (after rotation), and values. So what a soft prompt leaves is a prefix,
and so is a prefix with tokens behind it. Whether a model takes a prefix is decided by a number
(`Backbone.takes_prefixes`); models without keys and values, or with layers of different shape, do not.

Source: Li and Liang 2021 (arXiv 2101.00190), without the reparameterisation, as PEFT's `PREFIX_TUNING`.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

Layers = Iterable[tuple[Tensor, Tensor]]
"""For each layer the keys and the values of K prompts, `[K, G, P, D]`; shorter prompts are padded on their left."""


def is_prefix(prompt: Tensor) -> bool:
    """Whether a prompt is a prefix `[L, 2, G, P, D]`, or else a soft prompt `[P, H]`."""
    return prompt.dim() == 5


def method_of(prompt: Tensor) -> str:
    """The method that a prompt is trained by, as an experiment calls it."""
    return "prefix_tuning" if is_prefix(prompt) else "prompt_tuning"


def length_of(prompt: Tensor) -> int:
    """P of a prompt of either kind."""
    return prompt.shape[-2]


def separate(layers: Layers, lengths: Sequence[int]) -> list[Tensor]:
    """K prefixes, of the lengths given, from what K prompts left side by side."""
    states = torch.stack([torch.stack(pair) for pair in layers])
    return [states[:, :, k, :, states.shape[4] - length :] for k, length in enumerate(lengths)]


def side_by_side(prefixes: Sequence[Tensor], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Keys and values of every layer, each `[K, G, P, D]`, and `[K, P]` ones and zeros, P being the longest length."""
    lengths = [length_of(prefix) for prefix in prefixes]
    longest = max(lengths)
    padded = [nn.functional.pad(prefix, (0, 0, longest - length_of(prefix), 0)) for prefix in prefixes]
    pairs = torch.stack(padded, dim=2).to(dtype).flatten(0, 1).unbind()
    columns = torch.arange(longest, device=pairs[0].device)
    mask = columns >= longest - torch.tensor(lengths, device=columns.device)[:, None]
    return list(pairs[::2]), list(pairs[1::2]), mask.long()


def mix(
    prompts: Sequence[Tensor], dtype: torch.dtype, leave: Callable[[list[Tensor]], Layers]
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """As `side_by_side`, of prompts of both kinds, one prefix among them at least.

    Args:
        prompts: K prompts; a soft one may be empty.
        dtype: the model's type.
        leave: what soft prompts, none of them empty, leave in every layer.
    """
    nothing = next(filter(is_prefix, prompts))[..., :0, :]
    soft = [prompt for prompt in prompts if not is_prefix(prompt) and len(prompt)]
    left = iter(separate(leave(soft), [len(prompt) for prompt in soft]) if soft else [])
    prefixes = [p if is_prefix(p) else next(left) if len(p) else nothing for p in prompts]
    return side_by_side(prefixes, dtype)
