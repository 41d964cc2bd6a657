"""Training: K prompts side by side against each one alone, and what a step may and may not change."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from softprompt.batch import Example
from softprompt.training import BatchOrder, Slot, step
from tests.slots import FAMILY, MIXED, Frozen, draw_examples, make_settings, make_slot, train

BOTH_METHODS: list[dict[str, Any]] = [MIXED[0], MIXED[1] | {"prefix": True}, MIXED[2], MIXED[0] | {"prefix": True}]
ALONE_AND_TOGETHER = [
    (kind, trials) for kind in ("llama", "gpt2", "bloom", "mamba") for trials in (MIXED, [*FAMILY, MIXED[0]])
]


@pytest.mark.parametrize(("kind", "trials"), [*ALONE_AND_TOGETHER, ("llama", BOTH_METHODS)])
def test_side_by_side_is_as_alone(frozen: Frozen, kind: str, trials: list[dict[str, Any]]) -> None:
    """Lengths, rates, batch sizes, ages and methods differ: slot k joins after k steps alone."""
    backbone = frozen(kind)
    alone, together = ([make_slot(**settings) for settings in trials] for _ in range(2))
    expected = [train(backbone, slot) for slot in alone]
    losses = [train(backbone, slot, steps=k) for k, slot in enumerate(together)]
    while running := [k for k, slot in enumerate(together) if not slot.finished]:
        for k, loss in zip(running, step(backbone, [together[k] for k in running]).tolist(), strict=True):
            losses[k].append(loss)
    for k in range(len(trials)):
        torch.testing.assert_close(together[k].prompt, alone[k].prompt, rtol=1e-3, atol=1e-4)
        assert losses[k] == pytest.approx(expected[k], rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "trials"), [("llama", MIXED), ("gpt2", FAMILY[:3]), ("gpt2", FAMILY[1:])], ids=["plain", "family", "all"]
)
def test_a_slot_is_refilled_and_the_others_go_on(frozen: Frozen, kind: str, trials: list[dict[str, Any]]) -> None:
    backbone = frozen(kind)
    alone = [make_slot(**settings) for settings in trials]
    for slot in alone:
        train(backbone, slot, steps=8)
    first, other, late = (make_slot(**settings) for settings in trials)
    for _ in range(4):
        step(backbone, [first, other])
    for _ in range(4):
        step(backbone, [late, other])
    torch.testing.assert_close(other.prompt, alone[1].prompt, rtol=1e-3, atol=1e-4)
    for _ in range(4):
        step(backbone, [first, late])
    torch.testing.assert_close(first.prompt, alone[0].prompt, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(late.prompt, alone[2].prompt, rtol=1e-3, atol=1e-4)


def test_the_same_settings_give_the_same_bits(frozen: Frozen) -> None:
    one, two = make_slot(), make_slot()
    assert train(frozen(), one) == train(frozen(), two)
    assert torch.equal(one.prompt, two.prompt)


def test_another_seed_gives_another_order() -> None:
    assert [make_slot(seed=s).next_examples() for s in (0, 1)] == [make_slot(seed=s).next_examples() for s in (0, 1)]
    assert make_slot(seed=0).next_examples() != make_slot(seed=1).next_examples()


@pytest.mark.parametrize("prefix", [False, True])
def test_training_learns(frozen: Frozen, prefix: bool) -> None:
    slot = make_slot(length=8, steps=60, batch_size=20, learning_rate=0.1, prefix=prefix)
    losses = train(frozen(), slot)
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:3])
    assert slot.finished


@pytest.mark.parametrize("prefix", [False, True])
def test_only_the_prompt_changes(frozen: Frozen, prefix: bool) -> None:
    backbone, slot, examples = frozen(), make_slot(prefix=prefix), draw_examples()
    before = slot.prompt.detach().clone()
    train(backbone, slot)
    assert not torch.equal(slot.prompt, before)
    assert all(parameter.grad is None for parameter in slot.parameterization.parameters)
    assert examples == draw_examples()


def test_a_slot_does_not_write_to_the_vectors_it_starts_from(frozen: Frozen) -> None:
    initial = torch.zeros(3, 32)
    slot = Slot(initial, draw_examples(), make_settings(), torch.device("cpu"))
    train(frozen(), slot, steps=2)
    assert torch.equal(initial, torch.zeros(3, 32))


def test_the_loss_is_the_mean_over_target_tokens(frozen: Frozen) -> None:
    backbone = frozen()
    examples = [Example((5, 6, 7), (300, 301)), Example((8,), (310,))]
    slot = make_slot(examples=examples, batch_size=2)
    embed = backbone.model.get_input_embeddings()
    total = 0.0
    for example in examples:
        tokens = torch.tensor([*example.inputs, *example.target])
        with torch.no_grad():
            logits = backbone.model(inputs_embeds=torch.cat([slot.prompt, embed(tokens)])[None]).logits[0]
        first = len(slot.prompt) + len(example.inputs) - 1
        total -= sum(logits[first + t].log_softmax(0)[token].item() for t, token in enumerate(example.target))
    assert step(backbone, [slot]).item() == pytest.approx(total / 3, rel=1e-4)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("kind", ["llama", "mamba"])
def test_a_loss_that_is_not_finite_stays_with_its_slot(frozen: Frozen, kind: str, value: float) -> None:
    backbone = frozen(kind)
    healthy, twin, sick = make_slot(length=6), make_slot(length=6), make_slot(length=3, seed=1)
    train(backbone, healthy, steps=1)
    step(backbone, [twin, sick])
    with torch.no_grad():
        sick.prompt[1, 5] = value
    before = sick.prompt.detach().clone()
    train(backbone, healthy, steps=3)
    for _ in range(3):
        good, bad = step(backbone, [twin, sick]).tolist()
        assert math.isfinite(good)
        assert not math.isfinite(bad)
    torch.testing.assert_close(twin.prompt, healthy.prompt, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(sick.prompt.detach(), before, rtol=0, atol=0, equal_nan=True)
    assert sick.steps_done == 1
    assert all(parameter.grad is None for parameter in sick.parameterization.parameters)


def test_norms_are_capped_from_the_start_and_after_every_update(frozen: Frozen) -> None:
    backbone = frozen()
    slots = [make_slot(length=6, max_norm=1.5, learning_rate=0.2, bottleneck=width) for width in (None, 4)]
    free = make_slot(length=6, learning_rate=0.2)
    for _ in range(6):
        for slot in slots:
            assert slot.prompt.norm(dim=1).max() <= 1.5 * (1 + 1e-6)
        step(backbone, [*slots, free])
    assert free.prompt.norm(dim=1).min() > 1.6


def test_a_vector_below_the_cap_is_left_alone(frozen: Frozen) -> None:
    backbone, free, capped = frozen(), make_slot(), make_slot(max_norm=1e3)
    assert train(backbone, capped) == train(backbone, free)
    assert torch.equal(capped.prompt, free.prompt)


@pytest.mark.parametrize("more", [{}, {"bottleneck": 6}, {"bottleneck": 6, "dropout": True, "max_norm": 1.5}])
def test_every_way_of_training_learns(frozen: Frozen, more: dict[str, Any]) -> None:
    slot = make_slot(length=8, steps=90, batch_size=20, learning_rate=0.1, **more)
    losses = train(frozen("gpt2"), slot)
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:3])
    assert slot.prompt.shape == (8, 32)


def test_all_parameters_of_a_reparameterized_prompt_learn(frozen: Frozen) -> None:
    slot = make_slot(bottleneck=6, weight_decay=0.0)
    before = [parameter.detach().clone() for parameter in slot.parameterization.parameters]
    train(frozen(), slot, steps=3)
    changed = [not torch.equal(a, b) for a, b in zip(before, slot.parameterization.parameters, strict=True)]
    assert changed == [True] * 7


def test_learning_rates_follow_the_schedule() -> None:
    def rates(schedule: str) -> list[float]:
        settings = make_settings(steps=10, warmup_steps=2, learning_rate=0.4, schedule=schedule)
        return [settings.learning_rate_at(n) for n in (0, 1, 2, 4, 6, 8, 9)]

    assert rates("constant") == pytest.approx([0.2, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4])
    assert rates("linear") == pytest.approx([0.2, 0.4, 0.4, 0.3, 0.2, 0.1, 0.05])
    half = math.sqrt(0.5)
    last = 0.2 * (1 + math.cos(math.pi * 7 / 8))
    assert rates("cosine") == pytest.approx([0.2, 0.4, 0.4, 0.2 * (1 + half), 0.2, 0.2 * (1 - half), last])


def test_without_warmup_the_first_step_is_at_the_peak() -> None:
    assert make_settings(warmup_steps=0, learning_rate=0.4).learning_rate_at(0) == 0.4


def test_the_gradient_is_clipped_before_the_step(frozen: Frozen) -> None:
    """AdamW's first step is as long as the rate, unless its epsilon outweighs the gradient."""
    backbone, moved = frozen(), []
    for norm in (1e6, 1e-9):
        slot = make_slot(clip_norm=norm, schedule="constant", warmup_steps=0, weight_decay=0.0)
        before = slot.prompt.detach().clone()
        step(backbone, [slot])
        moved.append((slot.prompt.detach() - before).abs().max().item())
    assert moved[0] == pytest.approx(0.05, rel=0.01)
    assert moved[1] < 0.005


