"""Frozen weights in 8 and 4 bits, where bitsandbytes is installed, and what is said where it is not."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from softprompt.backbone import Backbone, hash_folder
from softprompt.batch import Example, collate
from softprompt.composition import concatenate
from softprompt.errors import UserError
from softprompt.quantization import QuantizedLinear, count_parameters, quantize
from softprompt.training import step
from tests.slots import make_slot
from tests.tiny import tiny_model, tiny_tokenizer

CPU = torch.device("cpu")
QUANTIZED = ["int8", "int4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(made)
    tiny_tokenizer().save_pretrained(made)
    return made


@pytest.fixture
def library() -> None:
    pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("precision", QUANTIZED)
def test_without_the_library_one_sentence_names_the_extra(
    folder: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"precision: int8 and int4 need bitsandbytes.*pip install"):
        Backbone.load(folder, precision=precision, device="cpu")


@pytest.mark.parametrize(("precision", "within"), [("int8", 0.01), ("int4", 0.12)])
@pytest.mark.usefixtures("library")
def test_a_layer_is_near_what_it_was_and_its_gradient_is_exact(precision: str, within: float) -> None:
    model = tiny_model()
    before = model.model.layers[0].mlp.up_proj
    quantize(model, precision, CPU)
    after = model.model.layers[0].mlp.up_proj
    assert isinstance(after, QuantizedLinear)
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    found = after(x)
    assert (found - before(x)).norm() < within * before(x).norm()
    whole = after.stored(torch.float32)
    expected = nn.functional.linear(x, whole)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(y.square().sum(), [x])[0] for y in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(("precision", "share"), [("int8", 0.62), ("int4", 0.35)])
@pytest.mark.usefixtures("library")
def test_a_model_takes_less_and_keeps_its_identity(folder: Path, precision: str, share: float) -> None:
    narrow, base = (Backbone.load(folder, precision=p, device="cpu") for p in ("bfloat16", precision))
    assert base.weights_sha256 == narrow.weights_sha256 == hash_folder(folder)
    assert count_parameters(base.model) == count_parameters(narrow.model)
    layers = [b.model.base_model.get_submodule("layers").state_dict().values() for b in (base, narrow)]
    ours, theirs = (sum(t.nbytes for t in tensors) for tensors in layers)
    assert ours < share * theirs
    assert torch.equal(base.embeddings, narrow.embeddings)


@pytest.mark.parametrize("precision", QUANTIZED)
@pytest.mark.usefixtures("library")
def test_every_composition_is_exact_and_training_leaves_the_weights(folder: Path, precision: str) -> None:
    base = Backbone.load(folder, precision=precision, device="cpu")
    before = base.weights_in_memory_sha256()
    assert base.composition.name.startswith("shared prefix")
    examples = [Example((5, 6, 7), (8,)), Example((9,), (10, 11))]
    prompts = [torch.randn(n, 32, generator=torch.Generator().manual_seed(n), requires_grad=True) for n in (3, 5)]
    batch = collate(examples, [0, 1], pad=0, device=CPU)
    results = []
    for compose in (concatenate, base.composition):
        loss = nn.functional.cross_entropy(compose(base.model, prompts, batch).float(), batch.targets)
        results.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, prompts)]))
    assert (results[1] - results[0]).norm() < 0.1 * results[0].norm()
    slot = make_slot(steps=40, learning_rate=0.1)
    losses = [step(base, [slot]).item() for _ in range(40)]
    assert sum(losses[-10:]) < sum(losses[:10])
    assert base.weights_in_memory_sha256() == before


@pytest.mark.usefixtures("library")
def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(UserError, match="this model has none"):
        quantize(tiny_model("gpt2"), "int8", CPU)
