"""T5 and BART from the formula to the artifact: against plain forward passes of the models, and against PEFT."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor

import softprompt as sp
from softprompt.batch import Example, collate
from softprompt.data import prepare
from softprompt.encoder_decoder import encode_and_decode
from softprompt.inference import Classifier
from softprompt.passes import Work
from tests.tiny import save_tiny, tiny_backbone, tiny_experiment, tiny_model, tiny_text_experiment

KINDS = ["t5", "bart"]
SINGLE = [(300,), (301,), (302,)]
SHARING = [(300, 301), (300, 302, 303), (310, 301), (300, 302, 304), (311,), (310, 302, 303, 304)]

backbone = cache(tiny_backbone)


def draw_prompt(length: int) -> Tensor:
    return 0.3 * torch.randn(length, 32, generator=torch.Generator().manual_seed(0))


def draw_inputs(count: int) -> list[tuple[int, ...]]:
    random = np.random.default_rng(0)
    return [tuple(random.integers(3, 370, size=random.integers(1, 12)).tolist()) for _ in range(count)]


def say(kind: str, prompt: Tensor, row: Sequence[int], target: Sequence[int]) -> Tensor:
    """Logits `[len(target), V]` of the model's own forward pass on one row."""
    model = backbone(kind).model
    embeds = torch.cat([prompt, model.get_input_embeddings()(torch.tensor(row))])[None]
    start = {"t5": 0, "bart": 2}[kind]
    logits: Tensor = model(inputs_embeds=embeds, decoder_input_ids=torch.tensor([[start, *target[:-1]]])).logits
    return logits[0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_prompt_stands_before_the_encoders_input_and_the_target_is_decoded(kind: str) -> None:
    prompts = [draw_prompt(3), draw_prompt(6)]
    examples, owner = [Example((5, 6, 7), (300, 301)), Example((8,), (302,)), Example((9, 10), (4, 5, 6))], [0, 1, 1]
    batch = collate(examples, owner, pad=7, device=torch.device("cpu"))
    found = encode_and_decode(backbone(kind).model, prompts, batch)
    expected = [say(kind, prompts[k], e.inputs, e.target) for e, k in zip(examples, owner, strict=True)]
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("labels", [SINGLE, SHARING], ids=["single", "sharing"])
@pytest.mark.parametrize("length", [0, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_a_plain_loop(kind: str, length: int, labels: list[tuple[int, ...]]) -> None:
    prompt, inputs = draw_prompt(length), draw_inputs(36)
    scores = Classifier(backbone(kind), prompt, labels).score(inputs)
    with torch.inference_mode():
        for n, row in enumerate(inputs):
            said = [say(kind, prompt, row, label).log_softmax(1) for label in labels]
            logs = [
                sum(s[t, token].item() for t, token in enumerate(label)) for s, label in zip(said, labels, strict=True)
            ]
            np.testing.assert_allclose(scores.log_probabilities[n], logs, rtol=1e-4, atol=1e-4)
            legal = [s.argmax(1).tolist() == list(label) for s, label in zip(said, labels, strict=True)]
            assert scores.legal[n] == any(legal)


@pytest.mark.parametrize("kind", KINDS)
def test_many_labels_cost_one_pass_of_the_encoder_and_one_copy_of_its_keys(kind: str) -> None:
    """77 labels of three tokens with 11 beginnings, as an intent task has."""
    labels = [(300 + n % 11, 320 + n // 11, 340) for n in range(77)]
    inputs, base = draw_inputs(40), backbone(kind)
    assert base.branches
    encoder: Any = base.model.get_encoder()
    encoded: list[int] = []
    projected: list[int] = []
    (name,) = [
        n
        for n, _ in base.model.named_modules()
        if n.endswith(("1.layer.1.EncDecAttention.k", "decoder.layers.1.encoder_attn.k_proj"))
    ]
    hooks = [
        encoder.register_forward_hook(lambda *seen: encoded.append(len(seen[2].last_hidden_state))),
        base.model.get_submodule(name).register_forward_hook(lambda *seen: projected.append(len(seen[2]))),
    ]
    scores = Classifier(base, draw_prompt(5), labels).score(inputs)
    for hook in hooks:
        hook.remove()
    assert sum(encoded) == sum(projected) == 40
    with torch.inference_mode():
        said = say(kind, draw_prompt(5), inputs[3], labels[70]).log_softmax(1)
    expected = sum(said[t, token].item() for t, token in enumerate(labels[70]))
    assert scores.log_probabilities[3, 70] == pytest.approx(expected, rel=1e-4)


@pytest.fixture(params=KINDS)
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> sp.Workbench:
    experiment = tiny_experiment(tmp_path)
    save_tiny(tmp_path / "model", request.param)
    return sp.Workbench(experiment, prepare(experiment, tmp_path / "cache"))


def test_inputs_and_targets_are_framed_as_the_model_was_taught(bench: sp.Workbench) -> None:
    tokenizer = bench.backbone.tokenizer
    example, row = bench.examples[0], bench.data.split("train")[0]
    assert list(example.inputs) == tokenizer(f"Review: {row['text']}\nSentiment:")["input_ids"]
    assert list(example.target) == tokenizer(f" {row['label']}")["input_ids"]
    assert example.inputs[-1] == example.target[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("kind", KINDS)
def test_free_text_is_decoded_as_the_tokenizer_frames_it_and_measured_by_the_plain_formula(
    kind: str, tmp_path: Path
) -> None:
    experiment = tiny_text_experiment(tmp_path)
    save_tiny(tmp_path / "model", kind)
    bench = sp.Workbench(experiment, prepare(experiment, tmp_path / "cache"))
    texts = [row["label"] for row in bench.data.split("train")]
    framed = [bench.backbone.tokenizer(f" {text}")["input_ids"][:8] for text in texts]
    assert [list(e.target) for e in bench.examples] == framed
    prompt = sp.SoftPrompt.load(sp.tune(bench, PARAMS | {"initialization": "vocabulary"}).save(tmp_path / "prompt"))
    split = bench.split("test")
    targets, _ = bench.target.encode(split.answers)
    with torch.inference_mode():
        said = [
            say(kind, prompt.vectors, row, target).log_softmax(1).gather(1, torch.tensor(target)[:, None])
            for row, target in zip(split.inputs, targets, strict=True)
        ]
    assert sp.measure_prompt(bench, prompt).score == pytest.approx(-torch.cat(said).mean().item(), rel=1e-4)


PARAMS: dict[str, Any] = {"length": 4, "initialization": "labels", "learning_rate": 0.1}


def loss_of(bench: sp.Workbench, prompt: Tensor) -> float:
    """Of the training rows, in nats per target token."""
    work = Work([prompt.clone().requires_grad_()], [bench.examples], bench.loss)
    return bench.passes.run(bench.backbone, work).item()


def test_a_whole_experiment_runs_from_training_to_prediction(bench: sp.Workbench, tmp_path: Path) -> None:
    before = bench.backbone.weights_in_memory_sha256()
    prompt = sp.tune(bench, PARAMS)
    assert bench.backbone.weights_in_memory_sha256() == before
    assert loss_of(bench, prompt.vectors) < 0.98 * loss_of(bench, bench.start(PARAMS, seed=[0, 0]).prompt)
    read = sp.SoftPrompt.load(prompt.save(tmp_path / "prompt"))
    assert torch.equal(read.vectors, prompt.vectors)
    measured, rows = sp.measure_prompt(bench, read), bench.data.split("test")
    answers = sp.Predictor(bench.backbone, read).predict([{"text": row["text"]} for row in rows])
    assert [a.label == row["label"] for a, row in zip(answers, rows, strict=True)] == list(measured.correct)


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # PEFT, about its own look
def test_peft_opens_the_folder_and_computes_the_same(bench: sp.Workbench, tmp_path: Path) -> None:
    folder, base = sp.tune(bench, PARAMS).save(tmp_path / "prompt"), bench.backbone
    config = json.loads((folder / "adapter_config.json").read_text())
    found = config["task_type"], config["num_virtual_tokens"], config["num_transformer_submodules"]
    assert found == ("SEQ_2_SEQ_LM", 4, 2)
    peft = PeftModel.from_pretrained(tiny_model(base.model.config.model_type), str(folder)).eval()
    texts, target = ["Review: a great film\nSentiment:", "Review: dull\nSentiment:"], bench.target.labels["positive"]
    told = base.tokenizer(texts, padding=True, return_tensors="pt")
    decoded = torch.tensor([[base.model.generation_config.decoder_start_token_id, *target[:-1]]] * 2)
    inputs = base.tokenizer(texts)["input_ids"]
    batch = collate([Example(tuple(row), target) for row in inputs], [0, 0], pad=0, device=torch.device("cpu"))
    with torch.inference_mode():
        theirs = peft(told["input_ids"], told["attention_mask"], decoder_input_ids=decoded).logits
        ours = base.composition(base.model, [sp.SoftPrompt.load(folder).vectors], batch)
    torch.testing.assert_close(ours.view_as(theirs), theirs, rtol=1e-4, atol=2e-5)


def test_vectors_that_are_stored_for_another_kind_of_model_are_refused(bench: sp.Workbench, tmp_path: Path) -> None:
    manifest = sp.tune(bench, PARAMS).save(tmp_path / "prompt") / "softprompt.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"encoder_decoder": False}))
    with pytest.raises(sp.UserError, match=r"must be F32 of shape \[4, 32\], found F32 of \[8, 32\]"):
        sp.SoftPrompt.load(manifest.parent)
