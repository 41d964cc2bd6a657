"""What a person watches while it runs: stages, and the trials in training.

The library reports to the watcher that is set, and knows nothing of terminals. Without one, plain lines are printed,
which a Prefect flow puts into its log.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class TrialProgress:
    """One trial in training."""

    number: int
    title: str
    """The trial in words, as `trial 0: labels · P=20 · lr 0.01`."""
    step: int
    steps: int
    rung: int
    """Validations done."""
    rungs: int
    score: str | None
    """Best score on the validation split so far, in words, as `accuracy 87.2%`."""
    loss: float
    """Training loss of the last step, in nats per target token."""


@dataclass(frozen=True, slots=True)
class SearchProgress:
    """The search as a whole."""

    ended: int
    """Trials that finished, failed or were pruned."""
    trials: int | None
    """Trials of the budget."""
    best: str | None
    """Best score on the validation split of all trials so far, in words."""
    seconds_left: float | None
    """Estimate of the time left."""


class Watcher(Protocol):
    """Whoever shows the progress."""

    def stage(self, text: str) -> None:
        """Something that takes a while begins, or has a result."""

    def step(self, trial: TrialProgress, search: SearchProgress) -> None:
        """A trial has made a step."""

    def end(self, title: str, outcome: str, search: SearchProgress) -> None:
        """A trial has ended: finished, pruned or failed."""


class Lines:
    """Plain lines: stages, rungs and ends, not every step."""

    def __init__(self, say: Callable[[str], None] | None = None) -> None:
        # `print` is looked up at every call, because Prefect replaces it inside a flow run.
        self._say = say or (lambda text: print(text, flush=True))
        self._rungs: dict[str, int] = {}

    def stage(self, text: str) -> None:
        """One line."""
        self._say(text)

    def step(self, trial: TrialProgress, search: SearchProgress) -> None:
        """One line where the trial has just been scored, else nothing."""
        if trial.score is None or trial.rung == self._rungs.get(trial.title):
            return
        self._rungs[trial.title] = trial.rung
        rung = f"rung {trial.rung} of {trial.rungs}, step {trial.step} of {trial.steps}, loss {trial.loss:.3f}"
        score = f"best validation {trial.score}"
        self._say(f"{trial.title}: {rung}, {score}, {time_left(search.seconds_left)}")

    def end(self, title: str, outcome: str, search: SearchProgress) -> None:
        """One line."""
        self._rungs.pop(title, None)  # another sweep of this process may have a trial of the same title
        of = f" of {search.trials}" if search.trials else ""
        self._say(f"{title}: {outcome}; {search.ended}{of} trials done, {time_left(search.seconds_left)}")


def time_left(seconds: float | None) -> str:
    """`about 3:20 left`, or what is known."""
    if seconds is None:
        return "time left not known yet"
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    return f"about {minutes}:{rest:02d} left"


_watchers: list[Watcher] = [Lines()]


def watcher() -> Watcher:
    """The watcher that is set."""
    return _watchers[-1]


@contextmanager
def watched_by(shown: Watcher) -> Iterator[None]:
    """Report to another watcher inside the block."""
    _watchers.append(shown)
    try:
        yield
    finally:
        _watchers.remove(shown)
