"""Continuations, against plain loops: the whole formula anew for every token, one row at a time, no cache."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from softprompt.backbone import Backbone
from softprompt.batch import Example, collate
from softprompt.composition import concatenate
from softprompt.errors import UserError
from softprompt.generation import Beams, Decoding, Generator, Greedy, Lookup, Sampling
from tests.test_prompt import make_prompt
from tests.tiny import tiny_backbone, tiny_tokenizer

Row = tuple[int, ...]
KINDS = ["llama", "gpt2", "opt", "gemma", "gemma2", "bloom", "falcon", "mamba", "mistral", "narrow mistral"]
CACHES: Any = ["dynamic", "static"]
INPUTS: list[Row] = [(40, 50, 60, 70), (5, 6, 7, 8, 9, 10, 11, 12, 13), (99,), (31, 32, 33, 34, 35, 36), (80, 70, 60)]
OWNER = [0, 1, 2, 1, 0]
NEW = 7


def draw_prompts(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [0.3 * torch.randn(length, 32, generator=generator) for length in lengths]


PROMPTS = draw_prompts(3, 8, 0)


@cache
def backbone(kind: str) -> Backbone:
    """A tiny model for which a token that it is fond of ends a text, beside the tokenizer's end token."""
    windows = {"mistral": {"sliding_window": 64}, "narrow mistral": {"sliding_window": 3}}
    base = tiny_backbone(kind.split()[-1], **windows.get(kind, {}))
    unending = [line for row, k in zip(INPUTS, OWNER, strict=True) for line in continue_plainly(base, PROMPTS[k], row)]
    base.model.generation_config.eos_token_id = [2, Counter(unending).most_common(3)[-1][0]]
    return base


def next_logits(base: Backbone, prompt: Tensor, row: Row) -> Tensor:
    """Logits `[V]` after a prompt and a row, by the formula as written."""
    batch = collate([Example(row, (0,))], [0], pad=0, device=torch.device("cpu"))
    with torch.inference_mode():
        return concatenate(base.model, [prompt], batch)[0]


def end_tokens(base: Backbone) -> list[int]:
    ends: int | list[int] = base.model.generation_config.eos_token_id
    return ends if isinstance(ends, list) else [ends]


def continue_plainly(base: Backbone, prompt: Tensor, row: Row, new: int = NEW) -> Row:
    said: Row = ()
    while len(said) < new:
        token = int(next_logits(base, prompt, (*row, *said)).argmax())
        if token in end_tokens(base):
            break
        said = (*said, token)
    return said


def search_beams(step: Callable[[Row], Tensor], count: int, penalty: float, ends: Sequence[int]) -> Row:
    """Beam search: of the best continuations of all beams, those that end are set aside, the others go on."""
    beams: list[tuple[float, Row]] = [(0.0, ())]
    done: list[tuple[float, Row]] = []
    for length in range(1, NEW + 1):
        scored = [(score + step(line), line) for score, line in beams]
        top = [(s, (*line, t)) for each, line in scored for t, s in enumerate(each.tolist())]
        top = sorted(top, reverse=True)[: count * (1 + len(ends))]
        done += [(s / length**penalty, line[:-1]) for s, line in top[:count] if line[-1] in ends]
        beams = [(s, line) for s, line in top if line[-1] not in ends][:count]
    done += [(s / NEW**penalty, line) for s, line in beams]
    return max(done)[1]


@pytest.mark.parametrize("kept", CACHES)
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_is_a_plain_loop(kind: str, kept: Any) -> None:
    base = backbone(kind)
    expected = [continue_plainly(base, PROMPTS[k], row) for row, k in zip(INPUTS, OWNER, strict=True)]
    assert len(set(map(len, expected))) > 1  # some end by themselves
    assert Generator(base, PROMPTS).generate(INPUTS, OWNER, max_new_tokens=NEW, cache=kept) == expected


