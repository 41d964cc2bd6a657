"""What a sweep left behind, as facts, beside what its undisturbed twin left: what is lost, what is doubled.

A fact is one line of the records: an entry of a metric's history, a parameter, the state of a trial, a file. It is
compared as a whole, so a wrong value counts twice: the right one is lost, and there is one that the twin has not.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

Fact = tuple[str, ...]


@dataclass(frozen=True)
class Difference:
    """How the records of a disturbed sweep differ from those of its twin."""

    lost: tuple[Fact, ...] = ()
    """What the twin has and the sweep has not."""
    doubled: tuple[Fact, ...] = ()
    """What the sweep has more often than the twin, or beside it."""

    def __bool__(self) -> bool:
        return bool(self.lost or self.doubled)

    def lines(self, most: int = 6) -> list[str]:
        """The first of each, in words."""
        told = []
        for what, facts in (("lost", self.lost), ("doubled", self.doubled)):
            told += [f"{what}: {' '.join(' · '.join(fact).split())[:160]}" for fact in facts[:most]]
            if len(facts) > most:
                told.append(f"{what}: {len(facts) - most} more")
        return told


def compare(twin: Iterable[Fact], found: Iterable[Fact]) -> Difference:
    """Every fact is to be found exactly as often as the twin has it."""
    wanted, seen = Counter(twin), Counter(found)
    return Difference(tuple(sorted((wanted - seen).elements())), tuple(sorted((seen - wanted).elements())))
