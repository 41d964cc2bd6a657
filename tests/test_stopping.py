"""Signals held back: what they would have done is done when the block is left."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from softprompt.stopping import Stop, stoppable


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Whoever starts the tests in the background has Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def run(work: Callable[[Stop], None], **how: float) -> None:
    with stoppable(**how) as stop:
        work(stop)


def test_ctrl_c_asks_first_and_interrupts_when_the_block_is_left():
    seen = []

    def work(stop: Stop) -> None:
        seen.append(stop.requested)
        signal.raise_signal(signal.SIGINT)
        seen.append(stop.requested)

    with pytest.raises(KeyboardInterrupt):
        run(work)
    assert seen == [False, True]


def test_what_handled_sigterm_before_handles_it_afterwards():
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))

    def work(stop: Stop) -> None:
        signal.raise_signal(signal.SIGTERM)
        assert (stop.requested, seen) == (True, [])

    try:
        with pytest.raises(KeyboardInterrupt):  # what was asked to stop does not go on
            run(work)
        assert seen == [signal.SIGTERM]
        signal.raise_signal(signal.SIGTERM)
        assert len(seen) == 2
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_signal_that_the_process_ignores_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stoppable() as stop:
            signal.raise_signal(signal.SIGINT)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_second_signal_interrupts_at_once():
    reached = []

    def work(stop: Stop) -> None:
        for n in range(3):
            signal.raise_signal(signal.SIGINT)
            reached.append(n)

    with pytest.raises(KeyboardInterrupt):
        run(work)
    assert reached == [0]


def test_work_that_does_not_look_is_interrupted_after_the_grace_period():
    def work(stop: Stop) -> None:
        signal.raise_signal(signal.SIGINT)
        while True:
            time.sleep(0.01)

    with pytest.raises(KeyboardInterrupt):
        run(work, grace=0.05)


def test_a_wait_ends_with_the_request():
    def work(stop: Stop) -> None:
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
        stop.wait(60)
        assert stop.requested

    with pytest.raises(KeyboardInterrupt):
        run(work)


def test_another_thread_holds_nothing_back():
    seen = []

    def work() -> None:
        with stoppable() as stop:
            seen.append(stop.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


def test_a_process_that_nobody_guards_dies_of_the_signal_after_its_work():
    code = (
        "import sys, time\n"
        "from softprompt.stopping import stoppable\n"
        "with stoppable() as stop:\n"
        "    print('ready', flush=True)\n"
        "    stop.wait(60)\n"
        "    print('saved', flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        assert process.stdout.read() == "saved\n"
    assert process.returncode == -signal.SIGTERM
