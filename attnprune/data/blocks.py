"""Text -> packed token blocks, mixed, with a seeded, disjoint evaluation split.

Documents are joined by the tokenizer's end-of-text token and cut into blocks of `seq_len`.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, overload

import torch
from torch import Tensor
from torch.utils.data import Dataset

from attnprune.data import tokens
from attnprune.data.chat import Conversation
from attnprune.errors import InputError

IGNORED_LABEL = -100
_ROWS_AT_ONCE = 4096
_DOCUMENTS_AT_ONCE = 64  # a fast tokenizer works on several in parallel


@dataclass(frozen=True)
class Source:
    """What one source gave: its name, tokens, rows skipped because they have no text, conversations among them, and how
    many of the tokens stand for characters that the tokenizer does not know."""

    name: str
    tokens: int
    empty_rows: int = 0
    conversations: int = 0
    unknown: int = 0


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

    select = take

    @property
    def seq_len(self) -> int:
        return self.input_ids.shape[1]

    @property
    def tokens(self) -> int:
        return self.input_ids.numel()

    @property
    def fingerprint(self) -> str:
        """sha256 of the tokens and labels: equal fingerprints mean equal data."""
        return _fingerprint(self.input_ids.shape, [self.input_ids], [self.labels])


@dataclass(frozen=True)
class StoredBlocks(Dataset):
    """Blocks of plain text in memory-mapped files, read as they are needed; the processes of a run share the pages.

    Attributes:
        parts: int32 [M, T] each, mapped.
        rows: int64 [N], the chosen rows of all parts, counted through them.
        name, sources: as in `Blocks`.
    """

    parts: tuple[Tensor, ...]
    rows: Tensor
    name: str
    sources: tuple[Source, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self._read(self.rows[[index]])[0]
        return {"input_ids": ids, "labels": ids}

    def take(self, rows: Tensor) -> Blocks:
        """The given rows, in that order, in memory."""
        ids = self._read(self.rows[rows])
        return Blocks(ids, ids, self.name, self.sources)

    def select(self, rows: Tensor) -> StoredBlocks:
        """The given rows, in that order, where they are."""
        return replace(self, rows=self.rows[rows])

    @property
    def seq_len(self) -> int:
        return self.parts[0].shape[1]

    @property
    def tokens(self) -> int:
        return len(self) * self.seq_len

    @property
    def fingerprint(self) -> str:
        """As that of `Blocks` with the same rows."""
        return _fingerprint((len(self), self.seq_len), self.chunks(), self.chunks())

    def chunks(self) -> Iterator[Tensor]:
        """All rows, int64 [up to 4096, T] at a time."""
        return (self._read(rows) for rows in self.rows.split(_ROWS_AT_ONCE))

    def _read(self, rows: Tensor) -> Tensor:
        """int64 [len(rows), T]."""
        ends = torch.tensor([len(part) for part in self.parts]).cumsum(0)
        where = torch.bucketize(rows, ends, right=True)
        ids = torch.empty(len(rows), self.seq_len, dtype=torch.int64)
        for number, part in enumerate(self.parts):
            mine = where == number
            ids[mine] = part[rows[mine] - (ends[number] - len(part))].long()
        return ids


AnyBlocks = Blocks | StoredBlocks


def _fingerprint(shape: Iterable[int], ids: Iterable[Tensor], labels: Iterable[Tensor]) -> str:
    digest = hashlib.sha256(repr(tuple(shape)).encode())
    for tensor in chain(ids, labels):
        digest.update(tensor.to(torch.int32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def unknown_notes(sources: Iterable[Source]) -> list[str]:
    """A line for each source with characters that the tokenizer does not know."""
    return [
        f"{s.name}: {s.unknown:,} of {s.tokens:,} tokens stand for characters that the tokenizer does not know"
        for s in sources
        if s.unknown
    ]


def split(blocks: AnyBlocks, eval_tokens: int, seed: int) -> tuple[AnyBlocks, Blocks]:
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
    return blocks.select(order[held_out:].sort().values), blocks.take(order[:held_out].sort().values)


@overload
def mix(parts: list[Blocks]) -> Blocks: ...
@overload
def mix(parts: list[AnyBlocks]) -> AnyBlocks: ...
def mix(parts: Any) -> AnyBlocks:
    """All blocks of all parts, which stay where they are if one of them is in a file."""
    if len(parts) == 1:
        return parts[0]
    sources = tuple(source for part in parts for source in part.sources)
    name = " + ".join(part.name for part in parts)
    if any(isinstance(part, StoredBlocks) for part in parts):
        return _joined([_stored(part) for part in parts], name, sources)
    ids, labels = (torch.cat([getattr(part, key) for part in parts]) for key in ("input_ids", "labels"))
    return Blocks(ids, labels, name, sources)


def _stored(blocks: AnyBlocks) -> StoredBlocks:
    if isinstance(blocks, StoredBlocks):
        return blocks
    assert torch.equal(blocks.input_ids, blocks.labels)  # only the bundled task has labels of its own
    return StoredBlocks((blocks.input_ids.int(),), torch.arange(len(blocks)), blocks.name, blocks.sources)


def _joined(parts: list[StoredBlocks], name: str, sources: tuple[Source, ...]) -> StoredBlocks:
    rows, before = [], 0
    for part in parts:
        rows.append(part.rows + before)
        before += sum(map(len, part.parts))
    return StoredBlocks(tuple(array for part in parts for array in part.parts), torch.cat(rows), name, sources)


def pack(documents: Iterable[str], tokenizer: Any, seq_len: int, max_tokens: int, name: str) -> Blocks:
    """The blocks that `rows_of` cuts, in memory."""
    tokens = array("i")
    for row in rows_of(documents, tokenizer, seq_len, max_tokens, name):
        tokens.extend(row)
    check_long_enough(len(tokens), seq_len, name)
    ids = torch.frombuffer(tokens, dtype=torch.int32).view(-1, seq_len).long()
    return Blocks(ids, ids, name)


def check_long_enough(tokens: int, seq_len: int, name: str) -> None:
    """Raises InputError: the text is shorter than one block."""
    if tokens < seq_len:
        raise InputError(
            f"{name}: the text is shorter than one block of {seq_len} tokens", hint="use a smaller --seq-len"
        )


def rows_of(
    documents: Iterable[str], tokenizer: Any, seq_len: int, max_tokens: int, name: str, tail: list[int] | None = None
) -> Iterator[list[int]]:
    """Tokenize documents, join them with the end-of-text token and cut blocks of `seq_len`.

    A tokenizer that starts every text with a BOS token (Gemma, Llama) gets one at the start of each block. A document's
    tokens are those of the tokenizer for the whole of it. `tail` is what is left of the documents before these, and
    in the end what is left of these.
    """
    opening = tokenizer("")["input_ids"]
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None and tokenizer.bos_token_id in opening else []
    most, made = max(1, max_tokens // seq_len), 0
    buffer = [] if tail is None else tail
    for ids in _token_ids(documents, tokenizer, max_tokens, name):
        buffer += ids
        start = 0
        while made < most:
            first = [] if bos == buffer[start : start + 1] else bos  # a chat template writes its own
            end = start + seq_len - len(first)
            if end > len(buffer):
                break
            yield first + buffer[start:end]
            start, made = end, made + 1
        del buffer[:start]
        if made == most:
            return


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
