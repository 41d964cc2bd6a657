"""The artifact: what is written is what is read, PEFT opens it, and nothing damaged or foreign passes."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file

from softprompt.batch import Example, collate
from softprompt.errors import UserError
from softprompt.packages import file_sha256
from softprompt.prompt import SoftPrompt
from tests.tiny import tiny_backbone, tiny_model

SHAPES = {"prompt_tuning": (5, 32), "prefix_tuning": (2, 2, 2, 5, 8)}
SMALLEST = {"prompt_tuning": (1, 2), "prefix_tuning": (1, 2, 1, 1, 2)}


def draw_vectors(*shape: int) -> torch.Tensor:
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def make_prompt(**changes: Any) -> SoftPrompt:
    backbone = tiny_backbone()
    prompt = SoftPrompt(
        vectors=draw_vectors(5, 32),
        template="Review: {text}\nSentiment:",
        words={"negative": " negative", "positive": " très bien"},
        max_tokens=48,
        weights_sha256=backbone.weights_sha256,
        tokenizer_sha256=backbone.tokenizer_sha256,
        base={"kind": "hub", "id": "somebody/tiny", "revision": "abc"},
        precision="float32",
        provenance={"seed": 3, "validation": {"accuracy": 0.5}},
    )
    return replace(prompt, **changes)


@pytest.fixture(params=SHAPES)
def method(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def prompt(method: str) -> SoftPrompt:
    """One of each method."""
    return make_prompt(vectors=draw_vectors(*SHAPES[method]))


def test_what_is_read_is_what_was_written(tmp_path: Path, prompt: SoftPrompt, method: str) -> None:
    assert prompt.save(tmp_path / "a" / "prompt") == tmp_path / "a" / "prompt"
    read = SoftPrompt.load(tmp_path / "a" / "prompt")
    assert torch.equal(read.vectors, prompt.vectors)
    assert read.vectors.dtype == torch.float32
    assert replace(read, vectors=prompt.vectors) == prompt
    assert (read.length, read.method) == (5, method)
    read.require(tiny_backbone())


def test_a_prompt_for_free_text_survives_the_folder(tmp_path: Path) -> None:
    prompt = make_prompt(words={}, before=" ", max_new_tokens=64)
    read = SoftPrompt.load(prompt.save(tmp_path / "prompt"))
    assert torch.equal(read.vectors, prompt.vectors)
    assert replace(read, vectors=prompt.vectors) == prompt
    rewrite(tmp_path / "prompt", max_new_tokens=None)
    with pytest.raises(UserError, match=r"softprompt\.json lacks max_new_tokens"):
        SoftPrompt.load(tmp_path / "prompt")


def test_a_folder_holds_three_files_of_kilobytes(tmp_path: Path, prompt: SoftPrompt) -> None:
    files = list(prompt.save(tmp_path / "prompt").iterdir())
    assert {f.name for f in files} == {"adapter_config.json", "adapter_model.safetensors", "softprompt.json"}
    assert sum(f.stat().st_size for f in files) < 5000


def test_saving_again_replaces_the_folder(tmp_path: Path, prompt: SoftPrompt) -> None:
    prompt.save(tmp_path / "prompt")
    (tmp_path / "prompt" / "stale").write_text("from before")
    make_prompt(vectors=torch.ones(2, 32)).save(tmp_path / "prompt")
    assert SoftPrompt.load(tmp_path / "prompt").length == 2
    assert [f.name for f in tmp_path.iterdir()] == ["prompt"]
    assert not (tmp_path / "prompt" / "stale").exists()


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    assert SoftPrompt.load(make_prompt().save(tmp_path)).length == 5


def test_what_is_no_soft_prompt_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis: holds files and is no soft prompt, so it is not replaced"):
        make_prompt().save(tmp_path / "thesis")
    with pytest.raises(UserError, match=r"chapter: is a file, and a soft prompt is a folder"):
        make_prompt().save(tmp_path / "thesis" / "chapter")
    assert [f.read_text() for f in tmp_path.rglob("*") if f.is_file()] == ["years of work"]


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    make_prompt().save(tmp_path / "prompt")
    with pytest.raises(TypeError):
        make_prompt(provenance={"not json": object()}).save(tmp_path / "prompt")
    assert [f.name for f in tmp_path.iterdir()] == ["prompt"]
    assert SoftPrompt.load(tmp_path / "prompt").provenance == make_prompt().provenance


def test_the_vectors_are_written_in_float32(tmp_path: Path, prompt: SoftPrompt) -> None:
    prompt = replace(prompt, vectors=prompt.vectors.to(torch.bfloat16).mT.contiguous().mT)
    read = SoftPrompt.load(prompt.save(tmp_path / "prompt"))
    assert torch.equal(read.vectors, prompt.vectors.float())


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # PEFT, about its own look
@pytest.mark.parametrize(
    ("kind", "shape"),
    [("llama", (5, 32)), ("llama", (2, 2, 2, 5, 8)), ("gpt2", (2, 2, 4, 5, 8)), ("falcon", (2, 2, 1, 5, 8))],
)
def test_peft_opens_the_folder_and_computes_the_same(tmp_path: Path, kind: str, shape: tuple[int, ...]) -> None:
    prompt, backbone = make_prompt(vectors=draw_vectors(*shape)), tiny_backbone(kind)
    peft = PeftModel.from_pretrained(tiny_model(kind), str(prompt.save(tmp_path / "prompt"))).eval()
    examples = [Example((5, 6, 7, 8), (300,)), Example((9, 10), (301,))]
    batch = collate(examples, [0, 0], pad=0, device=torch.device("cpu"))
    mask = (torch.arange(4) < batch.lengths[:, None]).long()
    with torch.inference_mode():
        ours = backbone.composition(backbone.model, [prompt.vectors], batch)
        theirs = peft(input_ids=batch.tokens, attention_mask=mask).logits[:, -4:][batch.rows, batch.columns]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_peft_refuses_a_prompt_that_does_not_stand_at_the_start(tmp_path: Path) -> None:
    """It would put it there, and compute something else."""
    folder = make_prompt(position="after_bos").save(tmp_path / "prompt")
    assert SoftPrompt.load(folder).position == "after_bos"
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json'"):
        PeftModel.from_pretrained(tiny_model(), str(folder))


def test_another_model_is_refused_with_both_hashes(prompt: SoftPrompt) -> None:
    other = tiny_backbone(seed=1)
    with pytest.raises(UserError) as refusal:
        prompt.require(other)
    assert prompt.weights_sha256 in str(refusal.value)
    assert other.weights_sha256 in str(refusal.value)


def test_another_tokenizer_is_refused() -> None:
    with pytest.raises(UserError, match=f"tokenizer have sha256 {'0' * 64}"):
        make_prompt(tokenizer_sha256="0" * 64).require(tiny_backbone())


def test_a_flipped_bit_is_refused(tmp_path: Path, prompt: SoftPrompt) -> None:
    file = prompt.save(tmp_path / "prompt") / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="is damaged"):
        SoftPrompt.load(tmp_path / "prompt")


def test_any_changed_byte_of_the_vectors_is_refused(tmp_path: Path, method: str) -> None:
    file = make_prompt(vectors=torch.ones(SMALLEST[method])).save(tmp_path / "prompt") / "adapter_model.safetensors"
    content = file.read_bytes()
    for n in range(len(content)):
        file.write_bytes(content[:n] + bytes([content[n] ^ 0x55]) + content[n + 1 :])
        with pytest.raises(UserError, match="is damaged"):
            SoftPrompt.load(tmp_path / "prompt")


@pytest.mark.parametrize("flip", [1, 0x20, 0x55])
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "softprompt.json"])
def test_whatever_byte_is_changed_what_is_read_is_sound(tmp_path: Path, name: str, flip: int, method: str) -> None:
    """As the one who changes it may also write the new hash."""
    folder = make_prompt(vectors=torch.ones(SMALLEST[method])).save(tmp_path / "prompt")
    content, manifest = (folder / name).read_bytes(), (folder / "softprompt.json").read_text()
    for n in range(0, len(content), 1 if name.startswith("adapter") else 5):
        (folder / name).write_bytes(content[:n] + bytes([content[n] ^ flip]) + content[n + 1 :])
        if name.startswith("adapter"):
            (folder / "softprompt.json").write_text(manifest)
            rewrite(folder, vectors_sha256=file_sha256(folder / name))
        try:
            read = SoftPrompt.load(folder)
        except UserError:
            continue
        assert read.vectors.shape == SMALLEST[method]
        assert read.vectors.isfinite().all()


@pytest.mark.parametrize(
    ("vectors", "told"),
    [
        (torch.full((5, 32), float("nan")), "holds numbers that are not finite"),
        (torch.full((5, 32), float("inf")), "holds numbers that are not finite"),
        (torch.ones(5, 32, 1), r"must be F32 of shape \[5, 32\], found F32 of \[5, 32, 1\]"),
        (torch.ones(160), r"must be F32 of shape \[5, 32\], found F32 of \[160\]"),
        (torch.ones(4000, 32), r"must be F32 of shape \[5, 32\], found F32 of \[4000, 32\]"),
        (torch.ones(5, 32, dtype=torch.float64), r"must be F32 of shape \[5, 32\], found F64"),
    ],
)
@pytest.mark.parametrize("shape", [(5, 32), (1, 2, 2, 5, 8)])  # both are stored as five rows of 32
def test_vectors_that_are_none_are_refused(
    tmp_path: Path, shape: tuple[int, ...], vectors: torch.Tensor, told: str
) -> None:
    folder = make_prompt(vectors=draw_vectors(*shape)).save(tmp_path / "prompt")
    save_file({"prompt_embeddings": vectors}, folder / "adapter_model.safetensors")
    rewrite(folder, vectors_sha256=file_sha256(folder / "adapter_model.safetensors"))
    with pytest.raises(UserError, match=told):
        SoftPrompt.load(folder)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"max_tokens": "48"}, "max_tokens must be int, found '48'"),
        ({"max_tokens": True}, "max_tokens must be int, found True"),
        ({"max_tokens": 0}, "max_tokens must be positive, found 0"),
        ({"shape": [0, 32]}, r"shape must hold whole numbers above zero, found \[0, 32\]"),
        ({"shape": [5.0, 32]}, r"shape must hold whole numbers above zero, found \[5.0, 32\]"),
        ({"shape": ["5", 32]}, r"shape must hold whole numbers above zero, found \['5', 32\]"),
        ({"shape": [5, 32, 1]}, r"shape must have 2 dimensions, found \[5, 32, 1\]"),
        ({"shape": []}, r"shape must have 2 dimensions, found \[\]"),
        ({"shape": 160}, "shape must be list, found 160"),
        ({"method": "lora"}, "method must be one of prompt_tuning, prefix_tuning, found 'lora'"),
        ({"method": "prefix_tuning"}, r"shape must have 5 dimensions, found \[5, 32\]"),
        ({"method": "prefix_tuning", "shape": [5, 1, 2, 2, 8]}, "shape must have keys and values, 2, found"),
        ({"words": []}, r"words must be dict, found \[\]"),
        ({"words": {}}, "max_new_tokens must be 0 beside words, else positive, found 0"),
        ({"max_new_tokens": 9}, "max_new_tokens must be 0 beside words, else positive, found 9"),
        ({"words": {}, "max_new_tokens": -1}, "max_new_tokens must be 0 beside words, else positive, found -1"),
        ({"before": 7}, "before must be str"),
        ({"words": {"negative": 7}}, "words must map labels to text"),
        ({"precision": "int2"}, "precision must be one of bfloat16, float32, int8, int4, found 'int2'"),
        ({"position": "end"}, "position must be one of start, after_bos, found 'end'"),
        ({"encoder_decoder": 1}, "encoder_decoder must be bool, found 1"),
        ({"base": "somewhere"}, "base must be dict"),
        ({"template": 7}, "template must be str"),
        ({"template": "{text:>999999999}"}, r"template: a placeholder must be a plain column name, got \{text:>9999"),
        ({"template": "{text.__class__}"}, "template: a placeholder must be a plain column name"),
        ({"template": "{text"}, "template: .*write {{ and }} for braces"),
    ],
)
def test_a_field_that_is_wrong_is_named(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    folder = make_prompt().save(tmp_path / "prompt")
    rewrite(folder, **changes)
    with pytest.raises(UserError, match=rf"softprompt\.json: {told}"):
        SoftPrompt.load(folder)


def test_a_field_that_nobody_knows_is_not_taken_in(tmp_path: Path) -> None:
    folder = make_prompt().save(tmp_path / "prompt")
    rewrite(folder, vectors=[[0.0]], seed=3)
    assert torch.equal(SoftPrompt.load(folder).vectors, make_prompt().vectors)


@pytest.mark.parametrize(("name", "size"), [("softprompt.json", 1 << 21), ("adapter_model.safetensors", 1 << 31)])
def test_a_huge_file_is_not_read(tmp_path: Path, name: str, size: int) -> None:
    folder = make_prompt().save(tmp_path / "prompt")
    with (folder / name).open("r+b") as file:
        file.truncate(size)
    with pytest.raises(UserError, match=f"{name} has {size} bytes, and [0-9]+ are the most; fetch it again"):
        SoftPrompt.load(folder)


@pytest.mark.parametrize("shape", [[2, 2, 1, 5, 16], [2, 2, 2, 10, 4], [1, 2, 2, 5, 16], [10**30, 2, 2, 5, 8]])
def test_a_prefix_of_another_shape_is_refused(tmp_path: Path, shape: list[int]) -> None:
    """Where it has as many numbers, by the model; where it has not, by the file."""
    folder = make_prompt(vectors=draw_vectors(2, 2, 2, 5, 8)).save(tmp_path / "prompt")
    rewrite(folder, shape=shape)
    with pytest.raises(
        UserError, match=r"the prefix has the shape .* the model takes \[2, 2, 2, |must be F32 of shape"
    ):
        SoftPrompt.load(folder).require(tiny_backbone())


def test_a_prefix_is_refused_where_the_model_takes_none() -> None:
    mamba = tiny_backbone("mamba")
    hashes = {"weights_sha256": mamba.weights_sha256, "tokenizer_sha256": mamba.tokenizer_sha256}
    with pytest.raises(UserError, match="prefix_tuning needs a model that takes keys and values"):
        make_prompt(vectors=draw_vectors(2, 2, 2, 5, 8), **hashes).require(mamba)


def test_vectors_that_the_model_cannot_take_are_refused() -> None:
    with pytest.raises(UserError, match="vectors have 16 dimensions, the model's embeddings have 32"):
        make_prompt(vectors=torch.ones(5, 16)).require(tiny_backbone())
    make_prompt(max_tokens=251).require(tiny_backbone())
    with pytest.raises(UserError, match="5 vectors and max_tokens=252 exceed the model's 256 positions"):
        make_prompt(max_tokens=252).require(tiny_backbone())


def test_a_disk_that_is_full_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    script = f"""
import resource
from softprompt.errors import UserError
from tests.test_prompt import make_prompt
resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
try:
    make_prompt().save({str(tmp_path / "prompt")!r})
