"""The rows of one local file: .txt and .md are one row, .jsonl and .parquet have many; .gz, .xz and .zst by suffix.

Every reader is bounded: what a small file unfolds to is refused before it fills the memory.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from attnprune.errors import InputError

MESSAGES = "messages"
DEFAULT_FIELD = "text"
COMPRESSIONS = (".gz", ".xz", ".zst")

_MAX_LINE_BYTES = 64 << 20
_MAX_BLANK_LINES = 200_000  # in a row
_MAX_UNFOLDED_BYTES = 512 << 20  # of a compressed text file, which is one document
_MAX_RATIO = 100  # text does not become a hundredth; a file that holds nothing but repetitions does
_MAX_ITEMS = 1 << 20  # of the lists in a row group, unless it has a thousandth as many rows
_BATCH_ROWS = 8


class Row(NamedTuple):
    """One row's text, messages or None, where it stands, and its column (None: the file is the row)."""

    place: str
    column: str | None
    value: Any


def kind(path: Path) -> tuple[str, str]:
    """(suffix, compression suffix or "") of a file name, in lower case: ("A.TXT.gz") is (".txt", ".gz")."""
    inner, outer = ["", "", *(suffix.lower() for suffix in path.suffixes)][-2:]
    return (inner, outer) if outer in COMPRESSIONS else (outer, "")


def readable(path: Path) -> bool:
    """Whether the name is that of a file that can be read."""
    return kind(path)[0] in _READERS


def column_of(names: Iterable[str], field: str) -> str | None:
    """The column to read: `field`, or the messages of a table of conversations that has no column 'text'."""
    found = set(names)
    return field if field in found else MESSAGES if field == DEFAULT_FIELD and MESSAGES in found else None


def rows(path: Path, field: str) -> Iterator[Row]:
    """The rows of a file that is `readable`, with every way that it can fail as one line.

    Raises:
        InputError: missing, damaged, binary, not UTF-8, no such column, or larger inside than the bounds.
    """
    suffix, compression = kind(path)
    try:
        if not path.is_file():
            raise InputError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
        if path.stat().st_size:
            yield from _READERS[suffix](path, compression, field)
    except (EOFError, MemoryError, lzma.LZMAError, zlib.error, ValueError) as error:
        raise InputError(f"{path}: not a {compression or suffix} file, or a damaged one") from error
    except OSError as error:
        damaged = compression and error.errno is None
        reason = f"not a {compression} file, or a damaged one" if damaged else error.strerror
        raise InputError(f"{path}: {reason or str(error).splitlines()[0]}") from None


def _opened(path: Path, compression: str) -> BinaryIO:
    if compression == ".gz":
        return gzip.open(path)  # pyright: ignore[reportReturnType]
    if compression == ".xz":
        return lzma.open(path)  # pyright: ignore[reportReturnType]
    if compression == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"))  # pyright: ignore[reportArgumentType]
    return path.open("rb")


def _text(path: Path, compression: str, _: str) -> Iterator[Row]:
    raw, end = bytearray(), -1
    with _opened(path, compression) as stream:
        while end < 0 and (piece := stream.read(1 << 20)):
            raw += piece
            end = raw.find(0, len(raw) - len(piece))
            if compression and len(raw) > _MAX_UNFOLDED_BYTES:
                raise InputError(
                    f"{path}: more than {_MAX_UNFOLDED_BYTES >> 20} MiB of text inside",
                    hint="unpack it, or give .jsonl, which is read line by line",
                )
    text = raw if end < 0 else raw[:end]
    try:
        text = text.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}: line {line}: not UTF-8 text") from None
    if end >= 0:
        raise InputError(f"{path}: line {text.count(chr(10)) + 1}: binary data (NUL byte)")
    del raw  # as large as the text
    if text:
        yield Row(str(path), None, text.replace("\r\n", "\n").replace("\r", "\n"))


def _jsonl(path: Path, compression: str, field: str) -> Iterator[Row]:
    with _opened(path, compression) as stream:
        number = blank = 0
        while line := stream.readline(_MAX_LINE_BYTES + 1):
            number += 1
            line = line.removeprefix(codecs.BOM_UTF8)
            blank = blank + 1 if not line.strip() else 0
            if len(line) > _MAX_LINE_BYTES or blank > _MAX_BLANK_LINES:
                what = f"{blank:,} blank lines" if blank > 1 else f"longer than {_MAX_LINE_BYTES >> 20} MiB"
                raise InputError(f"{path}: line {number}: {what}")
            if blank:
                continue
            place = f"{path}: line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                raise InputError(f"{place}: not valid JSON") from None
            column = column_of(row, field) if isinstance(row, dict) else None
            if column is None:
                raise InputError(f"{place}: no text field {field!r}", hint="use --text-field")
            yield Row(place, column, row[column])


def _parquet(path: Path, compression: str, field: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    if compression:
        raise InputError(f"{path}: a parquet file is read from any place in it", hint="unpack it")
    try:
        file = pyarrow.parquet.ParquetFile(path)
        column = column_of(file.schema_arrow.names, field)
        if column is None:
            named = ", ".join(file.schema_arrow.names)
            raise InputError(f"{path}: no column {field!r}", hint=f"columns: {named}; use --text-field")
        for group in range(file.metadata.num_row_groups):
            _check_row_group(path, file.metadata.row_group(group), column)
        number = 0
        # Few rows at a time: equal or similar values are kept once in the file, and whole each in memory.
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=[column]):
            for value in batch.column(0).to_pylist():
                number += 1
                yield Row(f"{path}: row {number}", column, value)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise InputError(f"{path}: not a parquet file, or a damaged one") from None


def _check_row_group(path: Path, group: Any, column: str) -> None:
    """Refuse a column that unfolds to far more than text does."""
    for index in range(group.num_columns):
        part = group.column(index)
        if part.path_in_schema != column and not part.path_in_schema.startswith(f"{column}."):
            continue
        size, packed = part.total_uncompressed_size, max(part.total_compressed_size, 0)
        if size > max(_MAX_LINE_BYTES, _MAX_RATIO * packed) or part.num_values > max(_MAX_ITEMS, 1000 * group.num_rows):
            raise InputError(f"{path}: column {column!r} unfolds to more than text does: {packed:,} bytes to {size:,}")


_READERS: dict[str, Callable[[Path, str, str], Iterator[Row]]] = {
    ".txt": _text,
    ".md": _text,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
}
