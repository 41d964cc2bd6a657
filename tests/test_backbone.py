"""The frozen model: what identifies it, which composition it allows, and what is refused."""

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFWriter, TokenType
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from softprompt.backbone import Backbone, convert_gguf, hash_folder, hash_tensors, hash_tokenizer, pick_device
from softprompt.batch import Example, collate
from softprompt.composition import concatenate, shared_prefix
from softprompt.decoder import written_out
from softprompt.encoder_decoder import encode_and_decode
from softprompt.errors import UserError
from softprompt.packages import file_sha256
from tests.tiny import save_tiny, tiny_backbone, tiny_model, tiny_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_causal_model_shares_the_prefix() -> None:
    base = tiny_backbone("gpt2")
    assert base.deviation(shared_prefix) < 1e-5
    assert base.composition is shared_prefix


def test_a_causal_model_in_bfloat16_shares_the_prefix() -> None:
    for kind, composition in (("llama", written_out), ("gpt2", shared_prefix)):
        base = Backbone.wrap(tiny_model(kind).bfloat16(), tiny_tokenizer())
        assert base.deviation(composition) < 0.15
        assert base.composition is composition


def test_a_model_without_keys_and_values_does_not() -> None:
    base = tiny_backbone("mamba")
    assert base.deviation(shared_prefix) == float("inf")
    assert base.composition is concatenate


class Forgetful(GPT2LMHeadModel):
    """Takes kept states and does not look at them."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("past_key_values") is not None:
            kwargs |= {"past_key_values": None, "attention_mask": None}
        return super().forward(*args, **kwargs)


def test_a_model_that_ignores_the_kept_states_does_not() -> None:
    config = tiny_model("gpt2").config
    assert isinstance(config, GPT2Config)
    base = Backbone.wrap(Forgetful(config), tiny_tokenizer())
    assert 0.5 < base.deviation(shared_prefix) < float("inf")
    assert base.composition is concatenate


class Crowded(GPT2LMHeadModel):
    """Takes a mean over the rows."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits - output.logits.mean(0, keepdim=True) / 2
        return output


class Padded(GPT2LMHeadModel):
    """Counts the columns, padding included."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * kwargs["attention_mask"].shape[1]
        return output


class Partial(GPT2LMHeadModel):
    """Does with tokens what it leaves out with vectors."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * (2 if kwargs.get("input_ids") is not None else 1)
        return output


