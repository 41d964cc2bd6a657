"""A trial that is stopped after any step and resumed ends as one that was not, to the bit."""

import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from softprompt.backbone import Backbone
from softprompt.checkpoint import Checkpoints, State, identity_of
from softprompt.data import prepare
from softprompt.history import TRAIN_LOSS, Entry
from softprompt.loss import Loss, OverLabels, OverVocabulary
from softprompt.passes import Passes
from softprompt.training import Slot, step
from softprompt.tuning import Tuning
from softprompt.workbench import Workbench
from tests.slots import make_slot, train
from tests.tiny import save_tiny, tiny_backbone, tiny_experiment, tiny_text_experiment

backbone = cache(tiny_backbone)

SLOTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"prefix": True}),
    ("llama", {"bottleneck": 6}),
    ("llama", {"max_norm": 1.5, "prefix": True}),
    ("llama", {"labels": True, "max_norm": 1.5}),
    ("llama", {"schedule": "linear", "batch_size": 7, "clip_norm": 0.1, "tokens": 60}),
    ("gpt2", {"dropout": True}),
    ("gpt2", {"dropout": True, "prefix": True, "heads": 4}),
    ("gpt2", {"dropout": True, "bottleneck": 5, "max_norm": 1.2, "labels": True, "tokens": 60}),
    ("t5", {}),
    ("t5", {"dropout": True, "bottleneck": 6}),
    ("t5", {"labels": True, "max_norm": 1.5}),
    ("mamba", {}),
    ("mamba", {"bottleneck": 6, "max_norm": 1.2}),
    ("mamba", {"labels": True}),
    ("bart", {"dropout": True}),
    ("bloom", {"bottleneck": 6}),
]
"""Every family of models with what it can be tuned by."""
EVERY_SLOT = pytest.mark.parametrize(("kind", "how"), SLOTS, ids=[f"{k}-{'-'.join(h) or 'plain'}" for k, h in SLOTS])


def begin(kind: str, how: dict[str, Any]) -> tuple[Slot, Passes]:
    how = {"steps": 6, **how}
    loss: Loss = OverLabels(backbone(kind), [(300, 301), (310,)]) if how.pop("labels", False) else OverVocabulary()
    tokens, heads = how.pop("tokens", 1024), how.pop("heads", 2)
    slot = make_slot(loss=loss, seed=3, **how)
    if heads != 2:
        initial = 0.3 * torch.randn(2, 2, heads, 4, 8, generator=torch.Generator().manual_seed(3))
        slot = Slot(initial, slot._examples, slot.settings, torch.device("cpu"), loss)
    return slot, Passes(tokens)


def require_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert (tensor.dtype, tensor.shape) == (other[name].dtype, other[name].shape), name
        assert torch.equal(tensor, other[name]), name


@EVERY_SLOT
def test_from_every_step_on_the_next_is_the_same(kind: str, how: dict[str, Any]) -> None:
    """So that every later one is, too."""
    slot, passes = begin(kind, how)
    states, losses = [slot.state()], []
    while not slot.finished:
        losses += train(backbone(kind), slot, steps=1, passes=passes)
        states.append(slot.state())
    for done, loss in enumerate(losses):
        resumed, passes = begin(kind, how)
        resumed.restore(states[done])
        require_same(resumed.state(), states[done])
        assert torch.equal(resumed.prompt, make(kind, how, states[done]).prompt)
        assert train(backbone(kind), resumed, steps=1, passes=passes) == [loss]
        require_same(resumed.state(), states[done + 1])


def make(kind: str, how: dict[str, Any], state: dict[str, Tensor]) -> Slot:
    slot, _ = begin(kind, how)
    slot.restore(state)
    return slot


@settings(deadline=None, max_examples=20)
@given(case=st.sampled_from(SLOTS), cuts=st.lists(st.integers(0, 6), max_size=3))
def test_however_often_it_is_cut_it_ends_the_same(case: tuple[str, dict[str, Any]], cuts: list[int]) -> None:
    kind, how = case
    expected, passes = begin(kind, how)
    losses = train(backbone(kind), expected, passes=passes)
    slot, found = begin(kind, how)[0], list[float]()
    for cut in sorted(cuts):
        found += train(backbone(kind), slot, steps=cut - slot.steps_done, passes=passes)
        slot = make(kind, how, slot.state())
    assert found + train(backbone(kind), slot, passes=passes) == losses
    require_same(slot.state(), expected.state())
    assert torch.equal(slot.prompt, expected.prompt)


