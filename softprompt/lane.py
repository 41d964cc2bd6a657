"""A lane: one device, one frozen model, trials of a shared study until the budget ends.

A lane asks the study for trials, trains K of them side by side, scores each at its rungs, prunes, records, and refills
the slots. Lanes meet only in the study's storage and in the tracking server.
"""

import contextlib
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from uuid import uuid4

import optuna
from optuna.trial import FrozenTrial, TrialState
from pydantic import BaseModel, ConfigDict

from softprompt import search
from softprompt.data import PreparedData
from softprompt.home import state_home, study_storage, without_secrets
from softprompt.objective import Objective
from softprompt.progress import SearchProgress, watcher
from softprompt.sizing import choose_slots
from softprompt.spec import ExperimentSpec
from softprompt.tracking import BEST_VAL, PROMPT, SECONDS, Outcome, Tracker
from softprompt.training import step
from softprompt.tuning import Tuning
from softprompt.workbench import Workbench


class Sweep(BaseModel):
    """Where a sweep's records are: what every lane needs to join it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """Name of the Optuna study and of the parent run."""
    run_id: str
    """MLflow id of the parent run."""
    tags: dict[str, str]
    """What every run of the sweep carries beside its own tags."""


class TrialRecord(BaseModel):
    """How a trial ended."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int
    title: str
    outcome: Outcome
    reason: str
    score: float | None
    """Best score on the validation split, as the experiment's objective has it."""
    steps: int
    seconds: float
    run_id: str


def open_sweep(experiment: ExperimentSpec, data: PreparedData, tags: dict[str, str]) -> Sweep:
    """Create the study and the parent run of a new sweep."""
    # Two sweeps may begin in one second.
    name = f"{experiment.name}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{uuid4().hex[:4]}"
    tracker = Tracker(experiment)
    search.create_study(name, study_storage(), experiment)
    return Sweep(name=name, run_id=tracker.start_sweep(name, experiment, data, tags), tags=tags)


@dataclass
class _Running:
    """A trial in a slot, with its handles in the study and in the tracker."""

    trial: optuna.Trial
    tuning: Tuning
    run_id: str
    logged: int = field(default=0)


