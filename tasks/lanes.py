"""Several lanes at once: processes of this machine, each with its own GPU or its share of the CPU's threads.

Each lane is an interpreter of its own, so that no lane waits for another's Python, and none takes another with it. The
experiment goes to them by standard input, credentials by the environment alone. What they report is shown here.
"""

import gc
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import torch

from softprompt.errors import UserError
from softprompt.home import state_home
from softprompt.lane_process import STOP_SECONDS, LaneJob
from softprompt.loading import load_backbone
from softprompt.progress import SearchProgress, TrialProgress, watcher
from softprompt.search import HopelessSweep
from softprompt.spec import ExecutionSpec, ExperimentSpec
from softprompt.sweep import Sweep
from softprompt.trials import TrialRecord

PROGRAM = (sys.executable, "-m", "softprompt.lane_process")
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def share_devices(execution: ExecutionSpec) -> list[str]:
    """The device of each lane on this machine; `lanes: auto` is one for each GPU, and one on a CPU.

    Raises UserError where there are fewer GPUs than lanes: one GPU's prompts are trained side by side in one lane.
    """
    device, lanes = execution.device, execution.lanes
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if on_gpu and lanes != 1:
        gpus = torch.cuda.device_count()
        if lanes == "auto" or lanes <= gpus:
            return [f"cuda:{n}" for n in range(gpus if lanes == "auto" else lanes)]
        raise UserError(
            f"execution.lanes: {lanes} lanes want a GPU each, and this machine has {gpus}; give {gpus} or auto, as "
            "execution.slots is what trains several prompts on one GPU"
        )
    count = 1 if lanes == "auto" else lanes
    if count > 1 and device not in ("auto", "cpu"):
        raise UserError(f"execution.lanes: {count} lanes cannot share {device}; set execution.device to auto or cuda")
    return [device] * count