class Wordy(GPT2LMHeadModel):
    """Takes tokens and no vectors."""

    def forward(self, input_ids: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        return super().forward(input_ids, attention_mask=attention_mask, **kwargs)


class Deaf(GPT2LMHeadModel):
    """Says the same whatever it is told."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = torch.zeros_like(output.logits)
        return output


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        (Crowded, "what it says of a row depends on the row's padding or neighbours"),
        (Padded, "what it says of a row depends on the row's padding or neighbours"),
        (Partial, "what it says of vectors is not what it says of the tokens that they stand for"),
        (Wordy, "it cannot be run on a prompt before its input: .*input_ids"),
        (Deaf, "it says the same with any prompt, or no numbers at all"),
    ],
)
def test_a_model_for_which_prompts_mean_nothing_is_refused(kind: type[GPT2LMHeadModel], fault: str) -> None:
    config = tiny_model("gpt2").config
    assert isinstance(config, GPT2Config)
    base = Backbone.wrap(kind(config), tiny_tokenizer())
    with pytest.raises(UserError, match=f"{kind.__name__} cannot be used with soft prompts: {fault}.*; choose a caus"):
        _ = base.composition


@pytest.mark.parametrize("convert", [PreTrainedModel.float, PreTrainedModel.bfloat16])
def test_a_bert_looks_ahead_and_is_refused(convert: Callable[[PreTrainedModel], PreTrainedModel]) -> None:
    base = Backbone.wrap(convert(tiny_model("bert")), tiny_tokenizer())
    with pytest.raises(UserError, match=r"BertLMHeadModel .* it looks ahead, .* \(by 0\.\d+ of what a prompt changes"):
        _ = base.composition


def test_a_decoder_that_nothing_starts_is_refused() -> None:
    base = tiny_backbone("t5", decoder_start_token_id=None)
    with pytest.raises(UserError, match=r"T5ForConditionalGeneration .* names its decoder_start_token_id"):
        _ = base.composition


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_an_encoder_decoder_is_loaded_as_one(tmp_path: Path, kind: str, precision: str) -> None:
    save_tiny(tmp_path, kind)
    base = Backbone.load(tmp_path, precision=precision, device="cpu")
    assert base.is_encoder_decoder
    assert base.composition is encode_and_decode
    assert base.branches


def test_a_prompt_after_the_first_token_is_one_between_it_and_the_others() -> None:
    """The formula with the token's embedding before the prompt, on rows that come without it."""
    base = Backbone.wrap(tiny_model(), tiny_tokenizer(begin=True))
    placed = base.placed("after_bos")
    assert base.placed("start") is base
    assert placed.placed("after_bos") is placed
    assert placed.placed("start") == base
    prompt = 0.3 * torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    row = torch.tensor([[1, 5, 6, 7]])
    embedded = base.model.get_input_embeddings()(row)[0]
    expected = base.model(inputs_embeds=torch.cat([embedded[:1], prompt, embedded[1:]])[None]).logits[0, -1:]
    batch = collate([Example((5, 6, 7), (300,))], [0], pad=0, device=torch.device("cpu"))
    torch.testing.assert_close(placed.composition(base.model, [prompt], batch), expected, rtol=1e-4, atol=1e-5)
    without = placed.composition(base.model, [prompt[:0]], batch)
    torch.testing.assert_close(without, base.model(row).logits[0, -1:], rtol=1e-4, atol=1e-5)
    assert placed.composition.name == base.composition.name


@pytest.mark.parametrize("frame", [{}, {"end": True}])
def test_a_place_after_a_token_that_is_not_there_is_refused(frame: dict[str, bool]) -> None:
    base = Backbone.wrap(tiny_model(), tiny_tokenizer(**frame))
    with pytest.raises(UserError, match="prompt_position: after_bos, but the model's tokenizer puts no begin-of-seq"):
        base.placed("after_bos")


def test_what_is_loaded_is_frozen_and_identified(folder: Path) -> None:
    base = Backbone.load(folder, precision="float32", device="cpu")
    assert base.weights_sha256 == hash_folder(folder)
    assert base.tokenizer_sha256 == hash_tokenizer(tiny_tokenizer())
    assert not base.model.training
    assert not any(weight.requires_grad for weight in base.model.parameters())
    assert base.reference == {"kind": "local", "path": str(folder)}
    assert base.hidden_size == 32
    assert base.embeddings.shape == (len(tiny_tokenizer()), 32)
    assert base.device == torch.device("cpu")


def test_the_identity_does_not_depend_on_the_precision(folder: Path) -> None:
    wide, narrow = (Backbone.load(folder, precision=p, device="cpu") for p in ("float32", "bfloat16"))
    assert narrow.model.dtype == torch.bfloat16
    assert wide.weights_sha256 == narrow.weights_sha256


def test_the_hash_does_not_depend_on_how_the_weights_are_cut_into_files(folder: Path, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert hash_folder(tmp_path / "sharded") == hash_folder(folder)


def test_one_flipped_weight_is_another_model(folder: Path) -> None:
    before = hash_folder(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][7] *= -1
    save_file(tensors, file, metadata={"format": "pt"})
    assert hash_folder(folder) != before


def test_the_hash_tells_names_types_and_shapes_apart() -> None:
    zeros = torch.zeros(4)
    variants = [[("a", zeros)], [("b", zeros)], [("a", zeros.view(2, 2))], [("a", torch.zeros(4, dtype=torch.int32))]]
    assert len({hash_tensors(named) for named in variants}) == 4
    assert hash_tensors([("a", torch.zeros(2, 2).T)]) == hash_tensors([("a", torch.zeros(2, 2))])
    assert hash_tensors([("a", torch.tensor(1.0, dtype=torch.bfloat16))])  # a scalar has no last dimension to view


def test_the_weights_in_memory_are_hashed_as_they_are() -> None:
    base = tiny_backbone()
    assert base.weights_in_memory_sha256() == base.weights_sha256 == tiny_backbone().weights_sha256
    with torch.no_grad():
        base.embeddings[3, 4] += 1
    assert base.weights_in_memory_sha256() != base.weights_sha256


def test_the_tokenizer_is_the_same_after_it_was_used() -> None:
    tokenizer = tiny_tokenizer()
    before = hash_tokenizer(tokenizer)
    tokenizer(["a film", "a"], padding=True, truncation=True, max_length=1)
    assert tokenizer.backend_tokenizer.truncation is not None
    assert hash_tokenizer(tokenizer) == before


def test_another_tokenizer_hashes_differently() -> None:
    added = tiny_tokenizer()
    added.add_tokens(["unseen"])
    others = [tiny_tokenizer(), tiny_tokenizer(begin=True), tiny_tokenizer(eos=False), added]
    assert len({hash_tokenizer(tokenizer) for tokenizer in others}) == 4


def test_auto_is_a_device_that_is_there() -> None:
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("device", ["cuda:99", *([] if torch.cuda.is_available() else ["cuda"])])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(UserError, match=f"{device} is not there, this machine has {torch.cuda.device_count()} CUDA"):
        pick_device(device)


def test_a_device_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UserError, match="'warp' is no device"):
        pick_device("warp")


def test_a_folder_without_safetensors_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"holds no model\.safetensors"):
        Backbone.load(folder)


