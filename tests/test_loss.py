"""Losses over the vocabulary and over the labels, against plain loops over rows, labels and tokens."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from softprompt.backbone import Backbone
from softprompt.batch import Example, collate
from softprompt.composition import concatenate
from softprompt.inference import Classifier
from softprompt.loss import Loss, OverLabels, OverVocabulary
from softprompt.passes import Passes, Work
from softprompt.training import step
from softprompt.trie import Labels
from tests.slots import Frozen, make_slot, train

SINGLE: Labels = [(300,), (301,), (302,)]
SHARING: Labels = [(300, 301), (300, 302, 303), (310, 301), (300, 302, 304), (311,)]


def draw_examples(labels: Labels, count: int, seed: int = 0) -> list[Example]:
    random = np.random.default_rng(seed)
    inputs = [tuple(random.integers(3, 290, size=random.integers(1, 9)).tolist()) for _ in range(count)]
    return [Example(row, labels[n % len(labels)]) for n, row in enumerate(inputs)]


def log_probability(backbone: Backbone, prompt: Tensor, inputs: tuple[int, ...], target: tuple[int, ...]) -> Tensor:
    """Of a target's tokens after one input, by the formula as written."""
    batch = collate([Example(inputs, target)], [0], pad=0, device=backbone.device)
    logits = concatenate(backbone.model, [prompt], batch)
    return torch.stack([logits[t].log_softmax(0)[token] for t, token in enumerate(target)]).sum()


def loop_over_labels(backbone: Backbone, prompt: Tensor, examples: Sequence[Example], labels: Labels) -> Tensor:
    losses = []
    for example in examples:
        scores = {label: log_probability(backbone, prompt, example.inputs, label) for label in labels}
        losses.append(torch.stack(list(scores.values())).logsumexp(0) - scores[example.target])
    return torch.stack(losses).mean()


def loop_over_tokens(backbone: Backbone, prompt: Tensor, examples: Sequence[Example], _: Labels) -> Tensor:
    total = torch.stack([log_probability(backbone, prompt, e.inputs, e.target) for e in examples]).sum()
    return -total / sum(len(e.target) for e in examples)


@pytest.mark.parametrize("tokens", [10**6, 20])
@pytest.mark.parametrize("labels", [SINGLE, SHARING], ids=["single", "sharing"])
@pytest.mark.parametrize("loop", [loop_over_labels, loop_over_tokens])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma", "bloom", "mamba"])  # the last two cannot read branches
def test_losses_and_gradients_are_those_of_a_plain_loop(
    frozen: Frozen, kind: str, loop: type, labels: Labels, tokens: int
) -> None:
    backbone = frozen(kind)
    loss: Loss = OverLabels(backbone, labels) if loop is loop_over_labels else OverVocabulary()
    prompts = [0.3 * torch.randn(p, 32, generator=torch.Generator().manual_seed(p)) for p in (2, 5)]
    ours, theirs = ([prompt.clone().requires_grad_() for prompt in prompts] for _ in range(2))
    batches = [draw_examples(labels, 5), draw_examples(labels, 7, seed=1)]
    losses = Passes(tokens).run(backbone, Work(ours, batches, loss))
    expected = torch.stack([loop(backbone, p, batch, labels) for p, batch in zip(theirs, batches, strict=True)])
    expected.sum().backward()
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close([p.grad for p in ours], [p.grad for p in theirs], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "mamba"])
def test_tokens_are_what_the_model_reads(frozen: Frozen, kind: str) -> None:
    """Without padding, as all inputs have one length; with it where labels take a row each."""
    backbone = frozen(kind)
    examples = [Example((n, 5, 6, 7), SHARING[n % 5]) for n in range(6)]
    loss, read = OverLabels(backbone, SHARING), []

    def logits(batch: object) -> Tensor:
        read.append(batch.tokens.numel())  # type: ignore[attr-defined]
        return torch.zeros(len(batch.targets), len(backbone.embeddings))  # type: ignore[attr-defined]

    loss.losses(backbone, examples, [0] * 6, logits)
    assert read == [sum(map(loss.tokens, examples))]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_training_over_labels_makes_the_right_one_win(frozen: Frozen, kind: str) -> None:
    """All inputs have one label, that which the model likes least: nothing else is to be learnt."""
    backbone = frozen(kind)
    inputs = [example.inputs for example in draw_examples(SHARING, 20)]
    before = Classifier(backbone, make_slot(8).prompt, SHARING).score(inputs)
    least = int(np.bincount(before.predicted, minlength=len(SHARING)).argmin())
    examples = [Example(row, SHARING[least]) for row in inputs]
    loss = OverLabels(backbone, SHARING)
    slot = make_slot(8, examples=examples, loss=loss, steps=40, batch_size=20, learning_rate=0.2)
    losses = train(backbone, slot)
    assert losses[-1] < math.log(2) < losses[0]
    after = Classifier(backbone, slot.prompt, SHARING).score(inputs)
    assert np.mean(after.predicted == least) > 0.5 > np.mean(before.predicted == least)


def test_slots_of_different_losses_train_side_by_side(frozen: Frozen) -> None:
    backbone = frozen()
    examples = draw_examples(SHARING, 20)
    kinds = OverVocabulary(), OverLabels(backbone, SHARING)
    alone, together = ([make_slot(examples=examples, loss=o, seed=3) for o in kinds] for _ in range(2))
    expected = [train(backbone, slot, steps=4) for slot in alone]
    losses = [step(backbone, together).tolist() for _ in range(4)]
    for k in range(2):
        assert [each[k] for each in losses] == pytest.approx(expected[k], rel=1e-3)
        torch.testing.assert_close(together[k].prompt, alone[k].prompt, rtol=1e-3, atol=1e-4)
    assert expected[0] != pytest.approx(expected[1], rel=0.1)
