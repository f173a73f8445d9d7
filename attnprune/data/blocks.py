"""Text -> packed token blocks, mixed, with a seeded, disjoint evaluation split.

Documents are joined by the tokenizer's end-of-text token and cut into blocks of `seq_len`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from attnprune.data import tokens
from attnprune.data.chat import Conversation
from attnprune.errors import InputError

IGNORED_LABEL = -100
_DOCUMENTS_AT_ONCE = 64  # a fast tokenizer works on several in parallel


@dataclass(frozen=True)
class Source:
    """What one source gave: its name, tokens, rows skipped because they have no text, and conversations among them."""

    name: str
    tokens: int
    empty_rows: int = 0
    conversations: int = 0


@dataclass(frozen=True)
class Blocks(Dataset):
    """Token blocks of equal length.

    Attributes:
        input_ids: int64 [N, T].
        labels: int64 [N, T]; -100 where the prediction does not count; equals `input_ids` for plain text.
        name: where the text came from.
        sources: what each source gave before a split; empty where nobody counted.
    """

    input_ids: Tensor
    labels: Tensor
    name: str
    sources: tuple[Source, ...] = ()

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.input_ids[index], "labels": self.labels[index]}

    def take(self, rows: Tensor) -> Blocks:
        """The given rows, in that order."""
        return replace(self, input_ids=self.input_ids[rows], labels=self.labels[rows])

    @property
    def seq_len(self) -> int:
        return self.input_ids.shape[1]

    @property
    def fingerprint(self) -> str:
        """sha256 of the tokens and labels: equal fingerprints mean equal data."""
        digest = hashlib.sha256(repr(tuple(self.input_ids.shape)).encode())
        for tensor in (self.input_ids, self.labels):
            digest.update(tensor.to(torch.int32).contiguous().numpy().tobytes())
        return digest.hexdigest()


def split(blocks: Blocks, eval_tokens: int, seed: int) -> tuple[Blocks, Blocks]:
    """(train, eval): a seeded choice of whole blocks, about `eval_tokens` of them held out; no block is in both.

    Raises:
        InputError: fewer than two blocks, so nothing could be held out.
    """
    total = len(blocks)
    if total < 2:
        raise InputError(
            f"{blocks.name}: {total} block(s) of {blocks.seq_len} tokens are too few to hold some out",
            hint="give more text or a smaller --seq-len",
        )
    held_out = max(1, min(eval_tokens // blocks.seq_len, total // 5 or 1))
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    # Sorted, so the order of the evaluation sums (and with it the last bit of the loss) does not depend on the seed.
    return blocks.take(order[held_out:].sort().values), blocks.take(order[:held_out].sort().values)


def mix(parts: list[Blocks]) -> Blocks:
    """All blocks of all parts."""
    if len(parts) == 1:
        return parts[0]
    ids, labels = (torch.cat([getattr(part, key) for part in parts]) for key in ("input_ids", "labels"))
    sources = tuple(source for part in parts for source in part.sources)
    return Blocks(ids, labels, " + ".join(part.name for part in parts), sources)


def pack(documents: Iterable[str], tokenizer: Any, seq_len: int, max_tokens: int, name: str) -> Blocks:
    """Tokenize documents, join them with the end-of-text token and cut blocks of `seq_len`; the tail is dropped.

    A tokenizer that starts every text with a BOS token (Gemma, Llama) gets one at the start of each block. A document's
    tokens are those of the tokenizer for the whole of it.

    Raises:
        InputError: the text is shorter than one block.
    """
    opening = tokenizer("")["input_ids"]
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None and tokenizer.bos_token_id in opening else []
    rows: list[list[int]] = []
    buffer: list[int] = []
    for ids in _token_ids(documents, tokenizer, max_tokens, name):
        buffer += ids
        start = 0
        while len(rows) * seq_len < max_tokens:
            first = [] if bos == buffer[start : start + 1] else bos  # a chat template writes its own
            end = start + seq_len - len(first)
            if end > len(buffer):
                break
            rows.append(first + buffer[start:end])
            start = end
        buffer = buffer[start:]
        if len(rows) * seq_len >= max_tokens:
            break
    if not rows:
        raise InputError(
            f"{name}: the text is shorter than one block of {seq_len} tokens", hint="use a smaller --seq-len"
        )
    ids = torch.tensor(rows[: max(1, max_tokens // seq_len)], dtype=torch.int64)
    return Blocks(ids, ids.clone(), name)


def _token_ids(documents: Iterable[str], tokenizer: Any, wanted: int, name: str) -> Iterator[list[int]]:
    """The ids of all documents in pieces, each document with its end-of-text token; about `wanted` at once."""
    eos = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    for batch in _batches(documents, wanted):
        if len(batch) == 1:
            yield from tokens.whole_document(batch[0], tokenizer, name)
            yield _end(batch[0], eos)
            continue
        made = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
        for document, ids in zip(batch, made, strict=True):
            yield ids + _end(document, eos)


def _end(document: str, eos: list[int]) -> list[int]:
    return [] if isinstance(document, Conversation) else eos


def _batches(documents: Iterable[str], characters: int) -> Iterator[list[str]]:
    """Documents to tokenize together, until they hold `characters`; a long one stays by itself."""
    batch: list[str] = []
    for document in documents:
        alone = len(document) > tokens.WINDOW
        if batch and alone:
            yield batch
            batch = []
        batch.append(document)
        if alone or len(batch) == _DOCUMENTS_AT_ONCE or sum(map(len, batch)) >= characters:
            yield batch
            batch = []
    if batch:
        yield batch
