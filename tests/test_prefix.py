"""Prefixes: against the model called row by row, against PEFT, and beside soft prompts in one batch."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import DynamicCache

from softprompt.backbone import Backbone
from softprompt.batch import Batch, Example, lift
from softprompt.composition import Composition, shared_prefix
from softprompt.decoder import written_out
from softprompt.errors import UserError
from softprompt.inference import Classifier
from softprompt.prefix import is_prefix, length_of, method_of, separate, side_by_side
from tests.test_composition import (
    FAST,
    SHARED,
    assert_close,
    backbone,
    draw_examples,
    draw_prompts,
    lay_out,
    model_of,
    run,
)
from tests.tiny import tiny_backbone, tiny_model, tiny_tokenizer

# PEFT, about its own look at the model
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
ROWS = [(4, 1), (7, 3), (1, 2), (9, 1), (3, 2)]


def draw_prefixes(base: Backbone, lengths: Sequence[int], seed: int = 0) -> list[Tensor]:
    """Of the size that keys and values have, and none that a soft prompt could leave."""
    generator = torch.Generator().manual_seed(seed)
    shape = base.as_prefix(torch.ones(1, 32)).shape
    return [torch.randn(*shape[:3], length, shape[4], generator=generator) for length in lengths]


def run_alone(base: Backbone, prompts: list[Tensor], batch: Batch) -> tuple[Tensor, Tensor, list[Tensor]]:
    """As `run`, with the model called row by row: a prefix is its past, a soft prompt stands before its embeddings."""
    parameters = [nn.Parameter(prompt.clone()) for prompt in prompts]
    logits = []
    for n, owner in enumerate(batch.owner.tolist()):
        tokens, prompt = batch.tokens[n : n + 1, : int(batch.lengths[n])], parameters[owner]
        if is_prefix(prompt):
            past = DynamicCache([(keys[None], values[None]) for keys, values in prompt])
            out = base.model(input_ids=tokens, past_key_values=past, use_cache=True).logits[0]
        else:
            embeds = torch.cat([prompt[None], base.model.get_input_embeddings()(tokens)], dim=1)
            out = base.model(inputs_embeds=embeds, use_cache=False).logits[0, len(prompt) :]
        logits.append(out[batch.columns[batch.rows == n]])
    loss = nn.functional.cross_entropy(torch.cat(logits), batch.targets)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return torch.cat(logits).detach(), loss.detach(), list(gradients)


@pytest.mark.parametrize(("kind", "compose"), FAST)
def test_a_prefix_is_the_past_of_every_row(kind: str, compose: Composition[Any]) -> None:
    base, batch = backbone(kind), lay_out(draw_examples(ROWS), [1, 0, 2, 1, 2])
    prefixes = draw_prefixes(base, [2, 6, 3])
    assert_close(run(compose, base, prefixes, batch), run_alone(base, prefixes, batch))


@pytest.mark.parametrize(("kind", "compose"), FAST)
def test_both_kinds_stand_side_by_side(kind: str, compose: Composition[Any]) -> None:
    base, batch = backbone(kind), lay_out(draw_examples(ROWS), [1, 0, 2, 3, 3])
    short, long = draw_prefixes(base, [2, 6])
    soft, nothing = draw_prompts([4, 0])
    for prompts in ([soft, short, nothing, long], [long, short, short, soft]):
        assert_close(run(compose, base, prompts, batch), run_alone(base, prompts, batch))


@st.composite
def tasks(draw: st.DrawFn) -> tuple[list[tuple[bool, int]], list[tuple[int, int]], list[int], int]:
    """Kinds and lengths of K prompts, sizes of N examples, their owners, and a seed."""
    prompts = draw(st.lists(st.tuples(st.booleans(), st.integers(1, 7)), min_size=1, max_size=4))
    sizes = draw(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4)), min_size=1, max_size=6))
    owner = draw(st.lists(st.integers(0, len(prompts) - 1), min_size=len(sizes), max_size=len(sizes)))
    return prompts, sizes, owner, draw(st.integers(0, 1000))


@pytest.mark.parametrize(
    ("kind", "compose"), [("llama", written_out), ("llama", shared_prefix), ("gpt2", shared_prefix)]
)
@given(task=tasks())
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
def test_any_prompts_of_both_kinds_are_as_each_alone(
    kind: str, compose: Composition[Any], task: tuple[list[tuple[bool, int]], list[tuple[int, int]], list[int], int]
) -> None:
    kinds, sizes, owner, seed = task
    base, batch = backbone(kind), lay_out(draw_examples(sizes, seed), owner)
    lengths = [length for _, length in kinds]
    drawn = zip(draw_prompts(lengths, seed), draw_prefixes(base, lengths, seed), strict=True)
    prompts = [pair[prefix] for (prefix, _), pair in zip(kinds, drawn, strict=True)]
    assert_close(run(compose, base, prompts, batch), run_alone(base, prompts, batch))


def test_both_kinds_stand_side_by_side_where_they_are_longer_than_the_attention_window() -> None:
    base, batch = tiny_backbone("mistral", sliding_window=3), lay_out(draw_examples(ROWS), [1, 0, 2, 1, 2])
    prompts = [*draw_prefixes(base, [2, 6]), *draw_prompts([5])]
    assert_close(run(shared_prefix, base, prompts, batch), run_alone(base, prompts, batch))


@cache
def peft_model(kind: str, shape: torch.Size) -> PeftModel:
    layers, _, groups, length, width = shape
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=length,
        num_layers=layers,
        num_attention_heads=groups,
        token_dim=groups * width,
    )
    model = get_peft_model(model_of(kind, torch.float32), config)
    assert isinstance(model, PeftModel)
    return model.eval()


@pytest.mark.parametrize(("kind", "compose"), FAST)
def test_peft_computes_the_same(kind: str, compose: Composition[Any]) -> None:
    base, batch = backbone(kind), lay_out(draw_examples(ROWS), [0] * 5)
    (prefix,) = draw_prefixes(base, [5])
    model = peft_model(kind, prefix.shape)
    weight = model.get_parameter("prompt_encoder.default.embedding.weight")
    weight.data.copy_(prefix.permute(3, 0, 1, 2, 4).reshape(5, -1))
    mask = (torch.arange(batch.tokens.shape[1]) < batch.lengths[:, None]).long()
    logits = model(input_ids=batch.tokens, attention_mask=mask).logits[batch.rows, batch.columns]
    loss = nn.functional.cross_entropy(logits, batch.targets)
    (gradient,) = torch.autograd.grad(loss, [weight])
    gradient = gradient.view(5, *prefix.shape[:3], -1).permute(1, 2, 3, 0, 4)
    assert_close(run(compose, base, [prefix], batch), (logits.detach(), loss.detach(), [gradient]))


@pytest.mark.parametrize(("kind", "compose"), FAST)
def test_what_a_soft_prompt_leaves_is_a_prefix_with_its_logits(kind: str, compose: Composition[Any]) -> None:
    base, batch = backbone(kind), lay_out(draw_examples(ROWS), [0] * 5)
    (soft,) = draw_prompts([6])
    prefix = base.as_prefix(soft)
    assert (length_of(prefix), method_of(prefix), prefix.dtype) == (6, "prefix_tuning", torch.float32)
    assert not prefix.requires_grad
    assert_close(run(compose, base, [prefix], batch)[0], run(compose, base, [soft], batch)[0])


def test_a_soft_prompt_longer_than_the_attention_window_leaves_all_of_its_states() -> None:
    base, batch = tiny_backbone("mistral", sliding_window=3), lay_out(draw_examples(ROWS), [0] * 5)
    (soft,) = draw_prompts([6])
    assert length_of(base.as_prefix(soft)) == 6
    assert_close(run(shared_prefix, base, [base.as_prefix(soft)], batch)[0], run(shared_prefix, base, [soft], batch)[0])


@pytest.mark.parametrize("kind", SHARED)
def test_a_lifted_opening_changes_nothing(kind: str) -> None:
    base = backbone(kind)
    examples = [Example((5, 6, 7, *e.inputs), e.target) for e in draw_examples(ROWS)]
    common, rest = lift(examples)
    prompts, owner = [*draw_prefixes(base, [2, 6]), *draw_prompts([4])], [1, 0, 1, 2, 2]

    def lifted(model: Any, given: Sequence[Tensor], batch: Batch) -> Tensor:
        return base.composition(model, base.extend(given, common), batch)

    expected = run_alone(base, prompts, lay_out(examples, owner))
    assert len(common) >= 3
    assert_close(run(lifted, base, prompts, lay_out(rest, owner)), expected)  # type: ignore[arg-type]


def test_prompts_without_an_opening_stay_as_they_are() -> None:
    prompts = [*draw_prefixes(backbone("llama"), [2]), *draw_prompts([4])]
    assert backbone("llama").extend(prompts, ()) == prompts


def test_what_is_separated_is_what_was_put_side_by_side() -> None:
    prefixes = draw_prefixes(backbone("llama"), [2, 5, 1])
    keys, values, mask = side_by_side(prefixes, torch.float32)
    assert mask.tolist() == [[0, 0, 0, 1, 1], [1] * 5, [0, 0, 0, 0, 1]]
    assert {layer.shape for layer in keys + values} == {(3, 2, 5, 8)}
    again = separate(zip(keys, values, strict=True), [2, 5, 1])
    assert all(torch.equal(one, other) for one, other in zip(again, prefixes, strict=True))


@pytest.mark.parametrize("kind", ["t5", "mamba"])
def test_a_model_that_takes_no_prefix_refuses_it(kind: str) -> None:
    told = rf"search\.method: prefix_tuning needs a model .* this {kind} model does not; use prompt_tuning"
    with pytest.raises(UserError, match=told):
        backbone(kind).as_prefix(torch.ones(3, 32))


def test_in_bfloat16_the_gradient_is_of_float32() -> None:
    base = Backbone.wrap(tiny_model().bfloat16(), tiny_tokenizer())
    prefix = base.as_prefix(draw_prompts([4])[0])
    exact = run_alone(backbone("llama"), [prefix], lay_out(draw_examples(ROWS), [0] * 5))[2][0]
    found = run(base.composition, base, [prefix], lay_out(draw_examples(ROWS), [0] * 5))[2][0]
    assert found.dtype == torch.float32
    assert (found - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom"])
def test_scores_after_a_prefix_are_those_of_a_plain_loop(kind: str) -> None:
    """With what all inputs begin with read once, and labels of several tokens that share a beginning."""
    base, labels = backbone(kind), [(300, 301), (300, 302, 303), (311,)]
    (prefix,) = draw_prefixes(base, [4])
    random = np.random.default_rng(0)
    inputs = [(5, 6, 7, *random.integers(3, 370, size=random.integers(1, 9)).tolist()) for _ in range(70)]
    scores = Classifier(base, prefix, labels).score(inputs)
    for c, label in enumerate(labels):
        batch = lay_out([Example(row, label) for row in inputs], [0] * len(inputs))
        logits = run_alone(base, [prefix], batch)[0].log_softmax(1)
        tokens = logits.gather(1, batch.targets[:, None]).view(len(inputs), -1)
        np.testing.assert_allclose(scores.log_probabilities[:, c], tokens.sum(1), rtol=1e-4, atol=1e-4)
