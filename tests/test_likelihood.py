"""Given targets against the plain formula, row by row, and against plain greedy decoding."""

import random

import pytest
import torch

from softprompt import likelihood
from softprompt.backbone import Backbone
from softprompt.batch import Example, collate
from softprompt.composition import concatenate
from softprompt.encoder_decoder import encode_and_decode
from softprompt.likelihood import score_targets
from softprompt.training import Settings, Slot, step
from tests.tiny import tiny_backbone

KINDS = ("llama", "gemma2", "gpt2", "opt", "bloom", "falcon", "mamba", "t5", "bart")


def prompt(length: int = 5) -> torch.Tensor:
    return torch.randn(length, 32, generator=torch.Generator().manual_seed(1)) / 4


def examples(count: int, longest: int = 9) -> list[Example]:
    """Inputs and targets of any length, most of which begin alike."""
    draw = random.Random(0)

    def tokens(most: int) -> tuple[int, ...]:
        return tuple(draw.choices(range(3, 300), k=draw.randint(1, most)))

    return [Example((7, 8, *tokens(12)), tokens(longest)) for _ in range(count)]


def plain_logits(backbone: Backbone, vectors: torch.Tensor, example: Example) -> torch.Tensor:
    batch = collate([example], [0], pad=0, device=torch.device("cpu"))
    with torch.inference_mode():
        formula = encode_and_decode if backbone.is_encoder_decoder else concatenate
        return formula(backbone.model, [vectors], batch)


@pytest.mark.parametrize("length", [0, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_the_log_probability_is_that_of_the_formula(kind: str, length: int):
    backbone, rows = tiny_backbone(kind), examples(40)
    found = score_targets(backbone, prompt(length), rows).log_probabilities
    for row, log_probability in zip(rows, found, strict=True):
        nats = plain_logits(backbone, prompt(length), row).log_softmax(1)
        expected = nats.gather(1, torch.tensor(row.target)[:, None]).sum().item()
        assert log_probability == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_targets_after_a_prefix_are_as_likely_as_after_the_soft_prompt_that_leaves_it(kind: str):
    backbone, rows = tiny_backbone(kind), examples(40)
    soft = score_targets(backbone, prompt(), rows)
    prefix = score_targets(backbone, backbone.as_prefix(prompt()), rows)
    assert prefix.log_probabilities == pytest.approx(soft.log_probabilities, rel=1e-4)
    assert prefix.greedy.tolist() == soft.greedy.tolist()


@pytest.mark.parametrize("limit", ["_ROWS", "_TOKENS", "_PLACES"])
def test_how_rows_are_cut_into_passes_changes_nothing(limit: str, monkeypatch: pytest.MonkeyPatch):
    backbone, rows = tiny_backbone(), examples(30)
    whole = score_targets(backbone, prompt(), rows)
    monkeypatch.setattr(likelihood, limit, 2)
    cut = score_targets(backbone, prompt(), rows)
    assert cut.log_probabilities == pytest.approx(whole.log_probabilities, rel=1e-5)
    assert cut.greedy.tolist() == whole.greedy.tolist()


def greedy(backbone: Backbone, row: tuple[int, ...], tokens: int) -> tuple[int, ...]:
    """What the model says by itself, by the formula alone."""
    said: tuple[int, ...] = ()
    for _ in range(tokens):
        said += (int(plain_logits(backbone, prompt(), Example(row, (*said, 0)))[-1].argmax()),)
    return said


@pytest.mark.parametrize("kind", KINDS)
def test_a_target_is_greedy_where_the_model_says_it_by_itself_and_nowhere_else(kind: str):
    backbone = tiny_backbone(kind)
    rows = [e.inputs for e in examples(5)]
    said = [greedy(backbone, row, tokens) for row, tokens in zip(rows, (1, 2, 3, 5, 7), strict=True)]
    right = [Example(row, target) for row, target in zip(rows, said, strict=True)]
    # Each of them once more with another token, the first, the last or one between.
    wrong = [
        Example(e.inputs, (*e.target[:n], (e.target[n] + 1) % 300, *e.target[n + 1 :]))
        for e in right
        for n in range(len(e.target))
    ]
    assert score_targets(backbone, prompt(), [*right, *wrong]).greedy.tolist() == [True] * 5 + [False] * 18


def test_the_mean_over_target_tokens_is_the_loss_of_training():
    backbone, rows = tiny_backbone(), examples(12)
    settings = Settings(
        steps=1,
        batch_size=12,
        learning_rate=0.1,
        schedule="constant",
        warmup_steps=0,
        weight_decay=0.0,
        clip_norm=1.0,
        seed=0,
    )
    found = score_targets(backbone, prompt(), rows).log_probabilities
    (loss,) = step(backbone, [Slot(prompt(), rows, settings, backbone.device)]).tolist()
    assert loss == pytest.approx(-found.sum() / sum(len(e.target) for e in rows), rel=1e-5)
