"""A request to stop, held back until the work is at a place where it can be gone on with.

Ctrl-C and SIGTERM, which is also how Prefect cancels a run, set a flag; what they would have done is done when the
block is left. Work that does not look at the flag in time is interrupted wherever it is.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

GRACE = 6.0
"""Seconds after which work that has not stopped is interrupted."""


class Stop:
    """Whether a stop was asked for.

    A plain flag, without a lock: it is set in the handler of a signal, which may come at any instruction.
    """

    requested = False

    def wait(self, seconds: float) -> None:
        """Sleep, or shorter if a stop is asked for."""
        deadline = time.monotonic() + seconds
        while not self.requested and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))


@contextmanager
def stoppable(grace: float = GRACE) -> Iterator[Stop]:
    """Hold signals back inside the block; a second one, or the end of the grace period, interrupts it at once.

    Signals reach the main thread alone: in another one, nothing is held back, and nothing is ever asked. A signal that
    the process ignores, as one in the background of a script does, stays ignored. Work that was asked to stop never
    goes on: where the signal itself ends nothing, KeyboardInterrupt is raised.
    """
    stop, held = Stop(), list[tuple[int, FrameType | None]]()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def hold(number: int, frame: FrameType | None) -> None:
        if held:
            raise KeyboardInterrupt
        held.append((number, frame))
        stop.requested = True
        signal.setitimer(signal.ITIMER_REAL, grace)

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    heard = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) != signal.SIG_IGN]
    before: dict[int, Any] = {number: signal.signal(number, hold) for number in heard}
    before[signal.SIGALRM] = signal.signal(signal.SIGALRM, interrupt)
    try:
        yield stop
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
        for number, _ in held:
            signal.raise_signal(number)
        if held:
            raise KeyboardInterrupt
