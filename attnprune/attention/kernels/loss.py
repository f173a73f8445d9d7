"""KL(base || student), both cross-entropies and the gradient of the student's logits: one kernel over rows of logits.

Logits are read twice, the second time mostly from the L2 cache, and the gradient takes the place of the student's:
nothing of the size of the vocabulary is made.
"""

# Triton turns Python arguments into constants, which pyright cannot know:
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnprune.attention.kernels import tiles

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e18)  # a maximum over nothing, and a logit past the end: differences and squares are finite

# Chosen without a GPU: 16 logits of each kind per thread, in loads of 16 bytes, without a spill.
BLOCK, WARPS = 4096, 8


@triton.jit
def tanh(x):
    """By one exponential that cannot overflow."""
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    size = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0.0, -size, size)


@triton.jit
def load_logits(ROW, n, vocabulary, scale, cap, CAPPED: tl.constexpr):
    """Logits n of a row, scaled and capped; LOWEST past the end. With a cap, raw * scale is what tanh sees."""
    inside = n < vocabulary
    x = tl.load(ROW + n, mask=inside, other=0.0).to(tl.float32) * scale
    if CAPPED:
        x = cap * tanh(x)
    return tl.where(inside, x, LOWEST)


@triton.jit
def step_of(x, largest):
    """(e^(x - m), what sums relative to `largest` shrink by) for the new maximum m: one of them is 1."""
    e = tl.exp2(tl.abs(x - largest) * -LOG2E)
    grows = x > largest
    return tl.where(grows, 1.0, e), tl.where(grows, e, 1.0)


@triton.jit
def merged(largest, total):
    """(maximum, log2 of the sum, factor of each lane's sums) over the lanes of an online softmax."""
    top = tl.max(largest, 0)
    factor = tl.exp2((largest - top) * LOG2E)
    return top, tl.log2(tl.sum(total * factor, 0)), factor


@triton.jit
def distill_kernel(
    S, T, LABELS, OUT, vocabulary, rows, s_stride, t_stride, share, scale, cap,
    CAPPED: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """See `distill_rows`; S student, T base. Grid (rows). Each lane keeps its own maximum: one reduction at the end."""
    row = tl.program_id(0).to(tl.int64)
    S += row * s_stride
    T += row * t_stride
    label = tl.load(LABELS + row)
    # Before the loops, and so before any thread writes a gradient.
    s_label = load_logits(S, tl.maximum(label, 0), vocabulary, scale, cap, CAPPED)
    t_label = load_logits(T, tl.maximum(label, 0), vocabulary, scale, cap, CAPPED)
    lane = tl.arange(0, BLOCK)
    s_largest = tl.full((BLOCK,), LOWEST, tl.float32)
    t_largest = tl.full((BLOCK,), LOWEST, tl.float32)
    s_total = tl.zeros((BLOCK,), tl.float32)
    t_total = tl.zeros((BLOCK,), tl.float32)
    cross = tl.zeros((BLOCK,), tl.float32)  # sum of e^t (t - s)
    for first in range(0, vocabulary, BLOCK):
        s = load_logits(S, first + lane, vocabulary, scale, cap, CAPPED)
        t = load_logits(T, first + lane, vocabulary, scale, cap, CAPPED)
        e, shrink = step_of(s, s_largest)
        s_total = s_total * shrink + e
        s_largest = tl.maximum(s_largest, s)
        e, shrink = step_of(t, t_largest)
        t_total = t_total * shrink + e
        cross = cross * shrink + e * (t - s)
        t_largest = tl.maximum(t_largest, t)
    s_top, s_log, _ = merged(s_largest, s_total)
    t_top, t_log, factor = merged(t_largest, t_total)
    counted = label >= 0
    kl = tl.sum(cross * factor, 0) * tl.exp2(-t_log) + (s_top - t_top) + (s_log - t_log) * LN2
    tl.store(OUT + row, tl.where(counted, kl, 0.0))
    tl.store(OUT + rows + row, tl.where(counted, s_top - s_label + s_log * LN2, 0.0))
    tl.store(OUT + 2 * rows + row, tl.where(counted, t_top - t_label + t_log * LN2, 0.0))
    if GRADIENT:
        for first in range(0, vocabulary, BLOCK):
            n = first + lane
            s = load_logits(S, n, vocabulary, scale, cap, CAPPED)
            t = load_logits(T, n, vocabulary, scale, cap, CAPPED)
            target = share * tl.exp2((t - t_top) * LOG2E - t_log) + tl.where(n == label, 1.0 - share, 0.0)
            gradient = tl.where(counted, tl.exp2((s - s_top) * LOG2E - s_log) - target, 0.0)
            if CAPPED:
                t = s * (1.0 / cap)
                gradient *= cap * (1.0 - t * t)
            gradient *= scale
            tl.store(S + n, gradient.to(S.dtype.element_ty), mask=n < vocabulary)


def distill_rows(
    student_logits: Tensor, base_logits: Tensor, labels: Tensor, out: Tensor, *, share: float, scale: float = 1.0,
    softcap: float | None = None, gradient: bool,
) -> None:  # fmt: skip
    """Losses of each row of logits, and the gradient of the student's. Nothing waits for the device.

    Args:
        student_logits, base_logits: [N, V] raw outputs of the output layer, any float dtype, rows contiguous.
        labels: int64 [N], contiguous; a negative one means that the row is not counted.
        out: fp32 [3, N], contiguous; becomes KL(base || student), cross-entropy of the student, of the base (nats), 0
            for rows that are not counted.
        share: of the KL in the loss share * KL + (1 - share) * CE.
        scale: factor of the raw logits, before `softcap`.
        softcap: logits are softcap * tanh(scale * raw / softcap); None: scale * raw.
        gradient: overwrite `student_logits` by d loss / d raw logits of each row (0 where it is not counted).
    """
    count, vocabulary = student_logits.shape
    cap = 1.0 if softcap is None else softcap
    with torch.cuda.device_of(student_logits):
        distill_kernel[(count,)](
            student_logits, base_logits, labels, out, vocabulary, count, student_logits.stride(0),
            base_logits.stride(0), share, scale / cap, cap, CAPPED=softcap is not None, GRADIENT=gradient,
            BLOCK=BLOCK, num_warps=WARPS, **tiles.FUSED,
        )  # fmt: skip
