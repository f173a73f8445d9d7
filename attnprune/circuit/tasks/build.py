"""From a task's name, or a file, and a tokenizer to three splits of prompt pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from attnprune.circuit.tasks import text, tokens
from attnprune.circuit.tasks.encoding import Encoder, Lexicon
from attnprune.circuit.tasks.files import read_examples
from attnprune.circuit.tasks.prompts import Example, Metric, Task, batched
from attnprune.circuit.tasks.tables import SUFFIXES, is_table
from attnprune.errors import InputError

PARTS = ("train", "validation", "test")
_PATIENCE = 1000  # draws in a row without a new prompt after which a task counts as exhausted


class Kind(NamedTuple):
    """A generated task: endless examples for a split's lexicon, its templates and its metric."""

    generate: Callable[[Lexicon, Random], Iterator[Example]]
    templates: tuple[str, ...]
    metric: Metric = "logit_difference"


_KINDS = {
    "ioi": Kind(partial(text.ioi, corruption="s2-rand"), text.IOI),
    "ioi:s2-flip": Kind(partial(text.ioi, corruption="s2-flip"), text.IOI),
    "ioi:abc": Kind(partial(text.ioi, corruption="abc"), text.IOI),
    "greater-than": Kind(text.greater_than, text.GREATER_THAN, "probability_difference"),
    "sva": Kind(text.agreement, text.AGREEMENT, "probability_difference"),
    "pronoun": Kind(text.pronoun, text.PRONOUN),
    "induction": Kind(partial(tokens.induction, corruption="query"), tokens.INDUCTION),
    "induction:keys": Kind(partial(tokens.induction, corruption="keys"), tokens.INDUCTION),
    "induction:values": Kind(partial(tokens.induction, corruption="values"), tokens.INDUCTION),
    "docstring": Kind(text.docstring, text.DOCSTRING),
    "addition": Kind(tokens.addition, tokens.ADDITION),
}


def task_names() -> tuple[str, ...]:
    """The generated tasks; "ioi" puts a random third name in place of S2, "induction" another token at the end."""
    return tuple(_KINDS)


def load_task(
    name: str, tokenizer: Any, *, vocabulary: int | None = None, count: int = 100, more: int = 0, seed: int = 0
) -> Task:
    """A generated task by name, or a file of prompts, as `count` prompt pairs for each split.

    The same arguments give the same task. The seed chooses which words (which prompts of a file) go to which split and
    what is drawn from them; a larger `count` adds prompts to those of a smaller one. A file may have fewer than asked.
    `vocabulary` is the model's number of tokens (default: those of the tokenizer, which may have more).
    `more` is how many train prompts there should be to learn a circuit on, or as many as there are.

    Raises:
        InputError: no such task or file, a bad file, a tokenizer that cannot write the task's words as single tokens,
            fewer different prompts than `count`, or a token that the model does not have.
    """
    if count < 1:
        raise InputError(f"{count} prompts: at least one is needed")
    encoder = Encoder(tokenizer, vocabulary)
    if is_table(name):
        return _from_file(Path(name), encoder, count, more, seed)
    if name not in _KINDS:
        raise InputError(f"{name}: no such task", hint=f"{', '.join(_KINDS)}, or a {', '.join(SUFFIXES)} file")
    kind = _KINDS[name]
    key = f"{name.partition(':')[0]} {seed}"  # the variants of a task differ in their corrupted prompts only
    splits = []
    for part, split in enumerate(PARTS):
        examples = kind.generate(Lexicon(name, encoder, key, part), Random(f"{key} {split}"))
        found = _distinct(examples, max(count, more) if split == "train" else count)
        if len(found) < count:
            raise InputError(f"{name}: {count} prompts in each split are too many", hint=f"up to {len(found)} work")
        splits.append(found)
    return _task(name, kind.templates, splits, count, more, kind.metric)


def _task(
    name: str, templates: tuple[str, ...], splits: list[list[Example]], count: int, more: int, metric: Metric
) -> Task:
    train, validation, test = (batched(examples[:count], metric) for examples in splits)
    further = batched(splits[0][: max(count, more)], metric) if more else ()
    return Task(name, metric, templates, train, validation, test, further)


def _distinct(examples: Iterator[Example], count: int) -> list[Example]:
    """The first `count` examples with different clean prompts, or as many as there are."""
    found: dict[tuple[int, ...], Example] = {}
    for _ in range(count):
        made = next((made for made in islice(examples, _PATIENCE) if tuple(made.clean) not in found), None)
        if made is None:
            break
        found[tuple(made.clean)] = made
    return list(found.values())


def _from_file(path: Path, encoder: Encoder, count: int, more: int, seed: int) -> Task:
    """No clean prompt of a split occurs in another one, as clean or as corrupted."""
    read = read_examples(path, encoder)
    rows = _linked(read.examples)
    if len(rows) < len(PARTS):
        raise InputError(
            f"{path}: {len(rows)} independent clean prompts, {len(PARTS)} are needed",
            hint="one per split; a corrupted prompt that is also a clean one stays with it",
        )
    splits = []
    for part in range(len(PARTS)):
        chosen = Lexicon(path.name, encoder, f"file {seed}", part).third(list(rows))
        splits.append([row for key in chosen for row in rows[key]])
    task = _task(path.name, (path.name,), splits, count, more, read.metric)
    return task if read.note is None else replace(task, notes=(read.note,))


def _linked(examples: list[Example]) -> dict[tuple[int, ...], list[Example]]:
    """Rows by group: one's clean prompt is the other's clean or corrupted one, directly or through further rows."""
    parent = {tuple(row.clean): tuple(row.clean) for row in examples}

    def root(prompt: tuple[int, ...]) -> tuple[int, ...]:
        while parent[prompt] != prompt:
            parent[prompt] = prompt = parent[parent[prompt]]
        return prompt

    for row in examples:
        if tuple(row.corrupted) in parent:
            parent[root(tuple(row.corrupted))] = root(tuple(row.clean))
    groups: dict[tuple[int, ...], list[Example]] = {}
    for row in examples:
        groups.setdefault(root(tuple(row.clean)), []).append(row)
    return groups
