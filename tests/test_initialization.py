"""Where a prompt starts: every strategy against its definition."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Generator, Tensor

from softprompt import initialization
from softprompt.backbone import Backbone
from softprompt.errors import UserError
from tests.tiny import tiny_backbone

backbone = cache(tiny_backbone)
WORDS = [(300, 301, 302), (310,)]
TEXT = "Decide whether this movie review is positive or negative."

Strategy = Callable[[Backbone, int, Generator], Tensor]
STRATEGIES: dict[str, Strategy] = {
    "uniform": initialization.uniform,
    "normal": initialization.normal,
    "vocabulary": initialization.vocabulary,
    "text": lambda b, length, g: initialization.text(b, length, g, text=TEXT),
    "prompt": lambda b, length, g: initialization.prompt(b, length, g, vectors=torch.ones(4, 32)),
    "labels": lambda b, length, g: initialization.labels(b, length, g, words=WORDS),
}


def stream(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def embedded(base: Backbone) -> Tensor:
    """What each token of the vocabulary becomes."""
    with torch.no_grad():
        table: Tensor = base.model.get_input_embeddings()(torch.arange(len(base.embeddings)))
    return table


def tokens_of(prompt: Tensor, base: Backbone) -> list[int]:
    """The token whose embedding each vector is, bit for bit; -1 where it is none."""
    same = (prompt[:, None] == embedded(base)[None]).all(2)
    return [int(row.nonzero()[0]) if row.any() else -1 for row in same]


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("length", [1, 2, 30])
def test_a_prompt_is_float32_on_the_cpu_and_of_its_length(name: str, length: int) -> None:
    prompt = STRATEGIES[name](backbone(), length, stream())
    assert prompt.shape == (length, 32)
    assert prompt.dtype == torch.float32
    assert prompt.device.type == "cpu"
    assert not prompt.requires_grad


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_generator_alone_decides(name: str) -> None:
    torch.manual_seed(1)
    one = STRATEGIES[name](backbone(), 30, stream())
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    assert torch.equal(STRATEGIES[name](backbone(), 30, stream()), one)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(STRATEGIES[name](backbone(), 30, stream(1)), one)


@pytest.mark.parametrize("bound", [0.5, 0.1])
def test_uniform_fills_its_interval(bound: float) -> None:
    prompt = initialization.uniform(backbone(), 1000, stream(), bound=bound)
    assert prompt.min() >= -bound
    assert prompt.max() <= bound
    assert prompt.mean().abs() < 0.01 * bound
    assert prompt.std() == pytest.approx(bound / 3**0.5, rel=0.01)
    assert prompt.abs().max() == pytest.approx(bound, rel=0.001)


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("kind", ["llama", "gemma"])  # gemma scales the rows that it looks up
def test_normal_has_the_moments_of_each_column_of_the_embeddings(kind: str, scale: float) -> None:
    base = backbone(kind)
    table = embedded(base)
    prompt = initialization.normal(base, 20_000, stream(), scale=scale)
    spread = scale * table.std(0)
    assert ((prompt.mean(0) - table.mean(0)).abs() < 0.05 * spread).all()
    assert ((prompt.std(0) / spread - 1).abs() < 0.05).all()


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_vocabulary_is_embeddings_of_common_tokens_without_replacement(kind: str) -> None:
    base = backbone(kind)
    tokens = tokens_of(initialization.vocabulary(base, 50, stream(), most_common=60), base)
    assert len(set(tokens)) == 50
    assert set(tokens) <= set(range(3, 63))  # 0, 1 and 2 are special tokens


def test_a_prompt_longer_than_the_sample_begins_it_again() -> None:
    tokens = tokens_of(initialization.vocabulary(backbone(), 25, stream(), most_common=10), backbone())
    assert sorted(tokens[:10]) == list(range(3, 13))
    assert tokens[10:20] == tokens[:10]
    assert tokens[20:] == tokens[:5]


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_text_is_cut_to_the_length_or_filled_up(kind: str) -> None:
    base = backbone(kind)
    ids = base.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert tokens_of(initialization.text(base, 3, stream(), text=TEXT), base) == ids[:3]
    longer = tokens_of(initialization.text(base, len(ids) + 8, stream(), text=TEXT), base)
    assert longer[: len(ids)] == ids
    assert len(set(longer[len(ids) :])) == 8
    assert min(longer) > 2


def test_a_text_without_tokens_is_refused() -> None:
    with pytest.raises(UserError, match="the text '' has no tokens"):
        initialization.text(backbone(), 3, stream(), text="")


def test_labels_are_the_means_of_their_tokens_and_filled_up() -> None:
    table = embedded(backbone())
    prompt = initialization.labels(backbone(), 6, stream(), words=WORDS)
    torch.testing.assert_close(prompt[0], table[[300, 301, 302]].mean(0))
    assert tokens_of(prompt[1:2], backbone()) == [310]
    assert -1 not in tokens_of(prompt[2:], backbone())
    assert torch.equal(initialization.labels(backbone(), 1, stream(), words=WORDS), prompt[:1])


def test_the_token_that_closes_a_label_is_no_part_of_its_mean() -> None:
    end = backbone().tokenizer.eos_token_id
    closed = initialization.labels(backbone(), 6, stream(), words=[(*ids, end) for ids in WORDS])
    assert torch.equal(closed, initialization.labels(backbone(), 6, stream(), words=WORDS))
    assert tokens_of(initialization.labels(backbone(), 1, stream(), words=[(end,)]), backbone()) == [end]


def test_a_prompt_goes_on_from_its_first_vectors_and_is_filled_up_from_the_vocabulary() -> None:
    vectors = torch.randn(4, 32, generator=stream(7))
    assert torch.equal(initialization.prompt(backbone(), 3, stream(), vectors=vectors), vectors[:3])
    longer = initialization.prompt(backbone(), 10, stream(), vectors=vectors)
    assert torch.equal(longer[:4], vectors)
    assert torch.equal(longer[4:], initialization.vocabulary(backbone(), 6, stream()))
