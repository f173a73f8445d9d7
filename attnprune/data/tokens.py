"""Token ids of documents of any length: those of the whole document, from windows that are small enough to be fast.

A tokenizer takes seconds and gigabytes for some megabytes at once. Cut text would not do: a tokenizer may put a space
before everything that it is given, and words or runs of line ends at a cut become other tokens. So windows overlap, and
one is followed by the next from a place around which both have the same tokens.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from attnprune.errors import InputError

WINDOW = 1 << 16  # characters
_OVERLAP = 1 << 12
_MAX_WINDOW = 1 << 22
_WINDOWS_AT_ONCE = 64  # a fast tokenizer works on several in parallel


def whole_document(document: str, tokenizer: Any, name: str) -> Iterator[list[int]]:
    """The ids of the document, without special tokens: pieces that are made as they are asked for.

    Raises:
        InputError: millions of characters without a word's end.
    """
    if len(document) <= WINDOW:
        yield tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
    elif getattr(tokenizer, "is_fast", False):
        yield from _from_windows(document, tokenizer, name)
    else:
        yield from _from_beginnings(document, tokenizer)


@dataclass(frozen=True)
class _Window:
    """The tokens of `document[start:stop]`; `places[i]` is where token i begins in the document."""

    start: int
    stop: int
    ids: list[int]
    places: list[int]


def _from_windows(document: str, tokenizer: Any, name: str) -> Iterator[list[int]]:
    starts = range(0, len(document) - _OVERLAP, WINDOW - _OVERLAP)
    spans = [(start, min(start + WINDOW, len(document))) for start in starts]
    left, given, first, count = _encode(document, spans[:1], tokenizer)[0], 0, 1, 1
    while first < len(spans):
        for right in _encode(document, spans[first : first + count], tokenizer):
            if right.stop <= left.stop:
                continue  # inside a window that was widened
            seam = _seam(document, left, right)
            if seam is None:
                left = _widened(document, left, tokenizer, name)
                continue
            yield left.ids[given : seam[0]]
            left, given = right, seam[1]
        first += count
        count = min(2 * count, _WINDOWS_AT_ONCE)  # little is tokenized in vain where little is needed
    yield left.ids[given:]


def _widened(document: str, window: _Window, tokenizer: Any, name: str) -> _Window:
    """A window about twice as long that ends where one of the following windows does."""
    step, length = WINDOW - _OVERLAP, window.stop - window.start
    if length > _MAX_WINDOW:
        raise InputError(f"{name}: {length:,} characters without the end of a word, from character {window.start:,} on")
    stop = min(window.stop + length // step * step, len(document))
    return _encode(document, [(window.start, stop)], tokenizer)[0]


def _encode(document: str, spans: list[tuple[int, int]], tokenizer: Any) -> list[_Window]:
    texts = [document[start:stop] for start, stop in spans]
    made = tokenizer(texts, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    return [
        _Window(start, stop, ids, [start + begin for begin, _ in offsets])
        for (start, stop), ids, offsets in zip(spans, made["input_ids"], made["offset_mapping"], strict=True)
    ]


def _seam(document: str, left: _Window, right: _Window) -> tuple[int, int] | None:
    """(tokens to take from `left`, to skip in `right`), if both agree on the middle half of their overlap.

    Not in a run of letters, of spaces or of signs: how a long one is divided may depend on where it begins and ends.
    """
    edges = (right.start + _OVERLAP // 4, right.start + 3 * _OVERLAP // 4)
    (a, b), (c, d) = ([bisect_left(window.places, edge) for edge in edges] for window in (left, right))
    if left.ids[a:b] != right.ids[c:d] or left.places[a:b] != right.places[c:d]:
        return None
    for i in range(b - 1, a, -1):
        place = left.places[i]
        if left.places[i - 1] < place and _sort(document[place - 1]) != _sort(document[place]):
            return i, i - a + c
    return None


def _sort(character: str) -> tuple[bool, bool]:
    return character.isspace(), character.isalnum()


def _from_beginnings(document: str, tokenizer: Any) -> Iterator[list[int]]:
    """Without the places of tokens: longer and longer beginnings, of which the end may still change."""
    given, size = 0, WINDOW
    while size < len(document):
        ids = tokenizer(document[:size], add_special_tokens=False, verbose=False)["input_ids"][:-_OVERLAP]
        yield ids[given:]
        given, size = max(given, len(ids)), 2 * size
    yield tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"][given:]
