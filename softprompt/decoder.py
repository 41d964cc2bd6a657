"""Shared prefix for gated decoders, their layers written out: the same numbers with less work around the matrices.

Most open decoders are built alike: RMS norm, rotary positions, grouped queries, a gated MLP. On a CPU, more than a
third of their own forward and backward pass goes into casts, copies and sums between the matrix products. Here prompts
and rows go through the same products in training, what stands between these is in few operations (`operations`), keys
and values are never repeated for the queries of a group, and the last layer asks for the predicting places alone.

    G groups of queries, one head of keys and values each   R queries of a group   D width of a head

A model is taken if it has these parts and no others (`fits`), and used so if its numbers are right
(`Backbone.composition`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.batch import Batch
from softprompt.composition import Composition, pad_left, positions
from softprompt.operations import normed, normed_products, turned
from softprompt.prefix import is_prefix, mix

_PARTS = {
    "": {"embed_tokens", "layers", "norm", "rotary_emb"},
    "layers.0": {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"},
    "layers.0.self_attn": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "layers.0.mlp": {"gate_proj", "up_proj", "down_proj", "act_fn"},
}
_MAY_HAVE = {"q_norm", "k_norm"}


def fits(model: PreTrainedModel) -> bool:
    """Whether a model has the parts that are written out here, and every token attends to all before it."""
    try:
        found = {path: {name for name, _ in model.base_model.get_submodule(path).named_children()} for path in _PARTS}
    except AttributeError:
        return False
    windows = getattr(model.config, "sliding_window", None), getattr(model.config, "attention_chunk_size", None)
    return not any(windows) and all(found[path] - _MAY_HAVE == parts for path, parts in _PARTS.items())


@dataclass(frozen=True, slots=True)
class Kept:
    """What K prompts leave in every layer."""

    keys: list[Tensor]
    """For each layer `[K, G, P, D]`; none where all prompts are empty."""
    values: list[Tensor]
    mask: Tensor
    """`[K, P]` ones where a prompt has a vector, zeros on the left of a shorter one."""

    def map(self, change: Callable[[Tensor], Tensor]) -> "Kept":
        """These states with a function applied to the keys and values of every layer."""
        return Kept(list(map(change, self.keys)), list(map(change, self.values)), self.mask)


def keep(model: PreTrainedModel, prompts: Sequence[Tensor]) -> Kept:
    """Run K prompts `[P_k, H]` through the model, once each, as far as their last keys and values.

    Prefixes stand beside them as they are.
    """
    if any(map(is_prefix, prompts)):
        return Kept(*mix(prompts, model.dtype, lambda soft: _layers(keep(model, soft))))
    prefix, mask = pad_left(prompts, model)
    kept = Kept([], [], mask)
    if prefix.shape[1]:
        _Pass(model, [_prompts(mask)]).run(prefix.flatten(0, 1), kept)
    return kept


def _layers(kept: Kept) -> list[tuple[Tensor, Tensor]]:
    return list(zip(kept.keys, kept.values, strict=True))


def attend(model: PreTrainedModel, kept: Kept, batch: Batch) -> Tensor:
    """Logits `[M, V]` of the batch's rows, each after the states of the prompt that owns it."""
    through = _Pass(model, [_rows(kept.mask, batch)])
    return through.predict(*through.run(_embed(model, batch), kept), batch)


def together(model: PreTrainedModel, prompts: Sequence[Tensor], batch: Batch) -> Tensor:
    """What `keep` and then `attend` compute, with prompts and rows in the same products.

    A prompt's few vectors alone are too little work for the reading of a whole weight.
    """
    if any(map(is_prefix, prompts)):
        return attend(model, keep(model, prompts), batch)
    prefix, mask = pad_left(prompts, model)
    if not prefix.shape[1]:
        return attend(model, Kept([], [], mask), batch)
    through = _Pass(model, [_prompts(mask), _rows(mask, batch)])
    states = torch.cat([prefix.flatten(0, 1), _embed(model, batch)])
    return through.predict(*through.run(states, Kept([], [], mask)), batch)


written_out = Composition("shared prefix, layers written out", keep, attend, Kept.map, together)


def _embed(model: PreTrainedModel, batch: Batch) -> Tensor:
    embedded: Tensor = model.get_input_embeddings()(batch.tokens)
    return embedded.flatten(0, 1)


@dataclass(frozen=True, slots=True)
class _Block:
    """N lines of T positions, prompts or rows, that lie in the states one after the other."""

    places: Tensor
    """`[N, T]` position of each."""
    attends: Tensor
    """`[1 or N, T, P+T]` what each attends to: of its prompt, and of its own line. Of prompts only the latter."""
    owner: Tensor | None = None
    """`[N]` prompt of each row; None for the prompts themselves."""


def _prompts(mask: Tensor) -> _Block:
    own = torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)  # even padding attends to something
    return _Block(positions(mask), (mask.bool()[:, None] | own).tril())


def _rows(mask: Tensor, batch: Batch) -> _Block:
    mask, own = mask.bool()[batch.owner], batch.attends
    places = mask.sum(1, keepdim=True) + batch.places
    if bool(mask.all()):
        mask = mask[:1]
    count = max(len(mask), len(own))
    mask = mask[:, None].expand(count, batch.tokens.shape[1], -1)
    return _Block(places, torch.cat([mask, own.expand(count, -1, -1)], dim=2), batch.owner)


