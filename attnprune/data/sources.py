"""Where text comes from: a Hub data set (streamed), a local .txt, .jsonl or .parquet file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from attnprune.errors import AttnPruneError, InputError

_MAX_LINE_BYTES = 64 << 20


def source_name(source: str) -> str:
    """How results name a source: a Hub data set by its id, a local file without its folder."""
    return Path(source).name if Path(source).exists() else source


def documents(source: str, text_field: str = "text") -> Iterable[str]:
    """The documents of a source: a local file by its suffix, otherwise a Hub data set `name[:config[:split]]`.

    Raises:
        InputError: the file is missing, empty, binary, or has no such field.
        AttnPruneError: the Hub data set cannot be reached.
    """
    path = Path(source)
    readers = {".txt": _read_txt, ".md": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    reader = readers.get(path.suffix)
    if reader is None and (_exists(path) or source.startswith((".", "/", "~"))):
        raise InputError(f"{source}: not a .txt, .jsonl or .parquet file")
    if reader is None:
        return _read_hub(source, text_field)
    if not _exists(path):
        raise InputError(f"{source}: no such file")
    return _read_file(path, reader, text_field)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # no permission, name too long, a NUL in the name
        return False


def _read_file(path: Path, reader: Callable[[Path, str], Iterable[str]], field: str) -> Iterator[str]:
    """The reader's documents, with every way a file can fail as one line."""
    try:
        if not path.is_file():
            raise InputError(f"{path}: not a file")
        if path.stat().st_size == 0:
            raise InputError(f"{path}: the file is empty")
        yield from reader(path, field)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or str(error).splitlines()[0]}") from None


def _read_txt(path: Path, _: str) -> list[str]:
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}: line {line}: not UTF-8 text") from None
    if "\0" in text:
        raise InputError(f"{path}: line {text.count(chr(10), 0, text.index(chr(0))) + 1}: binary data (NUL byte)")
    if not text.strip():
        raise InputError(f"{path}: only blank lines")
    return [text]


def _read_jsonl(path: Path, field: str) -> Iterator[str]:
    found = False
    with path.open("rb") as lines:
        number = 0
        while line := lines.readline(_MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > _MAX_LINE_BYTES:
                raise InputError(f"{path}: line {number}: longer than {_MAX_LINE_BYTES >> 20} MiB")
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                raise InputError(f"{path}: line {number}: not valid JSON") from None
            if not isinstance(row, dict) or not isinstance(row.get(field), str):
                raise InputError(f"{path}: line {number}: no text field {field!r}", hint="use --text-field")
            if not row[field].isascii() and any("\ud800" <= c <= "\udfff" for c in row[field]):
                raise InputError(f"{path}: line {number}: a lone surrogate is not text")
            found = found or bool(row[field].strip())
            yield row[field]
    if not found:
        raise InputError(f"{path}: no text in field {field!r}")


def _read_parquet(path: Path, field: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        if field not in file.schema_arrow.names:
            raise InputError(f"{path}: no column {field!r}", hint="use --text-field")
        for batch in file.iter_batches(columns=[field]):
            for text in batch.column(0).to_pylist():
                if text is not None and not isinstance(text, str):
                    raise InputError(f"{path}: column {field!r} is not text")
                yield text or ""
    except (pyarrow.ArrowException, OSError, ValueError):
        raise InputError(f"{path}: not a parquet file, or a damaged one") from None


def _read_hub(source: str, field: str) -> Iterator[str]:
    import datasets

    name, _, rest = source.partition(":")
    subset, _, part = rest.partition(":")
    try:
        rows = datasets.load_dataset(name, subset or None, split=part or "train", streaming=True)
        for row in rows:
            if not isinstance(row.get(field), str):
                raise InputError(
                    f"{source}: no text field {field!r}", hint=f"fields: {', '.join(row)}; use --text-field"
                )
            yield row[field]
    except InputError:
        raise
    except Exception as error:  # datasets raises a dozen unrelated types when the Hub is out of reach
        raise AttnPruneError(
            f"{source}: cannot read this data set from the Hub: {type(error).__name__}",
            hint="give a local file with --data FILE.txt, or --data self to train on the model's own text",
        ) from error