def test_beside_a_neighbour_a_slot_goes_on_to_the_same_bits() -> None:
    one, other = (make_slot(length=length, seed=length) for length in (3, 5))
    for _ in range(4):
        step(backbone(), [one, other])
    again, beside = make_slot(length=3, seed=3), make_slot(length=5, seed=5)
    again.restore(one.state())
    beside.restore(other.state())
    for _ in range(3):
        assert step(backbone(), [one, other]).tolist() == step(backbone(), [again, beside]).tolist()
    require_same(again.state(), one.state())


def test_a_state_is_not_touched_by_the_steps_after_it() -> None:
    slot = make_slot(bottleneck=6)
    train(backbone(), slot, steps=2)
    state = slot.state()
    before = {name: tensor.clone() for name, tensor in state.items()}
    resumed = make_slot(bottleneck=6)
    resumed.restore(state)
    train(backbone(), slot, steps=2)
    train(backbone(), resumed, steps=2)
    require_same(state, before)


def test_a_prompt_that_is_a_view_keeps_its_layout() -> None:
    """Sums over it are taken in the order of memory."""
    initial = 0.3 * torch.randn(32, 4, generator=torch.Generator().manual_seed(0))

    def begin() -> Slot:
        first = make_slot()
        return Slot(initial.T, first._examples, first.settings, torch.device("cpu"))

    slot, resumed = begin(), begin()
    losses = train(backbone(), slot, steps=3)
    resumed.restore(slot.state())
    assert len(losses) == 3
    assert train(backbone(), resumed) == train(backbone(), slot)
    require_same(resumed.state(), slot.state())
    kept = [s._optimizer.state_dict()["state"][0]["exp_avg"].stride() for s in (slot, resumed)]
    assert kept[0] == kept[1] == (1, 4)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"parameterization.prompt": None}, "the tensor parameterization.prompt is missing"),
        ({"optimizer.0.step": None}, "the tensor optimizer.0.step is missing"),
        ({"optimizer.1.step": torch.zeros(())}, "the tensor 'optimizer.1.step' is not known here"),
        (
            {"parameterization.prompt": torch.zeros(5, 32)},
            r"must be torch.float32 of shape \[4, 32\], found .* \[5, 32",
        ),
        ({"optimizer.0.exp_avg": torch.zeros(4, 32).double()}, "optimizer.0.exp_avg must be torch.float32 of shape"),
        (
            {"optimizer.0.step": torch.tensor(3)},
            r"optimizer.0.step must be torch.float32 of shape \[\], found torch.int64",
        ),
        ({"steps_done": None}, "steps_done must be one int64 from 0 to 12, found none"),
        ({"steps_done": torch.tensor(-1)}, "steps_done must be one int64 from 0 to 12, found torch.int64 -1"),
        ({"steps_done": torch.tensor(13)}, "from 0 to 12, found torch.int64 13"),
        ({"steps_done": torch.tensor(3.0)}, "from 0 to 12, found torch.float32 3.0"),
        ({"steps_done": torch.tensor([3, 4])}, r"from 0 to 12, found torch.int64 \[2\]"),
        ({"steps_done": torch.tensor(0)}, "the tensor 'optimizer.0.exp_avg' is not known here"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(change: dict[str, Any], told: str) -> None:
    slot, other = make_slot(), make_slot()
    train(backbone(), slot, steps=3)
    train(backbone(), other, steps=1)
    before = other.state()
    changed = {name: tensor for name, tensor in (slot.state() | change).items() if tensor is not None}
    with pytest.raises(ValueError, match=told):
        other.restore(changed)
    require_same(other.state(), before)


def test_a_state_of_another_parameterization_is_refused() -> None:
    for one, other in ((make_slot(), make_slot(bottleneck=6)), (make_slot(bottleneck=6), make_slot(bottleneck=5))):
        with pytest.raises(ValueError, match=r"is missing|must be"):
            other.restore(one.state())


# Trials

LABELS: dict[str, Any] = {"length": 4, "initialization": "labels", "learning_rate": 0.1}
NORMAL: dict[str, Any] = {"length": 3, "initialization": "normal", "learning_rate": 0.05}
RESIDUAL: dict[str, Any] = {"reparameterization": "residual", "residual.bottleneck": 6}
TRIALS: list[tuple[str, dict[str, Any]]] = [
    ("llama", LABELS),
    ("llama", LABELS | {"method": "prefix_tuning"}),
    ("llama over labels", LABELS | RESIDUAL | {"max_norm": 1.0}),
    ("llama of texts", NORMAL),
    ("gpt2", LABELS | {"dropout": True}),
    ("gpt2", NORMAL | RESIDUAL | {"dropout": True, "max_norm": 1.0}),
    ("t5", LABELS | {"dropout": True}),
    ("t5 of texts", NORMAL | RESIDUAL),
    ("mamba", LABELS | {"max_norm": 1.0}),
]
RUNGS = (3, 6, 12)
STOPS = [(n, True) for n in range(13)] + [(n, False) for n in RUNGS]
"""After a step; at a rung also before its validation."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Workbench]:
    @cache
    def opened(name: str) -> Workbench:
        kind, _, what = name.partition(" ")
        folder = tmp_path_factory.mktemp("bench")
        experiment = (tiny_text_experiment if what == "of texts" else tiny_experiment)(folder)
        if what == "over labels":
            training = experiment.training.model_copy(update={"loss": "labels"})
            experiment = experiment.model_copy(update={"training": training})
        save_tiny(folder / "model", kind)
        return Workbench(experiment, prepare(experiment, folder / "cache"))

    return opened


def run(bench: Workbench, tuning: Tuning, stop: tuple[int, bool] | None = None) -> None:
    """Train to the end, or to the stop: after so many steps, and after the validation there or before it."""
    while True:
        if tuning.at_rung and tuning.judged is None:
            if stop == (tuning.slot.steps_done, False):
                return
            tuning.validate()
        if stop == (tuning.slot.steps_done, True) or tuning.slot.finished:
            return
        tuning.add_loss(step(bench.backbone, [tuning.slot], bench.passes).item())


def begun(bench: Workbench, params: dict[str, Any]) -> Tuning:
    return Tuning(bench, dict(params), number=3, seed=[0, 3])


def timeless(history: list[Entry]) -> list[Entry]:
    return [entry._replace(time_ms=0) for entry in history]


@pytest.mark.parametrize(("name", "params"), TRIALS)
@settings(
    deadline=None, max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(stops=st.lists(st.sampled_from(STOPS), min_size=1, max_size=2, unique=True))
def test_a_trial_that_is_resumed_ends_the_same(
    bench: Callable[[str], Workbench],
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    params: dict[str, Any],
    stops: list[tuple[int, bool]],
) -> None:
    opened, folder = bench(name), tmp_path_factory.mktemp("trial")
    identity = identity_of(opened, "study", 3)
    expected = begun(opened, params)
    run(opened, expected)
    tuning = begun(opened, params)
    for stop in sorted(stops):
        run(opened, tuning, stop)
        Checkpoints(folder, identity).save(tuning.slot.steps_done, tuning.state())
        left, tuning = tuning, begun(opened, params)
        assert Checkpoints(folder, identity).load(tuning.restore) is not None
        assert tuning.history == left.history  # times and all
        assert (tuning.judged, tuning.rungs_passed) == (left.judged, left.rungs_passed)
    run(opened, tuning)
    assert timeless(tuning.history) == timeless(expected.history)
    assert tuning.losses == expected.losses
    assert tuning.rungs_passed == expected.rungs_passed == 3
    require_same(tuning.slot.state(), expected.slot.state())
    assert tuning.best is not None
    assert expected.best is not None
    assert (tuning.best.metrics, tuning.best.step) == (expected.best.metrics, expected.best.step)
    assert torch.equal(tuning.best.vectors, expected.best.vectors)
    assert tuning.prompt().provenance == expected.prompt().provenance


def test_another_process_goes_on_where_one_was_killed(tmp_path: Path) -> None:
    """The second child loads what the first one left, and ends as this process does without a stop."""
    folder = tmp_path / "bench"
    experiment = tiny_experiment(folder)
    prepare(experiment, folder / "cache")
    script = f"""
import os, signal, sys
from pathlib import Path
from softprompt.checkpoint import Checkpoints, identity_of
from softprompt.data import prepare
from softprompt.spec import ExperimentSpec
from softprompt.workbench import Workbench
from tests.test_resume import LABELS, RESIDUAL, begun, run
experiment = ExperimentSpec.model_validate_json({experiment.model_dump_json()!r})
bench = Workbench(experiment, prepare(experiment, Path({str(folder / "cache")!r})))
checkpoints = Checkpoints(Path({str(tmp_path / "trial")!r}), identity_of(bench, "study", 3))
tuning = begun(bench, LABELS | RESIDUAL)
if checkpoints.load(tuning.restore) is None:
    run(bench, tuning, (7, True))
    checkpoints.save(7, tuning.state())
    run(bench, tuning, (8, True))
    os.kill(os.getpid(), signal.SIGKILL)
assert tuning.slot.steps_done == 7
run(bench, tuning)
tuning.prompt().save({str(tmp_path / "prompt")!r})
"""
    ends = [subprocess.run([sys.executable, "-c", script], capture_output=True, text=True) for _ in range(2)]
    assert [end.returncode for end in ends] == [-9, 0], ends[1].stderr
    opened = Workbench(experiment, prepare(experiment, folder / "cache"))
    expected = begun(opened, LABELS | RESIDUAL)
    run(opened, expected)
    written = expected.prompt().save(tmp_path / "expected")
    for file in written.iterdir():
        assert (tmp_path / "prompt" / file.name).read_bytes() == file.read_bytes()


def test_a_trial_that_was_judged_says_so_until_the_next_step(bench: Callable[[str], Workbench]) -> None:
    opened = bench("llama")
    tuning, resumed = begun(opened, LABELS), begun(opened, LABELS)
    judged = [tuning.judged]
    run(opened, tuning, (3, False))
    judged.append(tuning.judged)
    score = tuning.validate().score
    judged.append(tuning.judged)
    resumed.restore(tuning.state())
    judged.append(resumed.judged)
    tuning.add_loss(step(opened.backbone, [tuning.slot]).item())
    assert [*judged, tuning.judged] == [None, None, score, score, None]


def test_the_history_holds_every_loss_and_metric_in_order(bench: Callable[[str], Workbench]) -> None:
    tuning = begun(bench("llama"), LABELS)
    run(bench("llama"), tuning)
    metrics = ["val_accuracy", "val_loss", "val_macro_f1", "val_illegal"]
    expected = [(key, n) for n in range(1, 13) for key in (TRAIN_LOSS, *(metrics if n in RUNGS else []))]
    assert [(entry.key, entry.step) for entry in tuning.history] == expected
    times = [entry.time_ms for entry in tuning.history]
    assert times == sorted(times)
    assert times[0] > 1.7e12  # milliseconds since 1970


def test_the_seconds_go_on(bench: Callable[[str], Workbench]) -> None:
    tuning, resumed = begun(bench("llama"), LABELS), begun(bench("llama"), LABELS)
    state = tuning.state()
    resumed.restore(State(state.tensors, state.meta | {"seconds": 5000.0}))
    assert 5000 <= resumed.seconds < 5600


def test_passes_become_as_small_as_they_had_become(bench: Callable[[str], Workbench]) -> None:
    opened = bench("llama")
    tuning, usual = begun(opened, LABELS), opened.passes.tokens
    try:
        opened.passes.tokens = 200
        state = tuning.state()
        for before, after in ((usual, 200), (100, 100)):
            opened.passes.tokens = before
            begun(opened, LABELS).restore(state)
            assert opened.passes.tokens == after
    finally:
        opened.passes.tokens = usual


@pytest.mark.parametrize(
    ("meta", "tensors", "told"),
    [
        ({"number": 4}, {}, "number is 4 there and 3 here"),
        ({"seed": [0, 4]}, {}, r"seed is \[0, 4\] there and \[0, 3\] here"),
        ({"params": NORMAL}, {}, "params is .*normal.* there and .*labels.* here"),
        ({"seconds": float("nan")}, {}, "seconds"),
        ({"seconds": -1.0}, {}, "seconds"),
        ({"more": 1}, {}, "more"),
        ({"pass_tokens": 0}, {}, "pass_tokens"),
        ({"history": ["train_loss"]}, {}, "entries of metrics beside its 1 names"),
        ({"best": None}, {}, "the best must have the tensors"),
        ({"best": {"step": 3, "metrics": ["rows", "accuracy"]}}, {}, r"the best must have 2 numbers, found \[\d\]"),
        ({}, {"best.vectors": None}, "the best must have the tensors"),
        ({}, {"best.vectors": torch.zeros(5, 32)}, "the best vectors must be"),
        ({}, {"other": torch.zeros(1)}, "neither of the slot, nor of the history, nor of the best"),
        ({}, {"slot.steps_done": torch.tensor(99)}, "steps_done must be"),
        ({}, {"history.step": None}, "the history must have"),
    ],
)
def test_a_state_that_does_not_fit_a_trial_is_refused_and_changes_nothing(
    bench: Callable[[str], Workbench], meta: dict[str, Any], tensors: dict[str, Any], told: str
) -> None:
    tuning, other = begun(bench("llama"), LABELS), begun(bench("llama"), LABELS)
    run(bench("llama"), tuning, (4, True))
    run(bench("llama"), other, (1, True))
    before, state = other.state(), tuning.state()
    changed = {name: tensor for name, tensor in (state.tensors | tensors).items() if tensor is not None}
    with pytest.raises(ValueError, match=told):
        other.restore(State(changed, state.meta | meta))
    require_same(other.state().tensors, before.tensors)
    assert other.best is None


def test_models_are_what_they_were() -> None:
    for kind in {kind for kind, _ in SLOTS}:
        made: Backbone = backbone(kind)
        assert made.weights_in_memory_sha256() == made.weights_sha256
