"""What is told to a person, for the tests of what is told."""

from softprompt.progress import SearchProgress, TrialProgress


class Told:
    """A watcher that keeps the lines of the stages."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def stage(self, text: str) -> None:
        self.lines.append(text)

    def step(self, trial: TrialProgress, search: SearchProgress) -> None:
        pass

    def end(self, title: str, outcome: str, search: SearchProgress) -> None:
        pass
