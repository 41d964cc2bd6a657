"""Gradient checkpointing: of each decoder layer the inputs are kept, and the rest is computed again on the way back.

transformers has it for models in training alone, and drops the keys and values of the prefix there. Here a frozen model
stays in evaluation, and a layer that writes to a cache finds it, when it runs again, as it was the first time.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

_HOLE = object()
"""Stands for the cache among the inputs that are kept, so that they do not hold what other layers write to it."""


@contextmanager
def checkpointed(model: PreTrainedModel) -> Iterator[None]:
    """Inside, forward passes keep the inputs of the model's layers alone; the backward pass may come later."""
    layers: list[Any] = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    for layer in layers:
        layer.forward = partial(_run, layer, layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own is found again


def _run(layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    again: Any = partial(checkpoint, use_reentrant=False, preserve_rng_state=layer.training)
    modules: list[Any] = list(layer.modules())
    cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
    if cache is None:
        return again(forward, *args, **kwargs)
    index = next(m.layer_idx for m in modules if hasattr(m, "layer_idx"))
    before = _part(cache, index)
    written: list[Any] = []

    def run_on_a_copy(*args: Any, **kwargs: Any) -> Any:
        own = _part(before, index)
        written.append(own.layers)
        filled = {name: own if value is _HOLE else value for name, value in kwargs.items()}
        return forward(*(own if value is _HOLE else value for value in args), **filled)

    holes = {name: _HOLE if value is cache else value for name, value in kwargs.items()}
    made = again(run_on_a_copy, *(_HOLE if value is cache else value for value in args), **holes)
    cache.layers[index : index + 1] = written.pop()[index:]
    return made


def _part(cache: Any, index: int) -> Any:
    """A cache of its own with what a layer finds there; layers replace tensors in it and never write into them."""
    part = copy.copy(cache)
    part.layers = [None] * min(index, len(cache.layers)) + [copy.copy(own) for own in cache.layers[index : index + 1]]
    return part
