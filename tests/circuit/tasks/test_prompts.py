"""Metrics, accuracy and ability, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from attnprune.circuit.tasks import Ability, accuracy, check_ability, load_task
from attnprune.circuit.tasks.prompts import NO_TOKEN, Example, Metric, batched, logit_difference, probability_difference
from attnprune.errors import AttnPruneError

# Metrics and ability


def test_metrics_by_hand():
    logits = torch.zeros(2, 3, 5)
    logits[:, -1] = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0], [0.5, 0.0, -1.0, 2.0, 1.0]])
    logits[:, 0] = 99.0  # only the last position counts
    answers, wrong = torch.tensor([[4, 0], [3, NO_TOKEN]]), torch.tensor([[1], [0]])
    found = logit_difference(logits, answers, wrong)
    assert found.tolist() == pytest.approx([math.log(math.exp(5) + math.exp(1)) - 2.0, 1.5], abs=1e-5)
    p = logits[:, -1].softmax(-1)
    expected = [p[0, 4] + p[0, 0] - p[0, 1], p[1, 3] - p[1, 0]]
    assert probability_difference(logits, answers, wrong).tolist() == pytest.approx([float(e) for e in expected])


@pytest.mark.parametrize("metric", ["logit_difference", "probability_difference"])
def test_metrics_are_differentiable_and_fp32(metric):
    examples = [
        Example([1, 2], [1, 3], [0, 4], [1], {}, 0, ("", "")),
        Example([1, 2], [1, 3], [2], [1, 0], {}, 0, ("", "")),
    ]
    prompts = batched(examples, metric)[0]
    logits = torch.randn(2, 2, 6, dtype=torch.bfloat16, requires_grad=True)
    score = prompts.score(logits)
    assert score.dtype == torch.float32
    (gradient,) = torch.autograd.grad(score.sum(), logits)
    assert gradient.isfinite().all()
    assert (gradient[:, 0] == 0).all()
    assert (gradient[0, -1, [0, 4]] > 0).all()
    assert gradient[0, -1, 1] < 0


def test_take_and_to_keep_rows_together(smol):
    batch = load_task("sva", smol, count=12).train[0]
    part = batch.take(torch.tensor([7, 2])).to("cpu")
    assert part.texts == (batch.texts[7], batch.texts[2])
    for name in ("clean", "corrupted", "answers", "wrong", "template"):
        assert torch.equal(getattr(part, name), getattr(batch, name)[[7, 2]])
    assert all(torch.equal(part.roles[role], batch.roles[role][[7, 2]]) for role in batch.roles)
    logits = torch.randn(len(batch), 1, len(smol))
    assert torch.equal(batch.score(logits)[[7, 2]], part.score(logits[[7, 2]]))


def test_accuracy_is_the_share_above_zero():
    assert accuracy(torch.tensor([1.0, 0.0, -1.0, 0.1])) == 0.5
    assert accuracy(torch.tensor([math.nan, 1.0])) == 0.5


def test_ability_rule():
    good, bad = torch.tensor([2.0, 1.0, 1.0, -1.0]), torch.tensor([0.0, 0.0, 1.0, -1.0])
    assert check_ability("ioi", "logit_difference", good, bad) == Ability(0.75, 0.75, 0.0)
    cases: list[tuple[torch.Tensor, torch.Tensor, Metric, str]] = [
        (torch.tensor([1.0, -1.0]), torch.tensor([-5.0, -5.0]), "logit_difference", "accuracy 0.50, 0.75 is needed"),
        (torch.tensor([1.0, 1.0]), torch.tensor([0.6, 0.6]), "logit_difference", "1.00 and 0.60"),
        (torch.tensor([0.1, 0.1]), torch.tensor([0.05, 0.05]), "probability_difference", "a gap of 0.1 is needed"),
        (torch.full((2,), math.nan), torch.zeros(2), "logit_difference", "accuracy 0.00"),
        (torch.ones(2), torch.full((2,), math.nan), "logit_difference", "nan"),
    ]
    for clean, corrupted, metric, part in cases:
        with pytest.raises(AttnPruneError) as caught:
            check_ability("ioi", metric, clean, corrupted)
        assert caught.value.exit_code == 1
        assert caught.value.message.startswith("ioi: ")
        assert part in caught.value.message
    with pytest.raises(AttnPruneError, match=r"accuracy 0.50 \(chance 0.33\), 0.75 is needed"):
        check_ability("docstring", "logit_difference", torch.tensor([1.0, -1.0]), torch.zeros(2), 1 / 3)
    ability = check_ability("sva", "probability_difference", torch.full((2,), 0.2), torch.zeros(2))
    assert ability.gap == pytest.approx(0.2)
