"""The formula: every composition against each other, against PEFT, and against themselves in other company."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from softprompt.backbone import Backbone
from softprompt.batch import Batch, Example, Tree, collate, collate_tree, lift, unfold
from softprompt.composition import Composition, compiled, concatenate, concatenate_left, shared_prefix
from softprompt.decoder import fits, written_out
from softprompt.encoder_decoder import encode_and_decode
from tests.tiny import tiny_backbone, tiny_model, tiny_tokenizer

WINDOWS = {"mistral, short window": 3, "mistral, long window": 40}
"""Shorter than a row, and longer than any."""
GATED = ["llama", "qwen2", "qwen3", "mistral", "gemma"]
SHARED = [*GATED, *WINDOWS, "gemma2", "gemma3_text", "gpt2", "opt", "bloom", "falcon"]
CAUSAL = [*SHARED, "mamba"]
ENCODERS = ["t5", "bart"]
IN_TWO_STEPS = replace(written_out, together=None)
FAST: list[tuple[str, Composition[Any]]] = [(name, shared_prefix) for name in SHARED]
FAST += [(name, compose) for name in GATED for compose in (written_out, IN_TWO_STEPS)]
CHOSEN = (
    dict.fromkeys(SHARED, shared_prefix)
    | dict.fromkeys(GATED, written_out)
    | {"mamba": concatenate}
    | dict.fromkeys(ENCODERS, encode_and_decode)
)
"""What each model is expected to allow."""
CPU = torch.device("cpu")
# PEFT, about its own look at the model
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
assert_close = partial(torch.testing.assert_close, rtol=1e-4, atol=2e-5)


def model_of(name: str, dtype: torch.dtype, **overrides: Any) -> PreTrainedModel:
    window = {"sliding_window": WINDOWS[name]} if name in WINDOWS else {}
    model = tiny_model(name.partition(",")[0], **window, **overrides)
    return model.bfloat16() if dtype == torch.bfloat16 else model


@cache
def backbone(name: str, dtype: torch.dtype = torch.float32) -> Backbone:
    return Backbone.wrap(model_of(name, dtype), tiny_tokenizer())


def formula(name: str) -> Composition[Any]:
    return encode_and_decode if name in ENCODERS else concatenate


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
    logits = compose(base.model, parameters, batch).float()
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


@pytest.mark.parametrize("name", CHOSEN)
def test_a_model_allows_what_its_numbers_say(name: str) -> None:
    assert backbone(name).composition is CHOSEN[name]


@pytest.mark.parametrize(("name", "compose"), FAST)
def test_all_compositions_agree(name: str, compose: Composition[Any]) -> None:
    base = backbone(name)
    batch = lay_out(draw_examples([(4, 1), (7, 3), (1, 2), (9, 1)]), [1, 0, 2, 1])
    prompts = draw_prompts([2, 6, 0])
    assert_same(run(concatenate, base, prompts, batch), run(compose, base, prompts, batch))


@pytest.mark.parametrize("name", CAUSAL)
def test_the_side_of_the_padding_changes_nothing(name: str) -> None:
    base, prompts = backbone(name), draw_prompts([2, 6, 0])
    batch = lay_out(draw_examples([(4, 1), (7, 3), (1, 2), (9, 1)]), [1, 0, 2, 1])
    assert_same(run(concatenate, base, prompts, batch), run(concatenate_left, base, prompts, batch))


@pytest.mark.parametrize("lengths", [[2, 6, 0], [4, 4, 4]])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "qwen3", "mistral", "gemma", "opt", "falcon"])
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
    model, meta = nn.Module.to(base.model, "meta"), torch.device("meta")
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


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom", "gemma", "mamba", *ENCODERS])
def test_a_lifted_opening_changes_nothing(kind: str) -> None:
    base = backbone(kind)
    examples = [Example((5, 6, 7, *e.inputs), e.target) for e in draw_examples([(4, 1), (7, 3), (1, 2)])]
    common, rest = lift(examples)
    prompts = draw_prompts([2, 6])
    lifted = [torch.cat([prompt, base.embed(common)]) for prompt in prompts]
    owner = [1, 0, 1]
    expected = formula(kind)(base.model, prompts, lay_out(examples, owner))
    assert len(common) >= 3
    assert_close(base.composition(base.model, lifted, lay_out(rest, owner)), expected)


def test_inputs_end_where_their_targets_begin() -> None:
    examples = draw_examples([(4, 1), (7, 3), (1, 2)])
    assert lay_out(examples, [0, 0, 0]).ends.tolist() == [4, 7, 1]
    assert collate_tree([e.inputs for e in examples], [0] * 3, TREE, pad=0).ends.tolist() == [4, 7, 1]


TREE = Tree(
    torch.tensor([300, 301, 302, 303, 304]),
    torch.tensor([0, 0, 1, 1, 2]),
    torch.tensor([[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 0, 0, 1, 0], [1, 0, 0, 1, 1]]).bool(),
)
"""Three paths: 300 302, 300 303 304 and 301."""


def test_a_tree_unfolds_into_its_paths() -> None:
    paths = TREE.paths
    assert sorted(row[:n] for row, n in zip(paths.tokens.tolist(), paths.lengths.tolist(), strict=True)) == [
        [300, 302],
        [300, 303, 304],
        [301],
    ]
    batch = collate_tree([(5, 6, 7), (8,)], [0, 0], TREE, pad=0)
    lines = unfold(batch)
    assert lines.tree is None
    assert len(lines.tokens) == 6
    assert lines.lengths.tolist() == [3 + n for n in paths.lengths] + [1 + n for n in paths.lengths]
    assert lines.targets is batch.targets
    read = [lines.tokens[row, : column + 1].tolist() for row, column in zip(lines.rows, lines.columns, strict=True)]
    branches = [[], [300], [301], [300, 302], [300, 303], [300, 303, 304]]
    assert read == [[*inputs, *branch] for inputs in ([5, 6, 7], [8]) for branch in branches]


@pytest.mark.parametrize("name", [name for name in CHOSEN if name != "bloom"])
def test_a_tree_is_read_as_its_paths_are(name: str) -> None:
    """Also where the rows are longer than the attention window, of which a tree's own mask would know nothing."""
    base, prompts = backbone(name), draw_prompts([4, 2])
    batch = collate_tree([e.inputs for e in draw_examples([(4, 1), (7, 1), (1, 1)])], [1, 0, 1], TREE, pad=0)
    with torch.no_grad():
        found = base.composition(base.model, prompts, batch)
        assert_close(found, formula(name)(base.model, prompts, unfold(batch)))


