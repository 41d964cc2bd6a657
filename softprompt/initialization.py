"""Where a prompt starts: six strategies, each by its definition.

All return P vectors `[P, H]` in float32 on the CPU, and draw from the generator that they are given and from nothing
else. Nothing here trains.

Sources: Lester, Al-Rfou, Constant 2021 (arXiv 2104.08691), section 3.2, for uniform, vocabulary, labels and the filling
up of a text; the normal is scaled to the embedding table, because N(0, 1) lies far off it.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

from softprompt.backbone import Backbone
from softprompt.errors import UserError

COMMON = 5000
"""Tokens that count as common where a strategy fills up from the vocabulary, as in the paper."""


def uniform(backbone: Backbone, length: int, generator: Generator, *, bound: float = 0.5) -> Tensor:
    """Each component from U[-bound, bound]."""
    return (torch.rand(length, backbone.hidden_size, generator=generator) * 2 - 1) * bound


def normal(backbone: Backbone, length: int, generator: Generator, *, scale: float = 1.0) -> Tensor:
    """Each component from a normal with the mean and `scale` times the deviation of its column of the table."""
    table = backbone.embed(range(len(backbone.embeddings))).cpu()  # some models scale what they look up
    noise = torch.randn(length, backbone.hidden_size, generator=generator)
    return table.mean(0) + scale * table.std(0) * noise


def vocabulary(backbone: Backbone, length: int, generator: Generator, *, most_common: int = COMMON) -> Tensor:
    """Embeddings of tokens sampled without replacement from the `most_common` lowest ids that are no special token.

    Vocabularies are built by merging the most frequent pairs first, so that a low id is a common token. A prompt
    longer than the sample begins it again.
    """
    special = set(backbone.tokenizer.all_special_ids)
    ids = [i for i in range(len(backbone.embeddings)) if i not in special][:most_common]
    order = torch.randperm(len(ids), generator=generator)
    chosen = [ids[order[n % len(ids)]] for n in range(length)]
    return backbone.embed(chosen).cpu()


def text(backbone: Backbone, length: int, generator: Generator, *, text: str) -> Tensor:
    """Embeddings of a text's tokens, cut to the length, or filled up from the common vocabulary."""
    ids = backbone.tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UserError(f"search.initialization: the text {text!r} has no tokens; give a text with words in it")
    return _fill(backbone, backbone.embed(ids).cpu(), length, generator)


def labels(backbone: Backbone, length: int, generator: Generator, *, words: Sequence[Sequence[int]]) -> Tensor:
    """One vector per label, the mean of its tokens' embeddings, filled up from the common vocabulary.

    Args:
        backbone: the frozen model.
        length: P.
        generator: random stream of the filling.
        words: the token ids of each label; special tokens that only frame a label do not count.
    """
    special = set(backbone.tokenizer.all_special_ids)
    meant = [[i for i in ids if i not in special] or ids for ids in words]
    vectors = torch.stack([backbone.embed(ids).cpu().mean(0) for ids in meant])
    return _fill(backbone, vectors, length, generator)


def prompt(backbone: Backbone, length: int, generator: Generator, *, vectors: Tensor) -> Tensor:
    """The vectors `[Q, H]` of a trained prompt: the first P of them, or filled up from the common vocabulary."""
    return _fill(backbone, vectors, length, generator)


STRATEGIES: dict[str, Callable[..., Tensor]] = {
    "uniform": uniform,
    "normal": normal,
    "vocabulary": vocabulary,
    "text": text,
    "labels": labels,
    "prompt": prompt,
}
"""The strategies by the names that an experiment gives them."""


def _fill(backbone: Backbone, vectors: Tensor, length: int, generator: Generator) -> Tensor:
    if len(vectors) >= length:
        return vectors[:length].clone()
    return torch.cat([vectors, vocabulary(backbone, length - len(vectors), generator)])