except UserError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert f"{tmp_path}: cannot be written" in done.stdout, done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "softprompt.json"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    (make_prompt().save(tmp_path / "prompt") / name).unlink()
    with pytest.raises(UserError, match=f"is no soft prompt, {name} is missing"):
        SoftPrompt.load(tmp_path / "prompt")


def rewrite(folder: Path, **changes: Any) -> None:
    file = folder / "softprompt.json"
    manifest = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in manifest.items() if v is not None}))


def test_another_format_is_refused(tmp_path: Path) -> None:
    rewrite(make_prompt().save(tmp_path / "prompt"), format=2)
    with pytest.raises(UserError, match="is of format 2, this version reads format 1"):
        SoftPrompt.load(tmp_path / "prompt")


@pytest.mark.parametrize("key", ["vectors_sha256", "template", "weights_sha256", "method", "shape"])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    rewrite(make_prompt().save(tmp_path / "prompt"), **{key: None})
    with pytest.raises(UserError, match=f"softprompt.json lacks {key}"):
        SoftPrompt.load(tmp_path / "prompt")


@pytest.mark.parametrize("text", ["{", "[]", "7", "[" * 100_000, '{"template": "\\ud800"}'])
def test_what_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    (make_prompt().save(tmp_path / "prompt") / "softprompt.json").write_text(text)
    with pytest.raises(UserError, match=r"softprompt\.json"):
        SoftPrompt.load(tmp_path / "prompt")


def test_a_file_without_the_tensor_is_refused(tmp_path: Path) -> None:
    folder = make_prompt().save(tmp_path / "prompt")
    save_file({"other": torch.zeros(2, 2)}, folder / "adapter_model.safetensors")
    rewrite(folder, vectors_sha256=file_sha256(folder / "adapter_model.safetensors"))
    with pytest.raises(UserError, match="no safetensors file with a tensor prompt_embeddings"):
        SoftPrompt.load(folder)