class _Pass:
    """States `[R, H]` of prompts, of a batch's rows, or of both, through all layers."""

    def __init__(self, model: PreTrainedModel, blocks: Sequence[_Block]) -> None:
        self._model, self._blocks = model, blocks
        base: Any = model.base_model
        self._layers, self._head = base.layers, base.layers[0].self_attn.head_dim
        places = torch.cat([block.places.flatten() for block in blocks])
        cos, sin = base.rotary_emb(model.get_input_embeddings().weight, places[None])
        self._turn = tuple(each[0, :, None].chunk(2, dim=-1)[0] for each in (cos, sin))
        """`[R, 1, D/2]`, twice."""
        self._biases = [_bias(model, block.attends) for block in blocks]

    def run(self, states: Tensor, kept: Kept) -> tuple[Tensor, Tensor]:
        """States before the last layer and what its attention mixes, `[R, H]` each; what prompts leave is kept."""
        for n, layer in enumerate(self._layers[:-1]):
            states = _finish(layer, states, self._attend(n, states, kept))
        return states, self._attend(len(self._layers) - 1, states, kept)

    def predict(self, states: Tensor, mixed: Tensor, batch: Batch) -> Tensor:
        """The rest of the last layer at the batch's places alone: logits `[M, V]` from what `run` returns."""
        rows, width = batch.tokens.shape
        places = len(states) - rows * width + batch.rows * width + batch.columns
        states = _finish(self._layers[-1], states[places], mixed[places])
        base: Any = self._model.base_model
        logits: Tensor = self._model.get_output_embeddings()(normed(states, base.norm))
        return logits

    def _attend(self, n: int, states: Tensor, kept: Kept) -> Tensor:
        """Values mixed by the attention of layer n, `[R, G·R·D]`."""
        layer, mixed = self._layers[n], []
        for block, bias, (queries, keys, values) in zip(
            self._blocks, self._biases, self._project(layer, states), strict=True
        ):
            if block.owner is None:
                kept.keys.append(keys)
                kept.values.append(values)
            elif kept.keys:
                keys, values = _join(kept.keys[n], keys, block.owner), _join(kept.values[n], values, block.owner)
            mixed.append(_mix(queries, keys, values, bias, layer.self_attn.scaling))
        return torch.cat(mixed)

    def _project(self, layer: Any, states: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For each block its queries `[N, T, G·R, D]`, keys and values `[N, G, T, D]`."""
        attention = layer.self_attn
        products = [attention.q_proj, attention.k_proj, attention.v_proj]
        found = normed_products(states, layer.input_layernorm, products)
        queries, keys, values = (each.view(len(states), -1, self._head) for each in found)
        if hasattr(attention, "q_norm"):
            queries, keys = normed(queries, attention.q_norm), normed(keys, attention.k_norm)
        heads = turned(queries, *self._turn), turned(keys, *self._turn), values
        shapes = [block.places.shape for block in self._blocks]
        parts = [each.split([shape.numel() for shape in shapes]) for each in heads]
        for shape, *block in zip(shapes, *parts, strict=True):
            own_queries, own_keys, own_values = (each.view(*shape, -1, self._head) for each in block)
            yield own_queries, own_keys.transpose(1, 2), own_values.transpose(1, 2)


def _bias(model: PreTrainedModel, attends: Tensor) -> Tensor:
    """What is added to the scores, `[1 or N·G, R·T, P+T]`."""
    base: Any = model.base_model
    attention = base.layers[0].self_attn
    bias = torch.zeros(attends.shape, dtype=model.dtype, device=attends.device).masked_fill_(~attends, -torch.inf)
    bias = bias.repeat(1, attention.num_key_value_groups, 1)
    groups = attention.k_proj.out_features // attention.head_dim
    return bias if len(bias) == 1 else bias.repeat_interleave(groups, dim=0)


def _finish(layer: Any, states: Tensor, mixed: Tensor) -> Tensor:
    """The rest of a layer, once it is known what attends to what."""
    mlp = layer.mlp
    states = _add(states, layer.self_attn.o_proj, mixed)
    gate, up = normed_products(states, layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj])
    return _add(states, mlp.down_proj, mlp.act_fn(gate) * up)


def _add(states: Tensor, product: Any, inputs: Tensor) -> Tensor:
    """The states and a product, summed where it is computed."""
    if product.bias is not None:
        states = states + product.bias
    return torch.addmm(states, inputs, product.weight.t())


def _mix(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scaling: float) -> Tensor:
    """Values mixed by attention, `[N·T, G·R·D]`."""
    rows, width, _, size = queries.shape
    groups = keys.shape[1]
    queries = queries.view(rows, width, groups, -1, size).permute(0, 2, 3, 1, 4).reshape(rows * groups, -1, size)
    keys, values = (each.reshape(rows * groups, -1, size) for each in (keys, values))
    shares = torch.baddbmm(bias, queries, keys.transpose(1, 2), alpha=scaling).softmax(-1)
    mixed = torch.bmm(shares, values).view(rows, groups, -1, width, size)
    return mixed.permute(0, 3, 1, 2, 4).reshape(rows * width, -1)


def _join(before: Tensor, own: Tensor, owner: Tensor) -> Tensor:
    """The prompt's keys or values before the row's own; one prompt serves all rows."""
    before = before.expand(len(own), -1, -1, -1) if len(before) == 1 else before[owner]
    return torch.cat([before, own], dim=2)
