"""A task that makes no sense: the same prompts, with answers that nothing in them tells."""

from __future__ import annotations

from dataclasses import replace

import torch

from attnprune.circuit.tasks.prompts import NO_TOKEN, Prompts, Task

_Answers = tuple[list[int], list[int]]
_Prompt = tuple[tuple[int, ...], tuple[int, ...]]


def nonsense_task(task: Task, seed: int) -> Task:
    """Each prompt with the answers of another one of its split, right and wrong exchanged for every second.

    So a rule that holds for the true answers is right half of the time, also where all prompts have the same ones.
    Prompts of `more` that are train prompts too have the same answers in both.
    """
    parts = {}
    for number, (pool, names) in enumerate(
        ((task.more or task.train, ("train", "more")), (task.validation, ("validation",)), (task.test, ("test",)))
    ):
        given = _given(pool, seed * 3 + number)
        parts |= {name: tuple(_with(batch, given) for batch in getattr(task, name)) for name in names}
    return replace(task, name=f"{task.name}, nonsense", **parts)


def _keys(batch: Prompts) -> list[_Prompt]:
    pairs = zip(batch.clean.tolist(), batch.corrupted.tolist(), strict=True)
    return [(tuple(clean), tuple(corrupted)) for clean, corrupted in pairs]


def _given(pool: tuple[Prompts, ...], seed: int) -> dict[_Prompt, _Answers]:
    """The new (answers, wrong) of every prompt: a cycle through all of them in random order."""
    keys = [key for batch in pool for key in _keys(batch)]
    own = [row for batch in pool for row in zip(batch.answers.tolist(), batch.wrong.tolist(), strict=True)]
    order = torch.randperm(len(own), generator=torch.Generator().manual_seed(seed)).tolist()
    found = {}
    for place, row in enumerate(order):
        answers, wrong = own[order[place - 1]]
        found[keys[row]] = (wrong, answers) if place % 2 else (answers, wrong)
    return found


def _with(batch: Prompts, given: dict[_Prompt, _Answers]) -> Prompts:
    rows = [given[key] for key in _keys(batch)]
    width = max(len(side) for row in rows for side in row)
    sides = [[side + [NO_TOKEN] * (width - len(side)) for side in sides] for sides in zip(*rows, strict=True)]
    return replace(batch, answers=torch.tensor(sides[0]), wrong=torch.tensor(sides[1]))
