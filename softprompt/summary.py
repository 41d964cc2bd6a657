"""What a prompt remembers of the rows it was made on: how many of each label, and how long they are.

It travels with the prompt, so that later rows can be compared with them when these are long gone; no text of theirs is
in it.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from softprompt.data import SPLITS
from softprompt.data.tokens import Tokens

if TYPE_CHECKING:
    from softprompt.workbench import Workbench

_DIGITS = 8
"""Binary digits of a length that are kept: up to 255 tokens it is exact, and a record has some thousand at the most."""


class Summary(BaseModel):
    """N rows in numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: int
    """N."""
    labels: dict[str, int]
    """Rows of each label; free text has none."""
    inputs: dict[int, int]
    """Rows by the tokens of their input, rounded down to eight binary digits."""
    texts: dict[int, int]
    """Rows by the tokens of their free text, likewise; labels have none."""


def summarize(bench: "Workbench") -> Summary:
    """The experiment's own rows, of all splits."""
    answers = [answer for split in SPLITS for answer in bench.split(split).answers]
    inputs = [tokens for split in SPLITS for tokens in bench.split(split).inputs]
    return _summary(bench, answers, inputs, [tokens for split in SPLITS for tokens in bench.targets[split][0]])


def summarize_rows(bench: "Workbench", rows: Sequence[Mapping[str, str]]) -> Summary:
    """Other rows, read as the experiment reads its own; each has its columns, and `label`, which it knows."""
    answers = [row["label"] for row in rows]
    inputs = bench.encode(rows).inputs if rows else []
    return _summary(bench, answers, inputs, bench.target.encode(answers)[0] if rows else [])


def _summary(bench: "Workbench", answers: list[str], inputs: list[Tokens], targets: list[Tokens]) -> Summary:
    words = bench.experiment.labels.words
    found = Counter(answers)
    return Summary(
        rows=len(answers),
        labels={label: found[label] for label in words},
        inputs=_count(inputs),
        texts={} if words else _count(targets),
    )


def _count(rows: list[Tokens]) -> dict[int, int]:
    return dict(sorted(Counter(_round(len(row)) for row in rows).items()))


def _round(length: int) -> int:
    shift = max(0, length.bit_length() - _DIGITS)
    return length >> shift << shift
