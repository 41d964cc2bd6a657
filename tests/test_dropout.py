"""Dropout of the frozen model: on in training alone, from a stream of its own."""

import pytest
import torch

from softprompt.batch import collate
from softprompt.composition import shared_prefix
from softprompt.dropout import dropping_out, has_dropout
from softprompt.training import step
from tests.slots import FAMILY, Frozen, draw_examples, make_slot, train

DROPS = next(settings for settings in FAMILY if settings.get("dropout"))


@pytest.mark.parametrize(("kind", "drops"), [("gpt2", True), ("opt", True), ("llama", False), ("mamba", False)])
def test_a_model_tells_whether_it_drops_out(frozen: Frozen, kind: str, drops: bool) -> None:
    assert has_dropout(frozen(kind)) is drops


def test_rates_of_zero_are_none(frozen: Frozen) -> None:
    assert not has_dropout(frozen("gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    assert has_dropout(frozen("llama", attention_dropout=0.1))


def test_the_draws_follow_the_seed_and_leave_the_random_state(frozen: Frozen) -> None:
    backbone, examples = frozen("gpt2"), draw_examples(4)
    batch = collate(examples, [0] * 4, pad=0, device=backbone.device)
    prompt = torch.zeros(3, 32)

    def run(seed: int) -> torch.Tensor:
        with torch.inference_mode(), dropping_out(backbone, seed):
            return shared_prefix(backbone.model, [prompt], batch)

    state = torch.get_rng_state()
    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
    assert torch.equal(torch.get_rng_state(), state)


def test_an_error_leaves_the_model_in_evaluation(frozen: Frozen) -> None:
    backbone = frozen("gpt2")
    with dropping_out(backbone, 0):
        assert backbone.model.training
    with pytest.raises(KeyboardInterrupt), dropping_out(backbone, 0):
        raise KeyboardInterrupt
    assert not backbone.model.training


def test_training_with_dropout_is_another_training_that_can_be_repeated(frozen: Frozen) -> None:
    backbone = frozen("gpt2")
    one, same, without = (make_slot(**DROPS | {"dropout": on}) for on in (True, True, False))
    losses = [train(backbone, slot) for slot in (one, same, without)]
    assert losses[0] == losses[1] != losses[2]
    assert torch.equal(one.prompt, same.prompt)
    assert not torch.allclose(one.prompt, without.prompt, atol=1e-3)


def test_every_step_draws_anew(frozen: Frozen) -> None:
    backbone, examples = frozen("gpt2"), draw_examples(4)
    slot = make_slot(examples=examples, batch_size=4, dropout=True, learning_rate=1e-12, weight_decay=0.0)
    assert len(set(train(backbone, slot, steps=4))) == 4


def test_neighbours_do_not_change_the_draws(frozen: Frozen) -> None:
    """To the bit: a slot with dropout has passes of its own, and what another draws is another's."""
    backbone = frozen("gpt2")
    alone, beside, other, plain = (make_slot(**DROPS), make_slot(**DROPS), make_slot(**FAMILY[3]), make_slot(length=6))
    train(backbone, alone, steps=4)
    for _ in range(4):
        torch.rand(3)
        step(backbone, [plain, other, beside])
    assert torch.equal(beside.prompt, alone.prompt)


def test_a_rate_in_a_model_whose_layers_are_written_out_is_not_lost(frozen: Frozen) -> None:
    backbone = frozen("llama", attention_dropout=0.3)
    assert backbone.composition.name == "shared prefix, layers written out"
    one, without = (make_slot(dropout=on) for on in (True, False))
    assert train(backbone, one, steps=1) != train(backbone, without, steps=1)
