"""What a task is: pairs of clean and corrupted prompts of equal length, their answers, roles, metric and ability rule.

Every prompt is scored at its last position only. Prompts of one batch have one length, so nothing is ever padded.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from attnprune.errors import AttnPruneError

Metric = Literal["logit_difference", "probability_difference"]

NO_TOKEN = -1
MIN_ACCURACY = 0.75  # the rule of the Mechanistic Interpretability Benchmark
# Mean metric, clean - corrupted: in nats, and in probability, where the possible range is -2 to 2.
MIN_GAP: dict[Metric, float] = {"logit_difference": 0.5, "probability_difference": 0.1}


class Example(NamedTuple):
    """One pair of prompts as token ids. `roles` are half-open token spans; `texts` are (clean, corrupted)."""

    clean: list[int]
    corrupted: list[int]
    answers: list[int]
    wrong: list[int]
    roles: dict[str, tuple[int, int]]
    template: int
    texts: tuple[str, str]


@dataclass(frozen=True)
class Prompts:
    """Pairs of prompts of equal length.

    Attributes:
        clean, corrupted: int64 [N, S].
        answers, wrong: int64 [N, A] and [N, W]: the next tokens that the metric counts for and against; -1 fills rows
            with fewer of them.
        roles: role name -> int64 [N, 2], half-open token span (first, end). The spans hold for clean and corrupted
            alike. Every prompt has END, its last token, which may also belong to another role; a prompt without some
            other role has the empty span (0, 0).
        template: int64 [N], index into `Task.templates`.
        texts: (clean, corrupted) text of every row, without BOS.
        metric: name of the metric, see `score`.
    """

    clean: Tensor
    corrupted: Tensor
    answers: Tensor
    wrong: Tensor
    roles: dict[str, Tensor]
    template: Tensor
    texts: tuple[tuple[str, str], ...]
    metric: Metric

    def __len__(self) -> int:
        return len(self.clean)

    @property
    def length(self) -> int:
        """Tokens of every prompt, BOS included."""
        return self.clean.shape[1]

    def take(self, rows: Tensor) -> Prompts:
        """The rows of an index tensor (int64 [M]) in that order."""
        return Prompts(
            self.clean[rows], self.corrupted[rows], self.answers[rows], self.wrong[rows],
            {role: spans[rows] for role, spans in self.roles.items()}, self.template[rows],
            tuple(self.texts[row] for row in rows.tolist()), self.metric,
        )  # fmt: skip

    def to(self, device: torch.device | str) -> Prompts:
        """The same prompts with all tensors on `device`."""
        return Prompts(
            self.clean.to(device), self.corrupted.to(device), self.answers.to(device), self.wrong.to(device),
            {role: spans.to(device) for role, spans in self.roles.items()}, self.template.to(device),
            self.texts, self.metric,
        )  # fmt: skip

    def score(self, logits: Tensor) -> Tensor:
        """The task's metric [N], fp32, from logits [N, S, V]; differentiable.

        logit_difference: logsumexp of the answers' logits - logsumexp of the wrong ones', in nats. With one answer and
        one wrong token it is the usual difference of two logits; with several it is the log odds of the two sets.
        probability_difference: sum of the answers' probabilities - sum of the wrong ones'.
        """
        metric = logit_difference if self.metric == "logit_difference" else probability_difference
        return metric(logits, self.answers, self.wrong)


def logit_difference(logits: Tensor, answers: Tensor, wrong: Tensor) -> Tensor:
    """logsumexp(answers) - logsumexp(wrong) [N] at the last position of logits [N, S, V]; -1 is no token."""
    last = logits[:, -1].float()
    for_, against = (
        last.gather(-1, tokens.clamp(min=0)).masked_fill(tokens == NO_TOKEN, -torch.inf).logsumexp(-1)
        for tokens in (answers, wrong)
    )
    return for_ - against


def probability_difference(logits: Tensor, answers: Tensor, wrong: Tensor) -> Tensor:
    """P(answers) - P(wrong) [N] at the last position of logits [N, S, V]; -1 is no token."""
    last = logits[:, -1].float().softmax(-1)
    for_, against = (
        last.gather(-1, tokens.clamp(min=0)).masked_fill(tokens == NO_TOKEN, 0.0).sum(-1) for tokens in (answers, wrong)
    )
    return for_ - against


@dataclass(frozen=True)
class Task:
    """A task for one tokenizer: prompts to rank with (train), to choose a size with (validation), to report on (test).

    No name, noun, object or sum of one split occurs in another; the sentences around them do.

    Attributes:
        name: as given to `load_task`.
        metric: name of the metric, the same in all prompts.
        templates: what `Prompts.template` counts, as text.
        train, validation, test: batches of equal-length prompts, shortest first.
        more: further train prompts with those of `train`, to learn a circuit on.
        notes: what a reader of a result has to know of the prompts.
    """

    name: str
    metric: Metric
    templates: tuple[str, ...]
    train: tuple[Prompts, ...]
    validation: tuple[Prompts, ...]
    test: tuple[Prompts, ...]
    more: tuple[Prompts, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def chance(self) -> float:
        """Accuracy of a guess among the answers and the wrong tokens, mean over the test prompts."""
        shares = [
            (batch.answers != NO_TOKEN).sum(1) / ((batch.answers != NO_TOKEN).sum(1) + (batch.wrong != NO_TOKEN).sum(1))
            for batch in self.test
        ]
        return torch.cat(shares).double().mean().item()

    @property
    def fingerprint(self) -> str:
        """sha256 of metric, tokens, answers, roles and templates: equal fingerprints mean equal data."""
        digest = hashlib.sha256(self.metric.encode())
        for part in ("train", "validation", "test", "more"):
            for batch in getattr(self, part):
                tensors = {
                    name: getattr(batch, name) for name in ("clean", "corrupted", "answers", "wrong", "template")
                }
                for name, tensor in (tensors | batch.roles).items():
                    digest.update(f"{part} {name} {tuple(tensor.shape)}".encode())
                    digest.update(tensor.to(torch.int32).cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def batched(examples: Iterable[Example], metric: Metric) -> tuple[Prompts, ...]:
    """Examples as batches of equal length, shortest first, in their given order within a batch."""
    groups: dict[int, list[Example]] = defaultdict(list)
    for example in examples:
        groups[len(example.clean)].append(example)
    return tuple(_stacked(groups[length], metric) for length in sorted(groups))


def _stacked(examples: list[Example], metric: Metric) -> Prompts:
    names = sorted({role for example in examples for role in example.roles})
    return Prompts(
        clean=torch.tensor([example.clean for example in examples]),
        corrupted=torch.tensor([example.corrupted for example in examples]),
        answers=_filled([example.answers for example in examples]),
        wrong=_filled([example.wrong for example in examples]),
        roles={role: torch.tensor([example.roles.get(role, (0, 0)) for example in examples]) for role in names},
        template=torch.tensor([example.template for example in examples]),
        texts=tuple(example.texts for example in examples),
        metric=metric,
    )


def _filled(rows: list[list[int]]) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [NO_TOKEN] * (width - len(row)) for row in rows])


class Ability(NamedTuple):
    """How well a model does a task: accuracy on clean prompts, mean metric on clean and on corrupted prompts."""

    accuracy: float
    clean: float
    corrupted: float

    @property
    def gap(self) -> float:
        """clean - corrupted: what a circuit can explain."""
        return self.clean - self.corrupted


def accuracy(scores: Tensor) -> float:
    """Share of prompts whose metric is above 0: the answers are preferred to the wrong tokens, whatever the argmax."""
    return (scores > 0).double().mean().item()


def check_ability(name: str, metric: Metric, clean: Tensor, corrupted: Tensor, chance: float | None = None) -> Ability:
    """The ability behind metric values [N] of a model's clean and corrupted prompts.

    `chance` is for the message: the accuracy of a guess.

    Raises:
        AttnPruneError: accuracy below 0.75, or a gap below 0.5 nats (logit difference) or 0.1 (probability difference):
            there is no behaviour whose circuit could be found. NaNs are refused too.
    """
    ability = Ability(accuracy(clean), clean.double().mean().item(), corrupted.double().mean().item())
    if not ability.accuracy >= MIN_ACCURACY:
        guess = "" if chance is None else f" (chance {chance:.2f})"
        raise AttnPruneError(
            f"{name}: this model cannot do the task: accuracy {ability.accuracy:.2f}{guess}, "
            f"{MIN_ACCURACY:.2f} is needed"
        )
    if not ability.gap >= MIN_GAP[metric]:
        raise AttnPruneError(
            f"{name}: clean and corrupted prompts differ too little for this model: {metric.replace('_', ' ')} "
            f"{ability.clean:.2f} and {ability.corrupted:.2f} (accuracy {ability.accuracy:.2f}), "
            f"a gap of {MIN_GAP[metric]} is needed"
        )
    return ability
