import pytest
from transformers import PreTrainedTokenizerBase

from softprompt.data.tokens import encode_inputs, encode_labels, encode_targets, render
from softprompt.errors import UserError
from tests.tiny import tiny_tokenizer

TEMPLATE = "Review: {text}\nSentiment:"


def decode(tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...]) -> str:
    text = tokenizer.decode(list(ids), skip_special_tokens=True)
    assert isinstance(text, str)
    return text


def test_the_tiny_tokenizer_is_always_the_same_and_encodes_every_text() -> None:
    tokenizer = tiny_tokenizer()
    assert 300 <= len(tokenizer) <= 400
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    text = "Review: ¡una película 🎬!\n{}"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(" positive") == tiny_tokenizer().encode(" positive")


def test_render_takes_braces_in_a_row_as_they_are() -> None:
    row = {"a": "{b} {{x}} {0!r}", "b": "B", "unused": "-"}
    assert render("{{{a}}} and {b}", row) == "{{b} {{x}} {0!r}} and B"


def test_labels_are_the_tokens_of_their_words() -> None:
    tokenizer = tiny_tokenizer(begin=True, end=True)
    tokens = encode_labels({"p": " positive", "n": " negative"}, tokenizer)
    assert {label: decode(tokenizer, ids) for label, ids in tokens.items()} == {"p": " positive", "n": " negative"}


def test_labels_end_where_one_would_begin_another() -> None:
    tokenizer = tiny_tokenizer()
    tokens = encode_labels({"x": "ab", "y": "abc", "z": "q"}, tokenizer)
    assert all(ids[-1] == tokenizer.eos_token_id for ids in tokens.values())
    assert [len(ids) for ids in tokens.values()] == [3, 4, 2]
    with pytest.raises(UserError, match=r"labels\.words: .* no end-of-sequence token"):
        encode_labels({"x": "ab", "y": "abc"}, tiny_tokenizer(eos=False))


def test_labels_that_tokens_cannot_tell_apart_are_refused() -> None:
    with pytest.raises(UserError, match=r"labels\.words: 'yes' of 'a' and 'yes' of 'b' have the same tokens"):
        encode_labels({"a": "yes", "b": "yes"}, tiny_tokenizer())
    with pytest.raises(UserError, match=r"labels\.words: '' of 'a' has no tokens"):
        encode_labels({"a": "", "b": "yes"}, tiny_tokenizer())


@pytest.mark.parametrize(("begin", "end"), [(False, False), (True, False), (True, True), (False, True)])
def test_a_text_becomes_its_tokens_and_one_end(begin: bool, end: bool) -> None:
    tokenizer = tiny_tokenizer(begin=begin, end=end)
    targets, cut = encode_targets(["great", "a film"], before=" ", max_new_tokens=9, tokenizer=tokenizer)
    assert targets == [(*tokenizer.encode(f" {t}", add_special_tokens=False), 2) for t in ("great", "a film")]
    assert cut == 0


@pytest.mark.parametrize(("begin", "end"), [(False, False), (True, False), (True, True), (False, True)])
def test_a_decoder_is_given_a_text_as_its_tokenizer_frames_it_and_one_end(begin: bool, end: bool) -> None:
    tokenizer = tiny_tokenizer(begin=begin, end=end)
    targets, cut = encode_targets(
        ["great", "a film", "the film"], before=" ", max_new_tokens=4, tokenizer=tokenizer, apart=True
    )
    plain = [tokenizer.encode(f" {text}", add_special_tokens=False) for text in ("great", "a film", "the film")]
    assert targets == [(*([1] if begin else []), *ids, 2)[:4] for ids in plain]
    assert cut == sum(begin + len(ids) >= 4 for ids in plain)
    with pytest.raises(UserError, match="row 2: its text 'y</s>z' holds '</s>', which is to end it"):
        encode_targets(["x", "y</s>z"], before=" ", max_new_tokens=9, tokenizer=tokenizer, apart=True)
    with pytest.raises(UserError, match="row 1: its text '' makes no tokens"):
        encode_targets([""], before="", max_new_tokens=9, tokenizer=tokenizer, apart=True)


def test_a_long_text_keeps_the_tokens_that_fit_and_loses_its_end() -> None:
    tokenizer = tiny_tokenizer()
    whole = tokenizer.encode("abcdef")
    for most in range(1, 9):
        (target,), cut = encode_targets(["abcdef"], before="", max_new_tokens=most, tokenizer=tokenizer)
        assert target == (*whole, 2)[:most]
        assert cut == (target[-1] != 2)


def test_a_text_that_cannot_be_ended_is_refused() -> None:
    with pytest.raises(UserError, match="the tokenizer has no end-of-sequence token"):
        encode_targets(["x"], before=" ", max_new_tokens=9, tokenizer=tiny_tokenizer(eos=False))
    with pytest.raises(UserError, match="row 2: its text 'y</s>z' holds '</s>', which is to end it"):
        encode_targets(["x", "y</s>z"], before=" ", max_new_tokens=9, tokenizer=tiny_tokenizer())
    with pytest.raises(UserError, match="row 1: its text '' makes no tokens"):
        encode_targets([""], before="", max_new_tokens=9, tokenizer=tiny_tokenizer())


