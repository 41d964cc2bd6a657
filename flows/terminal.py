"""Progress for a person in a terminal, and plain lines where there is none."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from softprompt.progress import Lines, SearchProgress, TrialProgress, time_left, watched_by


@contextmanager
def shown() -> Iterator[None]:
    """Show the progress of what runs inside the block."""
    # What is shown holds texts of the user's, whose [brackets] and :colons: are no markup.
    console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        with watched_by(_Recorded(Lines(lambda text: console.print(text, soft_wrap=True)))):
            yield
        return
    with _progress(console) as progress, watched_by(_Recorded(_Bars(progress))):
        yield


def _progress(console: Console) -> Progress:
    title, note = (TextColumn(text, markup=False) for text in ("{task.description}", "{task.fields[note]}"))
    columns = (SpinnerColumn(), title, BarColumn(24), MofNCompleteColumn(), note, TimeElapsedColumn())
    return Progress(*columns, console=console)


class _Bars:
    """One bar for the search and one for each trial in training; what has ended moves above them."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._search: TaskID | None = None
        self._trials: dict[str, TaskID] = {}

    def stage(self, text: str) -> None:
        if self._search is not None and not self._trials:
            self._progress.remove_task(self._search)
            self._search = None
        self._progress.console.print(f"· {text}")

    def step(self, trial: TrialProgress, search: SearchProgress) -> None:
        if trial.title not in self._trials:
            self._trials[trial.title] = self._progress.add_task(f"  {trial.title}", total=trial.steps, note="")
        best = "" if trial.score is None else f"best {trial.score}, "
        note = f"rung {trial.rung}/{trial.rungs}, {best}loss {trial.loss:.3f}"
        self._progress.update(self._trials[trial.title], completed=trial.step, note=note)
        self._show_search(search)

    def end(self, title: str, outcome: str, search: SearchProgress) -> None:
        if title in self._trials:
            self._progress.remove_task(self._trials.pop(title))
        self._progress.console.print(f"  {title}: {outcome}")
        self._show_search(search)

    def _show_search(self, search: SearchProgress) -> None:
        if self._search is None:
            self._search = self._progress.add_task("search", total=search.trials, note="")
        best = "" if search.best is None else f"best {search.best}, "
        self._progress.update(self._search, completed=search.ended, note=best + time_left(search.seconds_left))


class _Recorded:
    """Passes on to a watcher, and prints to the flow run's log as well, which Prefect takes from standard output."""

    def __init__(self, seen: Lines | _Bars) -> None:
        self._both = (seen, Lines())

    def stage(self, text: str) -> None:
        for watcher in self._both:
            watcher.stage(text)

    def step(self, trial: TrialProgress, search: SearchProgress) -> None:
        for watcher in self._both:
            watcher.step(trial, search)

    def end(self, title: str, outcome: str, search: SearchProgress) -> None:
        for watcher in self._both:
            watcher.end(title, outcome, search)