def run_lanes(
    experiment: ExperimentSpec,
    data: Path,
    sweep: Sweep,
    *,
    on_end: Callable[[TrialRecord], None],
    program: Sequence[str] = PROGRAM,
) -> None:
    """Train trials in as many processes as the experiment asks for, until no lane finds any left.

    A lane that dies is told of, and the others go on. Whatever ends this call early ends the lanes, which get
    8 seconds to save what they have.

    Args:
        experiment: What is trained, and how many lanes train it.
        data: Folder of the prepared splits.
        sweep: Where the lanes meet.
        on_end: Called in this thread with every trial that ended.
        program: What a lane's process is.

    Raises what the last of the lanes failed with where none came to its end: UserError for a user's mistake.
    """
    devices = share_devices(experiment.execution)
    _make_room()
    threads = max(1, torch.get_num_threads() // len(devices))
    crew = _Crew(experiment, on_end)
    try:
        for number, device in enumerate(devices):
            execution = experiment.execution.model_copy(update={"device": device, "lanes": 1})
            own = experiment.model_copy(update={"execution": execution})
            job = LaneJob(experiment=own, data=str(data), sweep=sweep)
            crew.start(_name_log(sweep, number), job, threads, program)
        crew.follow()
    except BaseException:
        crew.stop()
        raise
    crew.require_one()


def _make_room() -> None:
    """Give up this process's copy of the model, which is loaded again when it is needed."""
    load_backbone.cache_clear()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _name_log(sweep: Sweep, number: int) -> Path:
    return state_home() / "logs" / f"{sweep.name}-lane-{number}.log"


@dataclass
class _Lane:
    """A lane's process."""

    number: int
    process: "subprocess.Popen[str]"
    log: Path
    error: BaseException | None = field(default=None)
    """What it said that it failed with, or how it died."""

    def signal(self, number: int) -> None:
        """To it and to all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def close(self) -> int:
        """Wait for its end; its exit code, or the signal as a negative number."""
        code = self.process.wait()
        assert self.process.stdin is not None
        # Not before: for the lane, that would be our own end.
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        return code


class _Crew:
    """The lanes at work, and what they say."""

    def __init__(self, experiment: ExperimentSpec, on_end: Callable[[TrialRecord], None]) -> None:
        self._lanes: list[_Lane] = []
        self._alive: list[_Lane] = []
        self._stopping = False
        # By the clock where time is the budget, and then it is the same for one lane as for many.
        self._shares_time = experiment.budget.minutes is None
        self._on_end = on_end
        self._said: queue.Queue[tuple[_Lane, str | None]] = queue.Queue()

    def start(self, log: Path, job: LaneJob, threads: int, program: Sequence[str]) -> None:
        """One lane more."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as stream:
            process = subprocess.Popen(
                program,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                env=os.environ | dict.fromkeys(_THREADS, str(threads)),
                text=True,
                encoding="utf-8",
                start_new_session=True,  # Ctrl-C reaches it through us alone
            )
        lane = _Lane(len(self._lanes), process, log)
        self._lanes.append(lane)
        self._alive.append(lane)
        assert process.stdin is not None
        assert process.stdout is not None
        threading.Thread(target=self._listen, args=(lane, process.stdout), daemon=True).start()
        with suppress(BrokenPipeError):  # it is gone already, which is told of as any other death
            process.stdin.write(job.model_dump_json() + "\n")
            process.stdin.flush()

    def _listen(self, lane: _Lane, stream: IO[str]) -> None:
        """Take what a lane says without delay, so that it never waits for us; its end is said by None."""
        with stream:
            for line in stream:
                self._said.put((lane, line))
        self._said.put((lane, None))

    def follow(self, deadline: float = float("inf")) -> None:
        """Show what the lanes say until all have ended, or the clock `time.monotonic` is past the deadline."""
        while self._alive and time.monotonic() < deadline:
            try:
                # Waiting in slices lets a signal through.
                lane, line = self._said.get(timeout=0.2)
            except queue.Empty:
                continue
            if line is None:
                self._end(lane)
            else:
                self._show(lane, json.loads(line))

    def _end(self, lane: _Lane) -> None:
        code = lane.close()
        self._alive.remove(lane)
        if code == 0 or self._stopping:
            return
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        lane.error = lane.error or RuntimeError(f"lane {lane.number} {how}; its log is {lane.log}")
        rest = f"; the other {len(self._alive)} go on" if len(self._alive) > 1 else "; the other one goes on"
        told = f"lane {lane.number} {how}" if code < 0 else f"lane {lane.number} failed: {lane.error}"
        watcher().stage(told + (rest if self._alive else ""))

    def _show(self, lane: _Lane, event: dict[str, Any]) -> None:
        match event:
            case {"stage": text}:
                watcher().stage(f"lane {lane.number}: {text}")
            case {"step": said}:
                watcher().step(TrialProgress(**said["trial"]), self._search(said["search"]))
            case {"end": said}:
                watcher().end(said["title"], said["outcome"], self._search(said["search"]))
            case {"record": said}:
                self._on_end(TrialRecord.model_validate(said))
            case {"error": said}:
                lane.error = _restore(said)

    def _search(self, said: dict[str, Any]) -> SearchProgress:
        """A lane's view of the search; the time that it alone would take is shared by all."""
        search = SearchProgress(**said)
        if search.seconds_left is None or not self._shares_time:
            return search
        return replace(search, seconds_left=search.seconds_left / max(1, len(self._alive)))

    def stop(self) -> None:
        """Tell all lanes to stop, show what they still say, and end those that do not come to an end."""
        self._stopping = True
        try:
            for lane in self._alive:
                lane.signal(signal.SIGTERM)
            with suppress(Exception):  # what ended us is what is raised
                self.follow(time.monotonic() + STOP_SECONDS)
        finally:
            for lane in self._alive:
                lane.signal(signal.SIGKILL)
                lane.close()

    def require_one(self) -> None:
        """Raise what the last lane failed with, where none came to its end."""
        errors = [lane.error for lane in self._lanes if lane.error is not None]
        if len(errors) == len(self._lanes):
            raise errors[-1]


def _restore(said: dict[str, Any]) -> Exception:
    """The exception that a lane has told of."""
    if said["kind"] == "HopelessSweep":
        return HopelessSweep(said["text"])
    if said["kind"] == "UserError":
        return UserError(said["text"])
    if said["system"] is not None:
        return OSError(*said["system"])
    return RuntimeError(f"{said['kind']}: {said['text']}")
