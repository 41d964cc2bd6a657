"""The formula: every composition against each other, against PEFT, and against themselves in other company."""

from collections.abc import Sequence
from copy import deepcopy
from functools import cache, partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, PromptTuningConfig, get_peft_model
from torch import Tensor, nn

from softprompt.backbone import Backbone
from softprompt.composition import Batch, Composition, Example, collate, compiled, concatenate, lift, shared_prefix
from softprompt.decoder import fits, written_out
from tests.tiny import tiny_backbone, tiny_model, tiny_tokenizer

SHARED = ["llama", "gpt2", "qwen2", "qwen3", "mistral", "gemma", "opt", "bloom", "falcon"]
GATED = ["llama", "qwen2", "qwen3", "mistral", "gemma"]
FAST = [*((kind, shared_prefix) for kind in SHARED), *((kind, written_out) for kind in GATED)]
CPU = torch.device("cpu")
# PEFT, about its own look at the model
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
assert_close = partial(torch.testing.assert_close, rtol=1e-4, atol=2e-5)

backbone = cache(tiny_backbone)


def draw_prompts(lengths: Sequence[int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [0.3 * torch.randn(length, 32, generator=generator) for length in lengths]


def draw_examples(sizes: Sequence[tuple[int, int]], seed: int = 0) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(370, (count,), generator=generator).tolist())

    return [Example(tokens(inputs), tokens(target)) for inputs, target in sizes]


def lay_out(examples: Sequence[Example], owner: Sequence[int], pad: int = 0) -> Batch:
    return collate(examples, owner, pad=pad, device=CPU)


def run(
    compose: Composition[Any], base: Backbone, prompts: list[Tensor], batch: Batch
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Logits, loss, and the loss's gradients with respect to the prompts."""
    parameters = [nn.Parameter(prompt.clone()) for prompt in prompts]
    logits = compose(base.model, parameters, batch)
    loss = nn.functional.cross_entropy(logits, batch.targets)
    if not any(map(len, prompts)):
        return logits, loss, prompts  # nothing to learn, and no graph
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return logits.detach(), loss.detach(), list(gradients)


def assert_same(one: tuple[Tensor, Tensor, list[Tensor]], other: tuple[Tensor, Tensor, list[Tensor]]) -> None:
    assert_close(one, other)


def test_collate_lays_out_inputs_and_all_but_the_last_target_token() -> None:
    batch = lay_out([Example((5, 6, 7), (8,)), Example((9,), (10, 11, 12))], [1, 0], pad=3)
    assert batch.tokens.tolist() == [[5, 6, 7], [9, 10, 11]]
    assert batch.lengths.tolist() == [3, 3]
    assert batch.owner.tolist() == [1, 0]
    assert list(zip(batch.rows.tolist(), batch.columns.tolist(), batch.targets.tolist(), strict=True)) == [
        (0, 2, 8),
        (1, 0, 10),
        (1, 1, 11),
        (1, 2, 12),
    ]


def test_collate_pads_on_the_right() -> None:
    batch = lay_out([Example((5,), (6,)), Example((7, 8, 9), (6,))], [0, 0], pad=3)
    assert batch.tokens.tolist() == [[5, 3, 3], [7, 8, 9]]
    assert batch.lengths.tolist() == [1, 3]


def test_the_formula_is_the_prompt_before_the_embeddings() -> None:
    """One row, one prompt: nothing but a forward pass over [p; E[tokens]] and a look at its last places."""
    model = backbone("llama").model
    (prompt,), (example,) = draw_prompts([3]), draw_examples([(5, 2)])
    embedded = model.get_input_embeddings()(torch.tensor([*example.inputs, example.target[0]]))
    expected = model(inputs_embeds=torch.cat([prompt, embedded])[None]).logits[0, -2:]
    batch = lay_out([example], [0])
    assert_close(concatenate(model, [prompt], batch), expected)


@pytest.mark.parametrize(("kind", "compose"), FAST)
def test_all_compositions_agree(kind: str, compose: Composition[Any]) -> None:
    base = backbone(kind)
    assert base.composition is (written_out if kind in GATED else shared_prefix)
    batch = lay_out(draw_examples([(4, 1), (7, 3), (1, 2), (9, 1)]), [1, 0, 2, 1])
    prompts = draw_prompts([2, 6, 0])
    assert_same(run(concatenate, base, prompts, batch), run(compose, base, prompts, batch))


@pytest.mark.parametrize("lengths", [[2, 6, 0], [4, 4, 4]])
@pytest.mark.parametrize("kind", [kind for kind in SHARED if kind != "bloom"])  # has no fused attention
def test_fused_attention_agrees(kind: str, lengths: list[int]) -> None:
    """As models attend on a GPU: with no mask where all prompts are of one length, else with a whole one."""
    base = tiny_backbone(kind, attn_implementation="sdpa")
    assert base.branches
    batch = lay_out(draw_examples([(4, 1), (7, 3), (1, 2), (9, 1)]), [1, 0, 2, 1])
    prompts = draw_prompts(lengths)
    assert_same(run(concatenate, backbone(kind), prompts, batch), run(shared_prefix, base, prompts, batch))


@pytest.mark.parametrize("lengths", [[2, 6, 0], [4, 4, 4]])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "opt", "falcon"])
def test_a_pass_waits_for_no_number_of_the_device(kind: str, lengths: list[int]) -> None:
    """Tensors of the meta device have no numbers: whoever asks for one raises."""
    base = tiny_backbone(kind, attn_implementation="sdpa")
    meta = torch.device("meta")
    model = base.model.eval().to(meta)
    batch = collate(draw_examples([(4, 1), (7, 3), (1, 2)]), [1, 0, 2], pad=0, device=meta)
    prompts = [nn.Parameter(prompt.to(meta)) for prompt in draw_prompts(lengths)]
    logits = shared_prefix(model, prompts, batch)
    nn.functional.cross_entropy(logits, batch.targets).backward()
    assert all(prompt.grad is not None for prompt in prompts)


