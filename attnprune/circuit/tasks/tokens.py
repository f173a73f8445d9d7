"""Tasks made of tokens instead of sentences: induction on any vocabulary, and the bundled model's sums."""

from __future__ import annotations

import re
from collections.abc import Iterator
from random import Random
from typing import Literal

from attnprune.circuit.tasks.encoding import Encoder, Lexicon, in_turn
from attnprune.circuit.tasks.prompts import Example
from attnprune.data.texts import addition_task
from attnprune.data.vocabulary import check_tokens
from attnprune.errors import InputError

# (tokens of the list, how many of them are repeated): one prompt length, several distances between the copies.
SHAPES = ((11, 8), (12, 7), (13, 6))
INDUCTION = tuple(f"{listed} random tokens, then the first {repeated} again" for listed, repeated in SHAPES)
ADDITION = ("hundreds", "tens", "units")

_FIRST_DIGIT = len("#ab+cd=")
_OPERANDS = {"tens of a": 1, "units of a": 2, "tens of b": 4, "units of b": 5, "=": 6}


def induction(lexicon: Lexicon, draw: Random, corruption: Literal["query", "keys", "values"]) -> Iterator[Example]:
    """A list of random tokens [.. A1 B1 .. A2 B2 ..], then its beginning again up to A1 (END): next is B1.

    Corrupted, so that next is B2, the wrong token: `query` A2 stands at END; `keys` A1 and A2 change places in the
    list; `values` B1 and B2 do. So they change what an induction head looks for, what it is found by (written there by
    previous-token heads) or what is copied. (With another list instead, the circuit is most of the model.)
    """
    tokenizer, opening = lexicon.encoder.tokenizer, lexicon.encoder.opening
    most = max(listed for listed, _ in SHAPES)
    pool = _printable_tokens(lexicon.encoder, 3 * most)
    if len(pool) < 3 * most:
        raise InputError(f"{lexicon.task}: this tokenizer has {len(pool)} printable tokens, {3 * most} are needed")
    tokens = lexicon.third(pool)
    for template, (listed, repeated) in in_turn(SHAPES, draw):
        first = draw.sample(tokens, listed)
        key, other_key, end = repeated - 1, draw.randrange(repeated + 1, listed - 1), listed + repeated - 1
        places = {"A1": key, "B1": key + 1, "A2": other_key, "B2": other_key + 1, "END": end}
        clean = first + first[:repeated]
        corrupted = list(clean)
        if corruption == "query":
            corrupted[end] = first[other_key]
        else:
            one, other = (key, other_key) if corruption == "keys" else (key + 1, other_key + 1)
            corrupted[one], corrupted[other] = first[other], first[one]
        yield Example(
            opening + clean, opening + corrupted, [first[key + 1]], [first[other_key + 1]],
            {role: (len(opening) + place, len(opening) + place + 1) for role, place in places.items()},
            template, (tokenizer.decode(clean), tokenizer.decode(corrupted)),
        )  # fmt: skip


def _printable_tokens(encoder: Encoder, needed: int) -> list[int]:
    """Tokens of whole lower-case words, or, where there are fewer than `needed`, all tokens with something to see."""
    tokenizer = encoder.tokenizer
    vocabulary = {piece: token for piece, token in tokenizer.get_vocab().items() if token < encoder.vocabulary}
    words = sorted(token for piece, token in vocabulary.items() if re.fullmatch("[Ġ▁][a-z]{3,}", piece))
    if len(words) >= needed:
        return words
    ordinary = sorted(set(vocabulary.values()) - set(tokenizer.all_special_ids))
    texts = [tokenizer.decode([token]) for token in ordinary]
    return [
        t for t, text in zip(ordinary, texts, strict=True) if text.strip() and text.isprintable() and "�" not in text
    ]


def addition(lexicon: Lexicon, draw: Random) -> Iterator[Example]:
    """A sum `#ab+cd=efg` up to one of its answer's digits, which is next; none of them was trained on.

    Corrupted: another sum with another digit there, which is the wrong token.
    """
    opening = lexicon.encoder.opening
    sums = lexicon.third(_held_out_sums(lexicon))
    roles = {role: (len(opening) + place, len(opening) + place + 1) for role, place in _OPERANDS.items()}
    for digit, _ in in_turn(ADDITION, draw):
        cut = _FIRST_DIGIT + digit
        ids, text = draw.choice(sums)
        other, other_text = draw.choice([candidate for candidate in sums if candidate[0][cut] != ids[cut]])
        end = {"END": (len(opening) + cut - 1, len(opening) + cut)}
        yield Example(
            opening + ids[:cut], opening + other[:cut], [ids[cut]], [other[cut]], roles | end, digit,
            (text[:cut], other_text[:cut]),
        )  # fmt: skip


def _held_out_sums(lexicon: Lexicon) -> list[tuple[list[int], str]]:
    """(token ids, text) of the sums that the bundled model never saw in training."""
    tokenizer = lexicon.encoder.tokenizer
    try:
        ids = addition_task(tokenizer)[1].input_ids
        check_tokens(ids, tokenizer, lexicon.encoder.vocabulary, lexicon.task)
        rows = ids.tolist()
    except ValueError:  # rows of different lengths
        rows = [[]]
    if len(rows[0]) != _FIRST_DIGIT + len(ADDITION):
        raise InputError(f"{lexicon.task}: this tokenizer does not write '#12+34=046' as one token per character")
    return [(row, "".join(tokenizer.convert_ids_to_tokens(row))) for row in rows]