@pytest.mark.parametrize("kept", CACHES)
@pytest.mark.parametrize(("kind", "penalty"), [*((kind, 1.0) for kind in KINDS), ("llama", 0.0), ("llama", 2.0)])
def test_beams_are_a_plain_search(kind: str, penalty: float, kept: Any) -> None:
    base = backbone(kind)

    def search(prompt: Tensor, row: Row) -> Row:
        def step(line: Row) -> Tensor:
            return next_logits(base, prompt, (*row, *line)).log_softmax(0)

        return search_beams(step, 3, penalty, end_tokens(base))

    expected = [search(PROMPTS[k], row) for row, k in zip(INPUTS, OWNER, strict=True)]
    beams = Beams(3, length_penalty=penalty)
    assert Generator(base, PROMPTS).generate(INPUTS, OWNER, max_new_tokens=NEW, decoding=beams, cache=kept) == expected


@pytest.mark.parametrize("kept", CACHES)
@pytest.mark.parametrize("kind", ["llama", "bloom", "mamba", "narrow mistral"])
def test_samples_are_a_plain_loop_over_the_likeliest_tokens(kind: str, kept: Any) -> None:
    """Each number that a row draws falls into the share of one token."""
    base, how = backbone(kind), {"temperature": 1.5, "top_p": 0.7}

    def draw(n: int, prompt: Tensor, row: Row) -> Row:
        said: Row = ()
        for point in np.random.default_rng([5, n]).random(NEW):
            shares = (next_logits(base, prompt, (*row, *said)) / 1.5).double().softmax(0)
            before = (shares * (shares > shares[:, None])).sum(1)  # what is likelier than each token
            shares = shares * (before < 0.7)
            token = int((shares.cumsum(0) > point * shares.sum()).nonzero()[0])
            if token in end_tokens(base):
                break
            said = (*said, token)
        return said

    inputs, owner = [*INPUTS, *INPUTS[:2]], [*OWNER, *OWNER[:2]]
    expected = [draw(n, PROMPTS[k], row) for n, (row, k) in enumerate(zip(inputs, owner, strict=True))]
    sampling = Sampling(5, **how)
    said = Generator(base, PROMPTS).generate(inputs, owner, max_new_tokens=NEW, decoding=sampling, cache=kept)
    assert said == expected
    assert said[0] != said[5]  # the same input again goes on otherwise


def test_samples_have_the_models_distribution() -> None:
    base, count = tiny_backbone("gpt2"), 3000
    shares = (next_logits(base, PROMPTS[0], INPUTS[0]) / 0.5).softmax(0)
    said = Generator(base, PROMPTS).generate(
        [INPUTS[0]] * count, max_new_tokens=1, decoding=Sampling(0, temperature=0.5)
    )
    found = Counter(line[0] if line else 2 for line in said)
    assert len(found) > 20
    for token, share in enumerate(shares.tolist()):
        assert abs(found[token] - count * share) < 4.5 * sqrt(count * share * (1 - share)) + 1


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mamba"])
def test_prompt_lookup_is_greedy(kind: str) -> None:
    base = backbone(kind)
    expected = Generator(base, PROMPTS).generate(INPUTS, OWNER, max_new_tokens=NEW)
    assert Generator(base, PROMPTS).generate(INPUTS, OWNER, max_new_tokens=NEW, decoding=Lookup(3)) == expected


def test_prompt_lookup_takes_fewer_passes_where_the_text_repeats_itself() -> None:
    base = tiny_backbone("gemma")
    steps: list[int] = []
    base.model.model.layers[0].register_forward_hook(lambda module, args, output: steps.append(args[0].shape[1]))
    (said,) = Generator(base, PROMPTS).generate(INPUTS[1:2], max_new_tokens=20)
    greedy = len(steps)
    assert len(set(said)) < 3
    assert Generator(base, PROMPTS[:1]).generate(INPUTS[1:2], max_new_tokens=20, decoding=Lookup()) == [said]
    assert len(steps) - greedy < greedy / 2


@st.composite
def calls(draw: st.DrawFn) -> tuple[list[Row], list[int]]:
    """Rows and their owners."""
    rows = st.lists(st.integers(3, 370), min_size=1, max_size=9).map(tuple)
    inputs = draw(st.lists(rows, min_size=1, max_size=6))
    return inputs, draw(st.lists(st.integers(0, 2), min_size=len(inputs), max_size=len(inputs)))