WIDTHS = ([(4, 1), (9, 2), (6, 1)], [(12, 1), (5, 3), (7, 2)], [(19, 1), (2, 1), (3, 3)])
"""None as wide as a head, whose width is written into the code where one is met."""


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # dynamo, about its own look
def test_a_pass_can_be_compiled_once_for_all_widths() -> None:
    """As far as the graph; the code for it is made, and measured, where there is a GPU."""
    base = tiny_backbone(attn_implementation="sdpa", num_hidden_layers=1)
    fast = compiled(shared_prefix, backend="aot_eager")
    first, *others = (lay_out(draw_examples(sizes), [0, 0, 0]) for sizes in WIDTHS)
    (prompt,) = draw_prompts([5])
    assert_same(run(fast, base, [prompt], first), run(shared_prefix, base, [prompt], first))
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch in others:
            assert_same(run(fast, base, [prompt], batch), run(shared_prefix, base, [prompt], batch))


def test_columns_are_a_multiple_of_what_is_asked_for() -> None:
    examples, prompts = draw_examples([(4, 1), (7, 3), (1, 2)]), draw_prompts([3])
    tight, wide = (collate(examples, [0] * 3, pad=0, device=CPU, multiple=n) for n in (1, 8))
    assert (tight.tokens.shape[1], wide.tokens.shape[1]) == (9, 16)
    for compose in (concatenate, shared_prefix, written_out):
        assert_same(run(compose, backbone("llama"), prompts, tight), run(compose, backbone("llama"), prompts, wide))


@pytest.mark.parametrize("kind", GATED)
def test_layers_written_out_are_as_near_to_float32_as_the_models_own(kind: str) -> None:
    """In bfloat16 every order of operations rounds otherwise: what counts is the distance to the exact numbers."""
    batch = lay_out(draw_examples([(4, 1), (7, 3), (1, 2), (9, 1)] * 4), [1, 0, 0, 1] * 4)
    prompts = [prompt.bfloat16().float() for prompt in draw_prompts([3, 6])]

    def distances(seed: int) -> list[Tensor]:
        """Of logits and of gradients, ours as a share of the model's own."""
        model = tiny_model(kind, seed=seed).bfloat16()
        exact, narrow = (Backbone.wrap(m, tiny_tokenizer()) for m in (deepcopy(model).float(), model))
        pairs = ((concatenate, exact), (concatenate, narrow), (written_out, narrow))
        true, own, ours = (run(compose, base, prompts, batch) for compose, base in pairs)
        flat = [[torch.cat([t.flatten().float() for t in result[n]]) for result in (true, own, ours)] for n in (0, 2)]
        return [(found - expected).norm() / (theirs - expected).norm() for expected, theirs, found in flat]

    assert torch.tensor([distances(seed) for seed in range(6)]).mean(0).max() < 1.2


