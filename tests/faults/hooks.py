"""What is changed inside a child before it works: where it dies, what its clock says, what its host is called.

A target is named as `module:attribute`, as in `softprompt.lane:Lane.run`.
"""

import functools
import importlib
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

When = Literal["before", "after"]
calls: Counter[str] = Counter()
"""How often each counted target was called in this process."""


def wrap(target: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put a function around the one that a target names; AttributeError where there is none."""
    module, _, path = target.partition(":")
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    setattr(owner, name, around(getattr(owner, name)))


def die_at(target: str, *, nth: int, when: When) -> Callable[[], None]:
    """SIGKILL itself just before or just after the nth call of a target, in whichever thread that is."""

    def around(real: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(real)
        def mortal(*args: Any, **kwargs: Any) -> Any:
            calls[target] += 1
            last = calls[target] == nth
            if last and when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return real(*args, **kwargs)
            finally:
                if last:
                    os.kill(os.getpid(), signal.SIGKILL)

        return mortal

    return lambda: wrap(target, around)


def count_calls(targets: Sequence[str]) -> Callable[[], None]:
    """Count the calls of targets in `calls`."""

    def counted(target: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def around(real: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(real)
            def counting(*args: Any, **kwargs: Any) -> Any:
                calls[target] += 1
                return real(*args, **kwargs)

            return counting

        return around

    def install() -> None:
        for target in targets:
            wrap(target, counted(target))

    return install


def slowed(target: str, seconds: float) -> Callable[[], None]:
    """Sleep before every call of a target, so that a fault can hit anything."""

    def around(real: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(real)
        def slow(*args: Any, **kwargs: Any) -> Any:
            time.sleep(seconds)
            return real(*args, **kwargs)

        return slow

    return lambda: wrap(target, around)


def jumping_clock(jumps: Sequence[tuple[float, float]]) -> Callable[[], None]:
    """Let the wall clock jump, as (seconds after the begin, seconds that it jumps); the monotonic one goes on."""

    def install() -> None:
        began, real, real_ns = time.monotonic(), time.time, time.time_ns

        def off() -> float:
            now = time.monotonic() - began
            return sum(jump for at, jump in jumps if now >= at)

        time.time = lambda: real() + off()
        time.time_ns = lambda: real_ns() + int(off() * 1e9)

    return install


def host_named(name: str) -> Callable[[], None]:
    """Let the child believe that it runs on another machine, where nobody can look after its process."""

    def install() -> None:
        socket.gethostname = lambda: name

    return install


def default_of(target: str, **values: Any) -> Callable[[], None]:
    """Change the defaults of a target's keyword arguments."""

    def around(real: Callable[..., Any]) -> Callable[..., Any]:
        defaults = real.__kwdefaults__ or {}
        unknown = values.keys() - defaults.keys()
        if unknown:
            raise AttributeError(f"{target} has no default of {', '.join(sorted(unknown))}")
        real.__kwdefaults__ = defaults | values
        return real

    return lambda: wrap(target, around)
