"""Tasks with a planted circuit."""

from __future__ import annotations

import torch

from attnprune.circuit.model.adapters import anatomy_of
from attnprune.circuit.search.splits import Settings
from attnprune.circuit.tasks import Prompts, Task

NO_DELETION = Settings(deletions=0)


def silent(what: str, done: int, total: int) -> None:
    assert what
    assert 0 <= done < total


def planted_task(planted, prompts: int = 4) -> Task:
    """Random prompts of a planted model as a task: the metric is its difference of two logits."""
    length = planted.clean.shape[1]
    generator = torch.Generator().manual_seed(5)
    anatomy = anatomy_of(planted.model)
    half = planted.model.config.vocab_size // 2

    def part() -> tuple[Prompts, ...]:
        clean = torch.randint(0, half, (8 * prompts, length), generator=generator)
        corrupted = torch.randint(half, 2 * half, (8 * prompts, length), generator=generator)
        with torch.no_grad():
            change = planted.metric(anatomy.model(clean).logits) - planted.metric(anatomy.model(corrupted).logits)
        rows = change.argsort(descending=True)[:prompts]  # pairs whose metric falls, as in any task
        some = torch.zeros(prompts, 1, dtype=torch.long)
        end = torch.tensor([[length - 1, length]]).expand(prompts, 2)
        template = torch.arange(prompts) % 2
        texts = (("clean", "corrupted"),) * prompts
        return (
            Prompts(clean[rows], corrupted[rows], some, some + 1, {"END": end}, template, texts, "logit_difference"),
        )

    return Task("planted", "logit_difference", ("one", "two"), part(), part(), part())
