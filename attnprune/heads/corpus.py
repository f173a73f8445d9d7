"""The text that is looked at, as blocks of tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unicodedata import category

import torch
from torch import Tensor

from attnprune.data.blocks import Blocks, mix
from attnprune.data.sources import WHAT_DATA_IS, check_distinct
from attnprune.data.texts import addition_task, read_blocks
from attnprune.data.vocabulary import check_tokens
from attnprune.errors import InputError
from attnprune.sidecar import bases
from attnprune.sidecar.models import Named

MAX_TOKENS = 1024  # of a block: all its pairs are held at once, for one layer

Watch = Callable[[str, int, int], None]
"""Told what is going on: (stage, done, of)."""


def check_sources(sources: list[str]) -> None:
    """Refuse names that mean something else here than in training, before a model is read.

    Raises:
        InputError: naming the source.
    """
    if "self" in sources:
        raise InputError(
            "data self: is text that a model writes to be trained or evaluated on, for sparsify and eval only",
            hint=WHAT_DATA_IS,
        )
    if "task" in sources and len(sources) > 1:
        raise InputError("data task: is the bundled model's own text, beside which there is no other")


def blocks_of(named: Named, sources: list[str], tokens: int, seq_len: int, text_field: str) -> Blocks:
    """The text as blocks of equal length.

    Raises:
        InputError: a block longer than the context or than `tokens` allow, no such text, a token the model lacks.
    """
    if sources == ["task"]:
        blocks = addition_task(named.tokenizer)[1]
        _check_room(tokens, blocks.seq_len, 1)
        blocks = blocks.take(torch.arange(min(len(blocks), tokens // blocks.seq_len)))
    else:
        context = bases.context_length(named.model) or MAX_TOKENS
        longest = min(context, MAX_TOKENS)
        if seq_len > longest:
            limit = f"the model's context of {context}" if seq_len > context else f"the {MAX_TOKENS} that fit"
            raise InputError(f"a block of {seq_len} tokens is more than {limit}")
        check_distinct(sources)
        measured = 0 if named.sidecar is None else named.sidecar.manifest.result.seq_len
        length = seq_len or min(measured or 512, longest)
        _check_room(tokens, length, len(sources))
        share = tokens // len(sources)
        blocks = mix([read_blocks(source, text_field, named.tokenizer, length, share) for source in sources])
    check_tokens(blocks.input_ids, named.tokenizer, named.model.config.vocab_size, blocks.name)
    return replace(blocks, labels=blocks.input_ids)


def _check_room(tokens: int, length: int, texts: int) -> None:
    """Raises InputError: a block of each text has more than `tokens`."""
    if tokens < length * texts:
        each = "" if texts == 1 else f" of each of {texts} texts"
        raise InputError(f"{tokens} tokens: are fewer than a block of {length}{each}")


def delimiters_of(ids: Tensor, tokenizer: Any) -> Tensor:
    """Which tokens of the blocks are delimiters, bool like `ids`."""
    unique, place = ids.unique(return_inverse=True)
    return torch.tensor([is_delimiter(tokenizer.decode([token])) for token in unique.tolist()])[place]


def is_delimiter(text: str) -> bool:
    """Whether a token is punctuation, symbols or line breaks and nothing else, but for spaces around them."""
    marks = [character for character in text if character not in " \t"]
    return bool(marks) and all(c in "\n\r" or category(c)[0] == "P" or category(c) in ("Sc", "Sk", "Sm") for c in marks)
