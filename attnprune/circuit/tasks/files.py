"""Prompt pairs from a file, read strictly: the user's own, or as a benchmark publishes them.

Columns: clean, corrupted, answer, wrong. Answers continue the prompt, so they usually begin with a space; several are
separated by "|" (or a list). Instead of texts there may be token ids in correct_idx and incorrect_idx, the columns of
the EAP-IG package. Other columns are not read. `attnprune.circuit.tasks.layouts` has those of MIB and Edge-Pruning.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from attnprune.circuit.tasks.encoding import Encoder
from attnprune.circuit.tasks.layouts import MisfitError, layout_of, metric_of
from attnprune.circuit.tasks.prompts import Example, Metric
from attnprune.circuit.tasks.tables import Row, rows
from attnprune.errors import InputError

_TEXTS = ("answer", "wrong")
_INDICES = ("correct_idx", "incorrect_idx")


class Read(NamedTuple):
    """The rows of a file as examples, in order, with their metric; `note` says which rows were left out."""

    examples: list[Example]
    metric: Metric
    note: str | None


def read_examples(path: Path, encoder: Encoder) -> Read:
    """All rows of a file as examples, in order.

    A benchmark is published for all tokenizers, so its rows that do not fit this one are left out, as its own code
    does; a user's row that does not fit is refused.

    Raises:
        InputError: with the line: not what its name says, a column or value missing, clean and corrupted of different
            lengths in tokens or the same, an answer that is not one token, an answer that is also wrong; or no row of a
            benchmark fits.
    """
    examples: list[Example] = []
    misfits: list[str] = []
    layout = None
    for place, row in rows(path):
        layout = layout or layout_of(row)
        try:
            examples.append(_example(row if layout is None else layout(row, encoder), encoder))
        except InputError as error:
            message = f"{place}: {error.message}"
            if layout is None or not isinstance(error, MisfitError):
                raise InputError(f"{path}: {message}", hint=error.hint) from None
            misfits.append(message)
    if misfits and not examples:
        raise InputError(f"{path}: none of its {len(misfits):,} rows fits this tokenizer; {misfits[0]}")
    note = f"{path.name}: {len(misfits):,} of {len(misfits) + len(examples):,} rows do not fit this tokenizer"
    return Read(examples, metric_of(layout), note if misfits else None)


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
        raise MisfitError(
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
        raise MisfitError(f"{column} has characters that this tokenizer does not know")
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
        raise MisfitError(
            f"{column} {value!r} is not one token after the clean prompt",
            hint="it continues the prompt: the space belongs to the answer, not to the end of the prompt",
        )
    return token
