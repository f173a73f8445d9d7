"""What a tokenizer makes of a text that a model cannot read as it was meant.

A tokenizer may have more tokens than the model has embeddings: only the text that uses one is refused. One that does
not work on bytes reads every character that it does not know as the same token, or leaves it out: a text that somebody
looks at is refused, naming the characters; in a corpus they are counted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attnprune.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

_RARE = "\U00012000"  # a cuneiform sign: bytes to a tokenizer that works on them, and unknown to any other one
_NAMED = 8  # unknown characters in a message


def ids_of(text: str, tokenizer: Any, vocabulary: int, where: str, **options: Any) -> Tensor:
    """The ids, int64 [1, T], of a text that somebody looks at, for a model of `vocabulary` tokens.

    Args:
        where: what the text is, for messages.
        options: for the tokenizer.

    Raises:
        InputError: it is not UTF-8, or has characters or tokens that the tokenizer or the model does not know.
    """
    if any("\ud800" <= character <= "\udfff" for character in text):  # bytes of a command line that are no UTF-8
        raise InputError(f"{where}: is not UTF-8 text")
    if unknown := unknown_parts(text, tokenizer):
        more = f" and {len(unknown) - _NAMED} more" if len(unknown) > _NAMED else ""
        token, _ = _unknown(tokenizer)
        raise InputError(
            f"{where}: the tokenizer does not know {', '.join(map(repr, unknown[:_NAMED]))}{more}",
            hint="it would leave them out" if token is None else f"it would read each as {token!r}",
        )
    ids = tokenizer(text, return_tensors="pt", **options)["input_ids"]
    check_tokens(ids[0], tokenizer, vocabulary, where)
    return ids.long()


def unknown_id(tokenizer: Any) -> int | None:
    """The id that a tokenizer gives to every character that it does not know; None for one that gives none."""
    return _unknown(tokenizer)[1]


def _unknown(tokenizer: Any) -> tuple[str, int] | tuple[None, None]:
    """The unknown token and its id. Byte-level tokenizers may name one, and never use it."""
    token = tokenizer.unk_token
    if token is None and getattr(tokenizer, "is_fast", False):  # transformers may not be told of it
        token = getattr(tokenizer.backend_tokenizer.model, "unk_token", None)
    number = None if token is None else tokenizer.convert_tokens_to_ids(token)
    return (None, None) if number is None or number not in _plain(_RARE, tokenizer) else (token, number)


def unknown_parts(text: str, tokenizer: Any) -> list[str]:
    """The parts of a text that a tokenizer does not know, each once; what it was told to read as unknown is none."""
    token, number = _unknown(tokenizer)
    if number is None:
        return [] if _plain(_RARE, tokenizer) else [c for c in _characters(text) if not _plain(c, tokenizer)]
    if not getattr(tokenizer, "is_fast", False):
        return [c for c in _characters(text) if number in _plain(c, tokenizer)]
    made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    pairs = zip(made["input_ids"], made["offset_mapping"], strict=True)
    parts = dict.fromkeys(text[start:stop] for index, (start, stop) in pairs if index == number)
    return [part for part in parts if part != token]


def count_unknown(ids: Tensor, tokenizer: Any) -> int:
    """How many ids of a corpus stand for characters that the tokenizer does not know.

    None can be counted where the same token ends or begins every text.
    """
    number = unknown_id(tokenizer)
    if number is None or number in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        return 0
    return int((ids == number).sum())


def _characters(text: str) -> list[str]:
    return [character for character in dict.fromkeys(text) if not character.isspace()]


def _plain(text: str, tokenizer: Any) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def check_tokens(
    ids: Tensor, tokenizer: Any, vocabulary: int, where: str, first: int = 0, total: int | None = None
) -> None:
    """Refuse token ids, int64 [T] or blocks of them [N, T], that a model of `vocabulary` tokens cannot read.

    Args:
        first, total: number of the first of these blocks, and how many there are in all.

    Raises:
        InputError: naming the first such token, its id, the vocabulary and where it is.
    """
    beyond = (ids >= vocabulary).nonzero()
    if not len(beyond):
        return
    place = tuple(beyond[0].tolist())
    token = int(ids[place])
    row = f", block {first + place[0] + 1} of {total or len(ids)}" if ids.ndim > 1 else ""
    raise InputError(
        f"{where}{row}: the token {tokenizer.convert_ids_to_tokens(token)!r} (id {token}) is beyond the model's "
        f"vocabulary of {vocabulary}",
        hint="the tokenizer has more tokens than the model; take this one out of the text",
    )
