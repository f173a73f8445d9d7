"""Run-time kernels of gated attention: prefill and decode, where closed gates save work. Both are exact.

A row (a query in a head) without an open edge outputs 0 and needs no softmax, so prefill first looks for the rows that
have one (`scan_kernel`: scores and their maximum, no exponential, no values), gathers them, and computes only those
(`attend_kernel`), leaving out the values of tiles in which no gate is open. Decode reads each key once for all heads of
a group, and of the values only the rows that a gate opens.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportCallIssue=false, reportOperatorIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnprune.attention.kernels import elementwise as ew
from attnprune.attention.kernels import tiles

# Chosen without a GPU, as the training tiles: queries, keys, warps.
PREFILL_TILE = (16, 16, 4) if tiles.INTERPRETED else (128, 64, 8)
DECODE_KEYS = 16 if tiles.INTERPRETED else 64
DECODE_PROGRAMS = 264  # two for each multiprocessor of an H100


@triton.jit
def _scores(q, K, k_stride, keys, first, last, j0, D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr,
            MASK: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Raw scores of a tile [BM, BN], HIDDEN where the pair is not visible, and its keys."""
    j = j0 + tl.arange(0, BN)
    k = tiles.load_rows(K, j, k_stride, keys, D, DP, MASK)
    s = tl.dot(q, k.T, input_precision=PRECISION)
    if MASK:
        s = tl.where((j[None, :] >= first[:, None]) & (j[None, :] < last[:, None]), s, ew.HIDDEN)
    return s, j


@triton.jit
def _is_open(s, scale, bias):
    """The gates of a tile of scores; a head forced open (bias +inf) opens no hidden pair."""
    return (s * scale + bias > 0.0) & (s > ew.HIDDEN)


