"""Micro-batches: the gradients of the whole step, however it is cut, and wherever memory runs out."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from softprompt.backbone import Backbone
from softprompt.batch import Batch
from softprompt.composition import Composition
from softprompt.errors import UserError
from softprompt.loss import Loss, OverLabels, OverVocabulary
from softprompt.passes import Passes, Work
from softprompt.training import Slot, step
from tests.slots import FAMILY, MIXED, Frozen, draw_examples, make_slot

WHOLE = 10**6
LABELS = [(300, 301), (310,)]


@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=40), tokens=st.integers(1, 300))
def test_every_row_is_in_one_pass_and_no_pass_is_too_large(lengths: list[int], tokens: int) -> None:
    parts = Passes(tokens).cut(lengths)
    assert sorted(row for part in parts for row in part) == list(range(len(lengths)))
    for part in parts:
        assert len(part) == 1 or len(part) * max(lengths[row] for row in part) <= tokens


@pytest.mark.parametrize(
    ("lengths", "tokens", "sizes"),
    [
        ([30] * 16, 1024, [16]),
        ([30] * 35, 1024, [18, 17]),
        ([30] * 35, 30, [1] * 35),
        ([30] * 3, 7, [1] * 3),
        ([2000, *[20] * 60], 1024, [1, 30, 30]),
    ],
)
def test_passes_are_few_and_of_like_size(lengths: list[int], tokens: int, sizes: list[int]) -> None:
    assert [len(part) for part in Passes(tokens).cut(lengths)] == sizes


def loss(backbone: Backbone, name: str) -> Loss:
    return OverLabels(backbone, LABELS) if name == "labels" else OverVocabulary()


def differentiate(backbone: Backbone, passes: Passes, target: Loss) -> tuple[Tensor, list[Tensor]]:
    """Losses and gradients of three prompts with batches of their own size."""
    draws = [torch.randn(p, 32, generator=torch.Generator().manual_seed(p)) for p in (1, 6, 3)]
    prompts = [(0.3 * draw).requires_grad_() for draw in draws]
    work = Work(prompts, [draw_examples(n, seed=n) for n in (5, 9, 2)], target)
    losses = passes.run(backbone, work)
    return losses, [prompt.grad for prompt in prompts if prompt.grad is not None]


@pytest.mark.parametrize("name", ["vocabulary", "labels"])
@pytest.mark.parametrize("tokens", [60, 15, 1])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "gemma", "opt", "bloom", "falcon", "mamba"])
def test_a_cut_step_is_the_whole_one(frozen: Frozen, kind: str, tokens: int, name: str) -> None:
    backbone = frozen(kind)
    target = loss(backbone, name)
    whole, cut = (differentiate(backbone, Passes(size), target) for size in (WHOLE, tokens))
    assert len(cut[1]) == 3
    torch.testing.assert_close(cut, whole, rtol=1e-4, atol=1e-5)


def wrapped(backbone: Backbone, **changes: Any) -> Backbone:
    """A backbone whose composition is changed, and takes its two steps one after the other."""
    backbone.__dict__["composition"] = replace(backbone.composition, together=None, **changes)
    return backbone


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_prompts_are_computed_once(frozen: Frozen, kind: str) -> None:
    backbone, kept, attended = frozen(kind), [], []
    real: Composition[Any] = backbone.composition

    def keep(model: Any, prompts: Sequence[Tensor]) -> Any:
        kept.append(len(prompts))
        return real.keep(model, prompts)

    def attend(model: Any, states: Any, batch: Batch) -> Tensor:
        attended.append(len(batch.tokens))
        return real.attend(model, states, batch)

    slots = [make_slot(**settings) for settings in MIXED]
    rows = sum(len(slot.next_examples()) for slot in slots)
    step(wrapped(backbone, keep=keep, attend=attend), slots, Passes(40))
    assert kept == [3]
    assert sum(attended) == rows
    assert len(attended) > 2


class Crowded:
    """A memory that holds so many rows, and runs out in a pass of more."""

    def __init__(self, backbone: Backbone, rows: int) -> None:
        self.refused: list[int] = []
        self._real: Composition[Any] = backbone.composition
        self._rows = rows
        self.backbone = wrapped(backbone, attend=self._attend)

    def _attend(self, model: Any, states: Any, batch: Batch) -> Tensor:
        if len(batch.tokens) > self._rows:
            self.refused.append(len(batch.tokens))
            raise torch.OutOfMemoryError("out of memory")
        return self._real.attend(model, states, batch)


def prompts_of(slots: Sequence[Slot]) -> list[Tensor]:
    return [slot.prompt for slot in slots]


@pytest.mark.parametrize("settings", [MIXED, [FAMILY[0], *MIXED]], ids=["plain", "family"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mamba"])
def test_out_of_memory_halves_the_passes_and_begins_anew(
    frozen: Frozen, kind: str, settings: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    crowded, passes = Crowded(frozen(kind), 2), Passes(WHOLE)
    ours, theirs = ([make_slot(**each) for each in settings] for _ in range(2))
    for n in range(3):
        with caplog.at_level(logging.WARNING):
            losses = step(crowded.backbone, ours, passes)
        torch.testing.assert_close(losses, step(frozen(kind), theirs, Passes(WHOLE)), rtol=1e-3, atol=1e-4)
        assert [slot.steps_done for slot in ours] == [n + 1] * len(ours)
    torch.testing.assert_close(prompts_of(ours), prompts_of(theirs), rtol=1e-3, atol=1e-4)
    assert passes.tokens < 100
    assert len(crowded.refused) == len(caplog.records) > 1
    assert all(record.getMessage().startswith("out of memory with ") for record in caplog.records)


def test_the_smaller_size_is_kept(frozen: Frozen) -> None:
    crowded, passes = Crowded(frozen(), 2), Passes(WHOLE)
    slot = make_slot(examples=draw_examples(4), batch_size=4)
    step(crowded.backbone, [slot], passes)
    refused = list(crowded.refused)
    assert refused
    for _ in range(3):
        step(crowded.backbone, [slot], passes)
    assert crowded.refused == refused


def test_nothing_of_a_step_that_is_given_up_remains(frozen: Frozen) -> None:
    """Memory runs out once, in the last pass, when the gradients of all others are there."""
    backbone, passes = frozen("gpt2"), Passes(20)
    targets: tuple[Loss, ...] = OverVocabulary(), OverLabels(backbone, LABELS)
    ours, theirs = ([make_slot(loss=t, batch_size=5, seed=n) for n, t in enumerate(targets)] for _ in range(2))
    calls: list[Batch] = []
    real: Composition[Any] = backbone.composition
    last = sum(len(passes.cut(list(map(slot.loss.tokens, slot.next_examples())))) for slot in ours)

    def attend(model: Any, states: Any, batch: Batch) -> Tensor:
        calls.append(batch)
        if len(calls) == last:
            raise torch.OutOfMemoryError("out of memory")
        return real.attend(model, states, batch)

    expected = step(frozen("gpt2"), theirs, Passes(20))
    losses = step(wrapped(backbone, attend=attend), ours, passes)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(prompts_of(ours), prompts_of(theirs), rtol=1e-3, atol=1e-4)
    assert passes.tokens < 20
    assert len(calls) > 2 * last


def test_an_example_that_does_not_fit_alone_is_told_with_what_to_lower(frozen: Frozen) -> None:
    slot = make_slot()
    before = slot.prompt.clone()
    with pytest.raises(UserError, match=r"lower execution\.slots, search\.length or training\.max_tokens"):
        step(Crowded(frozen(), 0).backbone, [slot], Passes(WHOLE))
    assert torch.equal(slot.prompt, before)
    assert slot.steps_done == 0
    assert all(parameter.grad is None for parameter in slot.parameterization.parameters)
