"""Shared prefix for gated decoders, their layers written out: the same numbers with less work around the matrices.

Most open decoders are built alike: RMS norm, rotary positions, grouped queries, a gated MLP. On a CPU, more than a
third of their own forward and backward pass goes into casts, copies and sums between the matrix products. Here a norm
and a rotation are one operation each, with their derivative written by hand, keys and values are never repeated for the
queries of a group, and the last layer asks for nothing before the first predicting place.

    G groups of queries, one head of keys and values each   R queries of a group   D width of a head

A model is taken if it has these parts and no others (`fits`), and used so if its numbers are right
(`Backbone.composition`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt.composition import Batch, Composition, pad_left, positions

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
    """Run K prompts `[P_k, H]` through the model, once each, as far as their last keys and values."""
    prefix, mask = pad_left(prompts, model)
    kept = Kept([], [], mask)
    if prefix.shape[1]:
        own = torch.eye(prefix.shape[1], dtype=torch.bool, device=mask.device)  # even padding attends to something
        _Pass(model, positions(mask), (mask.bool()[:, None] | own).tril()).keep(prefix, kept)
    return kept


def attend(model: PreTrainedModel, kept: Kept, batch: Batch) -> Tensor:
    """Logits `[M, V]` of the batch's rows, each after the states of the prompt that owns it."""
    hidden = model.get_input_embeddings()(batch.tokens)
    width, mask = batch.tokens.shape[1], kept.mask.bool()
    if len(mask) > 1:
        mask = mask[batch.owner]
        keys, values = ([each[batch.owner] for each in layers] for layers in (kept.keys, kept.values))
        kept = Kept(keys, values, mask)
    places = mask.sum(1, keepdim=True) + batch.places
    own = batch.attends
    if bool(mask.all()):
        mask = mask[:1]
    count = max(len(mask), len(own))
    attends = torch.cat([mask[:, None].expand(count, width, -1), own.expand(count, -1, -1)], dim=2)
    first = int(batch.columns.min())
    hidden = _Pass(model, places, attends).run(hidden, kept, first)[batch.rows, batch.columns - first]
    base: Any = model.base_model
    logits: Tensor = model.get_output_embeddings()(_norm(base.norm, hidden))
    return logits


written_out = Composition("shared prefix, layers written out", keep, attend, Kept.map)


