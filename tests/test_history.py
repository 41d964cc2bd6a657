"""Curves as tensors and back."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from softprompt.history import Entry, pack, unpack

ENTRIES = st.lists(
    st.builds(
        Entry,
        st.sampled_from(["train_loss", "val_accuracy", "val_loss"]),
        st.floats(allow_nan=False),
        st.integers(0, 2**40),
        st.integers(0, 2**50),
    ),
    max_size=20,
)


@given(ENTRIES)
def test_what_is_packed_comes_back(entries: list[Entry]) -> None:
    assert unpack(*pack(entries)) == entries


def test_a_loss_that_is_no_number_comes_back() -> None:
    (entry,) = unpack(*pack([Entry("train_loss", math.nan, 3, 5)]))
    assert math.isnan(entry.value)
    assert entry._replace(value=0.0) == Entry("train_loss", 0.0, 3, 5)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"key": torch.tensor([0, 2], dtype=torch.int32)}, "entries of metrics beside its 2 names"),
        ({"key": torch.tensor([-1, 0], dtype=torch.int32)}, "entries of metrics beside its 2 names"),
        ({"key": torch.tensor([0, 1])}, "key must be torch.int32 in one row"),
        ({"value": torch.zeros(2)}, "value must be torch.float64 in one row"),
        ({"value": torch.zeros(3, dtype=torch.float64)}, "value must be torch.float64 in one row"),
        ({"step": torch.zeros(2, 1, dtype=torch.int64)}, "step must be torch.int64 in one row"),
        ({"more": torch.zeros(2)}, "must have key, value, step, time_ms, found"),
    ],
)
def test_columns_that_do_not_belong_together_are_refused(change: dict[str, Any], told: str) -> None:
    names, columns = pack([Entry("train_loss", 0.5, 1, 7), Entry("val_loss", 0.25, 1, 8)])
    with pytest.raises(ValueError, match=told):
        unpack(names, columns | change)
