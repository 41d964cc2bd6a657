"""Which row goes into which split: no row in two of them, and the same division for the same seed.

A split that the data names stays as it is, but for rows whose inputs stand there with different labels; free texts may
differ. Splits that the data does not name are carved from the training rows, after duplicates were dropped.

The place of a row in the order of carving follows from the seed and from its own inputs alone, and test comes before
validation before train. So a row that is added can push others from test to validation to train, and never the other
way: what was once trained on does not come into a later test split. Only a row that falls away lets others move up;
whether that has happened, the last place of the test split tells (`carving_rank`).
"""

import hashlib
import json
from collections import Counter
from typing import NamedTuple, TypeAlias

from softprompt.errors import UserError
from softprompt.spec import ExperimentSpec


class Example(NamedTuple):
    """One row: the values of the template's fields, and the label or free text."""

    inputs: tuple[str, ...]
    label: str


Splits: TypeAlias = dict[str, list[Example]]


def divide(pools: Splits, experiment: ExperimentSpec, left_out: Counter[str]) -> Splits:
    """The three splits, from the examples of each split that the data names.

    Args:
        pools: Examples in file order; `train` always, `validation` and `test` where the data names them.
        experiment: Gives seed, sizes and labels.
        left_out: Is added to, by reason.

    Raises:
        UserError: Fewer rows than asked for, an empty split, or a label without a training row.
    """
    if experiment.labels.words:
        pools = {split: _without_conflicts(examples, left_out) for split, examples in pools.items()}
    if len(pools) < 3:
        pools["train"] = _without_duplicates(pools["train"], left_out)
    pools = _without_overlap(pools, left_out)
    for split in pools:
        if not pools[split]:
            raise UserError(f"splits.{split}: no usable row is left for the {split} split; left out: {_tell(left_out)}")
    splits = _carve(pools, experiment, left_out)
    for label in experiment.labels.words:
        if all(example.label != label for example in splits["train"]):
            raise UserError(
                f"splits.train: none of the {len(splits['train'])} training rows has the label {label!r}; "
                "give more rows, or ask for fewer in splits.test and splits.validation"
            )
    return splits


def carving_rank(example: Example, seed: int) -> str:
    """The place of a row in the order of carving, whatever other rows there are; as text, it sorts."""
    return hashlib.sha256(json.dumps([seed, *example.inputs]).encode()).hexdigest()


def _without_conflicts(examples: list[Example], left_out: Counter[str]) -> list[Example]:
    labels: dict[tuple[str, ...], set[str]] = {}
    for example in examples:
        labels.setdefault(example.inputs, set()).add(example.label)
    kept = [e for e in examples if len(labels[e.inputs]) == 1]
    _count(left_out, "conflicting labels", len(examples) - len(kept))
    return kept


def _without_duplicates(examples: list[Example], left_out: Counter[str]) -> list[Example]:
    kept = list(dict.fromkeys(examples))
    _count(left_out, "duplicate", len(examples) - len(kept))
    return kept


def _without_overlap(pools: Splits, left_out: Counter[str]) -> Splits:
    """A row that stands in two splits stays in the one that judges later: test before validation before train."""
    seen: set[tuple[str, ...]] = set()
    kept: Splits = {}
    for split in [s for s in ("test", "validation", "train") if s in pools]:
        kept[split] = [e for e in pools[split] if e.inputs not in seen]
        _count(left_out, "stands in two splits", len(pools[split]) - len(kept[split]))
        seen.update(e.inputs for e in pools[split])
    return kept


def _carve(pools: Splits, experiment: ExperimentSpec, left_out: Counter[str]) -> Splits:
    """Split what is not there from the training rows in the order of carving: test first, then validation."""
    asked = {s: getattr(experiment.splits, s) for s in ("test", "validation") if s not in pools}
    pool = pools["train"]
    inputs = len({example.inputs for example in pool})
    needed = sum(asked.values()) + max(1, len(experiment.labels.words))
    if asked and inputs < needed:
        asks = " and ".join(f"splits.{split}={size}" for split, size in asked.items())
        train = "a training row for each label" if experiment.labels.words else "a training row"
        raise UserError(
            f"{asks} cannot be carved: with {train} that takes {needed} rows, and "
            f"{inputs} are available; ask for fewer rows (left out: {_tell(left_out)})"
        )
    shuffled = sorted(pool, key=lambda example: carving_rank(example, experiment.seed))
    splits = {s: e for s, e in pools.items() if s != "train"}
    for split, size in asked.items():
        splits[split], shuffled = shuffled[:size], shuffled[size:]
        # Other texts for its last input: they follow it in the order, and would go into a split that comes before it.
        rest = [e for e in shuffled if e.inputs != splits[split][-1].inputs]
        _count(left_out, "stands in two splits", len(shuffled) - len(rest))
        shuffled = rest
    splits["train"] = shuffled[: experiment.splits.train]
    return splits


def _count(left_out: Counter[str], reason: str, rows: int) -> None:
    if rows:
        left_out[reason] += rows


def _tell(left_out: Counter[str]) -> str:
    return ", ".join(f"{rows} {reason}" for reason, rows in left_out.items()) or "none"
