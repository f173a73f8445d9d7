"""The loss kernel (in Triton's interpreter where there is no GPU) against fp64 and autograd."""

import pytest
import torch

pytest.importorskip("triton")
from attnprune.attention.kernels import loss
from attnprune.attention.kernels.loss import distill_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCABULARY = 300


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(loss, "BLOCK", 128)  # the last block of a row is not full


def logits(rows=6, vocabulary=VOCABULARY, spread=4.0, seed=0, dtype=torch.float32):
    """(student, base, labels); the second and the last row do not count."""
    draw = torch.Generator().manual_seed(seed)
    base = torch.randn(rows, vocabulary, generator=draw) * spread
    student = base + torch.randn(rows, vocabulary, generator=draw)
    labels = torch.randint(0, vocabulary, (rows,), generator=draw)
    labels[1], labels[-1] = -100, -1
    return student.to(DEVICE, dtype), base.to(DEVICE, dtype), labels.to(DEVICE)


def defined(student, base, labels, share, scale=1.0, softcap=None):
    """([3, N], gradient [N, V]) in fp64."""
    student = student.double().requires_grad_()

    def log_p(raw):
        x = raw.double() * scale
        return torch.log_softmax(x if softcap is None else softcap * torch.tanh(x / softcap), -1)

    ours, theirs = log_p(student), log_p(base)
    counted = labels >= 0
    at = labels.clamp(min=0)[:, None]
    rows = [(theirs.exp() * (theirs - ours)).sum(-1), -ours.gather(1, at)[:, 0], -theirs.gather(1, at)[:, 0]]
    out = torch.stack([torch.where(counted, row, 0.0) for row in rows])
    (share * out[0] + (1 - share) * out[1]).sum().backward()
    return out.detach(), student.grad


def distilled(student, base, labels, share, gradient=True, **options):
    student, out = student.clone(), torch.full((3, len(labels)), 7.0, device=DEVICE)
    distill_rows(student, base, labels, out, share=share, gradient=gradient, **options)
    return out, student


def assert_close(made, expected, limit=1e-6):
    assert (made.double() - expected).abs().max() <= limit * expected.abs().max().clamp(min=1.0)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("options", [{}, {"scale": 0.25}, {"softcap": 5.0}, {"scale": 0.5, "softcap": 30.0}])
def test_losses_and_gradient_are_the_definition_s(share, options):
    inputs = logits()
    out, gradient = distilled(*inputs, share, **options)
    expected, gradient_expected = defined(*inputs, share, **options)
    assert_close(out, expected)
    # fp32: processors round differently, 2.1e-6 was seen
    assert (gradient.double() - gradient_expected).norm() <= 4e-6 * gradient_expected.norm()
    assert_close(gradient, gradient_expected)
    for row in (1, -1):  # not counted
        assert not out[:, row].any()
        assert not gradient[row].any()


@pytest.mark.parametrize("vocabulary", [1, 5, 128, 129])
def test_vocabularies_of_any_size(vocabulary):
    inputs = logits(3, vocabulary)
    expected, gradient_expected = defined(*inputs, 0.5)
    out, gradient = distilled(*inputs, 0.5)
    assert_close(out, expected)
    assert_close(gradient, gradient_expected)


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_far_logits_neither_overflow_nor_lose_the_small_difference(scale):
    """A KL of equal rows is 0, whatever their size; the largest logit may come first or last."""
    base = torch.linspace(-50, 50, VOCABULARY, device=DEVICE).repeat(4, 1) * scale
    base[1], base[2] = base[1].flip(0), base[2] - 1e4
    labels = torch.tensor([0, 1, 5, VOCABULARY - 1], device=DEVICE)
    out, gradient = distilled(base, base, labels, 1.0)
    assert out[0].abs().max() <= 1e-6
    assert gradient.abs().max() <= 1e-6
    assert_close(out, defined(base, base, labels, 1.0)[0])


def test_a_small_kl_keeps_its_digits():
    student, base, labels = logits()
    student = base + 1e-2 * torch.randn(student.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    expected, _ = defined(student, base, labels, 1.0)
    assert 1e-6 < expected[0].max() < 1e-4
    assert_close(distilled(student, base, labels, 1.0)[0], expected, 1e-7 * expected[1].max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_logits(dtype):
    inputs = logits(dtype=dtype)
    out, gradient = distilled(*inputs, 0.3, softcap=20.0)
    expected, gradient_expected = defined(*inputs, 0.3, softcap=20.0)
    assert_close(out, expected)
    assert gradient.dtype == dtype
    assert (gradient.double() - gradient_expected).abs().max() <= torch.finfo(dtype).eps / 2


def test_rows_of_a_wider_matrix_and_no_gradient():
    student, base, labels = logits()
    wide = torch.full((len(labels), VOCABULARY + 9), float("nan"), device=DEVICE)
    wide[:, :VOCABULARY] = student
    before = wide.clone()
    out, expected = torch.empty(3, len(labels), device=DEVICE), defined(student, base, labels, 0.3)
    distill_rows(wide[:, :VOCABULARY], base, labels, out, share=0.3, gradient=False)
    assert_close(out, expected[0])
    assert torch.equal(wide[:, :VOCABULARY], before[:, :VOCABULARY])
    distill_rows(wide[:, :VOCABULARY], base, labels, out, share=0.3, gradient=True)
    assert_close(wide[:, :VOCABULARY], expected[1])
    assert wide[:, VOCABULARY:].isnan().all()


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1])
def test_broken_logits_do_not_pass_for_a_loss(broken, which):
    inputs = logits()
    inputs[which][2, 7] = broken
    out, _ = distilled(*inputs, 0.5)
    assert not out[0, 2].isfinite()
    assert out[:, [0, 1, 3, 4, 5]].isfinite().all()
