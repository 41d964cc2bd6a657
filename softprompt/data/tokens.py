"""From rows to tokens: the template, the label words or texts, and what is cut where one is too long.

The text around the fields is part of the experiment and is never cut; only the values of the fields are.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import TypeAlias

from transformers import PreTrainedTokenizerBase

from softprompt.errors import UserError

Tokens: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Encoded:
    """Inputs as token ids, in the order of their rows."""

    inputs: list[Tokens]
    """For each row, T token ids; T differs from row to row."""
    cut: int
    """How many of the inputs were too long and lost the end of a field."""


def render(template: str, row: Mapping[str, str]) -> str:
    """The input as text; braces in the row's values are letters like any other."""
    return template.format_map(row)


def encode_labels(
    words: Mapping[str, str], tokenizer: PreTrainedTokenizerBase, *, apart: bool = False
) -> dict[str, Tokens]:
    """The tokens that stand for each label.

    Where the tokens of one label begin those of another, every label ends with the end-of-sequence token, so that
    no label's probability contains another's.

    Args:
        words: For each label, the text that the model is to continue with.
        tokenizer: Of the model.
        apart: Whether a target is a text of its own, as for a decoder: with all special tokens of a text then.

    Raises:
        UserError: A word has no tokens, two have the same, or the end token that is needed does not exist.
    """
    tokens = {label: tuple(tokenizer.encode(word, add_special_tokens=False)) for label, word in words.items()}
    for label, ids in tokens.items():
        if not ids:
            raise UserError(f"labels.words: {words[label]!r} of {label!r} has no tokens; choose another word")
    pairs = list(permutations(tokens, 2))
    for a, b in pairs:
        if tokens[a] == tokens[b]:
            raise UserError(
                f"labels.words: {words[a]!r} of {a!r} and {words[b]!r} of {b!r} have the same tokens "
                f"{list(tokens[a])}; choose words that the tokenizer tells apart"
            )
    if apart:
        tokens = {label: tuple(tokenizer(text_target=word)["input_ids"]) for label, word in words.items()}
    if not any(tokens[b][: len(tokens[a])] == tokens[a] for a, b in pairs):
        return tokens
    end = tokenizer.eos_token_id
    if end is None:
        raise UserError(
            "labels.words: the tokens of one word begin those of another, and the tokenizer has no end-of-sequence "
            "token to tell them apart; choose other words"
        )
    return {label: (*ids, end) for label, ids in tokens.items()}


