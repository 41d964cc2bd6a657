"""The reports of trials, brought to MLflow by a thread of their own: training never waits for a server.

A report says everything about its trial that is in a saved checkpoint. To deliver it is to make the trial's run in
MLflow say the same, so a delivery that was cut off anywhere is simply made again, by this process or by the next one: a
run is looked for before it is created, and a value carries the time at which it came about, by which MLflow knows it
again. Nothing is spooled here: what is not delivered when the process ends is still with the trial's checkpoints.
"""

import contextvars
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from threading import Condition, Event, Thread
from typing import Any, TypeVar

from mlflow.entities import Metric, Run

from softprompt.checkpoint import Ending
from softprompt.data import PreparedData
from softprompt.history import VAL, Entry
from softprompt.home import tracking_server
from softprompt.outage import DOUBTS, cause, is_bad_request, is_refusal, place, short
from softprompt.progress import watcher
from softprompt.tracking import (
    BEST_VAL,
    OUTCOME,
    PROMPT,
    SECONDS,
    STATUS,
    SweepRecord,
    Tracker,
    end_run,
    reopen_run,
)

_BATCH = 1000
"""Metrics of one request: the most that MLflow takes."""
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0
"""Seconds between two tries while MLflow is away."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TrialReport:
    """All that there is to say of a trial at one of its checkpoints."""

    number: int
    name: str
    """The trial in words: the name of its run."""
    params: Mapping[str, Any]
    history: Sequence[Entry]
    """Shared with the trial, which goes on to append to it."""
    length: int
    """How many entries of the history are in the checkpoint: no others are delivered."""
    ending: Ending | None = None
    prompt: Path | None = None
    """Folder of the trial's prompt, if it has ended with one."""
    checkpoint: Path | None = None
    """File of the checkpoint."""


@dataclass
class _Record:
    """What is known of a trial's run in MLflow."""

    run_id: str
    there: dict[str, set[int]] = field(default_factory=dict)
    """Steps of each metric that the run had when it was found."""
    described: bool = False
    """Whether it has its settings and its data."""
    delivered: int = 0
    """How many entries of the history it has."""
    refused: set[str] = field(default_factory=set)
    """Metrics that MLflow does not take."""
    checkpoint: str = ""
    """Name of the checkpoint that it has."""
    end_ms: int = 0


class _Refused(Exception):
    """MLflow will not take this, however often it is asked."""


class _Stopped(Exception):
    """The thread shall end."""


