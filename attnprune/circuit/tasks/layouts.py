"""Rows as benchmarks publish them, in our columns: clean, corrupted, answer, wrong. Each is known by its own columns.

The Mechanistic Interpretability Benchmark (mib-bench on the Hub; MIB_circuit_track/dataset.py there says which part is
what): `prompt`, and counterfactuals with one of their own.
    ioi: names in `metadata`, against `s2_io_flip_counterfactual`.
    mcqa, arc: `choices` with `label` and `answerKey`, against those of `symbol_counterfactual`.
    arithmetic: `label`, against that of `random_counterfactual`.

Edge-Pruning (princeton-nlp; src/prune and src/eval there):
    ioi: `ioi_sentences` and `corr_ioi_sentences` with the answer as their last word, names `a` (the answer) and `b`.
    gp: `prefix`, `pronoun` and `corr_prefix`, `corr_pronoun`.
    gt: `prefix`, `corr_prefix` and `digits`: larger ones are right and smaller ones wrong, of two digits each.
    its own files: `clean` and `corrupted` with the answer in <predict> ... </predict>; what follows it is not read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from attnprune.circuit.tasks.encoding import Encoder
from attnprune.circuit.tasks.prompts import Metric
from attnprune.errors import InputError

Row = dict[str, Any]

_PREDICTED = re.compile(r"(?s)(.*?)<predict>(.*?)</predict>")


class MisfitError(InputError):
    """A row that is as it should be, but not for this tokenizer."""


def layout_of(row: Mapping[str, Any]) -> Callable[[Any, Encoder], Row] | None:
    """What brings rows with these columns into ours; None where they are ours, or of nobody."""
    if "prompt" in row and any(column.endswith("_counterfactual") for column in row):
        return _mib
    if "ioi_sentences" in row:
        return _names
    if "corr_prefix" in row:
        return _years if "digits" in row else _pronouns
    if isinstance(row.get("clean"), str) and "<predict>" in row["clean"]:
        return _marked
    return None


def metric_of(layout: Callable[[Any, Encoder], Row] | None) -> Metric:
    """The metric of a file: that of greater-than is the difference of two probabilities."""
    return "probability_difference" if layout is _years else "logit_difference"


def _mib(row: Any, encoder: Encoder) -> Row:
    metadata = row.get("metadata")
    if isinstance(metadata, dict) and "indirect_object" in metadata:
        answer, wrong = (f" {_text(metadata, name)}" for name in ("indirect_object", "subject"))
        return _pair(row["prompt"], _part(row, "s2_io_flip_counterfactual")["prompt"], answer, wrong)
    if "choices" in row:
        other = _part(row, "symbol_counterfactual")
        return _pair(row["prompt"], other["prompt"], _choice(row), _choice(other))
    if "random_counterfactual" in row and row["random_counterfactual"] is None:  # the benchmark leaves these out
        raise MisfitError("no random_counterfactual")
    other = _part(row, "random_counterfactual")
    return _pair(row["prompt"], other["prompt"], _label(row), _label(other))


def _names(row: Any, encoder: Encoder) -> Row:
    clean, _, last = _text(row, "ioi_sentences").rstrip().rpartition(" ")
    corrupted = _text(row, "corr_ioi_sentences").rstrip().rpartition(" ")[0]
    if last != row.get("a"):
        raise InputError(f"ioi_sentences does not end in a ({row.get('a')!r})")
    return _pair(clean, corrupted, f" {last}", f" {_text(row, 'b')}")


def _pronouns(row: Any, encoder: Encoder) -> Row:
    answer, wrong = (f" {_text(row, column)}" for column in ("pronoun", "corr_pronoun"))
    return _pair(_text(row, "prefix"), _text(row, "corr_prefix"), answer, wrong)


def _years(row: Any, encoder: Encoder) -> Row:
    digits = str(row["digits"])
    if not re.fullmatch(r"\d\d?", digits) or int(digits) in (0, 99):
        raise InputError(f"digits {digits!r} are not within 1 and 98")
    tokens = [encoder.continuation("", f"{number:02d}") for number in range(100)]
    if None in tokens:
        raise MisfitError("two digits are not one token")
    prompts = {"clean": _text(row, "prefix"), "corrupted": _text(row, "corr_prefix")}
    return prompts | {"correct_idx": tokens[int(digits) + 1 :], "incorrect_idx": tokens[: int(digits)]}


def _marked(row: Any, encoder: Encoder) -> Row:
    found = [_PREDICTED.match(_text(row, column)) for column in ("clean", "corrupted")]
    if found[0] is None or found[1] is None:
        raise InputError("no <predict> ... </predict> in clean and in corrupted", hint="the corrupted one is wrong")
    (clean, answer), (corrupted, wrong) = (match.groups() for match in found if match is not None)
    # A space at the end of the prompt belongs to the answer, wherever the mark stands.
    space = " " if clean != clean.rstrip() and not answer.startswith(" ") else ""
    return _pair(clean.rstrip(), corrupted.rstrip(), space + answer.rstrip(), space + wrong.rstrip())


def _pair(clean: Any, corrupted: Any, answer: str, wrong: str) -> Row:
    return {"clean": clean, "corrupted": corrupted, "answer": [answer], "wrong": [wrong]}


def _choice(question: Mapping[str, Any]) -> str:
    choices, key = question.get("choices"), question.get("answerKey")
    labels = choices.get("label") if isinstance(choices, dict) else None
    if not isinstance(labels, list) or type(key) is not int or not 0 <= key < len(labels):
        raise InputError("answerKey is no place among the labels of choices")
    return str(labels[key])


def _label(question: Mapping[str, Any]) -> str:
    label = question.get("label")
    if not isinstance(label, int | str):
        raise InputError("label is neither a number nor text")
    return str(label)


def _part(row: Mapping[str, Any], column: str) -> dict[str, Any]:
    part = row.get(column)
    if not isinstance(part, dict) or "prompt" not in part:
        raise InputError(f"no {column} with a prompt")
    return part


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{column} is not text")
    return value
