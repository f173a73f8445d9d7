"""Text -> packed token blocks with a seeded, disjoint evaluation split.

Documents are joined by the tokenizer's end-of-text token and cut into blocks of `seq_len`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from attnprune.errors import InputError

IGNORED_LABEL = -100
_PIECE_CHARACTERS = 1 << 16
_PIECES_AT_ONCE = 64


@dataclass(frozen=True)
class Blocks(Dataset):
    """Token blocks of equal length.

    Attributes:
        input_ids: int64 [N, T].
        labels: int64 [N, T]; -100 where the prediction does not count; equals `input_ids` for plain text.
        name: where the text came from.
    """

    input_ids: Tensor
    labels: Tensor
    name: str

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.input_ids[index], "labels": self.labels[index]}

    def take(self, rows: Tensor) -> Blocks:
        """The given rows, in that order."""
        return Blocks(self.input_ids[rows], self.labels[rows], self.name)

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


def pack(documents: Iterable[str], tokenizer: Any, seq_len: int, max_tokens: int, name: str) -> Blocks:
    """Tokenize documents, join them with the end-of-text token and cut blocks of `seq_len`; the tail is dropped.

    A tokenizer that starts every text with a BOS token (Gemma, Llama) gets one at the start of each block.

    Raises:
        InputError: the text is shorter than one block.
    """
    opening = tokenizer("")["input_ids"]
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None and tokenizer.bos_token_id in opening else []
    body = seq_len - len(bos)
    eos = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    rows: list[list[int]] = []
    buffer: list[int] = []
    pieces = ((piece, last) for document in documents for piece, last in _pieces(document))
    while len(rows) * seq_len < max_tokens and (batch := _next_pieces(pieces, max_tokens - len(rows) * seq_len)):
        tokens = tokenizer([piece for piece, _ in batch], add_special_tokens=False, verbose=False)["input_ids"]
        for (_, last), ids in zip(batch, tokens, strict=True):
            buffer += ids + eos if last else ids
        whole = len(buffer) // body
        rows += [bos + buffer[i * body : (i + 1) * body] for i in range(whole)]
        buffer = buffer[whole * body :]
    if not rows:
        raise InputError(
            f"{name}: the text is shorter than one block of {seq_len} tokens", hint="use a smaller --seq-len"
        )
    ids = torch.tensor(rows[: max(1, max_tokens // seq_len)], dtype=torch.int64)
    return Blocks(ids, ids.clone(), name)


def _pieces(document: str) -> Iterator[tuple[str, bool]]:
    """(piece, whether it is the last) of a document cut at line ends: tokenizers slow down on megabytes at once."""
    start = 0
    while len(document) - start > _PIECE_CHARACTERS:
        end = document.rfind("\n", start, start + _PIECE_CHARACTERS) + 1
        end = end if end > start else start + _PIECE_CHARACTERS
        yield document[start:end], False
        start = end
    yield document[start:], True


def _next_pieces(pieces: Iterator[tuple[str, bool]], tokens: int) -> list[tuple[str, bool]]:
    """The next pieces, until they hold `tokens` characters: a fast tokenizer works on several in parallel."""
    batch: list[tuple[str, bool]] = []
    while tokens > 0 and len(batch) < _PIECES_AT_ONCE and (following := next(pieces, None)):
        batch.append(following)
        tokens -= len(following[0])
    return batch
