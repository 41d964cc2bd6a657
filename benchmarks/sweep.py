"""The wall time of a whole sweep of N short trials to equal best score, both sides by turns, trial by trial.

Ours is the product's own way: `begin_sweep` and `Lane`, with the study in SQLite, every trial a run in MLflow, prompts
stored, and as many slots as the product chooses for the device. The peer is Optuna around PEFT with the Trainer, in the
way of transformers' own search: the objective trains a fresh prompt, and a callback of the Trainer reports each
validation and raises `TrialPruned` where the study says so. To leave engine, scoring and slots as the only difference,
the peer is given what ours uses: space, sampler, pruner and seed, every trial's start and batches, and the validation
rows. Its study is in memory, and it tracks nothing.

Both are followed at every validation. What is compared is the time until each side's best score so far reaches the
lower of the two sides' final bests, for which of them ends a little higher is luck. The times of all N trials stand
beside that. Loading the model and making the databases are counted on neither side.
"""

from typing import Any

import optuna
from optuna.storages import InMemoryStorage
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks import peer
from benchmarks.sizes import Sizes
from benchmarks.start import Start
from benchmarks.subject import Subject, gold
from benchmarks.timing import Stopwatch, ratio
from softprompt import search
from softprompt.evaluation import Metrics
from softprompt.lane import Lane
from softprompt.progress import Lines, watched_by
from softprompt.sizing import choose_slots
from softprompt.spec import ExperimentSpec, validate_experiment
from softprompt.storage import create_stores
from softprompt.sweep import begin_sweep
from softprompt.trials import TrialRecord
from softprompt.workbench import Split, Workbench


class Course:
    """The best score of a sweep so far, by time."""

    def __init__(self) -> None:
        self.watch = Stopwatch()
        self.curve: list[tuple[float, float]] = []
        """Seconds and score, wherever the score rose."""

    @property
    def best(self) -> float:
        """The best score so far."""
        return self.curve[-1][1] if self.curve else 0.0

    def __str__(self) -> str:
        return f"{self.watch.seconds:6.1f} s, best {self.best:.1%}"

    def note(self, score: float) -> None:
        """Take a validation down."""
        if score > self.best:
            self.curve.append((round(self.watch.seconds, 2), score))

    def seconds_to(self, score: float) -> float:
        """When the best so far reached a score."""
        return next(seconds for seconds, best in self.curve if best >= score)


class _Noted(Workbench):
    """A workbench that takes every validation down."""

    course: Course

    def measure(self, prompt: Tensor, split: Split) -> Metrics:
        """As ever."""
        metrics = super().measure(prompt, split)
        self.course.note(metrics.score)
        return metrics


class PeerSearch:
    """Optuna around PEFT with the Trainer."""

    def __init__(self, base: PreTrainedModel, bench: Workbench) -> None:
        self.course = Course()
        self._base = base
        self._bench = bench
        storage = InMemoryStorage()
        search.create_study("peer", storage, bench.experiment)
        self._study = search.load_study("peer", storage, bench.experiment)

    def run_trial(self) -> None:
        """One trial more."""
        with self.course.watch.running():
            self._study.optimize(self._objective, n_trials=1)

    def _objective(self, trial: optuna.Trial) -> float:
        experiment, split = self._bench.experiment, self._bench.split("validation")
        params = search.suggest(trial, experiment.search)
        slot = self._bench.start(params, seed=[experiment.seed, trial.number])
        start = Start(slot.prompt.detach().cpu(), self._bench.examples, slot.settings)
        model, labels, scores = peer.wrap(self._base, start.prompt), list(self._bench.target.labels.values()), [0.0]
        rows = split.inputs, gold(self._bench, split)

        def validate(steps: int) -> None:
            scores.append(peer.accuracy(model, rows, labels))
            self.course.note(scores[-1])
            trial.report(scores[-1], steps)
            if trial.should_prune():
                raise optuna.TrialPruned

        peer.run(model, start, experiment.training.steps, peer.At(experiment.rungs, validate))
        return max(scores)


def measure(subject: Subject, sizes: Sizes) -> dict[str, Any]:
    """Both sweeps: how long each took to the same score, and to its end."""
    bench = _Noted(shorten(subject.experiment, sizes), backbone=subject.backbone)
    bench.course = Course()
    courses, search_of_peer = {"ours": bench.course}, PeerSearch(subject.base, bench)
    courses["peft"] = search_of_peer.course

    def take_turn(record: TrialRecord) -> None:
        with bench.course.watch.paused():
            search_of_peer.run_trial()
            print("  " + "   ".join(f"{side} {course}" for side, course in courses.items()), flush=True)

    create_stores()
    with watched_by(Lines(lambda text: None)), bench.course.watch.running():
        Lane(bench, begin_sweep(bench, {}, new=True), on_end=take_turn).run()
    slots = choose_slots(bench).slots
    return {"rungs": bench.experiment.rungs, "rows": sizes.trial_rows, "slots": slots, **_compare(courses)}


def _compare(courses: dict[str, Course]) -> dict[str, Any]:
    score = min(course.best for course in courses.values())
    to_score = {side: course.seconds_to(score) for side, course in courses.items()}
    whole = {side: round(course.watch.seconds, 2) for side, course in courses.items()}
    return {
        "score": score,
        "ratio": ratio(to_score["peft"], to_score["ours"]),
        "ratio_of_whole": ratio(whole["peft"], whole["ours"]),
        **{
            side: {
                "seconds_to_score": to_score[side],
                "seconds": whole[side],
                "best": course.best,
                "curve": course.curve,
            }
            for side, course in courses.items()
        },
    }


def shorten(experiment: ExperimentSpec, sizes: Sizes) -> ExperimentSpec:
    """The experiment with trials that two CPU cores have time for, for the peer as well."""
    first, steps = sizes.rungs
    tree = experiment.model_dump(mode="json")
    tree["training"] |= {"steps": steps, "warmup_steps": steps // 16}
    tree["search"] |= {"pruner": {"kind": "halving", "first_rung": first, "factor": 2}}
    tree["splits"] |= {"validation": sizes.trial_rows}
    tree |= {"budget": {"trials": sizes.trials}}
    return validate_experiment(tree, "the benchmark's sweep")