@pytest.mark.parametrize("decoding", [Greedy(), Beams(2), Sampling(0, top_p=0.9)], ids=lambda d: type(d).__name__)
@pytest.mark.parametrize("kind", ["llama", "bloom", "mamba", "narrow mistral"])
@given(call=calls())
@settings(max_examples=8, deadline=None, derandomize=True, database=None)
def test_a_row_does_not_depend_on_its_company(kind: str, decoding: Decoding, call: tuple[list[Row], list[int]]) -> None:
    (inputs, owner), base = call, backbone(kind)
    together = Generator(base, PROMPTS).generate(inputs, owner, max_new_tokens=4, decoding=decoding)
    in_parts = Generator(base, PROMPTS).generate(inputs, owner, max_new_tokens=4, decoding=decoding, rows=2)
    assert together == in_parts
    first = Generator(base, [PROMPTS[owner[0]]]).generate(inputs[:1], max_new_tokens=4, decoding=decoding)
    assert first == together[:1]


@pytest.mark.parametrize("kind", ["llama", "mamba"])
def test_a_checkpoints_own_habits_change_nothing(kind: str) -> None:
    habits = {"do_sample": True, "temperature": 9.0, "repetition_penalty": 3.0, "max_length": 3, "num_beams": 2}
    habits |= {"forced_eos_token_id": 9, "min_new_tokens": 5, "no_repeat_ngram_size": 1}
    base = tiny_backbone(kind)
    base.model.generation_config.update(**habits, suppress_tokens=list(range(10, 200)))
    before = base.model.generation_config.to_dict()
    expected = [continue_plainly(base, PROMPTS[0], row) for row in INPUTS]
    assert Generator(base, PROMPTS).generate(INPUTS, max_new_tokens=NEW) == expected
    assert base.model.generation_config.to_dict() == before


def test_the_end_is_the_tokenizers_too() -> None:
    base = tiny_backbone()
    base.model.generation_config.eos_token_id = None
    said = Generator(base, PROMPTS).generate(INPUTS, OWNER, max_new_tokens=NEW)
    base.tokenizer.eos_token = base.tokenizer.convert_ids_to_tokens(said[0][3])
    assert Generator(base, PROMPTS).generate(INPUTS, OWNER, max_new_tokens=NEW)[0] == said[0][:3]


@pytest.mark.parametrize("kept", CACHES)
def test_a_prompt_is_read_once(kept: Any) -> None:
    base = tiny_backbone()
    read: list[tuple[int, ...]] = []
    base.model.model.layers[0].register_forward_hook(lambda module, args, output: read.append(args[0].shape[:2]))
    generator = Generator(base, draw_prompts(40, 30))
    assert read[-1] == (2, 40)
    for _ in range(2):
        read.clear()
        generator.generate(INPUTS, [0, 1, 0, 1, 0], max_new_tokens=3, cache=kept)
        assert read == [(5, 9), (5, 1), (5, 1)]


