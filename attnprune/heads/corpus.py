"""What is looked at: models by name, one after the other, and the text as blocks of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unicodedata import category

import torch
from torch import Tensor

from attnprune.data.blocks import Blocks, mix
from attnprune.data.sources import check_distinct
from attnprune.data.texts import addition_task, read_blocks
from attnprune.data.vocabulary import check_tokens
from attnprune.errors import InputError
from attnprune.sidecar import bases, hub, loading
from attnprune.sidecar.folder import is_merged, open_artefact

MAX_TOKENS = 1024  # of a block: all its pairs are held at once, for one layer

Watch = Callable[[str, int, int], None]
"""Told what is going on: (stage, done, of)."""


class Named(NamedTuple):
    """A loaded model. `seq_len`: tokens of a block that fit it, 0 where nothing says."""

    name: str
    model: Any
    tokenizer: Any
    seq_len: int = 0


def sources_of(data: str | Path | Sequence[str | Path], tokens: int) -> list[str]:
    """The names of the texts, before a model is loaded for them.

    Raises:
        InputError: none, or no tokens of them.
    """
    sources = [str(source) for source in ([data] if isinstance(data, str | Path) else data)]
    if not sources:
        raise InputError("data: names no text")
    if tokens < 1:
        raise InputError(f"tokens {tokens}: is not a number above 0")
    return sources


def models_of(
    model: Any, tokenizer: Any, base: str | None, device: str, dense: bool, notes: list[str]
) -> Iterator[Named]:
    """The model, and the dense base if there is one to describe; each is loaded when it is its turn."""
    if not isinstance(model, str | Path):
        if tokenizer is None:
            raise InputError("a model in memory needs its tokenizer")
        if base is not None:
            raise InputError("base: is for models given by name")
        yield Named(type(model).__name__, model, tokenizer)
        return
    name, where = str(model), bases.pick_device(device)
    folder = hub.sparse_folder(name)
    if folder is None:
        if base is not None:
            raise InputError(f"--base: {name} is a dense model itself")
        loaded = bases.load_base(name, device=where)
        yield Named(name, loaded.model, loaded.tokenizer)
        return
    sidecar = open_artefact(folder)
    yield Named(name, *loading.load(folder, base, device=where), sidecar.manifest.result.seq_len)
    if not dense:
        return
    if base is None and is_merged(folder):
        notes.append("the dense base is not beside it: a merged folder does not hold it; name it with --base")
        return
    dense_name, _ = loading.which_base(sidecar, base)
    loaded = loading.load_dense(sidecar, base, where)
    yield Named(dense_name, loaded.model, loaded.tokenizer)


def blocks_of(named: Named, sources: list[str], tokens: int, seq_len: int, text_field: str) -> Blocks:
    """The text as blocks of equal length."""
    if sources == ["task"]:
        blocks = addition_task(named.tokenizer)[1]
        blocks = blocks.take(torch.arange(min(len(blocks), max(1, tokens // blocks.seq_len))))
    else:
        context = bases.context_length(named.model) or MAX_TOKENS
        longest = min(context, MAX_TOKENS)
        if seq_len > longest:
            limit = f"the model's context of {context}" if seq_len > context else f"the {MAX_TOKENS} that fit"
            raise InputError(f"a block of {seq_len} tokens is more than {limit}")
        check_distinct(sources)
        length, share = seq_len or min(named.seq_len or 512, longest), max(1, tokens // len(sources))
        blocks = mix([read_blocks(source, text_field, named.tokenizer, length, share) for source in sources])
    check_tokens(blocks.input_ids, named.tokenizer, named.model.config.vocab_size, blocks.name)
    return replace(blocks, labels=blocks.input_ids)


def delimiters_of(ids: Tensor, tokenizer: Any) -> Tensor:
    """Which tokens of the blocks are delimiters, bool like `ids`."""
    unique, place = ids.unique(return_inverse=True)
    return torch.tensor([is_delimiter(tokenizer.decode([token])) for token in unique.tolist()])[place]


def is_delimiter(text: str) -> bool:
    """Whether a token is punctuation, symbols or line breaks and nothing else, but for spaces around them."""
    marks = [character for character in text if character not in " \t"]
    return bool(marks) and all(c in "\n\r" or category(c)[0] == "P" or category(c) in ("Sc", "Sk", "Sm") for c in marks)
