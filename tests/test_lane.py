"""A whole lane on a tiny model: real study, real tracking store, real training."""

import math
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from optuna.trial import TrialState

from softprompt import search, training
from softprompt.backbone import hash_tensors
from softprompt.closing import close_abandoned_runs, close_open_runs
from softprompt.data import prepare
from softprompt.errors import UserError
from softprompt.home import cache_home, state_home, tracking_uri
from softprompt.lane import Lane
from softprompt.ledger import open_ledger
from softprompt.objective import ACCURACY
from softprompt.progress import Lines, SearchProgress, TrialProgress, watched_by
from softprompt.prompt import SoftPrompt
from softprompt.spec import ExperimentSpec
from softprompt.storage import study_store
from softprompt.sweep import Sweep, begin_sweep, close_sweep, driving
from softprompt.tracking import Tracker, _experiment_id
from softprompt.trials import TrialRecord, describe_end, trial_records
from softprompt.tuning import tune
from softprompt.workbench import Workbench
from tests.tiny import tiny_experiment, tiny_model

SPACE: dict[str, Any] = {
    "length": {"low": 1, "high": 8, "log": True},
    "learning_rate": {"low": 0.01, "high": 0.3, "log": True},
    "initialization": [{"kind": "labels"}, {"kind": "normal"}, {"kind": "uniform", "bound": 1e39}],
    "pruner": {"kind": "none", "every": 6},
}
LABELS = {"length": 4, "initialization": "labels", "learning_rate": 0.1}
NORMAL = {"length": 2, "initialization": "normal", "learning_rate": 0.05}
OVERFLOW = {"length": 3, "initialization": "uniform", "learning_rate": 0.1}
"""Numbers up to 1e39 are infinite in float32: the first loss is nan."""
_names = (f"tiny-{n}" for n in count())


@dataclass
class Ran:
    """What a lane left behind."""

    experiment: ExperimentSpec
    bench: Workbench
    sweep: Sweep
    records: list[TrialRecord]

    @property
    def study(self) -> optuna.Study:
        return search.load_study(self.sweep.name, study_store(), self.experiment)

    @property
    def children(self) -> list[Run]:
        """The trials' runs, by trial number."""
        client = MlflowClient(tracking_uri())
        found = client.search_runs(
            [Tracker(self.experiment).experiment_id], f"tags.`mlflow.parentRunId` = '{self.sweep.run_id}'"
        )
        return sorted(found, key=lambda run: int(run.data.tags["optuna.trial"]))

    def prompt(self, number: int, folder: Path) -> SoftPrompt:
        return SoftPrompt.load(Tracker(self.experiment).fetch_prompt(self.children[number].info.run_id, folder))


@pytest.fixture(scope="module")
def make(tmp_path_factory) -> Callable[..., Ran]:
    """A sweep that is open and has not run yet."""

    def opened(*start: dict[str, Any], space: dict[str, Any] | None = None, **overrides: Any) -> Ran:
        parts = {"name": next(_names), "search": SPACE | {"start": start} | (space or {})}
        parts |= {"budget": {"trials": len(start)}}
        experiment = tiny_experiment(tmp_path_factory.mktemp("lane"), **parts | overrides)
        bench = Workbench(experiment, prepare(experiment, cache_home()))
        state_home().mkdir(parents=True, exist_ok=True)
        return Ran(experiment, bench, begin_sweep(bench, {"prefect.flow_run_id": experiment.name}), [])

    return opened


@pytest.fixture(scope="module")
def run(make: Callable[..., Ran]) -> Callable[..., Ran]:
    """A sweep that has run to its end."""

    def ran(*start: dict[str, Any], **overrides: Any) -> Ran:
        made = make(*start, **overrides)
        Lane(made.bench, made.sweep, on_end=made.records.append).run()
        return made

    return ran


@pytest.fixture(scope="module")
def ends(run: Callable[..., Ran]) -> Ran:
    """A trial that finished and one that failed."""
    return run(LABELS, OVERFLOW)


def test_the_status_of_a_run_tells_how_its_trial_ended(ends):
    finished, failed = ends.children
    assert (finished.info.status, finished.data.tags["softprompt.outcome"]) == ("FINISHED", "finished")
    assert (failed.info.status, failed.data.tags["softprompt.outcome"]) == ("FAILED", "failed")
    assert failed.data.tags["softprompt.reason"] == "the training loss is nan at step 1; try a lower learning rate"


