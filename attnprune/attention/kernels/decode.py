"""Run-time attention of one query per sequence (decode): exact, bound by what it reads from the cache.

The keys are read once for all heads of a group; of the values only the rows that a gate of the group opens. The tiles
of keys go round the programs in turn, so that a buffer that is filled in part, a window and padding all spread evenly,
and nothing about the mask has to be known before the launch. Partial sums are merged in a fixed order.
"""

# Triton turns Python arguments into constants and iterates in its own way, which pyright cannot know:
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportCallIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnprune.attention.kernels import tiles
from attnprune.attention.kernels.prefill import (
    HIDDEN,
    LOG2E,
    any_open,
    gate_logits,
    load_marked_rows,
    row_pointer,
)

LOWEST = tl.constexpr(-1e30)  # a maximum over nothing: finite, as differences of it are taken

# Chosen without a GPU: four programs on each multiprocessor of an H100 hide each other's waits for memory.
PROGRAMS = 528
MOST_SPLITS = 64
WARPS, STAGES = 4, 3


@triton.jit
def decode_kernel(
    Q, K, V, VISIBLE, BIAS, ACC, LARGEST, TOTAL, COUNT, scaling, keys,
    q_b, q_h, k_b, k_h, k_t, v_b, v_h, v_t, m_b, m_t,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Every `splits`-th tile of keys for the heads of one group. Grid (B * H_kv, splits).

    Writes the numerator ACC fp32 [B, H, splits, D] and the denominator TOTAL, both relative to the largest score
    LARGEST (log2 units), and the open edges COUNT int32, all [B, H, splits].
    """
    KV: tl.constexpr = H // G
    b, kv = (tl.program_id(0) // KV).to(tl.int64), (tl.program_id(0) % KV).to(tl.int64)
    split, splits = tl.program_id(1), tl.num_programs(1)
    g = tl.arange(0, BM)  # the heads of the group, padded to what a matmul needs
    h = kv * G + g
    q = load_marked_rows(Q + b * q_b + kv * G * q_h, g, q_h, g < G, D, DP)
    bias = tl.load(BIAS + h, mask=g < G, other=HIDDEN)
    scale = scaling * LOG2E
    K += b * k_b + kv * k_h
    V += b * v_b + kv * v_h
    VISIBLE += b * m_b
    n = tl.arange(0, BN)
    acc = tl.zeros((BM, DP), tl.float32)
    largest = tl.full((BM,), LOWEST, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    count = tl.zeros((BM,), tl.int32)
    for tile in range(split, tl.cdiv(keys, BN), splits):
        j0 = tile * BN
        seen = tl.load(row_pointer(VISIBLE, j0, m_t) + n * m_t, mask=j0 + n < keys, other=0) != 0
        k = load_marked_rows(row_pointer(K, j0, k_t), n, k_t, seen, D, DP)
        s = tl.where(seen[None, :], tl.dot(q, k.T, input_precision=PRECISION), HIDDEN)
        top = tl.max(s, 1)
        larger = tl.maximum(largest, top * scale)
        shrink = tl.exp2(largest - larger)
        p = tl.exp2(tl.fma(s, scale, -larger[:, None]))
        total = total * shrink + tl.sum(p, 1)
        acc *= shrink[:, None]
        largest = larger
        if any_open(top, scaling, bias):
            is_open = gate_logits(s, scaling, bias[:, None]) > 0.0
            count += tl.sum(is_open.to(tl.int32), 1)
            wanted = tl.max(is_open.to(tl.int32), 0) > 0  # by some head of the group
            v = load_marked_rows(row_pointer(V, j0, v_t), n, v_t, wanted, D, DP)
            acc = tl.dot(tl.where(is_open, p, 0.0).to(v.dtype), v, acc, input_precision=PRECISION)
    d = tl.arange(0, DP)
    place = (b * H + h) * splits + split
    tl.store(ACC + place[:, None] * D + d[None, :], acc, mask=(g < G)[:, None] & (d < D)[None, :])
    tl.store(LARGEST + place, largest, mask=g < G)
    tl.store(TOTAL + place, total, mask=g < G)
    tl.store(COUNT + place, count, mask=g < G)


@triton.jit
def merge_kernel(
    ACC, LARGEST, TOTAL, COUNT, OUT, OPEN, splits, o_b, o_h,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Add up the partial sums of one head. Grid (B * H); SPLITS is the power of two that holds `splits`."""
    head = tl.program_id(0)
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    split, d = tl.arange(0, SPLITS), tl.arange(0, DP)
    inside = split < splits
    place = head.to(tl.int64) * splits + split
    largest = tl.load(LARGEST + place, mask=inside, other=LOWEST)
    weight = tl.exp2(largest - tl.max(largest, 0))
    total = tl.sum(weight * tl.load(TOTAL + place, mask=inside, other=0.0), 0)
    mask = inside[:, None] & (d < D)[None, :]
    acc = tl.load(ACC + place[:, None] * D + d[None, :], mask=mask, other=0.0)
    out = tl.sum(acc * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)  # 0 if the query sees nothing
    tl.store(OUT + b * o_b + h * o_h + d, out.to(OUT.dtype.element_ty), mask=d < D)
    tl.store(OPEN + head, tl.sum(tl.load(COUNT + place, mask=inside, other=0), 0))


def decode(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, visible: Tensor, *, scaling: float
) -> tuple[Tensor, Tensor]:
    """Gated attention of one query per sequence at run time: no gradient, no noise, the same bits in every run.

    The launch depends on shapes alone, and nothing waits for the device: fit for static caches and CUDA graphs.

    Args:
        query: [B, H, 1, D]; key, value: [B, H_kv, K, D] with H a multiple of H_kv, K the length of the buffer; fp32,
            bf16 or fp16, any strides (copied if the last axis is not contiguous).
        bias: gate bias [H], fp32; `+inf` forces a head open.
        visible: bool [B or 1, 1, 1, K], any mask. Keys and values that it hides are not read.
        scaling: factor of the scores, positive.

    Returns:
        output [B, H, 1, D] in the dtype of query, and the open edges, int32 [B, H, 1].
    """
    query, key, value = tiles.rows_contiguous(query, key, value)
    batch, heads, _, width = query.shape
    kv_heads, keys = key.shape[1:3]
    group, block = heads // kv_heads, keys_per_tile(query.dtype)
    visible = visible.expand(batch, 1, 1, keys)
    splits = splits_for(batch * kv_heads, triton.cdiv(keys, block))
    acc = query.new_empty(batch, heads, splits, width, dtype=torch.float32)
    largest, total = acc.new_empty(2, batch, heads, splits).unbind(0)
    count = torch.empty_like(total, dtype=torch.int32)
    # [B, 1, H, D] in memory, which is what the model's output projection reads
    output = query.new_empty(batch, 1, heads, width).transpose(1, 2)
    open_edges = count.new_empty(batch, heads, 1)
    shared = {"H": heads, "D": width, "DP": tiles.padded(width), **tiles.FUSED}
    with torch.cuda.device_of(query):
        decode_kernel[batch * kv_heads, splits](
            query, key, value, visible, bias, acc, largest, total, count, scaling, keys,
            *query.stride()[:2], *tiles.strides(key, value), visible.stride(0), visible.stride(3),
            G=group, BM=tiles.padded(group), BN=block, PRECISION=tiles.precision(query.dtype),
            num_warps=WARPS, num_stages=STAGES, **shared,
        )  # fmt: skip
        merge_kernel[(batch * heads,)](
            acc, largest, total, count, output, open_edges, splits, *output.stride()[:2],
            SPLITS=triton.next_power_of_2(splits), **shared,
        )  # fmt: skip
    return output, open_edges


def keys_per_tile(dtype: torch.dtype) -> int:
    """Keys that a program takes at once."""
    if tiles.INTERPRETED:
        return 16
    return 32 if dtype == torch.float32 else 64


def splits_for(groups: int, key_tiles: int) -> int:
    """Programs that share the keys of one group of heads: enough to fill the GPU, each with at least one tile."""
    return max(1, min(triton.cdiv(PROGRAMS, groups), MOST_SPLITS, key_tiles))
