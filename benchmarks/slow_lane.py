"""A lane whose device is slow by design: each training step and each validation also waits, as for a busy GPU.

It writes down how long it trained, scored and waited; what is left of its time is coordination.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from softprompt import lane, lane_process, training, tuning

WAIT = "BENCHMARK_WAIT"
"""Environment: seconds that a step waits."""
FOLDER = "BENCHMARK_FOLDER"
"""Environment: where each lane leaves its times."""


class _Times:
    """The lane's own clock."""

    def __init__(self) -> None:
        self.spent = {"train": 0.0, "score": 0.0}
        self.began = self.ended = 0.0

    def counted(self, what: str, do: Callable[..., Any], wait: float = 0.0) -> Callable[..., Any]:
        """The same, with its time taken down."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.monotonic()
            result = do(*args, **kwargs)
            time.sleep(wait)
            self.spent[what] += time.monotonic() - began
            return result

        return timed

    def whole(self, run: Callable[..., None]) -> Callable[..., None]:
        """A lane's run from the first trial to the last."""

        def timed(own: Any) -> None:
            self.began = time.monotonic()
            try:
                run(own)
            finally:
                self.ended = time.monotonic()
                self.write()

        return timed

    def write(self) -> None:
        """Leave the times in a file of this process; monotonic clocks of one machine are the same clock."""
        file = Path(os.environ[FOLDER]) / f"{os.getpid()}.json"
        file.write_text(json.dumps({"began": self.began, "ended": self.ended, **self.spent}))


if __name__ == "__main__":
    times = _Times()
    # What the lane calls, as a name of its module.
    vars(lane)["step"] = times.counted("train", training.step, float(os.environ[WAIT]))
    tuning.Tuning.validate = times.counted("score", tuning.Tuning.validate)  # type: ignore[method-assign]
    lane.Lane.run = times.whole(lane.Lane.run)  # type: ignore[method-assign]
    lane_process.main()