def test_weights_that_are_not_loaded_are_not_hashed(folder: Path) -> None:
    before = hash_folder(folder)
    save_file({"model.norm.weight": torch.zeros(32)}, folder / "a-backup.safetensors")
    assert hash_folder(folder) == before


def test_an_adapter_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds adapter_config\.json, an adapter for another model"):
        Backbone.load(folder)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 7}', '{"weight_map": {"a": "absent.safetensors"}}'])
def test_a_damaged_index_is_refused(folder: Path, content: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match="its weights cannot be read"):
        Backbone.load(folder)


def test_weights_that_are_missing_are_not_made_up(folder: Path) -> None:
    file = folder / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if k != "lm_head.weight"}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 of its tensors are missing, as lm_head\.weight; give the whole model"):
        Backbone.load(folder, device="cpu")


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    save_file(load_file(file) | {"lm_head.weight": torch.zeros(3, 3)}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="cannot be loaded as a language model"):
        Backbone.load(folder, device="cpu")


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    "changes", [{"hidden_size": "wide"}, {"hidden_size": 16}, {"hidden_act": "none"}, {"num_attention_heads": 0}]
)
def test_a_config_that_is_wrong_is_refused(folder: Path, changes: dict[str, Any]) -> None:
    edit_config(folder, **changes)
    with pytest.raises(UserError, match="cannot be loaded as a language model"):
        Backbone.load(folder, device="cpu")


def test_a_config_cannot_name_other_weights(folder: Path) -> None:
    save_file(load_file(folder / "model.safetensors"), folder / "other.safetensors", metadata={"format": "pt"})
    edit_config(folder, transformers_weights="other.safetensors")
    with pytest.raises(UserError, match=r"transformers_weights in config\.json names another file"):
        Backbone.load(folder, device="cpu")


def test_code_of_a_model_is_not_even_asked_about(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "own.py").write_text("raise SystemExit('the code of the model was run')")
    edit_config(folder, model_type="own", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"})
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    with pytest.raises(UserError, match="contains custom code which must be executed"):
        Backbone.load(folder, device="cpu")
    assert sys.stdin.read() == "y\n"


def test_a_model_without_fused_attention_is_loaded_off_the_cpu(folder: Path) -> None:
    tiny_model("gemma2").save_pretrained(folder)
    assert Backbone.load(folder, device="meta").model.config.model_type == "gemma2"


def test_padding_is_a_token_that_every_table_has() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<beyond the table>"})
    base = Backbone.wrap(tiny_model(), tokenizer)
    assert base.tokenizer.pad_token_id >= len(base.embeddings) > base.pad


def test_a_damaged_file_is_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="its weights cannot be read"):
        Backbone.load(folder)


