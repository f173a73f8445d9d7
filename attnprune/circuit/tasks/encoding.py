"""Text -> tokens for prompt pairs: which words a tokenizer writes as one token, and which tokens a role covers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from random import Random
from string import Formatter
from typing import Any, TypeVar

import torch

from attnprune.circuit.tasks.prompts import Example
from attnprune.data.vocabulary import check_tokens, unknown_id, unknown_parts
from attnprune.errors import InputError

Span = tuple[int, int]
Word = TypeVar("Word", str, tuple[str, ...])
Item = TypeVar("Item")


class Encoder:
    """A tokenizer as a model reads plain text: its BOS token first where it adds one, nothing after the text.

    `vocabulary`: the model's number of tokens; a tokenizer may have more. Default: those of the tokenizer.
    """

    def __init__(self, tokenizer: Any, vocabulary: int | None = None):
        self.tokenizer = tokenizer
        self.vocabulary = 1 + max(tokenizer.get_vocab().values()) if vocabulary is None else vocabulary
        bos = tokenizer.bos_token_id
        self.opening: list[int] = [bos] if bos is not None and bos in tokenizer("")["input_ids"] else []
        check_tokens(torch.tensor(self.opening), tokenizer, self.vocabulary, "the start of every prompt")
        self._unknown_id = unknown_id(tokenizer)
        self._words: dict[str, int | None] = {}

    def ids(self, text: str, where: str) -> list[int]:
        """Token ids of a text, BOS included.

        Raises:
            InputError: a token that the model does not have, with `where` it is.
        """
        ids = self.opening + self._ids(text)
        check_tokens(torch.tensor(ids), self.tokenizer, self.vocabulary, where)
        return ids

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def continuation(self, text: str, more: str) -> int | None:
        """The token that `more` adds to `text`, or None where that is not exactly one token that the model knows."""
        whole = self._ids(text + more)
        if whole[:-1] != self._ids(text) or whole[-1] == self._unknown_id or whole[-1] >= self.vocabulary:
            return None
        return whole[-1]

    def knows(self, text: str) -> bool:
        """Whether the tokenizer knows every part of a text."""
        return not unknown_parts(text, self.tokenizer)

    def word(self, word: str) -> int | None:
        """The token of a space and `word` inside a text, or None where that is not exactly one token."""
        if word not in self._words:
            self._words[word] = self.continuation("the", f" {word}")
        return self._words[word]

    def words(self, words: Sequence[str]) -> list[int]:
        """The tokens of words that are one token each."""
        return [token for word in words if (token := self.word(word)) is not None]

    def spans(self, text: str, characters: Mapping[str, Span]) -> dict[str, Span]:
        """Half-open token spans of half-open character spans: all tokens that overlap them."""
        if not self.tokenizer.is_fast:
            raise InputError("this tokenizer cannot say which characters a token covers (not a fast tokenizer)")
        offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        found = {}
        for role, (start, end) in characters.items():
            tokens = [index for index, (first, last) in enumerate(offsets) if first < end and last > start]
            found[role] = (len(self.opening) + tokens[0], len(self.opening) + tokens[-1] + 1)
        return found


class Lexicon:
    """The words of one split: its third of any word list, as far as the tokenizer writes them as one token each.

    `task` is for messages; all splits of a task have the same `seed`, and `part` is 0, 1 or 2.
    """

    def __init__(self, task: str, encoder: Encoder, seed: str, part: int):
        self.task = task
        self.encoder = encoder
        self._seed = seed
        self._part = part

    def third(self, items: Sequence[Item]) -> list[Item]:
        """This split's items of a list, a seeded choice; the other splits have the others."""
        shuffled = list(items)
        Random(self._seed).shuffle(shuffled)
        return shuffled[self._part :: 3]

    def words(self, what: str, words: Sequence[Word], need: int) -> list[Word]:
        """This split's words (or tuples of forms of a word) whose every form is one token.

        Raises:
            InputError: fewer than `need` in a split.
        """
        found = [word for word in words if all(map(self._is_one_token, (word,) if isinstance(word, str) else word))]
        if len(found) < 3 * need:
            raise InputError(
                f"{self.task}: this tokenizer has {len(found)} {what} that are one token each, {3 * need} are needed",
                hint="the task induction works with any tokenizer",
            )
        return self.third(found)

    def _is_one_token(self, word: str) -> bool:
        return self.encoder.word(word) is not None


def in_turn(items: Sequence[Item], draw: Random) -> Iterator[tuple[int, Item]]:
    """(index, item) over and over in one shuffled order, so that all are used equally often."""
    order = list(enumerate(items))
    draw.shuffle(order)
    return cycle(order)


def fill(template: str, values: Mapping[str, str]) -> tuple[str, dict[str, Span]]:
    """A template with its {role} slots filled, and the character span of every slot."""
    text, spans = "", {}
    for literal, role, _, _ in Formatter().parse(template):
        text += literal
        if role is not None:
            spans[role] = (len(text), len(text) + len(values[role]))
            text += values[role]
    return text, spans


def example(
    lexicon: Lexicon,
    template: tuple[int, str],
    clean: Mapping[str, str],
    changes: Mapping[str, str],
    answers: Sequence[int],
    wrong: Sequence[int],
) -> Example:
    """The example of a template (index, text) with `clean` in its slots; `changes` are other words when corrupted.

    Raises:
        InputError: the two prompts are not aligned token by token.
    """
    encoder = lexicon.encoder
    (text, places), (other, other_places) = fill(template[1], clean), fill(template[1], {**clean, **changes})
    ids, other_ids = (encoder.ids(prompt, lexicon.task) for prompt in (text, other))
    roles = encoder.spans(text, places)
    if len(ids) != len(other_ids) or roles != encoder.spans(other, other_places):
        raise InputError(f"{lexicon.task}: this tokenizer does not align {text!r} with {other!r}")
    roles["END"] = (len(ids) - 1, len(ids))
    return Example(ids, other_ids, list(answers), list(wrong), roles, template[0], (text, other))
