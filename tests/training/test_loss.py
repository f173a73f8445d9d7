"""Linear + KL + cross-entropies in chunks, against fp64 and whole logits; memory that does not grow with V."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.nn import functional

from attnprune.training import loss
from attnprune.training.loss import Head, distill

N, D, V = 70, 24, 97


def case(dtype=torch.float64, vocabulary=V, **head):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, base = normal(N, D), normal(N, D)
    labels = torch.randint(0, vocabulary, (N,), generator=generator)
    labels[::7] = -100
    weight, bias = normal(vocabulary, D), normal(vocabulary)
    bias = bias.to(dtype) if head.pop("bias", False) else None
    return hidden.to(dtype).requires_grad_(), base.to(dtype), Head(weight.to(dtype), bias, **head), labels


def defined(hidden, base, head, labels, share):
    """The definition in fp64 with whole logits: (damage, KL, loss, base loss)."""
    counted = labels >= 0
    values = []
    for states in (hidden, base):
        raw = states.double() @ head.weight.double().t() + (0 if head.bias is None else head.bias.double())
        raw = raw * head.scale
        raw = raw if head.softcap is None else head.softcap * torch.tanh(raw / head.softcap)
        values.append(raw.log_softmax(-1)[counted])
    log_p, log_base = values
    kl = functional.kl_div(log_p, log_base, log_target=True, reduction="none").sum(-1).mean()
    own, theirs = (-x.gather(1, labels[counted][:, None]).mean() for x in (log_p, log_base))
    return share * kl + (1 - share) * (own - theirs), kl, own, theirs


HEADS = [{}, {"bias": True}, {"scale": 0.25}, {"softcap": 3.0}, {"bias": True, "scale": 0.5, "softcap": 2.0}]


@pytest.fixture(params=[10**9, 16 * V, 1], ids=["whole", "chunks", "smallest"])
def chunks(request, monkeypatch):
    monkeypatch.setitem(loss.CHUNK_LOGITS, "cpu", request.param)


@pytest.mark.parametrize("share", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_it_is_the_definition(chunks, dtype, head, share):
    hidden, base, output, labels = case(dtype, **head)
    made = distill(hidden, base, output, labels, share)
    (3 * made.damage).backward()
    exact = hidden.detach().double().requires_grad_()
    expected = defined(exact, base, output, labels, share)
    (3 * expected[0]).backward()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    for ours, theirs in zip(made, expected, strict=True):  # the damage is a difference of losses
        assert ours.item() == pytest.approx(theirs.item(), rel=tolerance, abs=tolerance * expected[2].item())
    assert (hidden.grad.double() - exact.grad).abs().max() <= tolerance * max(1, exact.grad.abs().max())


def test_a_row_that_does_not_count_has_no_gradient():
    hidden, base, output, labels = case()
    distill(hidden, base, output, labels, 0.5).damage.backward()
    assert (hidden.grad[::7] == 0).all()
    assert (hidden.grad[1] != 0).any()


def test_without_a_base_the_loss_alone_is_left():
    hidden, base, output, labels = case()
    made = distill(hidden, None, output, labels, 0.0)
    made.damage.backward()
    exact = hidden.detach().clone().requires_grad_()
    expected = defined(exact, base, output, labels, 0.0)[2]
    expected.backward()
    assert made.loss.item() == pytest.approx(expected.item())
    assert made.kl.item() == made.base_loss.item() == 0
    assert torch.allclose(hidden.grad, exact.grad)


def test_half_precision_keeps_its_sums_in_fp32():
    hidden, base, output, labels = case(torch.bfloat16)
    made = distill(hidden, base, output, labels, 1.0)
    assert {value.dtype for value in made} == {torch.float32}
    expected = defined(hidden, base, output, labels, 1.0)
    assert made.kl.item() == pytest.approx(expected[1].item(), rel=3e-2)
    made.damage.backward()
    assert hidden.grad.dtype == torch.bfloat16


PEAK = """
import resource, torch
from attnprune.training.loss import Head, distill
tokens, width, vocabulary = 4096, 32, int({vocabulary})
hidden = torch.randn(tokens, width, requires_grad=True)
head, labels = Head(torch.randn(vocabulary, width)), torch.randint(0, vocabulary, (tokens,))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
{call}.backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
CHUNKED = "distill(hidden, hidden.detach(), head, labels, 1.0).damage"
WHOLE = "torch.nn.functional.cross_entropy(hidden @ head.weight.t(), labels)"


def peak(call, vocabulary):
    """MiB that a fresh process needs on top."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK.format(call=call, vocabulary=vocabulary)],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout)


def test_memory_does_not_grow_with_the_vocabulary():
    small, large = peak(CHUNKED, 10_000), peak(CHUNKED, 80_000)
    assert large < small + 40
    assert large < peak(WHOLE, 80_000) / 8
