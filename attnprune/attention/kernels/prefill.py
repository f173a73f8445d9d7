"""Run-time attention of many queries (prefill): exact, and the cheaper the fewer gates are open.

A row (one query of one head) without an open edge outputs 0 and needs no softmax. So a first pass finds the rows that
have one (`scan_kernel`: scores and their maximum, no exponential, no values), `compact_kernel` lists them, and a second
pass works on those alone (`attend_kernel`). It knows the row maximum already, so its sums are never rescaled.

Wide heads (and fp32) also branch in each tile: since z grows with the score, the largest score of a row tells whether
the tile has an open gate for it, and the values of a tile without one are not read. Where a tile's matmul is small the
wait of all warps for that one answer costs more than it saves, even if every tile is closed.

Masks come as the intervals of `spans.py`; tiles inside all intervals of a block run without a mask.
"""

# Triton turns Python arguments into constants and iterates in its own way, which pyright cannot know:
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportCallIssue=false
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnprune.attention.kernels import tiles

LOG2E = tl.constexpr(1.4426950408889634)
HIDDEN = tl.constexpr(float("-inf"))  # the score of a pair that is not visible, and the maximum of a row that is dead

COMPACTED = 1024  # rows that `compact_kernel` takes at once


class Tile(NamedTuple):
    """Launch settings of both passes: BM queries x BN keys; `registers` caps those of a thread.

    branches: leave out the work on the gates of a tile in which all are closed.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None
    branches: bool = True


# By bytes of an input element and padded width. Chosen without a GPU, by registers, spills and shared memory of the
# compiled kernels. The cap lets two blocks share a multiprocessor, which hide each other's waits, and spills nearly
# nothing in the loop.
TILES = {
    (2, 64): Tile(128, 64, 8, 3, registers=128, branches=False),
    (2, 128): Tile(128, 64, 8, 3),
    (4, 64): Tile(64, 32, 4, 2),
    (4, 128): Tile(64, 16, 4, 2),
}


def tile_for(width: int, dtype: torch.dtype) -> Tile:
    """Launch settings for a head width of up to 128."""
    return Tile(16, 16, 4, 2) if tiles.INTERPRETED else TILES[dtype.itemsize, max(64, tiles.padded(width))]


@triton.jit
def gate_logits(s, scaling, bias):
    """z of raw scores s, rounded once whatever the compiler may fuse: every kernel decides a gate on the same bits."""
    return tl.fma(s, scaling, bias)


@triton.jit
def any_open(largest, scaling, bias):
    """Whether any of these row maxima opens a gate: as z grows with s, the gates of the whole tile in one test."""
    return tl.max((gate_logits(largest, scaling, bias) > 0.0).to(tl.int32), 0) > 0


@triton.jit
def load_marked_rows(base, index, stride, marked, D: tl.constexpr, DP: tl.constexpr):
    """The marked rows of a [T, D] matrix; the others are not read and 0, as are the columns that pad D to DP."""
    d = tl.arange(0, DP)
    pointers = base + index.to(tl.int64)[:, None] * stride + d[None, :]
    return tl.load(pointers, mask=marked[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def row_pointer(base, index, stride):
    """Row `index` of a [T, D] matrix, in 64 bits, outside the vector arithmetic of a tile's pointers."""
    return base + tl.cast(index, tl.int64) * stride


@triton.jit
def _load_tile(
    base, j0, stride, start, end, D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, EDGE: tl.constexpr
):  # fmt: skip
    """Keys or values from j0 on; at an edge only those in [start, end), which some query of the block sees."""
    n = tl.arange(0, BN)
    if EDGE:
        return load_marked_rows(row_pointer(base, j0, stride), n, stride, (j0 + n >= start) & (j0 + n < end), D, DP)
    else:
        return tiles.load_rows(row_pointer(base, j0, stride), n, stride, end, D, DP, False)


