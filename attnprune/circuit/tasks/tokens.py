"""Tasks made of tokens instead of sentences: induction on any vocabulary, and the bundled model's sums."""

from __future__ import annotations

import re
from collections.abc import Iterator
from random import Random
from typing import Any

from attnprune.circuit.tasks.encoding import Lexicon, in_turn
from attnprune.circuit.tasks.prompts import Example
from attnprune.data import addition_task
from attnprune.errors import InputError

# (tokens of the list, how many of them are repeated): one prompt length, several distances between the copies.
SHAPES = ((11, 8), (12, 7), (13, 6))
INDUCTION = tuple(f"{listed} random tokens, then the first {repeated} again" for listed, repeated in SHAPES)
ADDITION = ("hundreds", "tens", "units")

_FIRST_DIGIT = len("#ab+cd=")
_OPERANDS = {"tens of a": 1, "units of a": 2, "tens of b": 4, "units of b": 5, "=": 6}


def induction(lexicon: Lexicon, draw: Random) -> Iterator[Example]:
    """A list of random tokens [.. A1 B1 .. A2 B2 ..], then its beginning again up to A1 (END): next is B1.

    Corrupted: A1 and A2 change places in the list, so next is B2, the wrong token. Two tokens differ: what leads from
    there to the answer is what stands before B1 and B2, found by the token at END. (With another list instead, every
    token differs, and the circuit is most of the model.)
    """
    tokenizer, opening = lexicon.encoder.tokenizer, lexicon.encoder.opening
    most = max(listed for listed, _ in SHAPES)
    pool = _printable_tokens(tokenizer, 3 * most)
    if len(pool) < 3 * most:
        raise InputError(f"{lexicon.task}: this tokenizer has {len(pool)} printable tokens, {3 * most} are needed")
    tokens = lexicon.third(pool)
    for template, (listed, repeated) in in_turn(SHAPES, draw):
        first = draw.sample(tokens, listed)
        key, other_key = repeated - 1, draw.randrange(repeated + 1, listed - 1)
        again, swapped = first[:repeated], list(first)
        swapped[key], swapped[other_key] = first[other_key], first[key]
        places = {"A1": key, "B1": key + 1, "A2": other_key, "B2": other_key + 1, "END": listed + repeated - 1}
        yield Example(
            opening + first + again, opening + swapped + again, [first[key + 1]], [first[other_key + 1]],
            {role: (len(opening) + place, len(opening) + place + 1) for role, place in places.items()},
            template, (tokenizer.decode(first + again), tokenizer.decode(swapped + again)),
        )  # fmt: skip


def _printable_tokens(tokenizer: Any, needed: int) -> list[int]:
    """Tokens of whole lower-case words, or, where there are fewer than `needed`, all tokens with something to see."""
    vocabulary = tokenizer.get_vocab()
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
        rows = addition_task(tokenizer)[1].input_ids.tolist()
    except ValueError:  # rows of different lengths
        rows = [[]]
    if len(rows[0]) != _FIRST_DIGIT + len(ADDITION):
        raise InputError(f"{lexicon.task}: this tokenizer does not write '#12+34=046' as one token per character")
    return [(row, "".join(tokenizer.convert_ids_to_tokens(row))) for row in rows]