@triton.jit
def scan_kernel(
    Q, K, BIAS, ROWS, LARGEST, OPEN, scaling, queries, keys, q_b, q_h, q_t, k_b, k_h, k_t,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Largest score (log2 units) and number of open edges of each row. Grid (row blocks, B * H)."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    b, h = (head // H).to(tl.int64), head % H
    i = block * BM + tl.arange(0, BM)
    inside = i < queries
    row = ROWS + (b * queries + i) * 3
    first = tl.load(row, mask=inside, other=0)
    last = tl.load(row + 1, mask=inside, other=0)
    q = tiles.load_rows(Q + b * q_b + h * q_h, i, q_t, queries, D, DP, True)
    K += b * k_b + (h // G) * k_h
    scale = scaling * ew.LOG2E
    bias = tl.load(BIAS + h) * ew.LOG2E
    largest = tl.full((BM,), ew.HIDDEN, tl.float32)
    count = tl.zeros((BM,), tl.float32)
    start, full_start, full_end, end = tiles.bounds(first, last, BN)
    for PART in tl.static_range(3):
        low, high = tiles.part(start, full_start, full_end, end, PART)
        for j0 in range(low, high, BN):
            s, _ = _scores(q, K, k_t, keys, first, last, j0, D, DP, BN, PART != 1, PRECISION)
            largest = tl.maximum(largest, tl.max(s, 1))
            count += tl.sum(tl.where(_is_open(s, scale, bias), 1.0, 0.0), 1)
    place = head.to(tl.int64) * queries + i
    tl.store(LARGEST + place, largest * scale, mask=inside)
    tl.store(OPEN + place, count.to(tl.int32), mask=inside)


@triton.jit
def attend_kernel(
    Q, K, V, OUT, BIAS, ROWS, LARGEST, ORDER, LIVE, scaling, queries, keys,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Output of the live rows: the first LIVE[head] entries of ORDER [B * H, Q]. Grid (row blocks, B * H)."""
    head = tl.program_id(1)
    live = tl.load(LIVE + head)
    position = tl.program_id(0) * BM + tl.arange(0, BM)
    if tl.program_id(0) * BM < live:
        b, h = (head // H).to(tl.int64), head % H
        inside = position < live
        i = tl.load(ORDER + head.to(tl.int64) * queries + position, mask=inside, other=queries)
        row = ROWS + (b * queries + i) * 3
        first = tl.load(row, mask=inside, other=0)
        last = tl.load(row + 1, mask=inside, other=0)
        largest = tl.load(LARGEST + head.to(tl.int64) * queries + i, mask=inside, other=0.0)
        q = tiles.load_rows(Q + b * q_b + h * q_h, i, q_t, queries, D, DP, True)
        K += b * k_b + (h // G) * k_h
        V += b * v_b + (h // G) * v_h
        scale = scaling * ew.LOG2E
        bias = tl.load(BIAS + h) * ew.LOG2E
        acc = tl.zeros((BM, DP), tl.float32)
        total = tl.zeros((BM,), tl.float32)
        start, full_start, full_end, end = tiles.bounds(first, last, BN)
        for PART in tl.static_range(3):
            low, high = tiles.part(start, full_start, full_end, end, PART)
            for j0 in range(low, high, BN):
                s, j = _scores(q, K, k_t, keys, first, last, j0, D, DP, BN, PART != 1, PRECISION)
                p = tl.exp2(s * scale - largest[:, None])
                total += tl.sum(p, 1)
                p = tl.where(_is_open(s, scale, bias), p, 0.0)
                if tl.max(tl.max(p, 1), 0) > 0.0:
                    v = tiles.load_rows(V, j, v_t, keys, D, DP, PART != 1)
                    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        out = acc / tl.where(total > 0.0, total, 1.0)[:, None]
        tiles.store_rows(OUT + b * o_b + h * o_h, i, o_t, queries, out, D, DP)


def prefill(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, rows: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """(output [B, H, Q, D], open edges int64 [H]) without gradient, noise or waiting for the device.

    Args:
        query: [B, H, Q, D]; key, value: [B, H_kv, K, D]; fp32, bf16 or fp16, any strides.
        bias: gate bias [H], fp32; `+inf` forces a head open.
        rows: int32 [B, Q, 3], see `Spans`.
    """
    query, key, value = tiles.rows_contiguous(query, key, value)
    batch, heads, queries, width = query.shape
    block, options = _options(query, key)
    output = query.new_zeros(batch, queries, heads, width).transpose(1, 2)
    largest = query.new_empty(batch, heads, queries, dtype=torch.float32)
    open_edges = torch.empty_like(largest, dtype=torch.int32)
    grid = (triton.cdiv(queries, block), batch * heads)
    scan_kernel[grid](
        query, key, bias, rows, largest, open_edges, scaling, queries, key.shape[2], *tiles.strides(query, key),
        **options,
    )  # fmt: skip
    order, live = _compacted(open_edges > 0)
    attend_kernel[grid](
        query, key, value, output, bias, rows, largest, order, live, scaling, queries, key.shape[2],
        *tiles.strides(query, key, value, output), **options,
    )  # fmt: skip
    return output, (open_edges * rows[:, None, :, 2]).sum((0, 2))


def _compacted(live: Tensor) -> tuple[Tensor, Tensor]:
    """(int32 [B, H, Q]: the live rows first, in their order; int32 [B, H]: how many), on the device."""
    queries = live.shape[-1]
    place = torch.where(live, live.cumsum(-1) - 1, queries)  # the others go to a place that is cut off
    index = torch.arange(queries, device=live.device, dtype=torch.int32).expand(live.shape)
    order = torch.zeros(*live.shape[:-1], queries + 1, dtype=torch.int32, device=live.device)
    return order.scatter_(-1, place, index)[..., :queries].contiguous(), live.sum(-1, dtype=torch.int32)


def _options(query: Tensor, key: Tensor) -> tuple[int, dict]:
    heads, width = query.shape[1], query.shape[3]
    queries, keys, warps = PREFILL_TILE
    if query.dtype == torch.float32 and not tiles.INTERPRETED:
        queries, keys = queries // 2, keys // 2
    return queries, {
        "H": heads, "G": heads // key.shape[1], "D": width, "DP": tiles.padded(width), "BM": queries, "BN": keys,
        "PRECISION": tiles.precision(query.dtype), "num_warps": warps, "num_stages": 2, **tiles.FUSED,
    }  # fmt: skip


@triton.jit
def decode_kernel(
    Q, K, V, VISIBLE, BIAS, ACC, LARGEST, TOTAL, OPEN, scaling, keys, per_split,
    q_b, q_h, k_b, k_h, k_t, v_b, v_h, v_t, m_b, m_t,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BG: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One part of the keys for the heads of one group: sums relative to the part's largest score.

    Grid (B * H_kv, parts). ACC [B, H, parts, D]; LARGEST, TOTAL and OPEN [B, H, parts].
    """
    KV: tl.constexpr = H // G
    b, kv = (tl.program_id(0) // KV).to(tl.int64), tl.program_id(0) % KV
    part, parts = tl.program_id(1), tl.num_programs(1)
    g = tl.arange(0, BG)  # the group's heads, padded to what a matmul needs
    h = kv * G + g
    q = tiles.load_rows(Q + b * q_b + kv * G * q_h, g, q_h, G, D, DP, True)
    bias = tl.load(BIAS + h, mask=g < G, other=ew.HIDDEN) * ew.LOG2E
    scale = scaling * ew.LOG2E
    K += b * k_b + kv * k_h
    V += b * v_b + kv * v_h
    acc = tl.zeros((BG, DP), tl.float32)
    largest = tl.full((BG,), ew.HIDDEN, tl.float32)
    total = tl.zeros((BG,), tl.float32)
    count = tl.zeros((BG,), tl.float32)
    d = tl.arange(0, DP)
    for j0 in range(part * per_split, tl.minimum((part + 1) * per_split, keys), BN):
        j = j0 + tl.arange(0, BN)
        seen = tl.load(VISIBLE + b * m_b + j.to(tl.int64) * m_t, mask=j < keys, other=0) != 0
        k = tl.load(K + j.to(tl.int64)[:, None] * k_t + d[None, :], mask=seen[:, None] & (d < D)[None, :], other=0.0)
        s = tl.where(seen[None, :], tl.dot(q, k.T, input_precision=PRECISION), ew.HIDDEN)
        is_open = _is_open(s, scale, bias[:, None])
        larger = tl.maximum(largest, tl.max(s, 1) * scale)
        shrink = tl.exp2(largest - larger)
        p = tl.where(seen[None, :], tl.exp2(s * scale - larger[:, None]), 0.0)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        largest = larger
        count += tl.sum(tl.where(is_open, 1.0, 0.0), 1)
        wanted = tl.max(is_open.to(tl.int32), 0) > 0  # for some head of the group
        if tl.max(wanted.to(tl.int32), 0) > 0:
            v_rows = V + j.to(tl.int64)[:, None] * v_t + d[None, :]
            v = tl.load(v_rows, mask=wanted[:, None] & (d < D)[None, :], other=0.0)
            p = tl.where(is_open, p, 0.0)
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    place = (b * H + h) * parts + part
    tl.store(ACC + place[:, None] * D + d[None, :], acc, mask=(g < G)[:, None] & (d < D)[None, :])
    tl.store(LARGEST + place, largest, mask=g < G)
    tl.store(TOTAL + place, total, mask=g < G)
    tl.store(OPEN + place, count.to(tl.int32), mask=g < G)


@triton.jit
def merge_kernel(
    ACC, LARGEST, TOTAL, OUT, o_b, o_h, parts,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PP: tl.constexpr,
):  # fmt: skip
    """Add up the parts of one head in a fixed order. Grid (B * H)."""
    head = tl.program_id(0).to(tl.int64)
    part, d = tl.arange(0, PP), tl.arange(0, DP)
    inside = part < parts
    largest = tl.load(LARGEST + head * parts + part, mask=inside, other=ew.HIDDEN)
    weight = tl.where(inside, tl.exp2(largest - tl.max(largest, 0)), 0.0)
    total = tl.sum(weight * tl.load(TOTAL + head * parts + part, mask=inside, other=0.0), 0)
    pointers = ACC + (head * parts + part)[:, None] * D + d[None, :]
    acc = tl.load(pointers, mask=inside[:, None] & (d < D)[None, :], other=0.0)
    out = tl.sum(acc * weight[:, None], 0) / tl.where(total > 0.0, total, 1.0)
    tl.store(OUT + (head // H) * o_b + (head % H) * o_h + d, out.to(OUT.dtype.element_ty), mask=d < D)


def decode(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, visible: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """(output [B, H, 1, D], open edges int64 [H]) of one query per sequence, without gradient or noise.

    The launch depends on shapes alone, and nothing waits for the device: fit for static caches and CUDA graphs.

    Args:
        query: [B, H, 1, D]; key, value: [B, H_kv, K, D], K the length of the buffer.
        visible: bool [B, 1, 1, K], any mask.
    """
    query, key, value = tiles.rows_contiguous(query, key, value)
    batch, heads, _, width = query.shape
    kv_heads, keys = key.shape[1:3]
    group = heads // kv_heads
    per_split = _keys_per_split(batch * kv_heads, keys)
    parts = triton.cdiv(keys, per_split)
    output = query.new_empty(batch, 1, heads, width).transpose(1, 2)
    acc = query.new_empty(batch, heads, parts, width, dtype=torch.float32)
    largest, total = acc.new_empty(2, batch, heads, parts).unbind(0)
    open_edges = torch.empty_like(total, dtype=torch.int32)
    shared = {"H": heads, "D": width, "DP": tiles.padded(width), **tiles.FUSED}
    decode_kernel[batch * kv_heads, parts](
        query, key, value, visible, bias, acc, largest, total, open_edges, scaling, keys, per_split,
        *query.stride()[:2], *tiles.strides(key, value), visible.stride(0), visible.stride(3),
        G=group, BG=tiles.padded(group), BN=DECODE_KEYS, PRECISION=tiles.precision(query.dtype), num_warps=4,
        num_stages=2, **shared,
    )  # fmt: skip
    merge_kernel[(batch * heads,)](
        acc, largest, total, output, *output.stride()[:2], parts, PP=triton.next_power_of_2(parts), **shared
    )
    return output, open_edges.sum((0, 2))


def _keys_per_split(programs: int, keys: int) -> int:
    """Enough parts to fill the GPU, each a whole number of tiles."""
    parts = max(1, min(DECODE_PROGRAMS // programs, 64, triton.cdiv(keys, DECODE_KEYS)))
    return triton.cdiv(triton.cdiv(keys, parts), DECODE_KEYS) * DECODE_KEYS
