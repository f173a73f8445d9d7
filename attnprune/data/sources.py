"""Where text comes from: a Hub data set, a file, a folder or a pattern of files. One rule for rows without text."""

from __future__ import annotations

import errno
import glob
import mimetypes
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from attnprune.data import files, hub
from attnprune.data.chat import Conversation, render
from attnprune.errors import InputError
from attnprune.files import unusable

_READABLE = "a .txt, .md, .jsonl or .parquet file (also with .gz, .xz or .zst)"
WHAT_DATA_IS = (
    "data names a file, folder, pattern or Hub data set; in Python a list of strings is the text itself: data=[text]"
)
_MAX_EMPTY_ROWS = 200_000  # in a row; a few bytes can hold billions


@dataclass
class Documents:
    """The texts of a source, read anew by every iteration.

    Rows that are null or blank are skipped. A list of messages becomes text by the tokenizer's chat template.

    Attributes:
        start: a `position` to go on from; the whole source without one.
        empty: rows skipped by the latest iteration so far.
        conversations: rows that the chat template made text of.
    """

    source: str
    field: str = files.DEFAULT_FIELD
    tokenizer: Any = None
    start: dict[str, Any] | None = None
    empty: int = 0
    conversations: int = 0

    @property
    def position(self) -> dict[str, Any]:
        """Where the latest iteration is, as JSON: behind the text that it gave last."""
        return {"empty": self.empty, "conversations": self.conversations, "rows": self._rows.position}

    def __iter__(self) -> Iterator[str]:
        start = self.start or {"empty": 0, "conversations": 0, "rows": None}
        self.empty, self.conversations, in_a_row = start["empty"], start["conversations"], 0
        found, column = self.start is not None, None
        self._rows = (_LocalRows if is_local(self.source) else hub.Rows)(self.source, self.field, start["rows"])
        for row in self._rows:
            column = row.column
            text = self._text(row)
            if text.strip():
                found, in_a_row = True, 0
                self.conversations += isinstance(text, Conversation)
                yield text
                continue
            self.empty += 1
            in_a_row += 1
            if in_a_row > _MAX_EMPTY_ROWS:
                raise InputError(f"{row.place}: {_MAX_EMPTY_ROWS:,} rows without text, one after the other")
        if not found and not self.empty:
            raise InputError(f"{self.source}: {'the file' if Path(self.source).suffix else 'it'} is empty")
        if not found:
            where = "only blank lines" if column is None else f"no text in field {column!r} ({self.empty:,} rows)"
            raise InputError(f"{self.source}: {where}", hint=None if column is None else "use --text-field")

    def _text(self, row: files.Row) -> str:
        if row.value is None:
            return ""
        text = row.value
        try:
            if not isinstance(text, str):
                text = render(text, self.tokenizer)
        except InputError as error:
            raise InputError(f"{row.place}: field {row.column!r}: {error.message}", hint=error.hint) from None
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise InputError(f"{row.place}: a lone surrogate is not text")
        return text


def documents(
    source: str, text_field: str = files.DEFAULT_FIELD, tokenizer: Any = None, start: dict[str, Any] | None = None
) -> Documents:
    """The documents of a source: local files, or else a Hub data set `name[:config[:split]]`.

    A folder gives all files in it that can be read, a pattern (`shards/*.jsonl.gz`) all that match, by name. Without a
    column 'text', one of 'messages' is read. Only `tokenizer` can make text of messages. `start`: see `Documents`.

    Raises:
        InputError: a file is missing, empty, binary, not of a known kind, or has no such field; no text at all.
        AttnPruneError: the Hub data set cannot be reached.
    """
    check_name(source)
    return Documents(source, text_field, tokenizer, start)


def check_name(source: str) -> None:
    """Refuse what is no local source and cannot be a Hub data set either, before the Hub is asked for it.

    Raises:
        InputError: naming it.
    """
    if is_local(source):
        return
    if source.startswith((".", "/", "~")) or source.endswith("/") or _is_file_name(source):
        raise InputError(f"{source}: no such file")
    if not hub.can_be_named(source):
        raise InputError(f"{source}: no such file, and no data set can have this name", hint=WHAT_DATA_IS)


def _is_file_name(source: str) -> bool:
    """Whether a name ends as files do (.jsonl, .pdf), which no data set on the Hub is expected to."""
    return files.readable(Path(source)) or (":" not in source and mimetypes.guess_type(source)[0] is not None)


def is_local(source: str) -> bool:
    """Whether a source is a file, a folder or a pattern; otherwise it is a Hub data set or one of our own names."""
    return _exists(source) or _is_pattern(source)


def source_name(source: str) -> str:
    """How results name a source: a Hub data set by its id, local files without their folder."""
    return Path(source).name if is_local(source) else source


def absolute(source: str) -> str:
    """A local source so that it means the same from any folder; another one as it is."""
    if not is_local(source):
        return source
    return str(Path(source).resolve()) if _exists(source) else os.path.abspath(source)


def local_files(source: str) -> list[Path]:
    """The files of a local source, by name.

    Raises:
        InputError: none that can be read, or a file of another kind that was named.
    """
    path = Path(source)
    if _exists(source) and path.is_dir():
        inside = sorted(file for file in path.rglob("*") if _counts(file.relative_to(path)) and file.is_file())
        found = [file for file in inside if files.readable(file)]
        if not found:
            raise InputError(f"{source}: no file to read in this folder", hint=_READABLE)
        return found
    found = [path] if _exists(source) else [Path(name) for name in sorted(glob.glob(source, recursive=True))]
    found = [file for file in found if not file.is_dir()]
    if not found:
        raise InputError(f"{source}: no such file")
    for file in found:
        if not files.readable(file):
            raise InputError(f"{file}: not {_READABLE}")
    return found


def check_distinct(sources: list[str]) -> None:
    """Refuse text that is named twice: its copies would be trained on and held out.

    Raises:
        InputError: naming it.
    """
    seen: set[str] = set()
    for source in sources:
        for name in [str(file.resolve()) for file in local_files(source)] if is_local(source) else [source]:
            if name in seen:
                raise InputError(f"{name}: named twice by --data", hint="held-out text must not be trained on as well")
            seen.add(name)


class _LocalRows:
    """The rows of a local source, as `hub.Rows`; a position is a number of rows."""

    def __init__(self, source: str, field: str, position: int | None = None):
        self.source, self.field, self.position = source, field, position or 0

    def __iter__(self) -> Iterator[files.Row]:
        every = (row for file in local_files(self.source) for row in files.rows(file, self.field))
        for row in islice(every, self.position, None):
            self.position += 1
            yield row


def _counts(inside: Path) -> bool:
    """Whether a file in a folder is data: not a hidden one, and not the folder's description."""
    return not any(part.startswith(".") for part in inside.parts) and inside.name.lower() != "readme.md"


def _exists(source: str) -> bool:
    try:
        return Path(source).exists()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # nor can it be a Hub name
            raise unusable(Path(source), error) from None
        return False  # no permission
    except ValueError:  # a NUL in the name
        return False


def _is_pattern(source: str) -> bool:
    """`*` and `?` are in no Hub name; `[` is in a slice of a split, so there must be such files."""
    if not glob.has_magic(source):
        return False
    return "*" in source or "?" in source or bool(glob.glob(source, recursive=True))