def test_the_example_of_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = tiny_backbone()
    base.model.save_pretrained("my-model")
    base.tokenizer.save_pretrained("my-model")
    for name, vectors in zip("abc", PROMPTS[:2] + PROMPTS[:1], strict=True):
        make_prompt(vectors=vectors).save(f"prompt-{name}")
    text = (Path(__file__).parents[1] / "docs" / "engine.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(example, names)
    assert len(names["texts"]) == 2
    assert len(names["members"]) == 3


def test_passes_are_bounded_in_rows_and_beams() -> None:
    base = tiny_backbone()
    read: list[int] = []
    base.model.model.layers[0].register_forward_hook(lambda module, args, output: read.append(len(args[0])))
    generator = Generator(base, PROMPTS[:1])
    read.clear()
    generator.generate(4 * INPUTS, max_new_tokens=1, rows=8)
    generator.generate(4 * INPUTS, max_new_tokens=1, rows=8, decoding=Beams(3))
    assert read == [8, 8, 4] + 10 * [6]


def test_generating_leaves_prompts_and_weights_as_they_are() -> None:
    base, prompts = tiny_backbone(), [torch.nn.Parameter(prompt) for prompt in draw_prompts(3, 8)]
    before = [prompt.detach().clone() for prompt in prompts]
    Generator(base, prompts).generate(INPUTS, [0, 1, 1, 0, 0], max_new_tokens=3)
    assert all(map(torch.equal, prompts, before))
    assert base.weights_in_memory_sha256() == base.weights_sha256


def test_no_rows_have_no_continuations() -> None:
    assert Generator(backbone("llama"), PROMPTS).generate([], max_new_tokens=3) == []


_PAIR: dict[str, Any] = {"vocab_size": 384, "d_model": 32, "eos_token_id": 2, "pad_token_id": 0}
PAIRS: dict[str, dict[str, Any]] = {
    "t5": _PAIR | {"d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    "bart": _PAIR
    | {"encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 64, "max_position_embeddings": 64}
    | {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64, "decoder_start_token_id": 2}
    | {"init_std": 0.2},
}


def tiny_pair(kind: str) -> Backbone:
    """An encoder and a decoder: T5's read positions relative to each other, BART's by column."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(kind, **PAIRS[kind]))
    return Backbone.wrap(model, tiny_tokenizer())


@pytest.mark.parametrize("decoding", [Greedy(), Lookup(), Beams(3)], ids=lambda d: type(d).__name__)
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_an_encoder_reads_the_prompt_before_the_input(kind: str, decoding: Decoding) -> None:
    base = tiny_pair(kind)
    model: Any = base.model

    def search(prompt: Tensor, row: Row) -> Row:
        embeds = torch.cat([prompt, base.embed(row)])[None]

        def step(line: Row) -> Tensor:
            start = torch.tensor([[model.generation_config.decoder_start_token_id, *line]])
            with torch.inference_mode():
                logits: Tensor = model(inputs_embeds=embeds, decoder_input_ids=start, use_cache=False).logits
            return logits[0, -1].log_softmax(0)

        return search_beams(step, decoding.count if isinstance(decoding, Beams) else 1, 1.0, [2])

    expected = [search(PROMPTS[k], row) for row, k in zip(INPUTS, OWNER, strict=True)]
    for kept in CACHES if not isinstance(decoding, Lookup) else CACHES[:1]:
        assert (
            Generator(base, PROMPTS).generate(INPUTS, OWNER, max_new_tokens=NEW, decoding=decoding, cache=kept)
            == expected
        )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"inputs": [(5,), ()]}, "inputs: input 1 has no tokens"),
        ({"owner": [0]}, "owner: names a prompt for 1 inputs, found 5"),
        ({"owner": [0, 1, 2, 3, 0]}, "owner: there is no prompt 3, found 3"),
        ({"owner": [0, 1, 2, -1, 0]}, "owner: there is no prompt -1, found 3"),
        ({"max_new_tokens": 0}, "max_new_tokens: must be at least 1, got 0"),
        ({"max_new_tokens": 250}, "max_new_tokens: 250, a prompt of 3 vectors and input 0 of 4 tokens take 257"),
        ({"decoding": Lookup(), "cache": "static"}, "takes guesses back"),
    ],
)
def test_a_call_that_cannot_be_is_refused(call: dict[str, Any], message: str) -> None:
    arguments = {"inputs": INPUTS, "owner": None, "max_new_tokens": 3} | call
    with pytest.raises(UserError, match=message):
        Generator(backbone("llama"), PROMPTS).generate(**arguments)


def test_a_model_that_has_just_as_many_positions_is_enough() -> None:
    (said,) = Generator(tiny_backbone("gpt2", n_positions=14), PROMPTS).generate(INPUTS[:1], max_new_tokens=7)
    assert len(said) == 7
    with pytest.raises(UserError, match="the model has 13"):
        Generator(tiny_backbone("gpt2", n_positions=13), PROMPTS).generate(INPUTS[:1], max_new_tokens=7)


def test_a_model_that_cannot_take_guesses_back_is_told() -> None:
    with pytest.raises(UserError, match="takes guesses back"):
        Generator(backbone("mamba"), PROMPTS).generate(INPUTS, max_new_tokens=3, decoding=Lookup())


def test_a_model_that_looks_ahead_is_refused() -> None:
    with pytest.raises(UserError, match="it looks ahead"):
        Generator(tiny_backbone("bert"), PROMPTS)


@pytest.mark.parametrize(
    "make",
    [lambda: Beams(1), lambda: Sampling(-1), lambda: Sampling(0, temperature=0), lambda: Sampling(0, top_p=1.1)],
)
def test_a_decoding_out_of_bounds_is_refused(make: Callable[[], Decoding]) -> None:
    with pytest.raises(UserError, match="must hold, got"):
        make()
