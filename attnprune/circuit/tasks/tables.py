"""The rows of a table of prompts in any of its files: .csv, .jsonl, .json, .parquet, .arrow as `datasets` saves it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attnprune.errors import InputError
from attnprune.files import reason, unusable

SUFFIXES = (".csv", ".jsonl", ".json", ".parquet", ".arrow")

Row = dict[str, Any]


def is_table(name: str) -> bool:
    """Whether a task's name is that of a file."""
    return name.lower().endswith(SUFFIXES)


def rows(path: Path) -> Iterator[tuple[str, Row]]:
    """(place, values by column) of every row: "line 3" of a text, "row 3" of other files, counted from 1.

    Raises:
        InputError: with the place: not UTF-8, not what its name says, damaged.
    """
    suffix = path.suffix.lower()
    if suffix in (".parquet", ".arrow"):
        yield from ((f"row {number}", row) for number, row in enumerate(_arrow_rows(path, suffix), 1))
        return
    text = _text(path)
    if suffix == ".json" and text.lstrip().startswith("["):  # else an object per line, as `datasets` takes it too
        yield from ((f"row {number}", row) for number, row in enumerate(_json_rows(text, path), 1))
        return
    read = _csv_rows if suffix == ".csv" else _jsonl_rows
    yield from ((f"line {line}", row) for line, row in read(text, path))


def _arrow_rows(path: Path, suffix: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with path.open("rb") as file:
            parquet = suffix == ".parquet"
            batches = pyarrow.parquet.ParquetFile(file).iter_batches() if parquet else pyarrow.ipc.open_stream(file)
            for batch in batches:
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise unusable(path, error) from None
        raise InputError(f"{path}: not a {suffix} file, or a damaged one") from None


def _json_rows(text: str, path: Path) -> list[Row]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise InputError(f"{path}: not a JSON list of objects")
    return found


def _text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {reason(error)}") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}: line {line}: not UTF-8 text") from None
    if "\0" in text:
        raise InputError(f"{path}: line {text.count(chr(10), 0, text.index(chr(0))) + 1}: binary data (NUL byte)")
    return text


def _csv_rows(text: str, path: Path) -> Iterator[tuple[int, Row]]:
    """(first line, values by column) of every record; records may hold line ends inside quotes."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise InputError(f"{path}: line 1: a column occurs twice")
        line = reader.line_num + 1
        for values in reader:
            if values and len(values) != len(header):
                raise InputError(f"{path}: line {line}: {len(values)} values for {len(header)} columns")
            if values:
                yield line, dict(zip(header, values, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}: line {line}: not valid CSV: {error}") from None


def _jsonl_rows(text: str, path: Path) -> Iterator[tuple[int, Row]]:
    for line, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise InputError(f"{path}: line {line}: not a JSON object")
        yield line, row
