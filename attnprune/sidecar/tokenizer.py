"""A tokenizer in a merged folder: everything that transformers writes, and the vocabularies that it leaves out."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attnprune.errors import InputError
from attnprune.sidecar import format, remote
from attnprune.sidecar.quiet import quiet


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer with its added tokens and all its chat templates, and copy its vocabularies.

    Raises:
        InputError: it cannot be written, because of the name of a chat template for example.
        AttnPruneError: the Hub cannot be reached.
    """
    try:
        with quiet():
            tokenizer.save_pretrained(folder)
    except ValueError as error:
        raise InputError(f"the tokenizer cannot be written: {error}") from error
    for file in _vocabularies(tokenizer.name_or_path, getattr(tokenizer, "_commit_hash", None)):
        if not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)


def _vocabularies(source: str, commit: str | None) -> Iterator[Path]:
    """The vocabulary files in a folder or Hub repository; none for a tokenizer made in memory or read from .gguf."""
    if source and Path(source).is_dir():
        yield from (file for name in format.VOCABULARY_FILES if (file := Path(source) / name).is_file())
    elif commit is not None:
        yield from remote.files_of(source, commit, format.VOCABULARY_FILES)
