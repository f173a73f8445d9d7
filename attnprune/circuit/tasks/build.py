"""From a task's name, or a file, and a tokenizer to three splits of prompt pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from attnprune.circuit.tasks import text, tokens
from attnprune.circuit.tasks.encoding import Encoder, Lexicon
from attnprune.circuit.tasks.files import read_examples
from attnprune.circuit.tasks.prompts import Example, Metric, Task, batched
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
    "induction": Kind(tokens.induction, tokens.INDUCTION),
    "docstring": Kind(text.docstring, text.DOCSTRING),
    "addition": Kind(tokens.addition, tokens.ADDITION),
}


def task_names() -> tuple[str, ...]:
    """The generated tasks; "ioi" is the one with a random third name in place of S2."""
    return tuple(_KINDS)


def load_task(name: str, tokenizer: Any, *, count: int = 100, seed: int = 0) -> Task:
    """A generated task by name, or the user's .csv or .jsonl file, as `count` prompt pairs for each split.

    The same arguments give the same task. The seed chooses which words (which prompts of a file) go to which split and
    what is drawn from them; a larger `count` adds prompts to those of a smaller one. A file may have fewer than asked.

    Raises:
        InputError: no such task or file, a bad file, a tokenizer that cannot write the task's words as single tokens,
            or fewer different prompts than `count`.
    """
    if count < 1:
        raise InputError(f"{count} prompts: at least one is needed")
    encoder = Encoder(tokenizer)
    if name.endswith((".csv", ".jsonl")):
        return _from_file(Path(name), encoder, count, seed)
    if name not in _KINDS:
        raise InputError(f"{name}: no such task", hint=f"{', '.join(_KINDS)}, or a .csv or .jsonl file")
    kind = _KINDS[name]
    key = f"{name.partition(':')[0]} {seed}"  # the variants of a task differ in their corrupted prompts only
    splits = []
    for part, split in enumerate(PARTS):
        examples = kind.generate(Lexicon(name, encoder, key, part), Random(f"{key} {split}"))
        splits.append(batched(_distinct(name, examples, count), kind.metric))
    return Task(name, kind.metric, kind.templates, *splits)


def _distinct(name: str, examples: Iterator[Example], count: int) -> list[Example]:
    """The first `count` examples with different clean prompts."""
    found: dict[tuple[int, ...], Example] = {}
    for _ in range(count):
        made = next((made for made in islice(examples, _PATIENCE) if tuple(made.clean) not in found), None)
        if made is None:
            raise InputError(f"{name}: {count} prompts in each split are too many", hint=f"up to {len(found)} work")
        found[tuple(made.clean)] = made
    return list(found.values())


def _from_file(path: Path, encoder: Encoder, count: int, seed: int) -> Task:
    """No clean prompt of a split occurs in another one, as clean or as corrupted."""
    rows = _linked(read_examples(path, encoder))
    if len(rows) < len(PARTS):
        raise InputError(
            f"{path}: {len(rows)} independent clean prompts, {len(PARTS)} are needed",
            hint="one per split; a corrupted prompt that is also a clean one stays with it",
        )
    splits = []
    for part in range(len(PARTS)):
        chosen = Lexicon(path.name, encoder, f"file {seed}", part).third(list(rows))
        splits.append(batched([row for key in chosen for row in rows[key]][:count], "logit_difference"))
    return Task(path.name, "logit_difference", (path.name,), *splits)


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