@cache
def peft_model(name: str, length: int, dtype: torch.dtype) -> PeftModel:
    task = "SEQ_2_SEQ_LM" if name in ENCODERS else "CAUSAL_LM"
    config = PromptTuningConfig(task_type=task, num_virtual_tokens=length, num_attention_heads=4)
    model = get_peft_model(model_of(name, dtype), config)
    assert isinstance(model, PeftModel)
    return model.eval()


def run_peft(
    name: str, prompt: Tensor, examples: Sequence[Example], *, left: bool = False, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Logits, loss and gradient of PEFT's own forward, on rows that are padded as its users pad them."""
    model = peft_model(name, len(prompt), dtype)
    weight = model.get_parameter("prompt_encoder.default.embedding.weight")
    with torch.no_grad():
        weight[: len(prompt)] = prompt
    parts = [e.inputs if name in ENCODERS else (*e.inputs, *e.target[:-1]) for e in examples]
    longest = max(map(len, parts))
    padding = [[0] * (longest - len(part)) for part in parts]
    rows = [[*p, *part] if left else [*part, *p] for part, p in zip(parts, padding, strict=True)]
    mask = [
        [0] * len(p) + [1] * len(part) if left else [1] * len(part) + [0] * len(p)
        for part, p in zip(parts, padding, strict=True)
    ]
    told = {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}
    if name in ENCODERS:
        start, most = model.config.decoder_start_token_id, max(len(e.target) for e in examples)
        decoded = [[start, *e.target[:-1], *[0] * (most - len(e.target))] for e in examples]
        told["decoder_input_ids"] = torch.tensor(decoded)
    found = model(**told).logits.float()
    first = [
        0 if name in ENCODERS else len(prompt) + len(p) * left + len(e.inputs) - 1
        for e, p in zip(examples, padding, strict=True)
    ]
    logits = torch.cat([row[at : at + len(e.target)] for row, at, e in zip(found, first, examples, strict=True)])
    loss = nn.functional.cross_entropy(logits, torch.tensor([token for e in examples for token in e.target]))
    (gradient,) = torch.autograd.grad(loss, [weight])
    return logits.detach(), loss.detach(), [gradient[: len(prompt)]]


RAGGED = [(4, 1), (7, 3), (1, 2), (9, 1)]


@pytest.mark.parametrize("name", CHOSEN)
def test_what_is_chosen_the_formula_and_peft_are_the_same(name: str) -> None:
    base, examples, (prompt,) = backbone(name), draw_examples(RAGGED), draw_prompts([5])
    batch = lay_out(examples, [0] * 4)
    chosen, plain = (run(compose, base, [prompt], batch) for compose in (base.composition, formula(name)))
    assert_same(chosen, plain)
    assert_same(chosen, run_peft(name, prompt, examples))
    assert base.weights_in_memory_sha256() == base.weights_sha256


@pytest.mark.parametrize("name", CHOSEN)
def test_in_bfloat16_they_differ_by_rounding(name: str) -> None:
    """Of the exact numbers, those of the same weights in float32: 2 % of the logits and 7 % of the gradients at most.

    PEFT's own forward is as far from them.
    """
    narrow, examples = backbone(name, torch.bfloat16), draw_examples(RAGGED * 4)
    exact = Backbone.wrap(deepcopy(narrow.model).float(), tiny_tokenizer())
    (prompt,) = (p.bfloat16().float() for p in draw_prompts([5]))
    batch = lay_out(examples, [0] * len(examples))
    true = run(formula(name), exact, [prompt], batch)
    ours = run(narrow.composition, narrow, [prompt], batch)
    theirs = run_peft(name, prompt, examples, dtype=torch.bfloat16)
    for n in (0, 2):
        expected, found, peer = (torch.cat([t.flatten().float() for t in r[n]]) for r in (true, ours, theirs))
        scale = (expected - expected.mean()).norm()
        error, peers = float((found - expected).norm() / scale), float((peer - expected).norm() / scale)
        assert error <= {0: 0.02, 2: 0.07}[n]
        assert error <= 1.2 * peers


@pytest.mark.parametrize("name", ["llama", "mistral, short window", "gemma2", "gpt2", "falcon"])
def test_padding_on_the_left_moves_peft_and_not_the_formula(name: str) -> None:
    examples, (prompt,) = draw_examples(RAGGED), draw_prompts([5])
    right = run_peft(name, prompt, examples)
    assert (run_peft(name, prompt, examples, left=True)[0] - right[0]).abs().max() > 0.1
    assert_same(run(concatenate_left, backbone(name), [prompt], lay_out(examples, [0] * 4)), right)


@st.composite
def tasks(draw: st.DrawFn) -> tuple[list[int], list[tuple[int, int]], list[int], int]:
    """Lengths of K prompts, sizes of N examples, their owners, and a seed."""
    lengths = draw(st.lists(st.integers(0, 7), min_size=1, max_size=4))
    sizes = draw(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4)), min_size=1, max_size=6))
    owner = draw(st.lists(st.integers(0, len(lengths) - 1), min_size=len(sizes), max_size=len(sizes)))
    return lengths, sizes, owner, draw(st.integers(0, 1000))


