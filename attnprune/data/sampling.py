"""Text that a base model writes itself, and its cache: a file per request, or what an interrupted drawing got to."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from attnprune.attention.gates import mix_seed
from attnprune.data.blocks import Blocks
from attnprune.data.drawing import writer
from attnprune.data.vocabulary import check_tokens
from attnprune.errors import InputError
from attnprune.files import held, unusable, write_atomic

DRAWS = 2  # what a seed draws; another number for every change of it, so that cached text is never taken for new
_CUDA_BYTES, _CPU_BYTES, _CPU_ROWS = 4 << 30, 1 << 30, 32
_DIGEST = hashlib.sha256().digest_size


def cache_folder() -> Path:
    """Where text that a model wrote is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "attnprune"


def self_written(model: Any, tokenizer: Any, seq_len: int, tokens: int, seed: int, cache: Path, key: str) -> Blocks:
    """Blocks sampled from the base model itself (temperature 1, from its start token), cached under `cache`.

    On this text the expected loss difference to the base IS the KL divergence, and no data set is needed.
    `key` identifies the model; the cache file name also holds the sizes, the seed and the kind of device. Rows go to
    the disk as they are written: a drawing that was interrupted goes on where it stopped, with the same rows.

    Raises:
        InputError: as `sample`; or the cache cannot be written.
    """
    start, rows = start_token(model, tokenizer), -(-tokens // seq_len)
    at_once = pieces_of(rows, rows_that_fit(model, seq_len))
    drawn = f"{DRAWS} {key} {seq_len} {tokens} {seed} {model.device.type} {at_once}"
    file = cache / f"self-{hashlib.sha256(drawn.encode()).hexdigest()[:16]}.safetensors"
    ids = _read(file)
    if ids is None:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with held(file.with_suffix(".part")) as part:
                ids = _read(file)  # another process may have written it while this one waited
                if ids is None:
                    ids = _finish(part, model, start, (rows, seq_len), at_once, seed)
                    write_atomic(file, save({"input_ids": ids}))
                Path(part.name).unlink(missing_ok=True)
        except OSError as error:
            raise unusable(file, error) from None
    return Blocks(ids, ids.clone(), "self")


def sample(model: Any, tokenizer: Any, rows: int, seq_len: int, seed: int, rows_at_once: int = 0) -> Tensor:
    """[rows, seq_len] tokens drawn from the model, each row from its start token on, at temperature 1.

    What is drawn depends on `rows_at_once` and on the device; 0 means as many as fit (`rows_that_fit`).
    The global random state is left alone.

    Raises:
        InputError: the tokenizer has no token to start with, or one that the model does not have.
    """
    start = start_token(model, tokenizer)
    at_once = pieces_of(rows, rows_at_once or rows_that_fit(model, seq_len))
    return torch.cat(list(_pieces(model, start, rows, seq_len, at_once, seed, 0)))[:rows]


def start_token(model: Any, tokenizer: Any) -> int:
    """The token that a text starts with: BOS, or EOS where there is none.

    Raises:
        InputError: neither, or one that the model does not have.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise InputError("self: this tokenizer has no BOS or EOS token to start a text with")
    check_tokens(torch.tensor([start]), tokenizer, model.config.vocab_size, "self")
    return start


def rows_that_fit(model: Any, seq_len: int) -> int:
    """Rows to write at once, at least 8: as many as keep their cache and their logits in 4 GiB on CUDA, in 1 GiB on a
    CPU, where more than 32 gain little."""
    config, on_cuda = model.config.get_text_config(), model.device.type == "cuda"
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cached = 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize
    logits = 4 * config.vocab_size * torch.float32.itemsize  # logits, noise and what the draw makes of them
    fit = (_CUDA_BYTES if on_cuda else _CPU_BYTES) // (seq_len * cached + logits)
    return max(8, fit if on_cuda else min(fit, _CPU_ROWS))


def pieces_of(rows: int, most: int) -> int:
    """Rows of a piece: pieces of one size, at most `most`, with as few rows beyond those wanted as possible."""
    return -(-rows // -(-rows // most))


def _pieces(model: Any, start: int, rows: int, seq_len: int, at_once: int, seed: int, first: int) -> Iterator[Tensor]:
    """The pieces [at_once, seq_len] from number `first` on. Each has its own seed, so they can be drawn apart."""
    count = -(-rows // at_once)
    if first < count:
        write = writer(model, start, at_once, seq_len)
        for piece in range(first, count):
            yield write(mix_seed(seed, piece))


# The cache


def _read(file: Path) -> Tensor | None:
    """The tokens of a finished file; None if there is none. One that was damaged is removed."""
    try:
        return load_file(file)["input_ids"] if file.exists() else None
    except SafetensorError:
        file.unlink()
        return None


def _finish(part: BinaryIO, model: Any, start: int, shape: tuple[int, int], at_once: int, seed: int) -> Tensor:
    """All rows: the pieces in the file, and behind them those that are missing, each on the disk once it is written."""
    rows, seq_len = shape
    done = _intact(part, at_once * seq_len)
    for piece in _pieces(model, start, rows, seq_len, at_once, seed, len(done)):
        content = piece.numpy().astype("<i8").tobytes()
        part.write(hashlib.sha256(content).digest() + content)
        part.flush()
        os.fsync(part.fileno())
        done.append(content)
    ids = np.frombuffer(b"".join(done), "<i8").astype(np.int64)
    return torch.from_numpy(ids).view(-1, seq_len)[:rows].contiguous()


def _intact(part: BinaryIO, tokens: int) -> list[bytes]:
    """The pieces (int64, each behind its digest) up to the first that a kill left torn, which is cut off."""
    pieces: list[bytes] = []
    size = _DIGEST + 8 * tokens
    part.seek(0)
    while len(record := part.read(size)) == size and hashlib.sha256(record[_DIGEST:]).digest() == record[:_DIGEST]:
        pieces.append(record[_DIGEST:])
    part.truncate(len(pieces) * size)
    part.seek(0, os.SEEK_END)
    return pieces
