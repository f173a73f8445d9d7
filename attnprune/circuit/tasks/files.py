"""The user's own prompt pairs: a .csv or .jsonl file, read strictly.

Columns: clean, corrupted, answer, wrong. Answers continue the prompt, so they usually begin with a space; several are
separated by "|" (or a list in JSONL). Instead of texts there may be token ids in correct_idx and incorrect_idx, the
columns of the EAP-IG package. Other columns are not read.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attnprune.circuit.tasks.encoding import Encoder
from attnprune.circuit.tasks.prompts import Example
from attnprune.errors import InputError
from attnprune.files import reason

_TEXTS = ("answer", "wrong")
_INDICES = ("correct_idx", "incorrect_idx")

Row = dict[str, Any]


def read_examples(path: Path, encoder: Encoder) -> list[Example]:
    """All rows of a file as examples, in order.

    Raises:
        InputError: with the line number: not UTF-8, not CSV or JSON, a column or value missing, clean and corrupted of
            different lengths in tokens or the same, an answer that is not one token, an answer that is also wrong.
    """
    rows = _csv_rows if path.suffix.lower() == ".csv" else _jsonl_rows
    examples = []
    for line, row in rows(_text(path), path):
        try:
            examples.append(_example(row, encoder))
        except InputError as error:
            raise InputError(f"{path}: line {line}: {error.message}", hint=error.hint) from None
    return examples


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


def _example(row: Row, encoder: Encoder) -> Example:
    """One row. Raises InputError without file and line."""
    by_index = not set(_TEXTS) & set(row)
    columns = _INDICES if by_index else _TEXTS
    for column in ("clean", "corrupted", *columns):
        if row.get(column) in (None, "", []):
            named = f"{column} (or {_TEXTS[_INDICES.index(column)]})" if column in _INDICES else column
            raise InputError(f"no {named}", hint="columns: clean, corrupted, answer, wrong")
    clean, corrupted = (_prompt(row, column, encoder) for column in ("clean", "corrupted"))
    if len(clean) != len(corrupted):
        raise InputError(
            f"clean has {len(clean)} tokens, corrupted {len(corrupted)}",
            hint="change a word, so that both have equally many with this tokenizer",
        )
    if clean == corrupted:
        raise InputError("clean and corrupted are the same")
    answers, wrong = (_tokens(row, column, by_index, encoder) for column in columns)
    if set(answers) & set(wrong):
        raise InputError("an answer is also wrong")
    roles = {"END": (len(clean) - 1, len(clean))}
    return Example(clean, corrupted, answers, wrong, roles, 0, (row["clean"], row["corrupted"]))


def _prompt(row: Row, column: str, encoder: Encoder) -> list[int]:
    text = row[column]
    if not isinstance(text, str) or any("\ud800" <= character <= "\udfff" for character in text):
        raise InputError(f"{column} is not text")
    if not encoder.knows(text):
        raise InputError(f"{column} has characters that this tokenizer does not know")
    return encoder.ids(text, column)


def _tokens(row: Row, column: str, by_index: bool, encoder: Encoder) -> list[int]:
    values = row[column].split("|") if isinstance(row[column], str) else row[column]
    values = values if isinstance(values, list) else [values]
    convert = _index if by_index else _continuation
    return list(dict.fromkeys(convert(value, row["clean"], column, encoder) for value in values))


def _index(value: Any, _: str, column: str, encoder: Encoder) -> int:
    vocabulary = min(len(encoder.tokenizer), encoder.vocabulary)
    index = int(value) if isinstance(value, str) and value.strip().isdecimal() else value
    if type(index) is not int or not 0 <= index < vocabulary:
        raise InputError(f"{column} {value!r} is not a token id below {vocabulary}")
    return index


def _continuation(value: Any, clean: str, column: str, encoder: Encoder) -> int:
    is_text = isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)
    token = encoder.continuation(clean, value) if is_text and value else None
    if token is None:
        raise InputError(
            f"{column} {value!r} is not one token after the clean prompt",
            hint="it continues the prompt: the space belongs to the answer, not to the end of the prompt",
        )
    return token