def test_a_folder_without_a_config_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="cannot be loaded as a language model"):
        Backbone.load(folder, device="cpu")


_GGUF = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attn_output"}
_GGUF |= {f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"}
_GGUF |= {f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")}


def write_gguf(path: Path, *, seed: int = 0, without: str = "") -> None:
    """The tiny Llama as a GGUF file in float32, as llama.cpp writes it, without one tensor if need be."""
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    add_tokenizer(writer)
    for name, tensor in tiny_model(seed=seed).state_dict().items():
        if name != without:
            add_tensor(writer, name.removeprefix("model.").removesuffix(".weight"), tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer: GGUFWriter) -> None:
    tokenizer = tiny_tokenizer()
    vocabulary = tokenizer.get_vocab()
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.__getitem__))
    writer.add_token_types([TokenType.CONTROL if n < 3 else TokenType.NORMAL for n in range(len(vocabulary))])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)


def add_tensor(writer: GGUFWriter, name: str, tensor: Tensor) -> None:
    new = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}.get(name, name)
    if new.startswith("layers."):
        _, layer, part = new.split(".", 2)
        new = f"blk.{layer}.{_GGUF[part]}"
    if new.endswith(("attn_q", "attn_k")):  # llama.cpp keeps the two halves of a rotation side by side
        heads = 4 if new.endswith("q") else 2
        tensor = tensor.view(heads, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
    writer.add_tensor(f"{new}.weight", tensor.contiguous().numpy())


def test_a_gguf_file_is_converted_once(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    sha256 = file_sha256(file)
    folder = convert_gguf(file, sha256=sha256, cache=tmp_path / "cache")
    base = Backbone.load(folder, precision="float32", device="cpu")
    expected = tiny_model()
    tokens = torch.tensor([[5, 6, 7, 300]])
    torch.testing.assert_close(base.model(tokens).logits, expected(tokens).logits)
    text = "Review: the film is great.\nSentiment:"
    assert base.tokenizer(text)["input_ids"][-8:] == tiny_tokenizer()(text)["input_ids"][-8:]

    file.unlink()  # the kept copy is enough
    assert convert_gguf(file, sha256=sha256, cache=tmp_path / "cache") == folder


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", None),
        ("model.safetensors", b"cut short"),
        ("model-2.safetensors", b"one too many"),
        ("converted.json", None),
        ("converted.json", b"{"),
        ("converted.json", b"7"),
        ("config.json", None),
        ("tokenizer.json", b"{}"),
        ("tokenizer_config.json", None),
    ],
)
def test_a_kept_conversion_that_was_harmed_is_made_anew(tmp_path: Path, name: str, content: bytes | None) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    sha256 = file_sha256(file)
    folder = convert_gguf(file, sha256=sha256, cache=tmp_path / "cache")
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    assert convert_gguf(file, sha256=sha256, cache=tmp_path / "cache") == folder
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("size", [0, 200, 5000])
def test_what_is_no_whole_gguf_file_is_refused(tmp_path: Path, size: int) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    file.write_bytes(file.read_bytes()[:size] or b"no GGUF at all")
    with pytest.raises(UserError, match=r"tiny\.gguf: cannot be read as the GGUF file of a language model"):
        convert_gguf(file, sha256=file_sha256(file), cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_gguf_file_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", without="model.norm.weight")
    with pytest.raises(UserError, match=r"tiny\.gguf: .* are missing"):
        convert_gguf(tmp_path / "tiny.gguf", sha256="0" * 64, cache=tmp_path / "cache")


def test_a_disk_that_is_full_is_told_with_its_folder(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    script = f"""
import resource
from pathlib import Path
from softprompt.backbone import convert_gguf
from softprompt.errors import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    convert_gguf(Path({str(tmp_path / "tiny.gguf")!r}), sha256="0" * 64, cache=Path({str(tmp_path / "cache")!r}))
except UserError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert f"{tmp_path / 'cache' / 'weights'}: cannot be written" in done.stdout, done.stderr
    assert "SOFTPROMPT_CACHE" in done.stdout
    assert not list((tmp_path / "cache" / "weights").iterdir())
