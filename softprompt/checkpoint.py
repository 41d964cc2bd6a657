"""What a trial has come to: the entries of its history, and its end."""

from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from softprompt.tracking import Outcome


class Entry(NamedTuple):
    """One value of one metric of a trial."""

    key: str
    value: float
    step: int
    time_ms: int
    """When it came about, in milliseconds since 1970."""


class Ending(BaseModel):
    """How a trial ended."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    outcome: Outcome
    reason: str
    score: float | None
    """Best score on the validation split."""
    val_loss: float | None
    """Loss there, in nats."""
    steps: int
    seconds: float
