"""The formula for encoder-decoder models, as T5 and BART: the prompt stands before the encoder's input.

    X = [p_0 … p_{P-1}; e_0 … e_{T-1}]  is read by the encoder, and the decoder says the target after it

An encoder looks in both directions, so that a prompt's states depend on the input and are shared by no two rows; what
is shared is the encoder's pass over a row, by all the continuations that are asked for. Of a batch's row the tokens of
the input go to the encoder, those of the target to the decoder, one place later and begun with the model's own start
token.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import EncoderDecoderCache, PreTrainedModel

from softprompt.batch import Batch, Tree
from softprompt.composition import Composition, join, keep_as_they_are, map_prompts, select_rows

_DECODED = 64
"""Rows of the decoder that have their own copy of an input's keys and values at the same time."""


def start_token(model: PreTrainedModel) -> int:
    """The token that every target is decoded after; ValueError where the model names none."""
    start = getattr(model.generation_config, "decoder_start_token_id", None)
    if not isinstance(start, int):
        raise ValueError("neither config.json nor generation_config.json names its decoder_start_token_id")
    return start


def _attend(model: PreTrainedModel, prompts: Sequence[Tensor], batch: Batch) -> Tensor:
    """Logits `[M, V]` of what the decoder says after the encoder has read each row's prompt and input."""
    inputs = replace(batch, tokens=batch.tokens[:, : int(batch.ends.max())])
    joined = join(model, prompts, inputs, batch.ends, left=False)
    encoder: Any = model.get_encoder()
    encoded = encoder(inputs_embeds=joined.embeds, attention_mask=joined.mask)
    begin = batch.tokens.new_full((len(joined.mask), 1), start_token(model))
    if batch.tree is not None:
        root = _decode(model, encoded, joined.mask, begin, use_cache=True)
        nodes = _decode_tree(model, encoded, joined.mask, root.past_key_values, batch.tree)
        first = batch.tokens.shape[1] - len(batch.tree.depths)
        return torch.cat([root.logits, nodes], dim=1)[batch.rows, (batch.columns + 1 - first).clamp(min=0)]
    behind = batch.ends[:, None] + torch.arange(int((batch.lengths - batch.ends).max()), device=begin.device)
    # Past the end of a row's target stands anything: no place before it looks there.
    said = batch.tokens.gather(1, behind.clamp(max=batch.tokens.shape[1] - 1))
    logits: Tensor = _decode(model, encoded, joined.mask, torch.cat([begin, said], dim=1)).logits
    return logits[batch.rows, batch.columns + 1 - batch.ends[batch.rows]]


encode_and_decode = Composition("concatenation before the encoder's input", keep_as_they_are, _attend, map_prompts)


def _decode_tree(model: PreTrainedModel, encoded: Any, mask: Tensor, begun: EncoderDecoderCache, tree: Tree) -> Tensor:
    """Logits `[N, S, V]` of a tree's tokens; every path goes on from what the start token has left, once a row."""
    paths, hidden, nodes = tree.paths, encoded.last_hidden_state, []
    for rows in torch.arange(len(hidden), device=hidden.device).split(max(1, _DECODED // len(paths.tokens))):
        each = rows.repeat_interleave(len(paths.tokens))
        caches = begun.self_attention_cache, begun.cross_attention_cache
        logits: Tensor = _decode(
            model,
            type(encoded)(last_hidden_state=hidden[each]),
            mask[each],
            paths.tokens.repeat(len(rows), 1),
            past_key_values=EncoderDecoderCache(*(select_rows(cache, each) for cache in caches)),
            use_cache=True,
        ).logits
        nodes.append(logits.unflatten(0, (len(rows), -1))[:, paths.holds, tree.depths])
    return torch.cat(nodes)


def _decode(model: PreTrainedModel, encoded: Any, mask: Tensor, tokens: Tensor, **cache: Any) -> Any:
    return model(
        encoder_outputs=encoded, attention_mask=mask, decoder_input_ids=tokens, **({"use_cache": False} | cache)
    )
