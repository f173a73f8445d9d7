"""What a caller in Python gives as data: names of sources, or the text itself, which goes to a file. No torch.

One rule for every function: a name is a str or Path, several names are a tuple, and a list of strings or a
`datasets.Dataset` is the text itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attnprune.data.sources import WHAT_DATA_IS, is_local
from attnprune.errors import InputError, printable
from attnprune.files import temporary_folder, write_atomic

IN_MEMORY = "texts-in-memory.jsonl"  # how results name text that lay nowhere else


@contextmanager
def sources_of(data: Any, text_field: str = "text") -> Iterator[list[str]]:
    """The names of the sources; text in memory is in a temporary file inside the block.

    Raises:
        InputError: no text, or something that is none.
    """
    sources = named(data)
    if sources is not None:
        yield sources
        return
    with temporary_folder() as scratch:
        yield [str(save_texts(data, scratch / IN_MEMORY, None if text_field == "text" else text_field))]


def named(data: Any) -> list[str] | None:
    """The names of sources; None for text in memory.

    Raises:
        InputError: a tuple of something else or of nothing, or a str that is no name but the text itself.
    """
    if not isinstance(data, (str, Path, tuple)):
        return None
    names = data if isinstance(data, tuple) else (data,)
    if not names or not all(isinstance(one, (str, Path)) for one in names):
        raise InputError("data: a tuple names several sources: files, folders, Hub data sets or 'self'")
    for name in map(str, names):
        if not name or (any(map(str.isspace, name)) and not _is_there(name)):  # no Hub data set has spaces
            shown = repr(printable(name, 60))
            raise InputError(f"data {shown}: a str names a file or data set, and there is none", hint=WHAT_DATA_IS)
    return [str(name) for name in names]


def _is_there(name: str) -> bool:
    try:
        return is_local(name)
    except InputError:  # longer than any name
        return False


def save_texts(data: Any, file: Path, field: str | None) -> Path:
    """Texts in memory as a .jsonl file, a document per line.

    Raises:
        InputError: no list of strings and no Dataset with a column of text; nothing in it.
    """
    columns = getattr(data, "column_names", None)
    if isinstance(columns, list) and hasattr(data, "__len__"):
        field = field or ("messages" if "text" not in columns and "messages" in columns else "text")
        if field not in columns:
            raise InputError(f"data: no column {field!r}, only {', '.join(columns)}", hint="text_field names another")
        rows: Any = [{field: row[field]} for row in data.select_columns([field])]
    elif isinstance(data, list) and all(isinstance(one, str) for one in data):
        if any(len(one) < 1024 and Path(one).suffix and Path(one).exists() for one in data[:1]):
            raise InputError(f"data: a list is the text itself; {data[0]!r} is a file", hint="a tuple names sources")
        if field not in (None, "text"):
            raise InputError(f"text_field {printable(field, 60)}: names a column, and a list of strings has none")
        field = "text"
        rows = [{field: one} for one in data]
    elif isinstance(data, list):
        kind = next(type(one).__name__ for one in data if not isinstance(one, str))
        raise InputError(f"data: a list is the text itself, in strings (got {kind})", hint="a tuple names sources")
    else:
        what = "a split of it: data['train']" if isinstance(columns, dict) else "a name, a list of strings or a Dataset"
        raise InputError(f"data: {type(data).__name__} is not text", hint=f"give {what}")
    for row in rows:
        if not isinstance(row[field], (str, list, type(None))):
            raise InputError(f"data: column {field!r} holds {type(row[field]).__name__}, neither text nor messages")
    if not any(row[field].strip() if isinstance(row[field], str) else row[field] for row in rows):
        raise InputError(f"data: {'holds no text' if rows else 'is empty'}")
    write_atomic(file, "".join(json.dumps(row, ensure_ascii=True) + "\n" for row in rows))
    return file
