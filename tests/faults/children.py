"""Children of one process that has imported everything: to kill a lane costs milliseconds, not seconds.

The process that forks has opened no database and no connection and runs no thread of Python, so that a child begins as
a new process would, with the imports done. What is other in it than in the product, `hooks` have changed.
"""

import ctypes
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Hook = Callable[[], None]
_FAILED = 70
_PR_SET_PDEATHSIG = 1


@dataclass
class Home:
    """The state of one scenario, and how its processes find it."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    """Servers that are used in place of the state's own files."""

    @classmethod
    def make(cls, folder: Path, template: Path | None) -> "Home":
        """A new state, with empty databases copied from the template: to make their tables takes seconds."""
        (folder / "tmp").mkdir(parents=True)
        if template is not None:
            shutil.copytree(template, folder / "state", dirs_exist_ok=True)
        return cls(folder)

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def log(self) -> Path:
        """What the processes of the scenario have said."""
        return self.folder / "log.txt"

    @property
    def variables(self) -> dict[str, str]:
        """The environment of its processes, beside what all have."""
        own = {"SOFTPROMPT_HOME": str(self.state), "TMPDIR": str(self.folder / "tmp")}
        own["PREFECT_HOME"] = str(self.state / "prefect")
        return own | self.environment

    def last_words(self) -> str:
        """The end of the log, where an error stands."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if self.log.exists() else []
        return lines[-1][:300] if lines else "nothing was said"


class Child:
    """A process that does one piece of work in a home."""

    def __init__(self, home: Home, work: Callable[[], Any], hooks: Sequence[Hook] = ()) -> None:
        self.home = home
        self.ended: int | None = None
        """How it ended: the exit status, or minus the signal."""
        handle, name = tempfile.mkstemp(dir=home.folder, prefix="result-")
        os.close(handle)
        self._result = Path(name)
        self.began = time.monotonic()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._live(work, hooks)
        self._handle = os.pidfd_open(self.pid)

    def _live(self, work: Callable[[], Any], hooks: Sequence[Hook]) -> None:
        """The child's whole life; it never returns."""
        status = _FAILED
        try:
            enter(self.home)
            for hook in hooks:
                hook()
            self._result.write_text(json.dumps(work()))
            status = 0
        except KeyboardInterrupt:
            status = 128 + signal.SIGINT
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def wait(self, seconds: float) -> bool:
        """Whether it has ended by then."""
        if self.ended is not None:
            return True
        ready, _, _ = select.select([self._handle], [], [], max(0.0, seconds))
        if ready:
            _, status = os.waitpid(self.pid, 0)
            self.ended = os.waitstatus_to_exitcode(status)
            os.close(self._handle)
        return bool(ready)

    def send(self, sign: int) -> None:
        """Send it a signal, if it is still there."""
        if self.ended is None:
            os.kill(self.pid, sign)

    def kill(self) -> None:
        """End it at once."""
        self.send(signal.SIGKILL)
        self.wait(60)

    @property
    def result(self) -> Any:
        """What its work returned; None where it did not come to that."""
        text = self._result.read_text() if self._result.exists() else ""
        return json.loads(text) if text else None


def end_with_parent(sign: int = signal.SIGKILL) -> None:
    """Let this process be sent a signal when the one that has forked it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, sign)


def enter(home: Home) -> None:
    """Become a process of a home: its environment, its log, the usual signals, no life beyond its parent's."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.update(home.variables)
    tempfile.tempdir = None
    log = os.open(home.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = (
        open(n, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115 - as long as the process lives
        for n in (1, 2)
    )


def ask(home: Home, work: Callable[[], Any], seconds: float = 120) -> Any:
    """The result of a piece of work that a child does; RuntimeError where it fails."""
    child = Child(home, work)
    if not child.wait(seconds):
        child.kill()
        raise RuntimeError(f"no answer within {seconds:g} s; {home.last_words()}")
    if child.ended != 0:
        raise RuntimeError(home.last_words())
    return child.result