def test_layers_with_other_parts_or_a_window_are_not_written_out() -> None:
    assert fits(tiny_model("llama"))
    assert not any(fits(tiny_model(kind)) for kind in ("gpt2", "bloom", "mamba", "falcon", "opt"))
    assert not fits(tiny_model("mistral", sliding_window=64))


def test_a_scaled_residual_is_found_by_its_numbers() -> None:
    base = tiny_backbone("granite", residual_multiplier=0.5)
    assert base.deviation(written_out) > 0.1
    assert base.composition is shared_prefix


def test_what_all_inputs_begin_with_is_lifted() -> None:
    examples = [Example((1, 2, 3, 4), (9,)), Example((1, 2, 5), (8,)), Example((1, 2, 3), (8, 7))]
    common, rest = lift(examples)
    assert common == (1, 2)
    assert rest == [Example((3, 4), (9,)), Example((5,), (8,)), Example((3,), (8, 7))]
    assert lift([Example((1, 2), (9,)), Example((1,), (9,))])[0] == ()
    assert lift([Example((1, 2), (9,))]) == ((1,), [Example((2,), (9,))])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom", "gemma", "mamba"])
def test_a_lifted_opening_changes_nothing(kind: str) -> None:
    base = backbone(kind)
    examples = [Example((5, 6, 7, *e.inputs), e.target) for e in draw_examples([(4, 1), (7, 3), (1, 2)])]
    common, rest = lift(examples)
    prompts = draw_prompts([2, 6])
    lifted = [torch.cat([prompt, base.embed(common)]) for prompt in prompts]
    owner = [1, 0, 1]
    expected = concatenate(base.model, prompts, lay_out(examples, owner))
    assert len(common) >= 3
    assert_close(base.composition(base.model, lifted, lay_out(rest, owner)), expected)


def test_both_compositions_agree_where_the_prompt_is_longer_than_the_attention_window() -> None:
    base = tiny_backbone("mistral", sliding_window=3)
    batch = lay_out(draw_examples([(4, 1), (7, 3)]), [1, 0])
    prompts = draw_prompts([2, 6])
    assert_same(run(concatenate, base, prompts, batch), run(shared_prefix, base, prompts, batch))


@cache
def peft_model(kind: str, length: int) -> PeftModel:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length)
    model = get_peft_model(tiny_model(kind), config)
    assert isinstance(model, PeftModel)
    return model.eval()


def run_peft(kind: str, prompt: Tensor, batch: Batch) -> tuple[Tensor, Tensor, list[Tensor]]:
    model = peft_model(kind, len(prompt))
    weight = model.get_parameter("prompt_encoder.default.embedding.weight")
    weight.data.copy_(prompt)
    mask = (torch.arange(batch.tokens.shape[1]) < batch.lengths[:, None]).long()
    logits = model(input_ids=batch.tokens, attention_mask=mask).logits[batch.rows, len(prompt) + batch.columns]
    loss = nn.functional.cross_entropy(logits, batch.targets)
    return logits.detach(), loss.detach(), list(torch.autograd.grad(loss, [weight]))


@pytest.mark.parametrize(("kind", "compose"), [*((kind, concatenate) for kind in SHARED), *FAST])
def test_peft_computes_the_same(kind: str, compose: Composition[Any]) -> None:
    batch = lay_out(draw_examples([(4, 1), (7, 3), (1, 2), (9, 1)]), [0] * 4)
    (prompt,) = draw_prompts([5])
    assert_same(run(compose, backbone(kind), [prompt], batch), run_peft(kind, prompt, batch))


