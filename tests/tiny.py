"""A tokenizer, models and an experiment small enough to build in every test: no download, always the same."""

import csv
import random
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from softprompt.backbone import Backbone
from softprompt.spec import ExperimentSpec, validate_experiment

CORPUS = (
    "Review: the film is a great and moving story, and the cast is wonderful.\nSentiment: positive",
    "Review: the plot is dull, the jokes are old and the film is a waste of time.\nSentiment: negative",
    "Decide whether this movie review is positive or negative.",
    "A bad film, a good film, a film that is neither good nor bad.",
    "Question: is the answer yes or no?\nAnswer: yes",
) * 8
SPECIAL = ("<pad>", "<s>", "</s>")


def tiny_tokenizer(*, begin: bool = False, end: bool = False, eos: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 384 tokens at most, as GPT-2's but for its size; every text can be encoded.

    Args:
        begin: Put `<s>` before every text, as Llama's does.
        end: Put `</s>` behind every text, as T5's does.
        eos: Whether the tokenizer says that `</s>` ends a sequence.
    """
    tokenizer = Tokenizer.from_str(_trained())
    if begin or end:
        single = f"{'<s> ' if begin else ''}$A{' </s>' if end else ''}"
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[(token, SPECIAL.index(token)) for token in ("<s>", "</s>")]
        )
    names = {"bos_token": "<s>", "pad_token": "<pad>"} | ({"eos_token": "</s>"} if eos else {})
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    text: str = tokenizer.to_str()
    return text


# Two threads gain nothing on matrices this small, and lose a factor of 30 where another process wants the cores.
torch.set_num_threads(1)

_COMMON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.2}
_GROUPED = _COMMON | {"num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 256}
_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "mistral": _GROUPED | {"sliding_window": None},
    "granite": _GROUPED,  # a llama with factors
    "qwen2": _GROUPED,
    "qwen3": _GROUPED | {"head_dim": 8},
    "gemma": _GROUPED | {"head_dim": 8},
    "gemma2": _GROUPED | {"head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.2},
    "opt": {"hidden_size": 32, "word_embed_proj_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"ffn_dim": 64, "max_position_embeddings": 256, "init_std": 0.2},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2},
    "falcon": _COMMON | {"multi_query": True, "new_decoder_architecture": False},
    "gemma3_text": _GROUPED
    | {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "bert": _COMMON | {"intermediate_size": 64, "max_position_embeddings": 256},  # looks ahead
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    "bart": {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
    | {"decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "init_std": 0.2}
    | {"max_position_embeddings": 256, "decoder_start_token_id": 2, "forced_eos_token_id": None},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "initializer_range": 0.2},
}
_FRAMES = {"t5": {"end": True}, "bart": {"begin": True, "end": True}}
"""What the tokenizers of these put around a text."""


def tiny_model(kind: str = "llama", *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A language model of two layers, 32 wide, with random weights and the tiny tokenizer's vocabulary.

    Args:
        kind: One of transformers' model types that `_CONFIGS` names; llama has grouped queries.
        seed: Of the weights.
        overrides: Other values of the model's config.
    """
    tokenizer = tiny_tokenizer()
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    settings = {"vocab_size": len(tokenizer), "attn_implementation": "eager"} | special | _CONFIGS[kind] | overrides
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(kind, **settings)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model: PreTrainedModel = auto.from_config(config)
    model.eval()
    return model


def tiny_backbone(kind: str = "llama", *, seed: int = 0, **overrides: Any) -> Backbone:
    """A tiny model, frozen and identified."""
    return Backbone.wrap(tiny_model(kind, seed=seed, **overrides), tiny_tokenizer(**_FRAMES.get(kind, {})))


def save_tiny(folder: Path, kind: str = "llama", **frame: bool) -> None:
    """Write a tiny model with its tokenizer, which puts around a text what its kind wants or what `frame` says."""
    tiny_model(kind).save_pretrained(folder)
    tiny_tokenizer(**_FRAMES.get(kind, {}) | frame).save_pretrained(folder)


def tiny_experiment(folder: Path, **overrides: Any) -> ExperimentSpec:
    """An experiment on a tiny Llama and 240 rows of praise and blame, all of it in the folder.

    Four trials of at most 12 steps, scored after 3, 6 and 12; every kind of initialization is searched.

    Args:
        folder: Where the model and the rows are written.
        overrides: Parts of the experiment, as in its YAML, in place of these.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_tiny(folder / "model")
    write_rows(folder / "rows.csv")
    return validate_experiment(_tree(folder) | overrides, "tiny experiment")


def tiny_text_experiment(folder: Path, **overrides: Any) -> ExperimentSpec:
    """The same with a free text for every row in place of a label; one in twenty is longer than the limit."""
    start = {"length": 4, "initialization": "vocabulary", "learning_rate": 0.1}
    kinds = [{"kind": kind} for kind in ("uniform", "normal", "vocabulary")]
    parts = {
        "name": "tiny-summary",
        "template": "Review: {text}\nIn short:",
        "labels": {"kind": "text", "field": "short", "max_new_tokens": 8},
        "search": _tree(folder)["search"] | {"initialization": kinds, "start": [start]},
        "evaluation": {"instruction": "What does this review say, in short?\n\n"},
    }
    return tiny_experiment(folder, **parts | overrides)


def _tree(folder: Path) -> dict[str, Any]:
    training = {"steps": 12, "batch_size": 4, "max_tokens": 48, "schedule": "cosine", "warmup_steps": 1}
    kinds: list[dict[str, Any]] = [{"kind": kind} for kind in ("uniform", "normal", "vocabulary", "labels")]
    return {
        "name": "tiny-sentiment",
        "seed": 0,
        "model": {"kind": "local", "path": str(folder / "model")},
        "precision": "float32",
        "data": {"kind": "file", "path": str(folder / "rows.csv")},
        "template": "Review: {text}\nSentiment:",
        "labels": {"kind": "column", "field": "label", "words": {"negative": " negative", "positive": " positive"}},
        "splits": {"validation": 40, "test": 60},
        "training": training | {"weight_decay": 0.0, "clip_norm": 1.0},
        "search": {
            "length": {"low": 1, "high": 8, "log": True},
            "learning_rate": {"low": 0.01, "high": 0.3, "log": True},
            "initialization": [*kinds, {"kind": "text", "text": "Is this film good or bad?"}],
            "pruner": {"kind": "halving", "first_rung": 3, "factor": 2},
            "startup_trials": 2,
            "start": [{"length": 4, "initialization": "labels", "learning_rate": 0.1}],
        },
        "budget": {"trials": 4},
        "evaluation": {"instruction": "Is this review positive or negative?\n\n"},
        "execution": {"device": "cpu"},
    }


_MARKERS = {"positive": ("great", "wonderful", "good", "moving"), "negative": ("dull", "bad", "old", "waste")}
_PLAIN = ("film", "story", "plot", "cast", "jokes", "movie", "review", "time")

_SHORT = {"positive": "a great film", "negative": "dull"}
_LONG = "the film is great, the plot is dull, and the cast is wonderful"


def write_rows(path: Path, count: int = 240) -> None:
    """Rows whose label is said by two of their words, and a short text beside it; no two rows are the same."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text", "label", "short"])
        for n in range(count):
            label = "positive" if n % 2 else "negative"
            words = [*draw.choices(_MARKERS[label], k=2), *draw.choices(_PLAIN, k=draw.randint(1, 8)), str(n)]
            text = " ".join(draw.sample(words, len(words)))
            writer.writerow([text, label, _SHORT[label] if n % 20 else _LONG])