def encode_targets(
    texts: Sequence[str], *, before: str, max_new_tokens: int, tokenizer: PreTrainedTokenizerBase, apart: bool = False
) -> tuple[list[Tokens], int]:
    """N texts as the tokens that a model is to generate, and how many of them were cut.

    A text ends with the end-of-sequence token. One that is too long loses its end and keeps the tokens that fit: what
    generation would give that goes no further.

    Args:
        texts: Of each row, the text.
        before: What stands between an input and its text.
        max_new_tokens: Most tokens of a target, the end-of-sequence token included.
        tokenizer: Of the model.
        apart: Whether a target is a text of its own, as for a decoder: with the special tokens before it too then.

    Raises:
        UserError: The tokenizer has no end-of-sequence token, or a text makes no tokens or holds that one.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise UserError("labels: the tokenizer has no end-of-sequence token to end a free text; name one in its config")
    spelt = [before + text for text in texts]
    encoded = tokenizer(spelt, add_special_tokens=False, verbose=False)["input_ids"]
    for n, ids in enumerate(encoded, start=1):
        if not ids or end in ids:
            what = f"holds {tokenizer.eos_token!r}, which is to end it" if ids else "makes no tokens"
            raise UserError(f"row {n}: its text {texts[n - 1][:60]!r} {what}; mend it or leave it out")
    if apart:
        framed = tokenizer(text_target=spelt, verbose=False)["input_ids"]
        encoded = [ids[:-1] if ids[-1] == end else ids for ids in framed]
    targets = [(*ids, end)[:max_new_tokens] for ids in encoded]
    return targets, sum(len(ids) >= max_new_tokens for ids in encoded)


def encode_inputs(
    rows: Iterable[Mapping[str, str]],
    *,
    template: str,
    fields: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    apart: bool = False,
    before: Tokens = (),
) -> Encoded:
    """The rows as tokens, with the special tokens that the tokenizer puts before a text, and none after it.

    Of an input that is too long, the field with the most tokens loses its end; where that is not enough, the next.

    Args:
        rows: Values of the template's fields.
        template: The input as text.
        fields: The columns that the template names.
        tokenizer: Of the model.
        max_tokens: Longest input (T), special tokens included.
        apart: Whether the input is a text of its own, as for an encoder: with the special tokens after it too then.
        before: Special tokens that every input begins with and loses, as they stand before the prompt.

    Raises:
        UserError: The template leaves no room for the fields, or a row makes no tokens.
    """
    whole = [{name: row[name] for name in fields} for row in rows]
    tail = 1 if not apart and _adds_end(tokenizer) else 0
    inputs = _encode([render(template, row) for row in whole], tokenizer, tail)
    long = {n: row for n, row in enumerate(whole) if len(inputs[n]) > max_tokens}
    cut = len(long)
    if long:
        _require_room(template, fields, tokenizer, max_tokens, tail)
    while long:
        excess = [len(inputs[n]) - max_tokens for n in long]
        shorter = _cut_longest(list(long.values()), excess, fields, tokenizer)
        encoded = _encode([render(template, row) for row in shorter], tokenizer, tail)
        inputs.update(zip(long, encoded.values(), strict=True))
        long = {n: row for n, row in zip(long, shorter, strict=True) if len(inputs[n]) > max_tokens}
    for n in range(len(whole)):
        if len(inputs[n]) <= len(before):
            raise UserError(f"row {n + 1}: makes no tokens with the template {template!r}; leave it out")
    return Encoded([inputs[n][len(before) :] for n in range(len(whole))], cut)


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase, tail: int) -> dict[int, Tokens]:
    """Texts as tokens, without the last `tail` of each."""
    if not texts:
        return {}
    # Not verbose: longer than the model can take is no matter here, as long inputs are cut.
    encoded = tokenizer(texts, verbose=False)["input_ids"]
    return {n: tuple(ids[: len(ids) - tail]) for n, ids in enumerate(encoded)}


def _adds_end(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer ends every text by itself; where the label comes right after the input, it must not."""
    return tokenizer.eos_token_id is not None and tokenizer.encode("a")[-1] == tokenizer.eos_token_id


def _require_room(
    template: str, fields: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_tokens: int, tail: int
) -> None:
    empty = _encode([render(template, dict.fromkeys(fields, ""))], tokenizer, tail)[0]
    if len(empty) >= max_tokens:
        raise UserError(
            f"training.max_tokens: the template alone takes {len(empty)} tokens, found max_tokens={max_tokens}; "
            "raise it or shorten the template"
        )
    if not tokenizer.is_fast:
        raise UserError(
            f"training.max_tokens: some inputs are longer than {max_tokens} tokens, and this tokenizer "
            f"({type(tokenizer).__name__}) cannot say where to cut them; raise max_tokens"
        )


def _cut_longest(
    rows: list[dict[str, str]], excess: list[int], fields: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, str]]:
    """Each row with its longest field cut by `excess` tokens, and by one letter at least."""
    texts = [row[name] for row in rows for name in fields]
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    spans = iter(encoded["offset_mapping"])
    return [_cut(row, {name: next(spans) for name in fields}, over) for row, over in zip(rows, excess, strict=True)]


def _cut(row: dict[str, str], spans: dict[str, list[tuple[int, int]]], over: int) -> dict[str, str]:
    longest = max(row, key=lambda name: (len(spans[name]), len(row[name])))
    kept = max(0, len(spans[longest]) - over)
    # The start of the first token that goes, not the end of the last that stays: where a letter takes several
    # tokens, all of them end at the same place, and nothing would be cut.
    end = spans[longest][kept][0] if spans[longest] else 0
    return row | {longest: row[longest][:end]}
