"""What has to hold on a GPU, on the first that these tests meet: exactness, no waiting, no compiling in the loop.

All of it runs with `make test-gpu`; what can be told without a GPU is told in the other tests.
"""

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from softprompt.backbone import Backbone
from softprompt.batch import Example, collate
from softprompt.composition import Composition, compiled, concatenate, shared_prefix
from softprompt.decoder import written_out
from softprompt.findings import find_device, find_model
from softprompt.sizing import choose_slots, estimate_memory
from softprompt.training import Slot, step
from softprompt.workbench import Workbench
from tests.slots import MIXED, make_settings
from tests.slots import draw_examples as draw_rows
from tests.test_composition import GATED, SHARED, draw_examples, draw_prompts, model_of
from tests.tiny import tiny_backbone, tiny_experiment, tiny_model, tiny_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU"),
]
GPU, CPU = torch.device("cuda"), torch.device("cpu")
SIZES = [(4, 1), (7, 3), (1, 2), (9, 1)] * 4
OWNER = [1, 0, 2, 1] * 4
COMPOSITIONS = [*((kind, shared_prefix) for kind in SHARED), *((kind, written_out) for kind in GATED)]


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """Float32 is float32, and not the shorter type that a GPU multiplies faster in."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def make_base(kind: str, dtype: torch.dtype = torch.float32, device: torch.device = GPU) -> Backbone:
    """A tiny model with the attention that transformers chooses, as `Backbone.load` does on a GPU."""
    model: Any = model_of(kind, torch.float32, attn_implementation="eager" if kind == "bloom" else "sdpa")
    model.eval().to(device, dtype)
    return Backbone.wrap(model, tiny_tokenizer())


def run(compose: Composition[Any], base: Backbone, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Logits and the gradients of all prompts, in one line, on the CPU."""
    prompts = [nn.Parameter(prompt.to(base.device)) for prompt in draw_prompts(lengths)]
    batch = collate(draw_examples(SIZES), OWNER, pad=0, device=base.device)
    logits = compose(base.model, prompts, batch).float()
    gradients = torch.autograd.grad(nn.functional.cross_entropy(logits, batch.targets), prompts)
    return logits.detach().cpu(), torch.cat([g.flatten() for g in gradients]).float().cpu()


@pytest.mark.parametrize("lengths", [[2, 6, 1], [4, 4, 4]])
@pytest.mark.parametrize(("kind", "compose"), COMPOSITIONS)
def test_compositions_are_the_concatenation_in_float32(
    kind: str, compose: Composition[Any], lengths: list[int]
) -> None:
    base = make_base(kind)
    expected = run(concatenate, make_base(kind, device=CPU), lengths)
    for found in (run(concatenate, base, lengths), run(compose, base, lengths)):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("kind", "compose"), COMPOSITIONS)
def test_compositions_round_in_bfloat16_as_the_concatenation(kind: str, compose: Composition[Any]) -> None:
    """Every order of operations rounds otherwise: what counts is the distance to the exact numbers."""
    narrow = make_base(kind, torch.bfloat16)
    exact = Backbone.wrap(deepcopy(narrow.model).float(), tiny_tokenizer())
    pairs = ((concatenate, exact), (concatenate, narrow), (compose, narrow))
    true, own, ours = (run(how, base, [3, 6, 3]) for how, base in pairs)
    for expected, theirs, found in zip(true, own, ours, strict=True):
        assert (found - expected).norm() < 2 * (theirs - expected).norm()


@pytest.mark.parametrize("kind", SHARED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_self_check_chooses_the_shared_prefix(kind: str, dtype: torch.dtype) -> None:
    base = make_base(kind, dtype)
    assert base.composition is shared_prefix
    assert base.branches == (kind != "bloom")


def make_slot(length: int = 4, seed: int = 0, **changes: Any) -> Slot:
    initial = 0.3 * torch.randn(length, 32, generator=torch.Generator().manual_seed(seed))
    return Slot(initial, draw_rows(), make_settings(seed=seed, **changes), GPU)


@pytest.mark.parametrize("kind", ["llama", "bloom", "mamba"])
def test_side_by_side_is_as_alone(kind: str) -> None:
    base = make_base(kind) if kind != "mamba" else Backbone.wrap(tiny_model(kind).eval().to(GPU), tiny_tokenizer())
    alone, together = ([make_slot(**settings) for settings in MIXED] for _ in range(2))
    for _ in range(6):
        for slot in alone:
            step(base, [slot])
        step(base, together)
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(other.prompt, one.prompt, rtol=1e-3, atol=1e-3)
    assert base.weights_in_memory_sha256() == base.weights_sha256


@pytest.mark.parametrize("lengths", [[2, 6, 1], [4, 4, 4]])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "opt", "falcon", "gemma"])
def test_a_pass_does_not_wait_for_the_device(kind: str, lengths: list[int]) -> None:
    """Laying out the rows, the forward pass and the backward pass."""
    base = make_base(kind)
    run(shared_prefix, base, lengths)
    prompts = [nn.Parameter(prompt.to(GPU)) for prompt in draw_prompts(lengths)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        opening = base.embed((5, 6))
        batch = collate(draw_examples(SIZES), OWNER, pad=0, device=GPU)
        logits = shared_prefix(base.model, [torch.cat([prompt, opening]) for prompt in prompts], batch)
        nn.functional.cross_entropy(logits, batch.targets).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(prompt.grad is not None for prompt in prompts)


def test_batches_have_few_widths() -> None:
    widths = {collate([Example((1,) * n, (2,))], [0], pad=0, device=GPU).tokens.shape[1] for n in range(1, 65)}
    assert widths == {16, 32, 48, 64}


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # dynamo, about its own look
def test_a_compiled_pass_is_exact_and_compiled_once() -> None:
    base, fast = make_base("llama"), compiled(shared_prefix)
    for lengths in ([2, 6, 1], [3, 5, 2]):  # the second with other lengths, as what varies is marked so
        torch.testing.assert_close(run(fast, base, lengths), run(shared_prefix, base, lengths), rtol=1e-3, atol=1e-4)
    with torch.compiler.set_stance("fail_on_recompile"):
        for lengths in ([4, 9, 5], [7, 2, 3]):
            expected = run(shared_prefix, base, lengths)
            torch.testing.assert_close(run(fast, base, lengths), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantised_weights_pass_the_gradient(precision: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    base = Backbone.load(tmp_path, precision=precision, device="cuda")
    there, here = run(base.composition, base, [3, 3, 3]), run(concatenate, base, [3, 3, 3])
    for found, expected in zip(there, here, strict=True):
        assert (found - expected).norm() < 0.1 * expected.norm()


def test_slots_are_chosen_and_fit(tmp_path: Path) -> None:
    bench = Workbench(tiny_experiment(tmp_path, execution={"device": "cuda"}), backbone=make_base("llama"))
    choice = choose_slots(bench)
    assert 1 <= choice.slots <= 4
    assert set(choice.rates) >= {1, choice.slots}
    assert estimate_memory(bench).row > 0
    assert find_model(bench, find_device(GPU)).lines()["attention"] == "sdpa"


def test_a_model_is_loaded_with_fused_attention(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    base = Backbone.load(tmp_path, precision="bfloat16")
    assert (base.device.type, base.model.config._attn_implementation) == ("cuda", "sdpa")
    assert base.weights_in_memory_sha256() == tiny_backbone_bfloat16().weights_in_memory_sha256()


def tiny_backbone_bfloat16() -> Backbone:
    return Backbone.wrap(tiny_backbone().model.bfloat16(), tiny_tokenizer())
