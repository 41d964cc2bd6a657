"""Training speed on a model of 1 to 2 B parameters: the shapes of Llama 3.2 1B with random weights.

Runs on a GPU; the shape is a parameter, so that a test can run it small.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks import ours, peer
from benchmarks.start import Start, steady
from benchmarks.timing import in_turns
from softprompt.backbone import Backbone
from softprompt.batch import Example


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model and the batches that it is trained on."""

    config: dict[str, Any]
    """Of a Llama."""
    prompt: int = 20
    """P."""
    batch_size: int = 16
    """B."""
    inputs: int = 256
    """T, the same for every row."""


LLAMA_1B = Shape(
    config={
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    }
)


def measure(
    shape: Shape,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    *,
    rounds: int,
    steps: int,
    warm_up: int,
    peak: float,
) -> dict[str, Any]:
    """Input tokens a second of both sides by turns, and our share of the peak.

    Args:
        shape: What is trained.
        tokenizer: Any: it is not used, but a backbone has one.
        device: Where.
        rounds: Turns of each side.
        steps: Steps of a turn that are counted.
        warm_up: Steps before them that are not.
        peak: FLOP/s of the device in a matrix product.
    """
    backbone, base = Backbone.wrap(build(shape, device), tokenizer), build(shape, device)
    start, tokens = _start(shape, backbone), shape.inputs  # an example's
    return {
        "parameters": sum(p.numel() for p in base.parameters()),
        "P": shape.prompt,
        "B": shape.batch_size,
        "T": shape.inputs,
        **in_turns(
            rounds,
            lambda: tokens * ours.train(backbone, [start], steps, warm_up),
            lambda: tokens * peer.train(base, start, steps, warm_up),
        ),
        "matmul_share": ours.share_of_peak(backbone, start, steps, warm_up, peak),
    }


def build(shape: Shape, device: torch.device) -> PreTrainedModel:
    """A model with random bfloat16 weights."""
    with device:
        model: Any = AutoModelForCausalLM.from_config(LlamaConfig(**shape.config), dtype=torch.bfloat16)
    frozen: PreTrainedModel = model.eval()
    return frozen


def _start(shape: Shape, backbone: Backbone) -> Start:
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randint(len(backbone.embeddings), size, generator=generator)

    rows = draw(64 * shape.batch_size, shape.inputs + 1).tolist()
    examples = [Example(tuple(row[:-1]), (row[-1],)) for row in rows]
    prompt = backbone.embed(draw(shape.prompt).tolist()).cpu()
    return Start(prompt, examples, steady(batch_size=shape.batch_size))
