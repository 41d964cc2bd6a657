"""The number that trials are ranked by: its names, its direction, and how it is told to a person.

Which one an experiment has follows from what its target is; how it is computed stands in `evaluation`.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Objective:
    """What a search makes as great, or as small, as it can."""

    key: str
    """Its name in a column, as in `val_accuracy`."""
    name: str
    """Its name in a sentence."""
    unit: str
    """`%` of a share, or what one counts."""
    direction: Literal["maximize", "minimize"]

    def gain(self, score: float) -> float:
        """The score as a number of which the greater is the better."""
        return score if self.direction == "maximize" else -score

    def number(self, score: float) -> str:
        """The score in a table, as `87.2%` or `1.2340`."""
        return f"{score:.1%}" if self.unit == "%" else f"{score:.4f}"

    def show(self, score: float) -> str:
        """The score in a sentence, as `87.2%` or `1.2340 nats per token`."""
        return self.number(score) if self.unit == "%" else f"{self.number(score)} {self.unit}"

    def tell(self, score: float) -> str:
        """The score with its name, as `accuracy 87.2%`."""
        return f"{self.name} {self.show(score)}"


ACCURACY = Objective("accuracy", "accuracy", "%", "maximize")
TOKEN_LOSS = Objective("loss_per_token", "loss", "nats per token", "minimize")
