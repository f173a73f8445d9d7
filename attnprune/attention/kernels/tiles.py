"""What all kernels share: loading rows of a matrix, the loop over tiles that intervals of keys need, launch options."""

# pyright: reportAttributeAccessIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret
FUSED = {} if INTERPRETED else {"enable_fp_fusion": True}  # scores are one multiply-add; Triton's default is changing


def padded(width: int) -> int:
    """The power of two that a head of this width takes in registers; matmuls need 16."""
    return max(16, triton.next_power_of_2(width))


def precision(dtype: torch.dtype) -> str:
    """How matmuls treat fp32 inputs: three TF32 products keep nearly all bits on the tensor cores."""
    return "tf32x3" if dtype == torch.float32 else "ieee"


def strides(*tensors: Tensor) -> list[int]:
    """Batch, head and row strides; the last axis is contiguous."""
    return [stride for x in tensors for stride in x.stride()[:3]]


def rows_contiguous(*tensors: Tensor) -> list[Tensor]:
    """Copies of those whose last axis is not contiguous."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


@triton.jit
def load_rows(base, index, stride, limit, D: tl.constexpr, DP: tl.constexpr, MASK: tl.constexpr):
    """Rows `index` of a [T, D] matrix, 0 past `limit` and in the columns that only pad D to a power of two."""
    d = tl.arange(0, DP)
    pointers = base + index.to(tl.int64)[:, None] * stride + d[None, :]
    if MASK:
        return tl.load(pointers, mask=(index < limit)[:, None] & (d < D)[None, :], other=0.0)
    elif D < DP:
        return tl.load(pointers, mask=(d < D)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def store_rows(base, index, stride, limit, x, D: tl.constexpr, DP: tl.constexpr):
    d = tl.arange(0, DP)
    pointers = base + index.to(tl.int64)[:, None] * stride + d[None, :]
    tl.store(pointers, x.to(base.dtype.element_ty), mask=(index < limit)[:, None] & (d < D)[None, :])


@triton.jit
def bounds(first, last, BLOCK: tl.constexpr):
    """(start, full_start, full_end, end) of the loop over tiles of BLOCK for intervals [first, last) of a block.

    Tiles in [full_start, full_end) lie inside every interval and need no mask; an empty interval leaves none.
    """
    start = tl.min(tl.where(last > first, first, 2147483647)) // BLOCK * BLOCK
    end = tl.max(last)
    full_start = tl.cdiv(tl.max(first), BLOCK) * BLOCK
    full_end = tl.maximum(tl.min(last) // BLOCK * BLOCK, full_start)
    return start, full_start, full_end, end


@triton.jit
def part(start, full_start, full_end, end, PART: tl.constexpr):
    """The tiles before (0), inside (1) and after (2) those that need no mask."""
    if PART == 0:
        return start, tl.minimum(full_start, end)
    elif PART == 1:
        return full_start, full_end
    else:
        return full_end, end