def test_study_tracker_and_records_agree(ends):
    states = {"finished": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
    for record, trial, child in zip(ends.records, ends.study.trials, ends.children, strict=True):
        assert trial.state == states[record.outcome]
        assert Tracker(ends.experiment).find_trial_run(ends.sweep.name, record.number) == child.info.run_id
        assert trial.user_attrs["title"] == record.title == f"trial {child.info.run_name}"
        assert (child.data.tags["optuna.study"], child.data.tags["optuna.trial"]) == (
            ends.sweep.name,
            str(record.number),
        )
        assert "prefect.flow_run_id" not in child.data.tags  # the sweep's may change when it goes on
        assert trial.user_attrs.get("reason", "") == child.data.tags.get("softprompt.reason", "") == record.reason


def test_a_run_has_its_settings_and_its_curves(ends):
    client, child = MlflowClient(tracking_uri()), ends.children[0]
    settings = {"length": "4", "initialization": "labels", "learning_rate": "0.1", "method": "prompt_tuning"}
    assert child.data.params == settings
    losses = client.get_metric_history(child.info.run_id, "train_loss")
    assert [m.step for m in losses] == list(range(1, 13))
    assert all(math.isfinite(m.value) for m in losses)
    for metric in ("val_accuracy", "val_loss", "val_illegal"):
        assert [m.step for m in client.get_metric_history(child.info.run_id, metric)] == [6, 12]
    assert child.data.metrics["best_val_accuracy"] == ends.records[0].score == ends.study.trials[0].value


def test_a_failed_run_shows_the_loss_that_ended_it(ends):
    child = ends.children[1]
    (loss,) = MlflowClient(tracking_uri()).get_metric_history(child.info.run_id, "train_loss")
    assert (loss.step, math.isnan(loss.value)) == (1, True)
    assert MlflowClient(tracking_uri()).list_artifacts(child.info.run_id) == []


def test_a_run_names_its_data_by_digest(ends):
    parent = MlflowClient(tracking_uri()).get_run(ends.sweep.run_id)
    assert parent.inputs is not None
    seen = {i.tags[0].value: i.dataset.digest for i in parent.inputs.dataset_inputs}
    assert seen == dict.fromkeys(("train", "validation", "test"), ends.bench.data.digest[:8])
    assert {i.tags[0].value for i in ends.children[0].inputs.dataset_inputs} == {"train", "validation"}


def test_the_parent_run_holds_the_experiment(ends):
    parent = MlflowClient(tracking_uri()).get_run(ends.sweep.run_id)
    assert parent.info.run_name.startswith("sweep ")
    assert parent.data.tags["optuna.study"] == ends.sweep.name
    assert parent.data.tags["softprompt.fingerprint"] == ends.experiment.fingerprint
    assert parent.data.params["test_rows"] == "60"
    assert parent.info.status == "RUNNING"  # closed by the task that registers the winner


def test_the_prompt_of_a_trial_loads_and_says_where_it_comes_from(ends, tmp_path):
    prompt = ends.prompt(0, tmp_path)
    prompt.require(ends.bench.backbone)
    assert prompt.length == 4
    assert prompt.provenance["params"] == LABELS | {"method": "prompt_tuning"}
    assert prompt.provenance["dataset"]["digest"] == ends.bench.data.digest
    assert prompt.provenance["validation"]["accuracy"] == ends.records[0].score


def test_the_model_is_never_touched(ends):
    assert ends.bench.backbone.weights_sha256 == ends.bench.backbone.weights_in_memory_sha256()
    assert not any(p.requires_grad for p in ends.bench.backbone.model.parameters())


def test_a_weak_trial_is_pruned(run, monkeypatch):
    scores = iter([0.9, 0.8, 0.2])
    real = Workbench.measure

    def measure(bench, *of):
        return real(bench, *of).model_copy(update={"accuracy": next(scores)})

    monkeypatch.setattr(Workbench, "measure", measure)
    ran = run(LABELS, NORMAL, space={"pruner": {"kind": "halving", "first_rung": 6, "factor": 2}})
    assert [r.outcome for r in ran.records] == ["finished", "pruned"]
    assert ran.records[1].reason == "20.0% at step 6 is too far behind other trials"
    assert (ran.children[1].info.status, ran.study.trials[1].state) == ("KILLED", TrialState.PRUNED)
    assert (ran.study.trials[1].intermediate_values, ran.records[1].steps) == ({6: 0.2}, 6)


def test_scores_that_are_no_numbers_fail_one_trial_and_not_the_lane(run, monkeypatch):
    real = training.step

    def poison(backbone, slots, passes):
        losses = real(backbone, slots, passes)
        if slots[0].steps_done == 12 and slots[0].prompt.shape[0] == LABELS["length"]:
            slots[0].prompt.data.fill_(torch.nan)
        return losses

    monkeypatch.setattr("softprompt.lane.step", poison)
    ran = run(LABELS, NORMAL)
    assert [r.outcome for r in ran.records] == ["failed", "finished"]
    assert ran.records[0].reason == "the scores are nan after step 12; try a lower learning rate"
    assert ran.prompt(0, state_home() / "fetched").provenance["step"] == 6  # the rung before is kept


def test_both_methods_share_a_lane_and_train_as_alone(run, tmp_path):
    points = [LABELS | {"method": "prefix_tuning"}, NORMAL | {"method": "prompt_tuning"}]
    points += [NORMAL | {"method": "prefix_tuning"}]
    space = {"method": {"choices": ["prompt_tuning", "prefix_tuning"]}}
    together = run(*points, space=space, execution={"device": "cpu", "slots": 3})
    assert [r.outcome for r in together.records] == ["finished"] * 3
    for number, point in enumerate(points):
        found, expected = together.prompt(number, tmp_path / str(number)), tune(together.bench, point, number=number)
        assert found.method == point["method"] == together.children[number].data.params["method"]
        torch.testing.assert_close(found.vectors, expected.vectors, rtol=1e-4, atol=1e-5)
    assert "prefix · labels" in together.children[0].info.run_name
    backbone = together.bench.backbone
    assert backbone.weights_in_memory_sha256() == hash_tensors(sorted(tiny_model().state_dict().items()))


FOUR = (LABELS, NORMAL, LABELS | {"length": 8}, NORMAL | {"learning_rate": 0.3})


@pytest.fixture(scope="module")
def alone(run: Callable[..., Ran]) -> Ran:
    """Four known trials one after the other."""
    return run(*FOUR)


def test_a_trial_does_not_depend_on_its_neighbours(run, alone, tmp_path):
    together = run(*FOUR, execution={"device": "cpu", "slots": 3})
    by_number = sorted(together.records, key=lambda r: r.number)
    for number, record in enumerate(by_number):
        ours, theirs = alone.prompt(number, tmp_path / f"a{number}"), together.prompt(number, tmp_path / f"b{number}")
        assert ours.provenance["params"] == theirs.provenance["params"]
        assert FOUR[number].items() <= ours.provenance["params"].items()
        assert record.score == alone.records[number].score
        torch.testing.assert_close(theirs.vectors, ours.vectors, rtol=1e-4, atol=1e-5)

    sweep = MlflowClient(tracking_uri()).get_run(together.sweep.run_id)
    assert sweep.data.tags["softprompt.slots"] == "3, as execution.slots says"


FURTHER: dict[str, Any] = {
    "reparameterization": [{"kind": "none"}, {"kind": "residual", "bottleneck": {"choices": [4, 8]}}],
    "max_norm": {"choices": [None, 1.0]},
}


def test_trials_of_further_settings_are_told_recorded_and_do_not_depend_on_their_neighbours(run, tmp_path):
    space, budget = FURTHER | {"startup_trials": 9}, {"trials": 6}
    training = tiny_experiment(tmp_path).training.model_dump() | {"loss": "labels"}
    execution = {"device": "cpu", "slots": 3, "micro_batch_tokens": 60}
    ran = run(space=space, budget=budget, training=training, execution=execution)
    kinds = set()
    for record, child in zip(sorted(ran.records, key=lambda r: r.number), ran.children, strict=True):
        if record.outcome == "failed":
            continue  # numbers that overflow
        prompt = ran.prompt(record.number, tmp_path / str(record.number))
        params = prompt.provenance["params"]
        kinds.add(params["reparameterization"])
        assert child.data.params == {name: str(value) for name, value in params.items()}
        assert ("· residual ·" in record.title) == (params["reparameterization"] == "residual")
        alone = tune(ran.bench, params, number=record.number)
        assert prompt.vectors.shape == (params["length"], 32)
        torch.testing.assert_close(prompt.vectors, alone.vectors, rtol=1e-3, atol=1e-4)
    assert kinds == {"none", "residual"}
    assert ran.bench.backbone.weights_in_memory_sha256() == ran.bench.backbone.weights_sha256


def test_the_library_alone_trains_the_same_prompt(alone, tmp_path):
    assert torch.equal(tune(alone.bench, dict(NORMAL), number=1).vectors, alone.prompt(1, tmp_path).vectors)


def test_the_same_seed_gives_the_same_winner_bit_for_bit(run, tmp_path):
    kinds = [{"kind": kind} for kind in ("labels", "normal", "vocabulary")]
    space = {"initialization": kinds, "startup_trials": 1, "pruner": {"kind": "halving", "first_rung": 3}}
    first, second = (run(LABELS, space=space, budget={"trials": 4}) for _ in range(2))
    told = [[(r.outcome, r.score, r.steps, r.title) for r in ran.records] for ran in (first, second)]
    assert told[0] == told[1]
    winners = [search.best_trial(ran.study).number for ran in (first, second)]
    assert winners[0] == winners[1]
    prompts = [ran.prompt(winners[0], tmp_path / ran.sweep.run_id) for ran in (first, second)]
    assert torch.equal(prompts[0].vectors, prompts[1].vectors)


def test_the_clock_ends_the_search_and_keeps_what_runs(run):
    training = {"steps": 100_000, "batch_size": 4, "max_tokens": 48, "schedule": "constant", "warmup_steps": 0}
    ran = run(
        *FOUR[:2],
        training=training | {"weight_decay": 0.0, "clip_norm": 1.0},
        budget={"minutes": 0.02},
        space={"pruner": {"kind": "none", "every": 50_000}},
        execution={"device": "cpu", "slots": 2},
    )
    assert [r.outcome for r in ran.records] == ["finished", "finished"]
    for record in ran.records:
        assert 0 < record.steps < 100_000
        assert record.reason == f"budget.minutes was spent at step {record.steps}"
        assert describe_end(record, ACCURACY).endswith(f"(budget.minutes was spent at step {record.steps})")
    assert search.best_trial(ran.study).value == max(r.score or 0 for r in ran.records)


def test_a_space_with_nothing_new_ends_the_search(run, monkeypatch):
    monkeypatch.setattr(search, "_PATIENCE", 12)
    space = {"length": 2, "learning_rate": 0.1, "initialization": [{"kind": "labels"}, {"kind": "normal"}]}
    ran = run(space=space, budget={"trials": 9})
    assert sorted(r.title.partition(": ")[2] for r in ran.records) == [
        "labels · P=2 · lr 0.1",
        "normal · P=2 · lr 0.1 · scale 1",
    ]


class Impatient:
    """A watcher that loses patience at a step."""

    def __init__(self, at: int) -> None:
        self._at = at

    def stage(self, text: str) -> None:
        pass

    def step(self, trial: TrialProgress, search: SearchProgress) -> None:
        if trial.step == self._at:
            raise KeyboardInterrupt

    def end(self, title: str, outcome: str, search: SearchProgress) -> None:
        pass


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("at", [2, 6, 12])
def test_a_search_that_was_interrupted_goes_on_and_ends_as_it_would_have(make, run, slots: int, at: int, tmp_path):
    execution = {"device": "cpu", "slots": slots}
    whole, ran = run(*FOUR, execution=execution), make(*FOUR, execution=execution)
    with watched_by(Impatient(at)), pytest.raises(KeyboardInterrupt):
        Lane(ran.bench, ran.sweep, on_end=ran.records.append).run()
    assert TrialState.RUNNING in {t.state for t in ran.study.trials}
    again = begin_sweep(ran.bench, {})
    assert (again.name, again.run_id, again.resumed) == (ran.sweep.name, ran.sweep.run_id, True)
    Lane(ran.bench, again, on_end=ran.records.append).run()
    assert_equal_ends(whole, ran, tmp_path)


def assert_equal_ends(whole: Ran, ran: Ran, folder: Path) -> None:
    """Two sweeps left the same: trials, curves, and prompts to the bit."""
    told = [[(r.number, r.title, r.outcome, r.score, r.steps) for r in trial_records(s.study)] for s in (whole, ran)]
    assert told[0] == told[1]
    assert len({r.number for r in ran.records}) == len(ran.records) == len(told[1])
    assert [t.intermediate_values for t in whole.study.trials] == [t.intermediate_values for t in ran.study.trials]
    client = MlflowClient(tracking_uri())
    for number, (ours, theirs) in enumerate(zip(whole.children, ran.children, strict=True)):
        assert (ours.info.status, ours.data.params) == (theirs.info.status, theirs.data.params)
        assert ours.data.metrics.keys() == theirs.data.metrics.keys()
        for key in ours.data.metrics.keys() - {"seconds"}:
            curves = [client.get_metric_history(run.info.run_id, key) for run in (ours, theirs)]
            assert [(m.step, m.value) for m in curves[0]] == [(m.step, m.value) for m in curves[1]]
        prompts = [each.prompt(number, folder / f"{n}-{number}").vectors for n, each in enumerate((whole, ran))]
        assert torch.equal(*prompts)
    assert not list((state_home() / "sweeps" / ran.sweep.name).iterdir())


def test_an_interrupt_while_a_trial_is_recorded_loses_nothing(make, run, tmp_path):
    execution = {"device": "cpu", "slots": 3}
    whole, ran = run(*FOUR, execution=execution), make(*FOUR, execution=execution)

    def interrupt(record: TrialRecord) -> None:
        ran.records.append(record)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Lane(ran.bench, ran.sweep, on_end=interrupt).run()
    assert [r.outcome for r in ran.records] == ["finished"]
    Lane(ran.bench, ran.sweep, on_end=ran.records.append).run()
    assert_equal_ends(whole, ran, tmp_path)


def test_ctrl_c_stops_at_a_step_and_is_then_what_it_always_was(make, run, tmp_path):
    whole, ran = run(*FOUR), make(*FOUR)

    class Presses(Impatient):
        def step(self, trial: TrialProgress, search: SearchProgress) -> None:
            if (trial.number, trial.step) == (1, 4):
                signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which is ignored in the background
    with watched_by(Presses(0)), pytest.raises(KeyboardInterrupt):
        Lane(ran.bench, ran.sweep, on_end=ran.records.append).run()
    signal.signal(signal.SIGINT, before)
    assert [r.number for r in ran.records] == [0]
    lines: list[str] = []
    with watched_by(Lines(lines.append)):
        Lane(ran.bench, ran.sweep, on_end=ran.records.append).run()
    assert [line for line in lines if line.endswith(": goes on from step 4")]
    assert_equal_ends(whole, ran, tmp_path)


def test_a_trial_that_cannot_start_fails_with_its_reason_and_the_others_go_on(make, monkeypatch):
    ran, real = make(LABELS, NORMAL), Workbench.start

    def refuse(bench: Workbench, params: dict[str, Any], **others: Any) -> Any:
        if params["initialization"] == "labels":
            raise UserError("params: nothing for labels here")
        return real(bench, params, **others)

    monkeypatch.setattr(Workbench, "start", refuse)
    Lane(ran.bench, ran.sweep, on_end=ran.records.append).run()
    assert [(r.outcome, r.reason) for r in ran.records] == [
        ("failed", "params: nothing for labels here"),
        ("finished", ""),
    ]
    assert [c.info.status for c in ran.children] == ["FAILED", "FINISHED"]


def test_of_trials_side_by_side_the_one_that_breaks_a_step_fails_alone(make, monkeypatch):
    ran, real = make(LABELS, NORMAL, LABELS | {"length": 8}, execution={"device": "cpu", "slots": 3}), training.step

    def breaks(backbone: Any, slots: Any, passes: Any) -> Any:
        if any(slot.prompt.shape[0] == 8 for slot in slots):
            raise torch.OutOfMemoryError("no room for 8 vectors")
        return real(backbone, slots, passes)

    monkeypatch.setattr("softprompt.lane.step", breaks)
    Lane(ran.bench, ran.sweep, on_end=ran.records.append).run()
    by_number = sorted(ran.records, key=lambda r: r.number)
    assert [(r.outcome, r.reason) for r in by_number] == [
        ("finished", ""),
        ("finished", ""),
        ("failed", "OutOfMemoryError: no room for 8 vectors"),
    ]


def test_a_search_whose_first_trials_all_fail_for_one_cause_stops_and_says_it(make):
    points = [OVERFLOW | {"length": length} for length in (1, 2, 3, 4, 5)]
    ran = make(*points)
    with pytest.raises(search.HopelessSweep, match="the training loss is nan at step 1"), driving(ran.sweep):
        Lane(ran.bench, ran.sweep, on_end=ran.records.append).run()
    assert [r.outcome for r in ran.records] == ["failed"] * 3
    assert not begin_sweep(ran.bench, {}).resumed


def test_a_sweep_that_has_ended_is_not_gone_on_with(run):
    ran = run(LABELS)
    close_sweep(ran.experiment, ran.sweep)
    again = begin_sweep(ran.bench, {})
    assert (again.resumed, again.name == ran.sweep.name) == (False, False)


def test_one_that_is_given_up_is_closed_everywhere(make):
    ran = make(LABELS, NORMAL)
    with watched_by(Impatient(6)), pytest.raises(KeyboardInterrupt):
        Lane(ran.bench, ran.sweep).run()
    other = begin_sweep(ran.bench, {}, new=True)
    assert (other.resumed, other.name == ran.sweep.name) == (False, False)
    client = MlflowClient(tracking_uri())
    for left in (*ran.children, client.get_run(ran.sweep.run_id)):
        assert (left.info.status, left.data.tags["softprompt.outcome"]) == ("KILLED", "interrupted")
        assert left.data.tags["softprompt.reason"] == "given up for a new sweep"
    assert [t.state for t in ran.study.trials][:1] == [TrialState.FAIL]
    assert not (state_home() / "sweeps" / ran.sweep.name).exists()
    assert begin_sweep(ran.bench, {}).name == other.name


def test_other_settings_are_another_sweep_and_another_place_is_not(make):
    ran = make(LABELS, NORMAL)
    changed = ran.experiment.model_copy(update={"seed": 7})
    assert begin_sweep(Workbench(changed, ran.bench.data), {}).name != ran.sweep.name
    place = ran.experiment.execution.model_copy(update={"slots": 2, "checkpoint_seconds": 5.0})
    moved = ran.experiment.model_copy(update={"execution": place})
    assert begin_sweep(Workbench(moved, ran.bench.data), {}).name == ran.sweep.name


def test_a_sweep_that_another_living_process_drives_is_refused(make):
    ran = make(LABELS)
    open_ledger().release(ran.sweep.name, "sweep")
    with subprocess.Popen([sys.executable, "-c", HOLD, ran.sweep.name], stdin=-1, stdout=-1, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"^{ran.sweep.name} is at work already, in process {process.pid} on "):
            begin_sweep(ran.bench, {})
        process.kill()
    assert begin_sweep(ran.bench, {}).resumed


HOLD = """
import sys
from softprompt.ledger import open_ledger
assert open_ledger().claim(sys.argv[1], "sweep")
print("held", flush=True)
sys.stdin.read()
"""


def test_what_a_killed_process_left_open_is_interrupted_and_goes_on(make):
    ran = make(LABELS)
    lane = Lane(ran.bench, ran.sweep)
    lane._refill()
    lane._delivery.flush()
    lane._leave()
    close_open_runs(ran.experiment.name, "failed", "gone")
    for run in (*ran.children, MlflowClient(tracking_uri()).get_run(ran.sweep.run_id)):
        assert run.info.status == "KILLED"
        assert run.data.tags["softprompt.outcome"] == "interrupted"
        assert run.data.tags["softprompt.reason"] == "gone; `softprompt sweep` goes on with it"
    again = begin_sweep(ran.bench, {})
    Lane(ran.bench, again).run()
    assert [(c.info.status, c.data.tags["softprompt.outcome"]) for c in ran.children] == [("FINISHED", "finished")]
    parent = MlflowClient(tracking_uri()).get_run(ran.sweep.run_id)
    assert (parent.info.status, "softprompt.outcome" in parent.data.tags) == ("RUNNING", False)


def owned_by(ran: Ran, pid: int) -> None:
    """Let the sweep have been begun by another process."""
    MlflowClient(tracking_uri()).set_tag(ran.sweep.run_id, "softprompt.pid", str(pid))


def test_what_a_process_that_is_gone_left_open_is_closed_and_a_living_ones_is_not(make):
    gone, living, elsewhere = make(LABELS), make(LABELS), make(LABELS)
    client = MlflowClient(tracking_uri())
    with subprocess.Popen(["true"]) as process:
        process.wait()
    owned_by(gone, process.pid)
    owned_by(elsewhere, process.pid)
    client.set_tag(elsewhere.sweep.run_id, "softprompt.host", "another.example")
    close_abandoned_runs()
    parent = client.get_run(gone.sweep.run_id)
    assert parent.info.status == "KILLED"
    assert parent.data.tags["softprompt.reason"] == "its process is gone; `softprompt sweep` goes on with it"
    for ran in (living, elsewhere):
        assert client.get_run(ran.sweep.run_id).info.status == "RUNNING"
        close_open_runs(ran.experiment.name, "failed", "gone")


def test_closing_what_is_not_there_makes_no_store(tmp_path, monkeypatch):
    monkeypatch.setenv("SOFTPROMPT_HOME", str(tmp_path))
    close_open_runs("a flow run", "failed", "a mistake")
    assert not list(tmp_path.iterdir())


def test_what_was_ended_keeps_its_end_and_what_mlflow_alone_finished_is_open(run):
    ran, client = run(LABELS), MlflowClient(tracking_uri())
    client.set_terminated(ran.sweep.run_id, "FINISHED")  # as registering a version does
    close_open_runs(ran.experiment.name, "failed", "gone")
    assert client.get_run(ran.sweep.run_id).info.status == "KILLED"
    assert [c.info.status for c in ran.children] == ["FINISHED"]


def test_two_sweeps_in_one_second_are_two_studies(make):
    ran = make(LABELS)
    names = {begin_sweep(ran.bench, {}, new=True).name for _ in range(3)}
    assert len(names) == 3


def test_an_experiment_that_was_deleted_in_mlflow_is_refused_before_there_is_a_study(make):
    ran = make(LABELS)
    MlflowClient(tracking_uri()).delete_experiment(Tracker(ran.experiment).experiment_id)
    before = optuna.get_all_study_names(study_store())
    with pytest.raises(UserError, match=rf"^name: the MLflow experiment '{ran.experiment.name}' is deleted in sqlite"):
        begin_sweep(ran.bench, {}, new=True)
    assert optuna.get_all_study_names(study_store()) == before


def test_an_experiment_that_another_process_makes_meanwhile_is_taken(monkeypatch):
    real, looks = MlflowClient.get_experiment_by_name, []

    def late(client, name):
        looks.append(name)
        return None if len(looks) == 1 else real(client, name)

    made = MlflowClient(tracking_uri()).create_experiment(next(_names))
    name = MlflowClient(tracking_uri()).get_experiment(made).name
    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", late)
    assert _experiment_id(MlflowClient(tracking_uri()), name) == made


def test_progress_counts_down_and_shows_the_best(make):
    ran, seen = make(*FOUR[:2]), []

    class Eyes(Impatient):
        def step(self, trial: TrialProgress, search: SearchProgress) -> None:
            seen.append((trial, search))

    with watched_by(Eyes(0)):
        Lane(ran.bench, ran.sweep, on_end=ran.records.append).run()
    assert [(t.number, t.step) for t, _ in seen] == [(n, s) for n in (0, 1) for s in range(1, 13)]
    assert [s.ended for _, s in seen] == [0] * 12 + [1] * 12
    assert seen[-1][1].best == f"accuracy {max(r.score or 0 for r in ran.records):.1%}"
    assert seen[0][1].best is None
    assert (seen[-1][0].rung, seen[-1][0].rungs) == (2, 2)