@triton.jit
def _scores(
    q, K, j0, stride, first, last, start, end, D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr,
    EDGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Raw scores q.k of a tile [BM, BN]."""
    k = _load_tile(K, j0, stride, start, end, D, DP, BN, EDGE)
    s = tl.dot(q, k.T, input_precision=PRECISION)
    if EDGE:
        j = j0 + tl.arange(0, BN)
        s = tl.where((j[None, :] >= first[:, None]) & (j[None, :] < last[:, None]), s, HIDDEN)
    return s


@triton.jit
def _first_seen(first, last):
    """The first key that some row of the block sees."""
    return tl.min(tl.where(last > first, first, 2147483647))


@triton.jit
def scan_kernel(
    Q, K, BIAS, ROWS, LARGEST, OPEN, scaling, queries, q_b, q_h, q_t, k_b, k_h, k_t,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BRANCH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Largest raw score of each live row (HIDDEN if it has no open edge) and its open edges. Grid (row blocks, B * H).

    LARGEST fp32 and OPEN int32 are [B, H, Q]; OPEN is 0 for rows that do not count. A query with NaN in it is live, so
    that the NaN reaches the output instead of passing for a row without an open edge.
    """
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest rows first
    head = tl.program_id(1)
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    lane = block * BM + tl.arange(0, BM)
    i = tl.minimum(lane, queries - 1)  # lanes past the end repeat the last row: an empty one would cost all a mask
    row = ROWS + (b * queries + i) * 3
    first, last, counted = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    q = tiles.load_rows(Q + b * q_b + h * q_h, i, q_t, queries, D, DP, True)
    K += b * k_b + (h // G) * k_h
    bias = tl.load(BIAS + h)
    broken = tl.max((q != q).to(tl.int32), 1) > 0
    largest = tl.where(broken, float("nan"), HIDDEN)
    count = tl.zeros((BM,), tl.int32)
    seen = _first_seen(first, last)
    start, full_start, full_end, end = tiles.bounds(first, last, BN)
    for PART in tl.static_range(3):
        low, high = tiles.part(start, full_start, full_end, end, PART)
        for j0 in range(low, high, BN):
            s = _scores(q, K, j0, k_t, first, last, seen, end, D, DP, BN, PART != 1, PRECISION)
            top = tl.max(s, 1)
            largest = tl.maximum(largest, top, propagate_nan=tl.PropagateNan.ALL)
            worth = True
            if BRANCH:
                worth = any_open(top, scaling, bias)
            if worth:
                count += tl.sum((gate_logits(s, scaling, bias) > 0.0).to(tl.int32), 1)
    dead = (gate_logits(largest, scaling, bias) <= 0.0) | (last <= first)
    place = head.to(tl.int64) * queries + lane
    tl.store(LARGEST + place, tl.where(dead, HIDDEN, largest), mask=lane < queries)
    tl.store(OPEN + place, tl.where(counted > 0, count, 0), mask=lane < queries)


@triton.jit
def compact_kernel(LARGEST, ORDER, LIVE, queries, BLOCK: tl.constexpr):
    """The live rows of each head in their order, ORDER [B, H, Q], and how many there are, LIVE [B, H]. Grid (B * H)."""
    head = tl.program_id(0).to(tl.int64)
    found = 0
    for i0 in range(0, queries, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        largest = tl.load(LARGEST + head * queries + i, mask=i < queries, other=HIDDEN)
        live = (largest != HIDDEN).to(tl.int32)
        place = found + tl.cumsum(live, 0) - 1
        tl.store(ORDER + head * queries + place, i, mask=live > 0)
        found += tl.sum(live, 0)
    tl.store(LIVE + head, found)


@triton.jit
def attend_kernel(
    Q, K, V, OUT, BIAS, ROWS, LARGEST, ORDER, LIVE, scaling, queries,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BRANCH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output of the live rows. Grid (row blocks, B * H); programs beyond the live rows have nothing to do."""
    head = tl.program_id(1)
    live = tl.load(LIVE + head)
    block = tl.cdiv(live, BM) - 1 - tl.program_id(0)  # the longest rows first
    if block >= 0:
        b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
        lane = block * BM + tl.arange(0, BM)
        statistics = head.to(tl.int64) * queries
        i = tl.load(ORDER + statistics + tl.minimum(lane, live - 1))  # lanes past the end repeat the last row
        row = ROWS + (b * queries + i) * 3
        first, last = tl.load(row), tl.load(row + 1)
        q = tiles.load_rows(Q + b * q_b + h * q_h, i, q_t, queries, D, DP, True)
        K += b * k_b + (h // G) * k_h
        V += b * v_b + (h // G) * v_h
        bias = tl.load(BIAS + h)
        scale = scaling * LOG2E
        shift = -tl.load(LARGEST + statistics + i) * scale
        acc = tl.zeros((BM, DP), tl.float32)
        total = tl.zeros((BM,), tl.float32)
        seen = _first_seen(first, last)
        start, full_start, full_end, end = tiles.bounds(first, last, BN)
        for PART in tl.static_range(3):
            low, high = tiles.part(start, full_start, full_end, end, PART)
            for j0 in range(low, high, BN):
                s = _scores(q, K, j0, k_t, first, last, seen, end, D, DP, BN, PART != 1, PRECISION)
                p = tl.exp2(tl.fma(s, scale, shift[:, None]))
                total += tl.sum(p, 1)
                worth = True
                if BRANCH:
                    worth = any_open(tl.max(s, 1), scaling, bias)
                if worth:
                    v = _load_tile(V, j0, v_t, seen, end, D, DP, BN, PART != 1)
                    p = tl.where(gate_logits(s, scaling, bias) > 0.0, p, 0.0)
                    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        i = tl.where(lane < live, i, queries)  # repeated lanes write nothing
        tiles.store_rows(OUT + b * o_b + h * o_h, i, o_t, queries, acc / total[:, None], D, DP)  # total >= 1


def prefill(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, rows: Tensor, *, scaling: float
) -> tuple[Tensor, Tensor]:
    """Gated attention at run time: no gradient, no noise, no waiting for the device, the same bits in every run.

    Args:
        query: [B, H, Q, D]; key, value: [B, H_kv, K, D] with H a multiple of H_kv; fp32, bf16 or fp16, any strides
            (copied if the last axis is not contiguous).
        bias: gate bias [H], fp32; `+inf` forces a head open.
        rows: int32 [B, Q, 3], contiguous, see `Spans`.
        scaling: factor of the scores, positive.

    Returns:
        output [B, H, Q, D] in the dtype of query, and int32 [B, H, Q]: the open edges of each row that counts.
    """
    query, key, value = tiles.rows_contiguous(query, key, value)
    batch, heads, queries, width = query.shape
    tile = tile_for(width, query.dtype)
    options = {
        "H": heads, "G": heads // key.shape[1], "D": width, "DP": tiles.padded(width), "BM": tile.queries,
        "BN": tile.keys, "BRANCH": tile.branches, "PRECISION": tiles.precision(query.dtype), "num_warps": tile.warps,
        "num_stages": tile.stages, "maxnreg": tile.registers, **tiles.FUSED,
    }  # fmt: skip
    # [B, Q, H, D] in memory, which is what the model's output projection reads
    output = query.new_zeros(batch, queries, heads, width).transpose(1, 2)
    largest = query.new_empty(batch, heads, queries, dtype=torch.float32)
    order, open_edges = query.new_empty(2, batch, heads, queries, dtype=torch.int32).unbind(0)
    live = order.new_empty(batch, heads)
    grid = (triton.cdiv(queries, tile.queries), batch * heads)
    with torch.cuda.device_of(query):
        scan_kernel[grid](
            query, key, bias, rows, largest, open_edges, scaling, queries, *tiles.strides(query, key), **options
        )
        compact_kernel[(batch * heads,)](largest, order, live, queries, BLOCK=COMPACTED, **tiles.FUSED)
        attend_kernel[grid](
            query, key, value, output, bias, rows, largest, order, live, scaling, queries,
            *tiles.strides(query, key, value, output), **options,
        )  # fmt: skip
    return output, open_edges
