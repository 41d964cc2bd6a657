"""Scores of labels, against plain loops over rows, labels and tokens."""

from collections import Counter
from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from softprompt.backbone import Backbone
from softprompt.batch import Example, collate
from softprompt.composition import concatenate
from softprompt.errors import UserError
from softprompt.generation import Generator
from softprompt.inference import ROWS, Classifier, Scores, by_length, pool, vote
from softprompt.trie import Labels
from tests.tiny import tiny_backbone

backbone = cache(tiny_backbone)
SINGLE: Labels = [(300,), (301,), (302,)]
SEVERAL: Labels = [(300, 301), (310,), (320, 321, 322)]
SHARING: Labels = [(300, 301), (300, 302, 303), (310, 301), (300, 302, 304), (311,), (310, 302, 303, 304)]


def draw_prompt(length: int) -> torch.Tensor:
    return 0.3 * torch.randn(length, 32, generator=torch.Generator().manual_seed(0))


def draw_inputs(count: int = 150) -> list[tuple[int, ...]]:
    """More rows than one pass takes, of lengths that are not in order."""
    random = np.random.default_rng(0)
    return [tuple(random.integers(3, 370, size=random.integers(1, 12)).tolist()) for _ in range(count)]


def brute_force(
    base: Backbone, prompt: torch.Tensor, labels: Labels, inputs: Sequence[tuple[int, ...]]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """One row, one label at a time, by the formula as written."""
    scores = np.empty((len(inputs), len(labels)))
    legal = np.zeros(len(inputs), bool)
    for n, row in enumerate(inputs):
        for c, label in enumerate(labels):
            batch = collate([Example(row, label)], [0], pad=0, device=torch.device("cpu"))
            with torch.inference_mode():
                logits = concatenate(base.model, [prompt], batch)
            scores[n, c] = sum(logits.log_softmax(1)[t, token].item() for t, token in enumerate(label))
            legal[n] |= logits.argmax(1).tolist() == list(label)
    return scores, legal


@pytest.mark.parametrize("labels", [SINGLE, SEVERAL, SHARING], ids=["single", "several", "sharing"])
@pytest.mark.parametrize("length", [0, 5])
@pytest.mark.parametrize(
    "kind", ["llama", "gpt2", "bloom", "mamba"]
)  # bloom cannot read branches, mamba reads them as lines
def test_scores_are_those_of_a_plain_loop(kind: str, length: int, labels: Labels) -> None:
    prompt, inputs = draw_prompt(length), draw_inputs(70)
    scores = Classifier(backbone(kind), prompt, labels).score(inputs)
    expected, legal = brute_force(backbone(kind), prompt, labels, inputs)
    np.testing.assert_allclose(scores.log_probabilities, expected, rtol=1e-4, atol=1e-4)
    assert scores.legal.tolist() == legal.tolist()


@pytest.mark.parametrize(
    "kind", ["llama", "gpt2", "qwen2", "qwen3", "mistral", "gemma", "opt", "falcon", "bloom", "mamba"]
)
def test_labels_share_a_pass_where_the_model_can_read_branches(kind: str) -> None:
    assert backbone(kind).branches is (kind != "bloom")


def test_many_labels_cost_one_pass_of_their_trie() -> None:
    """77 labels of three tokens with 11 beginnings, as an intent task has."""
    labels = [(300 + n % 11, 320 + n // 11, 340) for n in range(77)]
    inputs, base, read = draw_inputs(40), backbone(), []
    assert base.branches
    classifier = Classifier(base, draw_prompt(5), labels)
    handle = base.model.get_input_embeddings().register_forward_hook(lambda *seen: read.append(seen[1][0].numel()))
    scores = classifier.score(inputs)
    handle.remove()
    expected, _ = brute_force(base, draw_prompt(5), labels[:9], inputs[:5])
    np.testing.assert_allclose(scores.log_probabilities[:5, :9], expected, rtol=1e-4, atol=1e-4)
    assert sum(read) < 40 * (12 + 11 + 77)


def test_rows_keep_their_order_and_do_not_depend_on_each_other() -> None:
    classifier, inputs = Classifier(backbone(), draw_prompt(4), SEVERAL), draw_inputs()
    forth, back = classifier.score(inputs), classifier.score(inputs[::-1])
    np.testing.assert_allclose(forth.log_probabilities, back.log_probabilities[::-1], rtol=1e-4, atol=1e-4)
    assert np.array_equal(forth.predicted, back.predicted[::-1])


def test_scoring_twice_gives_the_same() -> None:
    classifier, inputs = Classifier(backbone(), draw_prompt(4), SINGLE), draw_inputs(20)
    assert np.array_equal(classifier.score(inputs).log_probabilities, classifier.score(inputs).log_probabilities)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mamba"])
def test_what_all_rows_begin_with_is_read_once(kind: str) -> None:
    opening, inputs = tuple(range(5, 45)), draw_inputs(80)
    classifier, read = Classifier(backbone(kind), draw_prompt(4), SHARING), []
    handle = backbone(kind).model.get_input_embeddings().register_forward_hook(lambda *s: read.append(s[1][0].shape))
    scores = classifier.score([(*opening, *row) for row in inputs])
    handle.remove()
    assert max(shape[-1] for shape in read) <= 40
    one_by_one = [classifier.score([(*opening, *row)]).log_probabilities[0] for row in inputs[:5]]
    np.testing.assert_allclose(scores.log_probabilities[:5], one_by_one, rtol=1e-4, atol=1e-4)


def test_passes_are_bounded_in_rows_and_in_tokens() -> None:
    lengths = [5000, *[3] * 130, 9000, 4000, 4096, 4096]
    found = list(by_length(lengths, most=ROWS))
    assert sorted(row for rows in found for row in rows) == list(range(len(lengths)))
    assert [len(rows) for rows in found] == [32, 32, 32, 32, 2, 2, 1, 1, 1]


def test_no_rows_have_no_scores() -> None:
    scores = Classifier(backbone(), draw_prompt(4), SINGLE).score([])
    assert scores.log_probabilities.shape == (0, 3)
    assert scores.predicted.tolist() == []


def test_an_output_is_legal_when_the_first_choice_is_a_label() -> None:
    inputs = draw_inputs(30)
    prompt = draw_prompt(4)
    batch = collate([Example(row, (0,)) for row in inputs], [0] * 30, pad=0, device=torch.device("cpu"))
    with torch.inference_mode():
        favourites = concatenate(backbone().model, [prompt], batch).argmax(1).tolist()
    labels = [(favourites[0],), (next(t for t in range(3, 378) if t not in favourites),)]
    scores = Classifier(backbone(), prompt, labels).score(inputs)
    assert scores.legal.tolist() == [favourite == favourites[0] for favourite in favourites]


def test_a_label_of_several_tokens_is_legal_when_all_of_them_are_the_first_choice() -> None:
    row, prompt = (5, 6, 7), draw_prompt(4)
    chosen: tuple[int, ...] = ()
    for _ in range(2):
        batch = collate([Example((*row, *chosen), (0,))], [0], pad=0, device=torch.device("cpu"))
        with torch.inference_mode():
            chosen = (*chosen, int(concatenate(backbone().model, [prompt], batch).argmax()))
    other = (chosen[0], (chosen[1] + 1) % 370)
    assert Classifier(backbone(), prompt, [chosen, (1, 2)]).score([row]).legal.tolist() == [True]
    assert Classifier(backbone(), prompt, [other, (1, 2)]).score([row]).legal.tolist() == [False]


def test_probabilities_are_shares_among_the_labels() -> None:
    logs = np.log(np.array([[0.2, 0.2], [0.3, 0.1]], np.float32))
    scores = Scores(np.vstack([logs, [[-900.0, -901.0]]]).astype(np.float32), np.array([True, True, False]))
    expected = [[0.5, 0.5], [0.75, 0.25], [1 / (1 + np.exp(-1)), 1 / (1 + np.exp(1))]]
    np.testing.assert_allclose(scores.probabilities, expected, rtol=1e-6)
    assert scores.predicted.tolist() == [0, 0, 0]


def test_scoring_leaves_prompt_and_weights_as_they_are() -> None:
    base, prompt = tiny_backbone(), torch.nn.Parameter(draw_prompt(4))
    before = prompt.detach().clone()
    Classifier(base, prompt, SEVERAL).score(draw_inputs(10))
    assert torch.equal(prompt, before)
    assert prompt.grad is None
    assert base.weights_in_memory_sha256() == base.weights_sha256


SEVERAL_PROMPTS = [draw_prompt(3), draw_prompt(9)[4:], draw_prompt(0)]


@pytest.mark.parametrize("count", [20, 90])  # with 90 rows, what all begin with is put behind every prompt
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gemma", "falcon", "mistral", "bloom", "mamba"])
def test_rows_of_different_prompts_are_scored_as_each_prompt_scores_them_alone(kind: str, count: int) -> None:
    base, inputs = backbone(kind), [(7, 8, 9, *row) for row in draw_inputs(count)]
    owner = np.random.default_rng(1).integers(3, size=count)
    together = Classifier(base, SEVERAL_PROMPTS, SHARING).score(inputs, owner.tolist())
    for k, prompt in enumerate(SEVERAL_PROMPTS):
        alone = Classifier(base, prompt, SHARING).score([inputs[n] for n in np.flatnonzero(owner == k)])
        found = together.log_probabilities[owner == k]
        np.testing.assert_allclose(found, alone.log_probabilities, rtol=1e-4, atol=1e-4)
        assert together.legal[owner == k].tolist() == alone.legal.tolist()


@pytest.mark.parametrize("kind", ["mistral", "gemma2"])
def test_rows_past_a_window_of_attention_are_scored_as_in_a_plain_loop(kind: str) -> None:
    base, inputs = tiny_backbone(kind, sliding_window=14), draw_inputs(70)
    assert base.branches
    for prompt in (draw_prompt(2), draw_prompt(17)):
        scores = Classifier(base, prompt, SHARING).score(inputs)
        expected, legal = brute_force(base, prompt, SHARING, inputs)
        np.testing.assert_allclose(scores.log_probabilities, expected, rtol=1e-4, atol=1e-4)
        assert scores.legal.tolist() == legal.tolist()


def test_prompts_are_read_once_and_their_rows_share_the_by_length() -> None:
    base, read = tiny_backbone("gpt2"), []
    base.model.get_submodule("transformer.h.0").register_forward_hook(
        lambda module, args, output: read.append(args[0].shape[:2])
    )
    assert base.branches
    read.clear()
    classifier = Classifier(base, [draw_prompt(40), draw_prompt(30)], SINGLE)
    for _ in range(2):
        classifier.score([(5, 6), (7, 8), (9, 10)], [0, 1, 0])
    assert read == [(2, 40), (3, 2), (3, 2)]


@pytest.mark.parametrize(
    ("owner", "message"), [([0], "for 1 inputs, found 2"), ([0, 3], "no prompt 3, found 3"), ([-1, 0], "no prompt -1")]
)
def test_an_owner_that_is_not_there_is_refused(owner: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Classifier(backbone(), SEVERAL_PROMPTS, SINGLE).score([(5,), (6,)], owner)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "gemma", "falcon", "mistral", "bloom", "mamba"])
def test_an_output_is_legal_where_free_greedy_decoding_says_a_label(kind: str) -> None:
    base, inputs = backbone(kind), draw_inputs(60)
    said = Generator(base, SEVERAL_PROMPTS[:1]).generate(inputs, max_new_tokens=3)
    # Labels of one, two and three tokens that are said somewhere, and others that begin alike and end otherwise.
    spelt = {line[:length] for line, length in zip(said[:18], 6 * (1, 2, 3), strict=True) if len(line) >= length}
    labels = [label for label in spelt if not any(label[:n] in spelt for n in range(1, len(label)))]
    labels += [(*label[:-1], 377) for label in labels if len(label) > 1]
    legal = [any(line[: len(label)] == label for label in labels) for line in said]
    assert {len(label) for label in labels} == {1, 2, 3}
    assert 5 < sum(legal) < 55
    assert Classifier(base, SEVERAL_PROMPTS[0], labels).score(inputs).legal.tolist() == legal


def test_every_prompt_scores_every_input() -> None:
    inputs = draw_inputs(30)
    members = Classifier(backbone(), SEVERAL_PROMPTS, SEVERAL).score_each(inputs)
    for prompt, member in zip(SEVERAL_PROMPTS, members, strict=True):
        alone = Classifier(backbone(), prompt, SEVERAL).score(inputs)
        np.testing.assert_allclose(member.log_probabilities, alone.log_probabilities, rtol=1e-4, atol=1e-4)
        assert member.legal.tolist() == alone.legal.tolist()
    assert [len(member.legal) for member in Classifier(backbone(), SEVERAL_PROMPTS, SEVERAL).score_each([])] == [0] * 3


@pytest.mark.parametrize("count", [1, 2, 4, 5])
def test_votes_are_a_plain_count(count: int) -> None:
    random = np.random.default_rng(0)
    members = [Scores(random.normal(size=(200, 4)).astype(np.float32), np.ones(200, bool)) for _ in range(count)]
    ties = 0
    for n, (elected, pooled) in enumerate(zip(vote(members), pool(members), strict=True)):
        votes = Counter(int(member.log_probabilities[n].argmax()) for member in members)
        leaders = [label for label, number in votes.items() if number == max(votes.values())]
        ties += len(leaders) > 1
        assert elected == max(leaders, key=lambda c: sum(member.probabilities[n, c] for member in members))
        assert pooled == max(range(4), key=lambda c: sum(member.log_probabilities[n, c] for member in members))
    assert (ties > 0) is (count > 1)


def test_a_vote_and_a_pool_can_differ() -> None:
    sure, unsure = [-9.0, -0.01], [-0.6, -0.8]
    members = [Scores(np.array([row], np.float32), np.array([True])) for row in (sure, unsure, unsure)]
    assert vote(members).tolist() == [0]
    assert pool(members).tolist() == [1]
