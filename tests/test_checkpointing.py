"""Gradient checkpointing: the same losses and gradients, with layers that run twice."""

import pytest
import torch
from torch import Tensor

from softprompt.backbone import Backbone
from softprompt.checkpointing import checkpointed
from softprompt.loss import OverLabels, OverVocabulary
from softprompt.passes import Passes, Work
from tests.slots import FAMILY, Frozen, draw_examples, make_slot, train

KINDS = ["llama", "gpt2", "qwen3", "gemma", "gemma2", "mistral", "opt", "bloom", "falcon", "mamba"]
LABELS = [(300, 301), (310,)]


def differentiate(backbone: Backbone, passes: Passes, labels: bool, seed: int | None) -> tuple[Tensor, list[Tensor]]:
    """Losses and gradients of two prompts."""
    prompts = [(0.3 * torch.randn(p, 32, generator=torch.Generator().manual_seed(p))).requires_grad_() for p in (3, 5)]
    loss = OverLabels(backbone, LABELS) if labels else OverVocabulary()
    losses = passes.run(backbone, Work(prompts, [draw_examples(5), draw_examples(7, seed=1)], loss, seed))
    gradients = [prompt.grad for prompt in prompts]
    assert all(gradient is not None for gradient in gradients)
    return losses, [gradient for gradient in gradients if gradient is not None]


@pytest.mark.parametrize("labels", [False, True], ids=["vocabulary", "labels"])
@pytest.mark.parametrize("tokens", [10**6, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_the_same(frozen: Frozen, kind: str, tokens: int, labels: bool) -> None:
    backbone = frozen(kind)
    plain, again = (
        differentiate(backbone, Passes(tokens, gradient_checkpointing=on), labels, None) for on in (False, True)
    )
    torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [10**6, 40])
@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_what_is_dropped_is_dropped_again(frozen: Frozen, kind: str, tokens: int) -> None:
    backbone = frozen(kind)
    plain, again, other = (
        differentiate(backbone, Passes(tokens, gradient_checkpointing=on), False, seed)
        for on, seed in ((False, 0), (True, 0), (True, 1))
    )
    torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(other[0], plain[0], rtol=1e-3)


@pytest.mark.parametrize(("on", "runs"), [(False, 1), (True, 2)])
def test_layers_run_twice(frozen: Frozen, on: bool, runs: int) -> None:
    backbone, seen = frozen("gpt2"), []
    backbone.native  # its check runs layers too  # noqa: B018
    handle = backbone.model.get_submodule("transformer.h.0.mlp").register_forward_pre_hook(lambda *_: seen.append(1))
    differentiate(backbone, Passes(10**6, gradient_checkpointing=on), False, None)
    handle.remove()
    assert len(seen) == 2 * runs  # prompts and rows


def bytes_kept(backbone: Backbone, on: bool) -> int:
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {weight.untyped_storage().data_ptr() for weight in backbone.model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        prompt = torch.zeros(4, 32, requires_grad=True)
        with checkpointed(backbone.model) if on else torch.enable_grad():
            logits = backbone.model(inputs_embeds=prompt[None].expand(16, -1, -1), use_cache=False).logits
    assert logits.requires_grad
    return sum(size for place, size in kept.items() if place not in weights)


def test_a_pass_keeps_less(frozen: Frozen) -> None:
    backbone = frozen("gpt2", n_layer=6)
    assert bytes_kept(backbone, on=True) < 0.5 * bytes_kept(backbone, on=False)


def test_the_model_is_left_as_it_was(frozen: Frozen) -> None:
    backbone = frozen()
    layer = backbone.model.get_submodule("model.layers.0")
    with checkpointed(backbone.model):
        assert "forward" in vars(layer)
    assert "forward" not in vars(layer)
    with pytest.raises(KeyboardInterrupt), checkpointed(backbone.model):
        raise KeyboardInterrupt
    assert "forward" not in vars(layer)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_trials_end_as_they_do_without(frozen: Frozen, kind: str) -> None:
    backbone = frozen(kind)
    for settings in ({"length": 4}, FAMILY[2]):
        slots = [make_slot(**settings) for _ in range(2)]
        plain, again = (
            train(backbone, slot, passes=Passes(10**6, gradient_checkpointing=on))
            for slot, on in zip(slots, (False, True), strict=True)
        )
        assert again == pytest.approx(plain, rel=1e-3)
        torch.testing.assert_close(slots[1].prompt, slots[0].prompt, rtol=1e-3, atol=1e-4)
