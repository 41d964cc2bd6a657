"""What a trial leaves behind it: its curves, entry by entry, and how it ended.

The one source of both: MLflow and checkpoints are written from it. Nothing here knows of either.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Outcome = Literal["finished", "pruned", "failed", "interrupted"]

TRAIN_LOSS = "train_loss"
"""Training loss of a step, in nats per term of the loss."""
VAL = "val_"
"""What stands before the name of a metric on the validation split, as in `val_accuracy`."""


class Entry(NamedTuple):
    """One value of one metric."""

    key: str
    value: float
    step: int
    """Steps done when it came about."""
    time_ms: int
    """When that was, in milliseconds since 1970."""


_COLUMNS = {"key": torch.int32, "value": torch.float64, "step": torch.int64, "time_ms": torch.int64}


def pack(history: Sequence[Entry]) -> tuple[list[str], dict[str, Tensor]]:
    """The N entries as the names of the metrics and four tensors `[N]`; a key is the place of its name."""
    names = list(dict.fromkeys(entry.key for entry in history))
    places = {name: place for place, name in enumerate(names)}
    columns = {
        "key": [places[entry.key] for entry in history],
        "value": [entry.value for entry in history],
        "step": [entry.step for entry in history],
        "time_ms": [entry.time_ms for entry in history],
    }
    return names, {name: torch.tensor(values, dtype=_COLUMNS[name]) for name, values in columns.items()}


def unpack(names: Sequence[str], columns: Mapping[str, Tensor]) -> list[Entry]:
    """The entries that `pack` was given; ValueError where these are not of its making."""
    if columns.keys() != _COLUMNS.keys():
        raise ValueError(f"the history must have {', '.join(_COLUMNS)}, found {', '.join(sorted(columns)) or 'none'}")
    shape = columns["key"].shape
    for name, dtype in _COLUMNS.items():
        column = columns[name]
        if (column.dtype, column.shape, column.dim()) != (dtype, shape, 1):
            raise ValueError(f"the history's {name} must be {dtype} in one row, found {column.dtype} of {column.shape}")
    keys = columns["key"]
    if len(keys) and (int(keys.min()) < 0 or int(keys.max()) >= len(names)):
        raise ValueError(f"the history has entries of metrics beside its {len(names)} names")
    values, steps, times = (columns[name].tolist() for name in ("value", "step", "time_ms"))
    return [Entry(names[k], v, s, t) for k, v, s, t in zip(keys.tolist(), values, steps, times, strict=True)]