@st.composite
def tasks(draw: st.DrawFn) -> tuple[list[int], list[tuple[int, int]], list[int], int]:
    """Lengths of K prompts, sizes of N examples, their owners, and a seed."""
    lengths = draw(st.lists(st.integers(0, 7), min_size=1, max_size=4))
    sizes = draw(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4)), min_size=1, max_size=6))
    owner = draw(st.lists(st.integers(0, len(lengths) - 1), min_size=len(sizes), max_size=len(sizes)))
    return lengths, sizes, owner, draw(st.integers(0, 1000))


@pytest.mark.parametrize(
    ("kind", "compose"),
    [*((kind, shared_prefix) for kind in ("llama", "gpt2", "bloom")), ("llama", written_out), ("qwen3", written_out)],
)
@given(task=tasks())
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
def test_any_prompts_and_rows_agree(
    kind: str, compose: Composition[Any], task: tuple[list[int], list[tuple[int, int]], list[int], int]
) -> None:
    lengths, sizes, owner, seed = task
    base, batch, prompts = backbone(kind), lay_out(draw_examples(sizes, seed), owner), draw_prompts(lengths, seed)
    assert_same(run(concatenate, base, prompts, batch), run(compose, base, prompts, batch))


@pytest.mark.parametrize(
    ("kind", "compose"),
    [("llama", written_out), ("llama", concatenate), ("opt", shared_prefix), ("mamba", concatenate)],
)
@given(task=tasks())
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
def test_a_row_does_not_depend_on_its_company(
    kind: str, compose: Composition[Any], task: tuple[list[int], list[tuple[int, int]], list[int], int]
) -> None:
    lengths, sizes, owner, seed = task
    model, examples, prompts = backbone(kind).model, draw_examples(sizes, seed), draw_prompts(lengths, seed)
    with torch.no_grad():
        together = compose(model, prompts, lay_out(examples, owner))
        alone = [
            compose(model, [prompts[k]], lay_out([example], [0])) for example, k in zip(examples, owner, strict=True)
        ]
    assert_close(together, torch.cat(alone))


@pytest.mark.parametrize(
    ("kind", "compose"),
    [
        ("llama", shared_prefix),
        ("llama", written_out),
        ("llama", concatenate),
        ("bert", concatenate),
    ],  # bert looks ahead, and must be told
)
def test_padding_is_never_read(kind: str, compose: Composition[Any]) -> None:
    examples, prompts = draw_examples([(2, 1), (9, 2)]), draw_prompts([4, 1])
    zeros, others = (compose(backbone(kind).model, prompts, lay_out(examples, [0, 1], pad=p)) for p in (0, 77))
    assert_close(zeros, others)


@pytest.mark.parametrize("compose", [shared_prefix, written_out, concatenate])
def test_kept_states_serve_many_batches_and_stay_as_they_are(compose: Composition[Any]) -> None:
    model = backbone("llama").model
    batch, other = lay_out(draw_examples([(4, 1), (7, 2)]), [0, 1]), lay_out(draw_examples([(3, 1)] * 5), [1] * 5)
    with torch.no_grad():
        states = compose.keep(model, draw_prompts([3, 5]))
        first = compose.attend(model, states, batch)
        compose.attend(model, states, other)
        assert torch.equal(compose.attend(model, states, batch), first)


@pytest.mark.parametrize("compose", [concatenate, shared_prefix, written_out])
def test_only_prompts_receive_gradients_and_the_weights_stay(compose: Composition[Any]) -> None:
    base = tiny_backbone()
    batch = lay_out(draw_examples([(4, 1), (7, 2)]), [0, 1])
    prompts = [nn.Parameter(prompt) for prompt in draw_prompts([3, 5])]
    nn.functional.cross_entropy(compose(base.model, prompts, batch), batch.targets).backward()
    assert all(prompt.grad is not None and prompt.grad.abs().sum() > 0 for prompt in prompts)
    assert all(weight.grad is None for weight in base.model.parameters())
    assert base.weights_in_memory_sha256() == base.weights_sha256