@pytest.mark.parametrize(
    ("kind", "compose"),
    [
        *((kind, shared_prefix) for kind in ("llama", "gpt2", "bloom", "mistral, short window", "gemma3_text")),
        *((kind, written_out) for kind in ("llama", "qwen3")),
        *((kind, concatenate_left) for kind in ("llama", "opt", "falcon", "mamba")),
    ],
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
    [
        ("llama", written_out),
        *((kind, concatenate) for kind in ("llama", "mamba")),
        *((kind, concatenate_left) for kind in ("gpt2", "mamba")),
        *((kind, shared_prefix) for kind in ("opt", "mistral, short window")),
        *((kind, encode_and_decode) for kind in ENCODERS),
    ],
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
        *(("llama", compose) for compose in (shared_prefix, written_out, concatenate, concatenate_left)),
        *((kind, encode_and_decode) for kind in ENCODERS),
    ],
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


@pytest.mark.parametrize(
    ("kind", "compose"),
    [
        *(("llama", compose) for compose in (concatenate, shared_prefix, written_out)),
        ("mamba", concatenate),
        *((kind, encode_and_decode) for kind in ENCODERS),
    ],
)
def test_only_prompts_receive_gradients_and_the_weights_stay(kind: str, compose: Composition[Any]) -> None:
    base = tiny_backbone(kind)
    batch = lay_out(draw_examples([(4, 1), (7, 2)]), [0, 1])
    prompts = [nn.Parameter(prompt) for prompt in draw_prompts([3, 5])]
    nn.functional.cross_entropy(compose(base.model, prompts, batch), batch.targets).backward()
    assert all(prompt.grad is not None and prompt.grad.abs().sum() > 0 for prompt in prompts)
    assert all(weight.grad is None for weight in base.model.parameters())
    assert base.weights_in_memory_sha256() == base.weights_sha256
