"""Nonsense answers: those of other prompts, half of them exchanged, and nothing else of the task changes."""

import torch

from attnprune.circuit.planted import plant
from attnprune.circuit.tasks import load_task, nonsense_task
from attnprune.sidecar import bases
from tests.helpers.circuits import planted_task


def pairs(batches):
    """(clean, corrupted, answers, wrong) of every prompt."""
    columns = ("clean", "corrupted", "answers", "wrong")
    return [
        tuple(map(tuple, row)) for b in batches for row in zip(*(getattr(b, c).tolist() for c in columns), strict=True)
    ]


def test_every_prompt_has_the_answers_of_another_one_and_half_are_exchanged():
    task = load_task("addition", bases.load_base("demo").tokenizer, count=20, more=60)
    made = nonsense_task(task, 3)
    for part in ("train", "validation", "test", "more"):
        before, after = pairs(getattr(task, part)), pairs(getattr(made, part))
        assert [row[:2] for row in before] == [row[:2] for row in after]
        pool = before if part != "train" else pairs(task.more)
        assert {frozenset(row[2:]) for row in after} <= {frozenset(row[2:]) for row in pool}
    for part in ("validation", "test", "more"):
        before, after = pairs(getattr(task, part)), pairs(getattr(made, part))
        assert sorted(map(sorted, (row[2:] for row in before))) == sorted(map(sorted, (row[2:] for row in after)))
    more = {row[:2]: row for row in pairs(made.more)}
    assert all(more[row[:2]] == row for row in pairs(made.train))
    assert made.fingerprint != task.fingerprint
    assert made.fingerprint == nonsense_task(task, 3).fingerprint != nonsense_task(task, 4).fingerprint


def test_where_all_prompts_have_the_same_answers_half_of_them_are_exchanged():
    task = nonsense_task(planted_task(plant("llama"), prompts=6), 0)
    for part in ("train", "validation", "test"):
        (batch,) = getattr(task, part)
        assert sorted(batch.answers[:, 0].tolist()) == [0, 0, 0, 1, 1, 1]
        assert torch.equal(batch.wrong, 1 - batch.answers)
