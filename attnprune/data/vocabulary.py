"""Token ids that a model has an embedding for. A tokenizer may know more; only the text that uses one is refused."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnprune.errors import InputError


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
