"""A lane: one device, one frozen model, trials of a shared study until the budget ends.

A lane asks the study for trials, trains K of them side by side, scores each at its rungs, prunes, records, and refills
the slots. Lanes meet only in the study's storage and in the tracking server. What a lane has to do survives it: a trial
belongs to the lane that holds its lease, its state is in its checkpoints before anyone is told of it, and whoever
claims it after a death goes on from there.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from queue import SimpleQueue
from statistics import fmean

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from softprompt import search
from softprompt.checkpoint import Checkpoints, Ending, identity_of
from softprompt.delivery import Delivery, TrialReport
from softprompt.errors import UserError
from softprompt.history import Outcome
from softprompt.home import checkpoint_home, tracking_server, without_secrets
from softprompt.ledger import open_ledger
from softprompt.progress import SearchProgress, watcher
from softprompt.sizing import choose_slots
from softprompt.stopping import Stop, stoppable
from softprompt.storage import study_store
from softprompt.sweep import Sweep
from softprompt.tracking import Tracker
from softprompt.training import step
from softprompt.trials import TrialRecord, describe_end, ending_of, record_of, tell
from softprompt.tuning import Tuning, describe, history_of
from softprompt.workbench import Workbench

_POLL = 1.0
"""Seconds between two looks at the trials of other lanes."""


@dataclass
class _Running:
    """A trial in a slot, with its handles in the study and on disk."""

    trial: optuna.Trial
    tuning: Tuning
    checkpoints: Checkpoints
    saved: float = field(default_factory=time.monotonic)
    """When its state was last saved."""

    @property
    def number(self) -> int:
        return self.tuning.number


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
        self._ledger = open_ledger()
        self._study = search.load_study(sweep.name, study_store(), bench.experiment)
        self._tracker = Tracker(bench.experiment)
        self._delivered: SimpleQueue[TrialReport] = SimpleQueue()
        self._delivery = Delivery(self._tracker, sweep, bench.data, self._delivered.put)
        self._on_end = on_end
        self._slots = 1
        """K, the trials side by side at the most; chosen when the lane begins."""
        self._running: list[_Running] = []
        self._undelivered: dict[int, Checkpoints] = {}
        """Trials that have ended, and whose records are on their way."""
        self._trials: list[FrozenTrial] = []
        """The trials that count, as the study had them when one last began or ended."""
        self._whole = True
        """Whether the state of the slots is that after a step, and not in the middle of one."""
        self._exhausted = False
        self._looked = -_POLL
        """When there was last looked for something to fill a free slot with."""
        self._steps = 0
        self._ended_steps: list[int] = []
        row = self._ledger.find_sweep(sweep.name)
        self._spent = row.seconds if row else 0.0
        """Seconds of search before this lane began."""
        self._began = time.monotonic()

    def run(self) -> None:
        """Train until the budget is spent and no lane has anything left to do, then return.

        Whatever interrupts it, the state of every trial is saved, and others may claim them. Raises HopelessSweep where
        the first trials all fail for one cause.
        """
        choice = choose_slots(self._bench)
        self._slots = choice.slots
        watcher().stage(f"trials side by side: {choice}")
        self._tracker.log_slots(self._sweep.run_id, str(choice))
        with stoppable() as stop, self._ledger.beating():
            try:
                while self._go_on(stop):
                    pass
            finally:
                self._leave()

    def _go_on(self, stop: Stop) -> bool:
        """Fill the slots and make a step, or wait for others; False when all is done, or a stop is asked for."""
        self._collect()
        if stop.requested:
            return False
        try:
            self._refill()
            if self._running:
                self._step()
                return True
        except UpdateFinishedTrialError:
            if not self._drop_lost():
                raise
            return True
        if not (self._undelivered or self._elsewhere()):
            return False
        stop.wait(_POLL if self._elsewhere() else 0.05)
        return True

    def _refill(self) -> None:
        """Fill the free slots: first with what a lane that died has left, then from the study."""
        full, just = len(self._running) == self._slots, time.monotonic() - self._looked < _POLL
        if full or (self._running and just):
            return
        self._looked = time.monotonic()
        for number in self._elsewhere():
            if len(self._running) < self._slots and self._ledger.claim(self._sweep.name, _subject(number)):
                self._take_up(number)
        while len(self._running) < self._slots and self._may_start():
            asked = self._ask()
            if asked is None:
                self._exhausted = search.is_exhausted(self._study)
                if self._exhausted:
                    watcher().stage("the search space has nothing new left to try")
                break
            self._start(*asked)

    def _ask(self) -> tuple[optuna.Trial, search.Params] | None:
        """A new trial that is this lane's alone; what is asked for on the way and not to be trained is let go of."""
        claimed: list[int] = []

        def claim(number: int) -> bool:
            if not self._ledger.claim(self._sweep.name, _subject(number)):
                return False
            claimed.append(number)
            return True

        asked = search.ask(self._study, self._experiment.search, self._experiment.budget, claim)
        for number in claimed if asked is None else claimed[:-1]:
            self._ledger.release(self._sweep.name, _subject(number))
        return asked

    def _elsewhere(self) -> list[int]:
        """Numbers of the trials that are under way and not this lane's."""
        leased = [s.partition(" ")[2] for s in self._ledger.leased(self._sweep.name) if s.startswith(_subject(""))]
        own = {running.number for running in self._running} | self._undelivered.keys()
        return sorted({*map(int, leased), *search.unfinished(self._study)} - own)

    def _take_up(self, number: int) -> None:
        """Go on with a trial that this lane has just claimed, at whatever point it was left."""
        checkpoints = self._checkpoints(number)
        trial, ending = self._frozen(number), checkpoints.ending
        if trial.state.is_finished() and search.is_counted(trial):
            self._deliver_end(number, checkpoints, ending or ending_of(trial))
            return
        reopened = search.reopen(self._study, number, self._experiment.search, self._experiment.budget)
        if reopened is None:  # it is told by now not to be trained
            self._ledger.release(self._sweep.name, _subject(number))
        elif ending is not None:
            self._finish(reopened[0], checkpoints, ending)
        else:
            self._start(*reopened, left=True)

    def _frozen(self, number: int) -> FrozenTrial:
        """A trial as the study has it now."""
        return next(t for t in self._study.get_trials(deepcopy=False) if t.number == number)

    def _may_start(self) -> bool:
        return not (self._exhausted or self._overdue)

    @property
    def _seconds(self) -> float:
        """Seconds of search in all, of this sweep."""
        return self._spent + time.monotonic() - self._began

    @property
    def _overdue(self) -> bool:
        minutes = self._experiment.budget.minutes
        return minutes is not None and self._seconds >= 60 * minutes

    def _checkpoints(self, number: int) -> Checkpoints:
        folder = checkpoint_home() / self._sweep.name / f"trial-{number:05d}"
        return Checkpoints(folder, identity_of(self._bench, self._sweep.name, number))

    def _start(self, trial: optuna.Trial, params: search.Params, *, left: bool = False) -> None:
        """Put a trial that this lane holds into a slot; one that was left goes on from its last checkpoint."""
        checkpoints = self._checkpoints(trial.number)
        trial.set_user_attr(search.TITLE, f"trial {trial.number}: {describe(params)}")
        try:
            tuning = Tuning(self._bench, params, number=trial.number, seed=[self._experiment.seed, trial.number])
        except Exception as error:  # of this trial's settings alone, and not of the sweep
            reason = _told(error)
            ending = Ending(outcome="failed", reason=reason, score=None, val_loss=None, steps=0, seconds=0.0)
            self._finish(trial, checkpoints, checkpoints.close(ending, None))
            return
        running = _Running(trial, tuning, checkpoints)
        self._running.append(running)
        if left:
            self._fetch(trial.number, checkpoints)
            if checkpoints.load(tuning.restore) is not None:
                watcher().stage(f"{tuning.title}: goes on from step {tuning.slot.steps_done}")
        self._report(running)
        self._trials = search.counted(self._study)
        if tuning.failure:
            self._end(running, "failed", tuning.failure)
        elif tuning.judged is not None:
            self._judge(running)
        elif tuning.at_rung:
            self._score(running)

    def _fetch(self, number: int, checkpoints: Checkpoints) -> None:
        """Get what a lane of another machine has stored, where there may be one."""
        if tracking_server() is None:
            return
        try:
            self._tracker.fetch_checkpoints(self._sweep.name, number, checkpoints.folder)
        except Exception as error:
            watcher().stage(f"trial {number}: its checkpoints cannot be fetched ({_told(error)}), those here are used")

    def _step(self) -> None:
        """One training step of every slot, and what follows from it."""
        self._whole = False
        losses = self._advance()
        for running, loss in losses:
            running.tuning.add_loss(loss)
        self._whole = True
        self._steps += len(losses)
        for running, _ in losses:
            if running.tuning.failure:
                self._end(running, "failed", running.tuning.failure)
            elif running.tuning.at_rung or self._overdue:
                self._score(running)
            else:
                if time.monotonic() - running.saved >= self._experiment.execution.checkpoint_seconds:
                    self._save(running)
                watcher().step(running.tuning.progress(), self._progress())

    def _advance(self) -> list[tuple[_Running, float]]:
        """The losses of a step of all slots; where it cannot be made together, of each that can make it alone."""
        backbone, passes = self._bench.backbone, self._bench.passes
        try:
            losses = step(backbone, [r.tuning.slot for r in self._running], passes).tolist()
            return list(zip(self._running, losses, strict=True))
        except Exception as error:
            if len(self._running) == 1:
                self._end(self._running[0], "failed", _told(error))
                return []
        made = []
        for running in list(self._running):
            try:
                made.append((running, step(backbone, [running.tuning.slot], passes).item()))
            except Exception as error:
                self._end(running, "failed", _told(error))
        return made

    def _score(self, running: _Running) -> None:
        """Validate, save, and judge."""
        try:
            running.tuning.validate()
        except Exception as error:
            self._end(running, "failed", _told(error))
            return
        if self._save(running):
            self._judge(running)

    def _judge(self, running: _Running) -> None:
        """Report the last score, and stop the trial where it is finished, pruned or out of time.

        Done again after a death, it says the same.
        """
        tuning, at, score = running.tuning, running.tuning.slot.steps_done, running.tuning.judged
        assert score is not None
        search.report(running.trial, score, at)
        watcher().step(tuning.progress(), self._progress())
        if tuning.slot.finished:
            self._end(running, "finished")
        elif self._overdue:
            self._end(running, "finished", f"budget.minutes was spent at step {at}")
        elif search.falls_behind(running.trial, at):
            self._end(running, "pruned", f"{self._objective.show(score)} at step {at} is too far behind other trials")

    def _save(self, running: _Running) -> bool:
        """Write a checkpoint, and report what is in it; False where the trial is another lane's by now."""
        if not self._still_held(running):
            return False
        saved = running.checkpoints.save(running.tuning.slot.steps_done, running.tuning.state())
        running.saved = time.monotonic()
        self._ledger.spend(self._sweep.name, self._seconds)
        if saved is not None:
            self._report(running)
        return True

    def _report(self, running: _Running) -> None:
        """Let the trial's run say what is saved."""
        tuning, files = running.tuning, running.checkpoints.files()
        self._delivery.put(
            TrialReport(
                number=tuning.number,
                name=tuning.title.removeprefix("trial "),
                params=tuning.params,
                history=tuning.history,
                length=len(tuning.history),
                checkpoint=files[-1] if files else None,
            )
        )

    def _still_held(self, running: _Running) -> bool:
        """Whether the trial is this lane's still; one that was taken up by another, it drops without a word."""
        if self._ledger.holds(self._sweep.name, _subject(running.number)):
            return True
        self._running.remove(running)
        watcher().stage(f"{running.tuning.title}: another lane has taken it up meanwhile")
        return False

    def _drop_lost(self) -> bool:
        """Whether a trial was lost: this lane stood still, and another one has ended the trial meanwhile."""
        return [running for running in list(self._running) if not self._still_held(running)] != []

    def _end(self, running: _Running, outcome: Outcome, reason: str = "") -> None:
        """The end of a trial in a slot."""
        if not self._save(running):
            return
        tuning, best = running.tuning, running.tuning.best
        ending = Ending(
            outcome=outcome,
            reason=reason,
            score=best.metrics.score if best else None,
            val_loss=best.metrics.log_loss if best else None,
            steps=tuning.slot.steps_done,
            seconds=round(tuning.seconds, 1),
        )
        ending = running.checkpoints.close(ending, tuning.prompt() if best else None)
        self._finish(running.trial, running.checkpoints, ending, running)

    def _finish(
        self, trial: optuna.Trial, checkpoints: Checkpoints, ending: Ending, running: _Running | None = None
    ) -> None:
        """The one place where a trial ends for others, once its end is on disk: study, then tracker."""
        tell(self._study, trial, ending)
        if running is not None:
            self._running.remove(running)
            self._looked = -_POLL
            self._ended_steps.append(ending.steps)
        self._deliver_end(trial.number, checkpoints, ending, running.tuning if running else None)
        self._trials = search.counted(self._study)
        record = record_of(self._frozen(trial.number))
        watcher().end(record.title, describe_end(record, self._objective), self._progress())
        self._on_end(record)
        cause = search.common_cause(self._study)
        if cause:
            raise search.HopelessSweep(f"the first trials of {self._sweep.name} all failed, for one cause: {cause}")

    def _deliver_end(self, number: int, checkpoints: Checkpoints, ending: Ending, tuning: Tuning | None = None) -> None:
        """Let the trial's run say how it ended; the lease is kept until it does."""
        frozen = self._frozen(number)
        state = None if tuning else checkpoints.load()
        history = tuning.history if tuning else history_of(state) if state else []
        self._undelivered[number] = checkpoints
        self._delivery.put(
            TrialReport(
                number=number,
                name=str(frozen.user_attrs[search.TITLE]).removeprefix("trial "),
                params=tuning.params if tuning else search.params_of(frozen, self._experiment.search),
                history=history,
                length=len(history),
                ending=ending,
                prompt=checkpoints.prompt_folder,
            )
        )

    def _collect(self) -> None:
        """Let go of the trials whose records have arrived."""
        while not self._delivered.empty():
            report = self._delivered.get()
            if report.ending is not None:
                self._undelivered.pop(report.number).remove()
                self._ledger.let_go(self._sweep.name, [_subject(report.number)])

    def _leave(self) -> None:
        """Save what is in the slots, and let go of everything: whoever comes next goes on from the disk.

        It does not take long, whatever is away: a storage that does not answer lets nobody take a trial either.
        """
        for running in self._running if self._whole else ():
            with suppress(Exception):  # the checkpoint before it is as good
                if self._ledger.may_hold(self._sweep.name, _subject(running.number)):
                    running.checkpoints.save(running.tuning.slot.steps_done, running.tuning.state())
        self._delivery.close(patience=2.0)
        with suppress(Exception):
            self._collect()
        numbers = [*(r.number for r in self._running), *self._undelivered]
        self._ledger.let_go(self._sweep.name, [_subject(number) for number in numbers])

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
        trials, minutes = self._experiment.budget.trials, self._experiment.budget.minutes
        by_clock = 60 * minutes - self._seconds if minutes else None
        by_pace = None
        if trials and self._steps:
            steps = self._experiment.training.steps
            usual = fmean([self._experiment.search.pruner.usual_steps(steps), *self._ended_steps])
            begun = sum(steps if r.tuning.slot.steps_done >= usual else usual for r in self._running)
            done = sum(r.tuning.slot.steps_done for r in self._running)
            pace = (time.monotonic() - self._began) / self._steps
            by_pace = pace * (begun - done + usual * max(0, trials - asked))
        known = [seconds for seconds in (by_pace, by_clock) if seconds is not None]
        return min(known, default=None)


def _subject(number: int | str) -> str:
    """What is leased of a trial."""
    return f"trial {number}"


def _told(error: Exception) -> str:
    """An error in a line."""
    text = without_secrets(" ".join(str(error).split()))[:500]
    return text if isinstance(error, UserError | FloatingPointError) else f"{type(error).__name__}: {text}"