@pytest.mark.parametrize(("begin", "end"), [(False, False), (True, False), (True, True), (False, True)])
def test_inputs_carry_what_the_tokenizer_puts_before_a_text_and_nothing_after(begin: bool, end: bool) -> None:
    tokenizer = tiny_tokenizer(begin=begin, end=end)
    rows = [{"text": "a great film"}, {"text": "dull"}]
    encoded = encode_inputs(rows, template=TEMPLATE, fields=["text"], tokenizer=tokenizer, max_tokens=99)
    plain = [tokenizer.encode(render(TEMPLATE, row), add_special_tokens=False) for row in rows]
    assert encoded.inputs == [(*([tokenizer.bos_token_id] if begin else []), *ids) for ids in plain]
    assert encoded.cut == 0


@pytest.mark.parametrize("begin", [False, True])
def test_an_encoder_is_given_what_the_tokenizer_puts_after_a_text_too(begin: bool) -> None:
    tokenizer = tiny_tokenizer(begin=begin, end=True)
    rows = [{"text": "a great film"}, {"text": "the film is great, " * 30}]
    encoded = encode_inputs(rows, template=TEMPLATE, fields=["text"], tokenizer=tokenizer, max_tokens=40, apart=True)
    assert list(encoded.inputs[0]) == tokenizer.encode(render(TEMPLATE, rows[0]))
    assert len(encoded.inputs[1]) <= 40
    assert all(ids[-1] == tokenizer.eos_token_id for ids in encoded.inputs)
    labels = encode_labels({"p": " positive", "n": " negative"}, tokenizer, apart=True)
    assert {label: list(ids) for label, ids in labels.items()} == {
        label: tokenizer.encode(word) for label, word in (("p", " positive"), ("n", " negative"))
    }


def test_what_stands_before_the_prompt_is_taken_from_the_inputs_and_counts_as_theirs() -> None:
    tokenizer = tiny_tokenizer(begin=True)
    rows = [{"text": "a great film"}, {"text": "the film is great, " * 30}]
    whole, rest = (
        encode_inputs(rows, template=TEMPLATE, fields=["text"], tokenizer=tokenizer, max_tokens=40, before=before)
        for before in ((), (1,))
    )
    assert [(1, *ids) for ids in rest.inputs] == whole.inputs
    with pytest.raises(UserError, match="row 1: makes no tokens"):
        encode_inputs(
            [{"text": ""}], template="{text}", fields=["text"], tokenizer=tokenizer, max_tokens=8, before=(1,)
        )


def test_a_long_input_loses_the_end_of_its_longest_field_and_nothing_else() -> None:
    tokenizer = tiny_tokenizer(begin=True)
    template = "Title: {title}\nReview: {text}\nSentiment:"
    rows = [{"title": "a film", "text": "the film is great, " * n} for n in (1, 30, 2)]
    encoded = encode_inputs(rows, template=template, fields=["title", "text"], tokenizer=tokenizer, max_tokens=48)
    assert encoded.cut == 1
    assert [len(ids) <= 48 for ids in encoded.inputs] == [True] * 3
    text = decode(tokenizer, encoded.inputs[1])
    assert text.startswith("Title: a film\nReview: the film is great, the film")
    assert text.endswith("\nSentiment:")
    assert len(encoded.inputs[1]) >= 46
    assert decode(tokenizer, encoded.inputs[2]) == render(template, rows[2])


def test_where_one_field_is_not_enough_the_next_is_cut() -> None:
    tokenizer = tiny_tokenizer()
    row = {"a": "x" * 40, "b": "y" * 30}
    [ids] = encode_inputs([row], template="{a}|{b}|", fields=["a", "b"], tokenizer=tokenizer, max_tokens=12).inputs
    assert len(ids) <= 12
    assert decode(tokenizer, ids).count("|") == 2


@pytest.mark.parametrize("letter", ["🎬", "é", "漢", " ", "\n", "{", "e\u0301"])
def test_letters_of_several_tokens_are_cut_whole(letter: str) -> None:
    tokenizer = tiny_tokenizer()
    for max_tokens in range(16, 24):
        [ids] = encode_inputs(
            [{"text": letter * 50}], template=TEMPLATE, fields=["text"], tokenizer=tokenizer, max_tokens=max_tokens
        ).inputs
        text = decode(tokenizer, ids)
        assert len(ids) <= max_tokens
        assert text.endswith("\nSentiment:")
        assert "\ufffd" not in text


def test_a_template_without_room_is_refused() -> None:
    row = {"text": "a film " * 50}
    with pytest.raises(UserError, match=r"training\.max_tokens: the template alone takes \d+ tokens"):
        encode_inputs([row], template=TEMPLATE, fields=["text"], tokenizer=tiny_tokenizer(), max_tokens=6)


def test_an_input_without_tokens_is_refused_with_its_row() -> None:
    rows = [{"text": "a film"}, {"text": ""}]
    with pytest.raises(UserError, match=r"row 2: makes no tokens with the template '\{text\}'"):
        encode_inputs(rows, template="{text}", fields=["text"], tokenizer=tiny_tokenizer(), max_tokens=8)
    begun = encode_inputs(rows, template="{text}", fields=["text"], tokenizer=tiny_tokenizer(begin=True), max_tokens=8)
    assert begun.inputs[1] == (1,)


def test_no_rows_are_no_inputs() -> None:
    assert encode_inputs([], template=TEMPLATE, fields=["text"], tokenizer=tiny_tokenizer(), max_tokens=8).inputs == []
