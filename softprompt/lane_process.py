"""A lane in a process of its own: the work comes in as JSON on standard input, what happens goes out as JSON lines.

Standard input stays open as long as the process that started us lives. Where it closes, we stop as on SIGTERM: no lane
trains for nobody. What libraries print goes to standard error, which whoever started us keeps in a log.
"""

import json
import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import IO, Any

from pydantic import BaseModel, ConfigDict

from softprompt.data import load_prepared
from softprompt.errors import UserError
from softprompt.home import without_secrets
from softprompt.lane import Lane
from softprompt.progress import SearchProgress, TrialProgress, watched_by
from softprompt.search import HopelessSweep
from softprompt.spec import ExperimentSpec
from softprompt.sweep import Sweep
from softprompt.trials import TrialRecord
from softprompt.workbench import Workbench

STOP_SECONDS = 8
"""What a lane that is told to stop has for saving and ending."""


class LaneJob(BaseModel):
    """What a lane's process is given."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    experiment: ExperimentSpec
    data: str
    """Folder of the prepared splits."""
    sweep: Sweep


def main() -> None:
    """Train the one job that stands on standard input; exit code 0 when nothing is left to train, 1 on an error."""
    _stop_when_told()
    events = _Events(os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8"))
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        job = LaneJob.model_validate_json(sys.stdin.readline())
        threading.Thread(target=_stop_with_parent, daemon=True).start()
        with watched_by(events):
            bench = Workbench(job.experiment, load_prepared(Path(job.data)))
            Lane(bench, job.sweep, on_end=events.record).run()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGTERM)
    except Exception as error:
        traceback.print_exc()
        events.error(error)
        sys.exit(1)


class _Events:
    """A watcher that writes down everything, for another process to show."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._lock = threading.Lock()  # records are delivered, and told of, in another thread

    def stage(self, text: str) -> None:
        self._write("stage", text)

    def step(self, trial: TrialProgress, search: SearchProgress) -> None:
        self._write("step", {"trial": asdict(trial), "search": asdict(search)})

    def end(self, title: str, outcome: str, search: SearchProgress) -> None:
        self._write("end", {"title": title, "outcome": outcome, "search": asdict(search)})

    def record(self, trial: TrialRecord) -> None:
        self._write("record", trial.model_dump(mode="json"))

    def error(self, error: Exception) -> None:
        """An exception as what it was: a user's mistake, an error of the system, or another."""
        kind = type(error).__name__
        if isinstance(error, UserError):
            kind = "HopelessSweep" if isinstance(error, HopelessSweep) else "UserError"
        system = [error.errno, error.strerror, error.filename] if isinstance(error, OSError) else None
        self._write("error", {"kind": kind, "text": without_secrets(str(error)), "system": system})

    def _write(self, kind: str, content: Any) -> None:
        with self._lock:
            self._stream.write(json.dumps({kind: content}) + "\n")
            self._stream.flush()


def _stop_when_told() -> None:
    """Make SIGTERM and SIGINT an interrupt, and let none of them disturb the ending."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)


def _stop_with_parent() -> None:
    """Wait for the end of standard input; then stop, and after a grace period be gone."""
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(STOP_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