@pytest.mark.parametrize(("count", "size"), [(40, 4), (41, 4), (3, 8), (1, 1), (700, 5)])
def test_every_epoch_covers_every_example_once(count: int, size: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 40, count).tolist()
    order = BatchOrder(lengths, size, seed=0)
    per_epoch = math.ceil(count / size)
    epochs = [[order[e * per_epoch + n] for n in range(per_epoch)] for e in range(3)]
    for epoch in epochs:
        assert Counter(i for batch in epoch for i in batch) == Counter(range(count))
        assert sorted(map(len, epoch), reverse=True)[: per_epoch - 1] == [size] * (per_epoch - 1)
    if count > size:
        assert epochs[0] != epochs[1] != epochs[2]


def test_a_batch_is_a_function_of_its_number() -> None:
    lengths = np.random.default_rng(0).integers(1, 40, 50).tolist()
    one, other = BatchOrder(lengths, 4, seed=3), BatchOrder(lengths, 4, seed=3)
    forth = [one[n] for n in range(40)]
    assert [other[n] for n in reversed(range(40))] == forth[::-1]


@pytest.mark.parametrize("size", [8, 16, 32])
def test_batches_of_like_length_pad_little(size: int) -> None:
    """Short texts, as reviews are: lognormal, median 24 tokens, cut at 96."""
    lengths = np.minimum(np.random.default_rng(0).lognormal(np.log(24), 0.5, 9000), 96).astype(int).clip(3)
    order = BatchOrder(lengths.tolist(), size, seed=0)
    used = padded = 0
    for n in range(math.ceil(len(lengths) / size)):
        batch = lengths[order[n]]
        used += batch.sum()
        padded += len(batch) * batch.max()
    assert 1 - used / padded < 0.03


def test_long_and_short_batches_come_in_turn() -> None:
    lengths = list(range(200))
    means = [np.mean(BatchOrder(lengths, 5, seed=0)[n]) for n in range(40)]
    assert abs(np.corrcoef(means, range(40))[0, 1]) < 0.4