class Lane:
    """Trains trials of one sweep on one device."""

    def __init__(
        self,
        bench: Workbench,
        sweep: Sweep,
        *,
        on_end: Callable[[TrialRecord], None] = lambda record: None,
    ) -> None:
        self._bench = bench
        self._experiment = bench.experiment
        self._objective = bench.experiment.labels.objective
        self._sweep = sweep
        self._tracker = Tracker(bench.experiment)
        self._study = search.load_study(sweep.name, study_storage(), bench.experiment)
        self._on_end = on_end
        self._slots = 1
        """K, the trials side by side at the most; chosen when the lane begins."""
        self._running: list[_Running] = []
        self._trials: list[FrozenTrial] = []
        """The trials that count, as the study had them when one last began or ended."""
        self._exhausted = False
        self._steps = 0
        self._ended_steps: list[int] = []
        minutes = self._experiment.budget.minutes
        self._began = time.monotonic()
        self._deadline = self._began + 60 * minutes if minutes else None

    def run(self) -> None:
        """Train until the budget is spent, then return; whatever interrupts it, no trial is left open."""
        choice = choose_slots(self._bench)
        self._slots = choice.slots
        watcher().stage(f"trials side by side: {choice}")
        self._tracker.log_slots(self._sweep.run_id, str(choice))
        try:
            while self._refill():
                self._step()
        except BaseException as error:
            for running in list(self._running):
                with contextlib.suppress(BaseException):  # what ends one trial must not leave the next one open
                    reason = without_secrets(f"{type(error).__name__}: {error}".rstrip(": "))
                    self._end(running, "interrupted", reason)
            raise

    def _refill(self) -> bool:
        """Fill the free slots from the study; False when nothing is left to train."""
        while len(self._running) < self._slots and self._may_start():
            asked = search.ask(self._study, self._experiment.search)
            if asked is None:
                self._exhausted = True
                watcher().stage("the search space has nothing new left to try")
                break
            trial, params = asked
            try:
                self._running.append(self._start(trial, params))
            except BaseException:
                self._study.tell(trial, state=TrialState.FAIL)
                raise
            self._trials = search.counted(self._study)
        return bool(self._running)

    def _may_start(self) -> bool:
        trials = self._experiment.budget.trials
        spent = trials is not None and len(search.counted(self._study)) >= trials
        return not (spent or self._exhausted or self._overdue)

    @property
    def _overdue(self) -> bool:
        return self._deadline is not None and time.monotonic() >= self._deadline

    def _start(self, trial: optuna.Trial, params: search.Params) -> _Running:
        seed = [self._experiment.seed, trial.number]
        tuning = Tuning(self._bench, params, number=trial.number, seed=seed)
        run_id = self._tracker.start_trial(
            self._sweep.run_id,
            study=self._sweep.name,
            number=trial.number,
            name=tuning.title.removeprefix("trial "),
            params=params,
            data=self._bench.data,
            tags=self._sweep.tags,
        )
        trial.set_user_attr(search.RUN_ID, run_id)
        trial.set_user_attr(search.TITLE, tuning.title)
        return _Running(trial, tuning, run_id)

    def _step(self) -> None:
        """One training step of every slot, and what follows from it."""
        losses = step(self._bench.backbone, [r.tuning.slot for r in self._running], self._bench.passes).tolist()
        self._steps += len(losses)
        for running, loss in zip(list(self._running), losses, strict=True):
            running.tuning.losses.append(loss)
            if running.tuning.failure:
                self._end(running, "failed", running.tuning.failure)
            elif running.tuning.at_rung or self._overdue:
                self._score(running)
            else:
                watcher().step(running.tuning.progress(), self._progress())

    def _score(self, running: _Running) -> None:
        """Validate, report, and stop the trial where it is finished, pruned or out of time."""
        tuning, at = running.tuning, running.tuning.slot.steps_done
        try:
            metrics = tuning.validate()
        except FloatingPointError as error:
            self._end(running, "failed", str(error))
            return
        running.trial.report(metrics.score, at)
        # Before the losses: MLflow's comparison page opens with the metric that was logged first.
        self._tracker.log_validation(running.run_id, metrics, step=at)
        self._log_losses(running)
        watcher().step(tuning.progress(), self._progress())
        if tuning.slot.finished:
            self._end(running, "finished")
        elif self._overdue:
            self._end(running, "finished", f"budget.minutes was spent at step {at}")
        elif running.trial.should_prune():
            self._end(
                running, "pruned", f"{self._objective.show(metrics.score)} at step {at} is too far behind other trials"
            )

    def _end(self, running: _Running, outcome: Outcome, reason: str = "") -> None:
        """The one place where a trial ends: artifact, run, study, slot, in this order."""
        tuning = running.tuning
        self._log_losses(running)
        if tuning.best is not None and outcome != "interrupted":
            self._store_prompt(running)
        self._tracker.end(running.run_id, outcome, reason)
        self._tell(running, outcome, reason)
        self._running.remove(running)
        self._trials = search.counted(self._study)
        self._ended_steps.append(tuning.slot.steps_done)
        record = TrialRecord(
            number=tuning.number,
            title=tuning.title,
            outcome=outcome,
            reason=reason,
            score=tuning.best.metrics.score if tuning.best else None,
            steps=tuning.slot.steps_done,
            seconds=round(tuning.seconds, 1),
            run_id=running.run_id,
        )
        watcher().end(tuning.title, describe_end(record, self._objective), self._progress())
        self._on_end(record)

    def _log_losses(self, running: _Running) -> None:
        """Record the losses since the last time."""
        losses = running.tuning.losses
        self._tracker.log_losses(running.run_id, losses[running.logged :], first_step=running.logged + 1)
        running.logged = len(losses)

    def _store_prompt(self, running: _Running) -> None:
        best = running.tuning.best
        assert best is not None
        scores = {f"{BEST_VAL}{self._objective.key}": best.metrics.score, SECONDS: running.tuning.seconds}
        self._tracker.log_metrics(running.run_id, scores, step=running.tuning.slot.steps_done)
        with tempfile.TemporaryDirectory(dir=state_home()) as folder:
            made = running.tuning.prompt().save(Path(folder) / PROMPT)
            self._tracker.log_folder(running.run_id, made, PROMPT)

    def _tell(self, running: _Running, outcome: Outcome, reason: str) -> None:
        best = running.tuning.best
        if best is not None:
            running.trial.set_user_attr(search.VAL_LOSS, best.metrics.log_loss)
        if reason:
            running.trial.set_user_attr(search.REASON, reason)
        if outcome == "finished" and best is not None:
            self._study.tell(running.trial, best.metrics.score)
        else:
            state = TrialState.PRUNED if outcome == "pruned" else TrialState.FAIL
            self._study.tell(running.trial, state=state)

    def _progress(self) -> SearchProgress:
        ended = [t for t in self._trials if t.state.is_finished()]
        scores = [t.value for t in ended if t.state == TrialState.COMPLETE and t.value is not None]
        scores += [r.tuning.best.metrics.score for r in self._running if r.tuning.best]
        best = max(scores, key=self._objective.gain, default=None)
        return SearchProgress(
            ended=len(ended),
            trials=self._experiment.budget.trials,
            best=None if best is None else self._objective.tell(best),
            seconds_left=self._seconds_left(len(self._trials)),
        )

    def _seconds_left(self, asked: int) -> float | None:
        """By the clock where time is the budget, else by the pace of the steps and the usual length of a trial."""
        trials, now = self._experiment.budget.trials, time.monotonic()
        by_clock = self._deadline - now if self._deadline else None
        by_pace = None
        if trials and self._steps:
            steps = self._experiment.training.steps
            usual = fmean([self._experiment.search.pruner.usual_steps(steps), *self._ended_steps])
            begun = sum(steps if r.tuning.slot.steps_done >= usual else usual for r in self._running)
            done = sum(r.tuning.slot.steps_done for r in self._running)
            by_pace = (now - self._began) / self._steps * (begun - done + usual * max(0, trials - asked))
        known = [seconds for seconds in (by_pace, by_clock) if seconds is not None]
        return min(known, default=None)


def describe_end(record: TrialRecord, objective: Objective) -> str:
    """The end of a trial in words, as `finished with 87.2 %`."""
    score = "" if record.score is None else f" with {objective.show(record.score)}"
    why = f" ({record.reason})" if record.reason else ""
    return f"{record.outcome}{score}{why}"
