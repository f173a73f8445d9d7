"""Tokens of large texts in files: made once, memory-mapped by every process of a run and by later runs.

All that a run needs is tokenized before its first step, because its blocks are drawn at random from the whole text: the
order is then the same for any number of processes, and after a resume. Of a Hub data set no more is read than that.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import torch

from attnprune.data import hub
from attnprune.data.blocks import Source, StoredBlocks, check_long_enough, rows_of
from attnprune.data.sources import check_name, documents, is_local, local_files, source_name
from attnprune.data.vocabulary import count_unknown
from attnprune.files import held, unusable, write_atomic

LARGE = 32 << 20  # bytes of local text, from which on its tokens are stored
MANY = 8 << 20  # tokens of a Hub data set
STORES = 2  # what a file holds; another number for every change of it
_DOCUMENTS_AT_ONCE = 256  # between two positions that are kept


def is_large(source: str, tokenizer: Any, tokens: int) -> bool:
    """Whether a source is worth a file: much local text, or many tokens of a Hub data set; and a tokenizer that can be
    told apart."""
    if not getattr(tokenizer, "is_fast", False):
        return False
    if not is_local(source):
        return tokens >= MANY
    return sum(file.stat().st_size for file in local_files(source)) >= LARGE


def stored_blocks(
    source: str, text_field: str, tokenizer: Any, seq_len: int, max_tokens: int, cache: Path
) -> StoredBlocks:
    """Blocks of a source, at most `max_tokens`, in a file under `cache`, which is written if it is not there.

    Its name says what decides its content: the text's files with their sizes and times (of a Hub data set: its commit),
    the tokenizer, the lengths. One that was interrupted goes on where it was, from the same document.

    Raises:
        InputError: as `documents`, too little text for one block; or the cache cannot be written.
        AttnPruneError: as `documents`.
    """
    check_name(source)
    made_from = [STORES, _version(source), text_field, _fingerprint(tokenizer), seq_len, max_tokens]
    key = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:16]
    tokens, facts = cache / f"tokens-{key}.i32", cache / f"tokens-{key}.json"
    try:
        found = _facts(tokens, facts, seq_len)
        if found is None:
            cache.mkdir(parents=True, exist_ok=True)
            with held(tokens.with_suffix(".part")) as part:
                found = _facts(tokens, facts, seq_len)  # another process may have made it meanwhile
                if found is None:
                    found = _write(part, source, text_field, tokenizer, seq_len, max_tokens)
                    os.replace(part.name, tokens)
                    _position_of(part).replace(facts)  # last: with it the tokens are whole
    except OSError as error:
        raise unusable(tokens, error) from None
    ids = torch.from_file(str(tokens), shared=False, size=found["rows"] * seq_len, dtype=torch.int32)
    name, read = source_name(source), found["read"]
    counted = Source(name, ids.numel(), read["empty"], read["conversations"], count_unknown(ids, tokenizer))
    return StoredBlocks((ids.view(-1, seq_len),), torch.arange(found["rows"]), name, (counted,))


def _write(
    part: BinaryIO, source: str, text_field: str, tokenizer: Any, seq_len: int, max_tokens: int
) -> dict[str, Any]:
    """Append to an unfinished file what is missing in it: whole rows, with the position behind their documents beside
    it, from which an interrupted one goes on."""
    name, most = source_name(source), max(1, max_tokens // seq_len)
    done = _facts(Path(part.name), _position_of(part), seq_len, exactly=False) or {"rows": 0, "tail": [], "read": None}
    rows, tail = done["rows"], done["tail"]
    part.truncate(4 * seq_len * rows)
    texts = documents(source, text_field, tokenizer, done["read"])
    remaining = iter(texts)
    while rows < most and (first := next(remaining, None)) is not None:
        some = chain([first], islice(remaining, _DOCUMENTS_AT_ONCE - 1))
        for row in rows_of(some, tokenizer, seq_len, (most - rows) * seq_len, name, tail):
            part.write(array("i", row).tobytes())
            rows += 1
        part.flush()
        os.fsync(part.fileno())
        done = {"rows": rows, "tail": tail, "read": texts.position}
        write_atomic(_position_of(part), json.dumps(done))
    if not rows:
        _position_of(part).unlink(missing_ok=True)
    check_long_enough(rows * seq_len, seq_len, name)
    return done


def _position_of(part: BinaryIO) -> Path:
    return Path(part.name).with_suffix(".position")


def _version(source: str) -> Any:
    """What tells a text from all others."""
    if not is_local(source):
        return [source, hub.version(source)]
    return [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in local_files(source)]


def _facts(tokens: Path, facts: Path, seq_len: int, *, exactly: bool = True) -> dict[str, Any] | None:
    """What is known of a whole file, or of what is whole in one that may be longer; None without one."""
    try:
        found = json.loads(facts.read_text())
        size, wanted = tokens.stat().st_size, 4 * seq_len * found["rows"]
        return found if size == wanted or (size > wanted and not exactly) else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _fingerprint(tokenizer: Any) -> str:
    """sha256 of all that decides what a fast tokenizer makes of a text."""
    parts = [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