class _Pass:
    """N rows of T positions through all layers."""

    def __init__(self, model: PreTrainedModel, places: Tensor, attends: Tensor) -> None:
        base: Any = model.base_model
        self._layers = base.layers
        attention = self._layers[0].self_attn
        cos, sin = base.rotary_emb(model.get_input_embeddings().weight, places)
        half = cos.shape[-1] // 2
        self._turn = cos[:, :, None, :half], sin[:, :, None, :half]
        """`[1 or N, T, 1, D/2]`, twice."""
        bias = torch.zeros(attends.shape, dtype=model.dtype, device=attends.device).masked_fill_(~attends, -torch.inf)
        bias = bias[:, None].expand(-1, attention.num_key_value_groups, -1, -1)
        groups = attention.k_proj.out_features // attention.head_dim
        self._bias = bias if len(bias) == 1 else bias.repeat_interleave(groups, dim=0)
        """What is added to the scores, `[1 or N·G, R, T, P+T]`."""

    def keep(self, hidden: Tensor, kept: Kept) -> None:
        """Store every layer's keys and values; what follows them in the last layer is not computed."""
        for n, layer in enumerate(self._layers):
            queries, keys, values = self._project(layer, hidden)
            kept.keys.append(keys)
            kept.values.append(values)
            if n < len(self._layers) - 1:
                hidden = self._finish(layer, hidden, queries, keys, values)

    def run(self, hidden: Tensor, kept: Kept, first: int) -> Tensor:
        """Hidden states after what was kept `[N, T - first, H]`; the last layer begins with column `first`."""
        for n, layer in enumerate(self._layers):
            start = first if n == len(self._layers) - 1 else 0
            queries, keys, values = self._project(layer, hidden, start)
            if kept.keys:
                keys, values = _join(kept.keys[n], keys), _join(kept.values[n], values)
            hidden = self._finish(layer, hidden[:, start:], queries, keys, values)
        return hidden

    def _project(self, layer: Any, hidden: Tensor, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Queries from column `first` on `[N, T - first, G·R, D]`, keys and values `[N, G, T, D]`."""
        attention, inputs = layer.self_attn, _norm(layer.input_layernorm, hidden)
        queries = attention.q_proj(inputs[:, first:]).view(len(inputs), hidden.shape[1] - first, -1, attention.head_dim)
        keys, values = (
            p(inputs).view(*inputs.shape[:2], -1, attention.head_dim) for p in (attention.k_proj, attention.v_proj)
        )
        if hasattr(attention, "q_norm"):
            queries, keys = _norm(attention.q_norm, queries), _norm(attention.k_norm, keys)
        cos, sin = self._turn
        queries, keys = _turn(queries, cos[:, first:], sin[:, first:]), _turn(keys, cos, sin)
        return queries, keys.transpose(1, 2), values.transpose(1, 2)

    def _finish(self, layer: Any, hidden: Tensor, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The rest of a layer, once it is known what attends to what."""
        attention, mlp = layer.self_attn, layer.mlp
        hidden = hidden + attention.o_proj(self._mix(queries, keys, values, attention.scaling))
        inputs = _norm(layer.post_attention_layernorm, hidden)
        result: Tensor = hidden + mlp.down_proj(mlp.act_fn(mlp.gate_proj(inputs)) * mlp.up_proj(inputs))
        return result

    def _mix(self, queries: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        """Values mixed by attention, `[N, T, G·R·D]`."""
        rows, width, _, size = queries.shape
        groups = keys.shape[1]
        queries = queries.view(rows, width, groups, -1, size).permute(0, 2, 3, 1, 4).reshape(rows * groups, -1, size)
        keys, values = (t.reshape(rows * groups, -1, size) for t in (keys, values))
        bias = self._bias[:, :, -width:].flatten(1, 2)
        shares = torch.baddbmm(bias, queries, keys.transpose(1, 2), alpha=scaling).softmax(-1)
        mixed = torch.bmm(shares, values).view(rows, groups, -1, width, size)
        return mixed.permute(0, 3, 1, 2, 4).reshape(rows, width, -1)


def _join(before: Tensor, own: Tensor) -> Tensor:
    """The prompt's keys or values before the row's own; one prompt serves all rows."""
    return torch.cat([before.expand(len(own), -1, -1, -1), own], dim=2)


def _norm(norm: Any, hidden: Tensor) -> Tensor:
    """A norm by our own means where it is the usual one, else by its own."""
    epsilon = getattr(norm, "variance_epsilon", None)
    apply: Any = _RmsNorm.apply
    normed: Tensor = norm(hidden) if epsilon is None else apply(hidden, norm.weight, epsilon)
    return normed


def _turn(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    apply: Any = _Rotate.apply
    turned: Tensor = apply(heads, cos, sin)
    return turned


class _RmsNorm(torch.autograd.Function):
    """`x / sqrt(mean(x²) + ε) · w`; statistics in float32, no gradient for the frozen `w`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_()
        scale = torch.rsqrt(squares / x.shape[-1] + epsilon)
        ctx.save_for_backward(x, scale, weight)
        return (x * scale).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        x, scale, weight = ctx.saved_tensors
        wide, gradient = x.float(), (gradient * weight).float()
        along = (gradient * wide).sum(-1, keepdim=True) * scale.square() / x.shape[-1]
        return gradient.addcmul_(wide, along, value=-1).mul_(scale).to(x.dtype), None, None


class _Rotate(torch.autograd.Function):
    """Rotary positions on `[N, T, heads, D]`; the derivative of a rotation is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(gradient, cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    turned = torch.empty_like(x)
    upper, lower = turned.chunk(2, dim=-1)
    torch.mul(first, cos, out=upper).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=lower).addcmul_(first, sin)
    return turned