class Delivery:
    """Delivers the reports of a sweep's trials.

    Args:
        tracker: of the experiment.
        sweep: the trials' parent.
        data: what the trials work on.
        on_delivered: called in the thread with each report that has been delivered to its end.
    """

    def __init__(
        self,
        tracker: Tracker,
        sweep: SweepRecord,
        data: PreparedData,
        on_delivered: Callable[[TrialReport], None] = lambda report: None,
    ) -> None:
        self._tracker, self._sweep, self._data, self._on_delivered = tracker, sweep, data, on_delivered
        self._records: dict[int, _Record] = {}
        self._waiting: dict[int, TrialReport] = {}
        """The newest report of each trial that is not delivered, in the order of the next try."""
        self._failing: set[int] = set()
        self._at = -1
        """Number of the trial whose report is being delivered."""
        self._doubts: Counter[int] = Counter()
        self._told: set[str] = set()
        self._changed = Condition()
        self._hurry, self._stop, self._closing = Event(), Event(), False
        # In the context of whoever made it: Prefect knows by it to which task the lines belong that are printed.
        work = contextvars.copy_context().run
        self._thread = Thread(target=work, args=(self._work,), name="delivery", daemon=True)
        self._thread.start()

    @property
    def pending(self) -> list[int]:
        """The numbers of the trials whose newest report is not delivered."""
        with self._changed:
            return sorted(self._waiting)

    def put(self, report: TrialReport) -> None:
        """Have a report delivered, in the place of an earlier one of its trial; returns at once."""
        with self._changed:
            self._waiting[report.number] = report
            self._changed.notify_all()

    def flush(self, *, wait: bool = True) -> list[int]:
        """Try at once what is not delivered; returns what is `pending` then.

        Args:
            wait: until everything is delivered, however long MLflow is away.
        """
        self._hurry.set()
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: not self._waiting or self._closing)
            return sorted(self._waiting)

    def close(self, patience: float = 5.0) -> list[int]:
        """End the thread; returns what is still `pending`, within ten seconds in any case.

        A request that hangs just then is left to its time limit, which no process waits for; none is made after it.

        Args:
            patience: seconds that are left to deliver what is waiting; no longer than MLflow is there.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._hurry.set()
        self._thread.join(min(patience, 5.0))
        self._stop.set()
        self._hurry.set()
        self._thread.join(4.0)
        return self.pending

    def _work(self) -> None:
        pause = _FIRST_PAUSE
        while (report := self._next()) is not None:
            try:
                self._deliver(report)
            except _Stopped:
                return
            except Exception as error:
                if isinstance(error, _Refused) or is_refusal(error):
                    self._tell_once(f"trial {report.number} is not recorded in MLflow: {short(error)}")
                    self._leave(report)
                    continue
                self._note_failure(report, error)
                if self._closing:
                    return
                self._hurry.wait(pause)
                self._hurry.clear()
                pause = min(2 * pause, _LONGEST_PAUSE)
            else:
                pause = _FIRST_PAUSE
                self._leave(report)

    def _next(self) -> TrialReport | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            return None if self._stop.is_set() else next(iter(self._waiting.values()), None)

    def _leave(self, report: TrialReport) -> None:
        """Go on to the next report."""
        del self._doubts[report.number]
        if self._failing:
            self._failing.discard(report.number)
            if not self._failing:
                watcher().stage(f"{place()} is back; what was not recorded has been delivered")
        with self._changed:
            if self._waiting.get(report.number) is report:
                del self._waiting[report.number]
            self._changed.notify_all()

    def _note_failure(self, report: TrialReport, error: Exception) -> None:
        if not self._failing:
            why = short(cause(error))
            watcher().stage(f"{place()} is away; training goes on, and the records follow when it is back ({why})")
        self._failing.add(report.number)
        with self._changed:  # the others first: maybe it is this one alone
            self._waiting[report.number] = self._waiting.pop(report.number)

    def _tell_once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            watcher().stage(text)

    def _deliver(self, report: TrialReport) -> None:
        """Make the run of a trial say what the report says. Whatever is raised, it may be called again."""
        self._at = report.number
        record, run = self._open(report)
        outcome = run.data.tags.get(OUTCOME)
        if report.ending is not None and outcome == report.ending.outcome != "interrupted":
            self._announce(report)  # by an earlier process
            return
        if report.ending is None and outcome == "interrupted":
            self._call(reopen_run, self._tracker.client, record.run_id)
        elif report.ending is None and outcome is not None:
            return  # another lane has taken the trial over and ended it
        if not record.described:
            self._describe(record, report)
        self._log_history(record, report)
        if report.ending is None:
            self._store_checkpoint(record, report)
        elif not self._finish(record, report, report.ending):
            return
        self._announce(report)

    def _announce(self, report: TrialReport) -> None:
        if report.ending is not None:
            self._records.pop(report.number, None)
        try:
            self._on_delivered(report)
        except Exception as error:  # of its listener: nothing that another delivery would mend
            self._tell_once(f"after trial {report.number} was recorded: {type(error).__name__}: {short(error)}")

    def _open(self, report: TrialReport) -> tuple[_Record, Run]:
        """The run of a trial as it is now: known, found, or created."""
        record = self._records.get(report.number)
        if record is not None:
            run = self._get_run(record.run_id)
            if run is not None:
                return record, run
            del self._records[report.number]
        study, number = self._sweep.name, report.number
        run_id = self._call(
            self._tracker.start_trial,
            self._sweep.run_id,
            study=study,
            number=number,
            name=report.name,
            start_ms=report.history[0].time_ms if report.length else None,
        )
        self._call(self._tracker.drop_twins, study, number, keep=run_id)
        run = self._call(self._tracker.client.get_run, run_id)
        there = {key: self._steps(run_id, key) for key in run.data.metrics}
        record = self._records[number] = _Record(run_id, there)
        return record, run

    def _get_run(self, run_id: str) -> Run | None:
        """A run, unless somebody has deleted it."""
        try:
            run = self._call(self._tracker.client.get_run, run_id)
        except _Refused:
            return None
        return run if run.info.lifecycle_stage == "active" else None

    def _steps(self, run_id: str, key: str) -> set[int]:
        return {metric.step for metric in self._call(self._tracker.client.get_metric_history, run_id, key)}

    def _describe(self, record: _Record, report: TrialReport) -> None:
        try:
            self._call(self._tracker.log_params, record.run_id, report.params)
        except _Refused:  # all of them, because of some
            for key, value in report.params.items():
                self._attempt(report, f"setting {key}", self._tracker.log_params, record.run_id, {key: value})
        splits = ("train", "validation")
        self._attempt(report, "data", self._tracker.log_inputs, record.run_id, self._data, splits)
        record.described = True

    def _log_history(self, record: _Record, report: TrialReport) -> None:
        """Log what the run does not have yet, in order.

        Of what is delivered together validation comes first: MLflow's page of comparison opens with the metric that
        was logged first.
        """
        if not record.delivered:
            self._log(record, report, _first_validation(report))
        while record.delivered < report.length:
            end = min(record.delivered + _BATCH, report.length)
            entries = report.history[record.delivered : end]
            self._log(record, report, sorted(entries, key=lambda entry: not entry.key.startswith(VAL)))
            record.delivered = end

    def _log(self, record: _Record, report: TrialReport, entries: Sequence[Entry]) -> None:
        new = [e for e in entries if e.key not in record.refused and e.step not in record.there.get(e.key, ())]
        if not new:
            return
        metrics = [Metric(e.key, e.value, e.time_ms, e.step) for e in new]
        try:
            self._call(self._tracker.client.log_batch, record.run_id, metrics=metrics)
        except _Refused as refusal:  # all of them, because of some
            keys = dict.fromkeys(e.key for e in new)
            if len(keys) == 1:
                record.refused.update(keys)
                self._tell_once(f"metric {new[0].key} of trial {report.number} is not recorded in MLflow: {refusal}")
                return
            for key in keys:
                self._log(record, report, [e for e in new if e.key == key])

    def _store_checkpoint(self, record: _Record, report: TrialReport) -> None:
        """Store the checkpoint where lanes of other machines find it, if this machine is not all there is."""
        file = report.checkpoint
        if file is None or tracking_server() is None or record.checkpoint == file.name or not file.exists():
            return
        try:
            self._attempt(report, "checkpoint", self._tracker.store_checkpoint, record.run_id, file)
        except FileNotFoundError:
            return  # the trial has written two newer ones meanwhile
        record.checkpoint = file.name

    def _finish(self, record: _Record, report: TrialReport, ending: Ending) -> bool:
        """Deliver a trial's end; False where its prompt is not taken.

        Such a run ends without the tag of its outcome, so that the next process tries again; the prompt has to stay.
        """
        tracker, client, run_id = self._tracker, self._tracker.client, record.run_id
        stored = report.prompt is None or self._attempt(report, "prompt", self._store_prompt, run_id, report.prompt)
        # Once and for all, for MLflow knows a value by its time.
        record.end_ms = record.end_ms or (report.history[report.length - 1].time_ms if report.length else _now())
        summary = [Entry(SECONDS, ending.seconds, ending.steps, record.end_ms)]
        if ending.score is not None:
            best = f"{BEST_VAL}{tracker.objective.key}"
            summary.insert(0, Entry(best, ending.score, ending.steps, record.end_ms))
        self._log(record, report, summary)
        if tracking_server() is not None:
            self._attempt(report, "removal of checkpoints", tracker.drop_checkpoints, run_id)
        self._call(tracker.drop_twins, self._sweep.name, report.number, keep=run_id)
        if not stored:
            self._attempt(report, "end", client.set_terminated, run_id, STATUS[ending.outcome], record.end_ms)
            return False
        return self._attempt(report, "end", end_run, client, run_id, ending.outcome, ending.reason, record.end_ms)

    def _store_prompt(self, run_id: str, folder: Path) -> None:
        if not folder.is_dir():
            raise LookupError(f"{folder} is not there")
        self._tracker.log_folder(run_id, folder, PROMPT)

    def _attempt(self, report: TrialReport, what: str, function: Callable[..., Any], *args: Any) -> bool:
        """Deliver a part of a report; False where it is refused for good, which is told once and stops nothing else."""
        try:
            self._call(function, *args)
        except _Refused as refusal:
            self._tell_once(f"the {what} of trial {report.number} is not recorded in MLflow: {refusal}")
            return False
        return True

    def _call(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Ask MLflow for something; `_Refused` is raised for what it will never do, anything else may pass."""
        if self._stop.is_set():
            raise _Stopped
        try:
            return function(*args, **kwargs)
        except Exception as error:
            if is_bad_request(error):
                self._doubts[self._at] += 1
            if is_refusal(error) or (is_bad_request(error) and self._doubts[self._at] >= DOUBTS):
                raise _Refused(short(error)) from error
            raise


def _first_validation(report: TrialReport) -> list[Entry]:
    known = (entry for entry in islice(report.history, report.length) if entry.key.startswith(VAL))
    first = next(known, None)
    return [] if first is None else [first, *(entry for entry in known if entry.step == first.step)]


def _now() -> int:
    return int(time.time() * 1000)
