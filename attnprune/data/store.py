"""Tokens of large local texts in files: made once, memory-mapped by every process of a run and by later runs."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch

from attnprune.data.blocks import Source, StoredBlocks, rows_of
from attnprune.data.sources import documents, is_local, local_files, source_name
from attnprune.files import temporary_folder, unusable

LARGE = 32 << 20  # bytes of text, from which on its tokens are stored
STORES = 1  # what a file holds; another number for every change of it
_ROWS_AT_ONCE = 1024


def is_large(source: str, tokenizer: Any) -> bool:
    """Whether the tokens of a source are worth a file: a large local text and a tokenizer that can be told apart."""
    if not is_local(source) or not getattr(tokenizer, "is_fast", False):
        return False
    return sum(file.stat().st_size for file in local_files(source)) >= LARGE


def stored_blocks(
    source: str, text_field: str, tokenizer: Any, seq_len: int, max_tokens: int, cache: Path
) -> StoredBlocks:
    """Blocks of a local source, at most `max_tokens`, in a file under `cache`, which is written if it is not there.

    Its name says what decides its content: the text's files with their sizes and times, the tokenizer, the lengths.

    Raises:
        InputError: as `documents` and `rows_of`; or the cache cannot be written.
    """
    files = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in local_files(source)]
    made_from = [STORES, files, text_field, _fingerprint(tokenizer), seq_len, max_tokens]
    key = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:16]
    tokens, facts = cache / f"tokens-{key}.i32", cache / f"tokens-{key}.json"
    try:
        found = _facts(tokens, facts, seq_len)
        if found is None:
            cache.mkdir(parents=True, exist_ok=True)
            with temporary_folder(cache) as made:
                found = _write(made / "tokens", source, text_field, tokenizer, seq_len, max_tokens)
                (made / "facts").write_text(json.dumps(found))
                os.replace(made / "tokens", tokens)
                os.replace(made / "facts", facts)  # last: with it the tokens are whole
    except OSError as error:
        raise unusable(tokens, error) from None
    ids = torch.from_file(str(tokens), shared=False, size=found["rows"] * seq_len, dtype=torch.int32)
    name = source_name(source)
    counted = Source(name, ids.numel(), found["empty"], found["conversations"])
    return StoredBlocks((ids.view(-1, seq_len),), torch.arange(found["rows"]), name, (counted,))


def _write(file: Path, source: str, text_field: str, tokenizer: Any, seq_len: int, max_tokens: int) -> dict[str, int]:
    texts, count, rows = documents(source, text_field, tokenizer), 0, []
    with file.open("wb") as out:
        for row in rows_of(texts, tokenizer, seq_len, max_tokens, source_name(source)):
            rows.append(row)
            if len(rows) == _ROWS_AT_ONCE:
                out.write(torch.tensor(rows, dtype=torch.int32).numpy().tobytes())
                count, rows = count + len(rows), []
        out.write(torch.tensor(rows, dtype=torch.int32).numpy().tobytes())
        out.flush()
        os.fsync(out.fileno())
    return {"rows": count + len(rows), "empty": texts.empty, "conversations": texts.conversations}


def _facts(tokens: Path, facts: Path, seq_len: int) -> dict[str, int] | None:
    """What is known of a whole file; None without one."""
    try:
        found = json.loads(facts.read_text())
        return found if tokens.stat().st_size == 4 * seq_len * found["rows"] else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _fingerprint(tokenizer: Any) -> str:
    """sha256 of all that decides what a fast tokenizer makes of a text."""
    parts = [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
