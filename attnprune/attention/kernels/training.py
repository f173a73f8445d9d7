"""Training kernels of gated attention: forward, dQ, dK/dV, and a single-pass backward.

The gradients are those of `chunked.py`. Between forward and backward only O(T) numbers per head are kept (the
log-sum-exp of each row). The default backward has no atomics: every output element is summed by one program in a fixed
order, so two runs agree bit for bit, at the price of computing the scores twice. The single pass computes them once and
adds dQ with atomics. Masks come as the intervals of `spans.py`; tiles inside all intervals run without a mask.

Tiles are BM queries x BN keys. Scores and statistics are fp32; the matmuls take the inputs' dtype.

Long because forward and backward repeat each other's index arithmetic and are only checked side by side.
"""

# Triton turns Python arguments into constants and iterates in its own way, which pyright cannot know:
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnprune.attention.kernels import elementwise as ew
from attnprune.attention.kernels import tiles
from attnprune.attention.spans import Spans


class Tile(NamedTuple):
    """Launch settings of one kernel: BM queries x BN keys; `registers` caps those of a thread."""

    queries: int
    keys: int
    warps: int = 8
    stages: int = 2
    registers: int | None = None


# By width and noise. Chosen without a GPU, by registers, spills and instructions of the compiled kernels
# (tests/helpers/aot.json). At width 64 a cap lets 16 warps (dK/dV: 12) instead of 8 share a multiprocessor and hide
# each other's waits, with next to no reloads in the loop; dK/dV with noise and the single pass would spill there.
# 8 warps on a tile whose first dimension is 64 repeat its elementwise work.
CASES = [(64, False), (64, True), (128, False), (128, True)]
WIDE, NARROW = dict.fromkeys(CASES, Tile(128, 64)), dict.fromkeys(CASES, Tile(32, 128))
CAPPED = Tile(128, 32, registers=128)
TILES = {
    "forward": WIDE | {(64, False): Tile(128, 64, registers=128), (64, True): CAPPED},
    "dq": WIDE | {(64, False): CAPPED, (64, True): CAPPED},
    "dkdv": NARROW | {(64, False): Tile(32, 64, 4, registers=168)},
    "single": NARROW,
}
# fp32 inputs take twice the registers.
WIDE_FP32, NARROW_FP32 = dict.fromkeys(CASES, Tile(64, 32)), dict.fromkeys(CASES, Tile(16, 64))
TILES_FP32 = {
    "forward": WIDE_FP32,
    "dq": WIDE_FP32,
    "dkdv": NARROW_FP32 | {(64, False): Tile(32, 64)},
    "single": NARROW_FP32,
}


def tile_for(kernel: str, width: int, noise: bool, dtype: torch.dtype) -> Tile:
    """Launch settings for a head width of up to 128."""
    if tiles.INTERPRETED:
        return Tile(32, 16)
    table = TILES_FP32 if dtype.itemsize == 4 else TILES
    return table[kernel][64 if width <= 64 else 128, noise]


@triton.jit
def _forward_tile(
    acc, m, total, soft, hard, q, K, V, k_stride, v_stride, keys_total, first, last, j0, scale, bias, state,
    inv_temperature, D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr, NOISE: tl.constexpr,
    SHARP_P: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    j = j0 + tl.arange(0, BN)
    k = tiles.load_rows(K, j, k_stride, keys_total, D, DP, MASK)
    v = tiles.load_rows(V, j, v_stride, keys_total, D, DP, MASK)
    s = tl.dot(q, k.T, input_precision=PRECISION)
    z = s * scale + bias
    if MASK:
        visible = (j[None, :] >= first[:, None]) & (j[None, :] < last[:, None])
        s = tl.where(visible, s, ew.HIDDEN)
        z = tl.where(visible, z, ew.HIDDEN)
    m_new = tl.maximum(m, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - m_new[:, None])  # one fused multiply-add, as for z
    shrink = tl.exp2(m - m_new)
    total = total * shrink + tl.sum(p, 1)
    y = ew.odds(z)
    soft += tl.sum(ew.penalty(y, z, inv_temperature, SHARP_P, FAST), 1)
    hard += tl.sum(tl.where(z > 0.0, 1.0, 0.0), 1)  # exact in fp32 below 2^24 keys
    if NOISE:
        u = ew.uniform(state[:, None], j[None, :])
        p = tl.where(u * y > 1.0 - u, p, 0.0)
    else:
        p = tl.where(z > 0.0, p, 0.0)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, m_new, total, soft, hard


@triton.jit
def forward_kernel(
    Q, K, V, OUT, LSE, SOFT, HARD, BIAS, ROWS, SEED, scaling, inv_temperature, queries, keys,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    NOISE: tl.constexpr, SHARP_P: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output, log-sum-exp (log2 units) and per row the smooth and the hard edge count. Grid (row blocks, B * H)."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest rows first
    head = tl.program_id(1)
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    i = block * BM + tl.arange(0, BM)
    inside = i < queries
    row = ROWS + (b * queries + i) * 3
    first = tl.load(row, mask=inside, other=0)
    last = tl.load(row + 1, mask=inside, other=0)
    counted = tl.load(row + 2, mask=inside, other=0)
    q = tiles.load_rows(Q + b * q_b + h * q_h, i, q_t, queries, D, DP, True)
    K += b * k_b + (h // G) * k_h
    V += b * v_b + (h // G) * v_h
    scale = scaling * ew.LOG2E
    bias = tl.load(BIAS + h) * ew.LOG2E
    state = ew.row_state(tl.load(SEED), head, i) if NOISE else i
    acc = tl.zeros((BM, DP), tl.float32)
    m = tl.full((BM,), ew.HIDDEN, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    soft = tl.zeros((BM,), tl.float32)
    hard = tl.zeros((BM,), tl.float32)
    start, full_start, full_end, end = tiles.bounds(first, last, BN)
    for PART in tl.static_range(3):
        low, high = tiles.part(start, full_start, full_end, end, PART)
        for j0 in range(low, high, BN):
            acc, m, total, soft, hard = _forward_tile(
                acc, m, total, soft, hard, q, K, V, k_t, v_t, keys, first, last, j0, scale, bias, state,
                inv_temperature, D, DP, BN, PART != 1, NOISE, SHARP_P, FAST, PRECISION)  # fmt: skip
    empty = last <= first  # hidden scores are finite: a row that sees nothing has summed them
    out = tl.where(empty[:, None], 0.0, acc / tl.where(empty, 1.0, total)[:, None])
    statistics = head.to(tl.int64) * queries + i
    tl.store(LSE + statistics, tl.where(empty, -ew.HIDDEN, m + tl.log2(total)), mask=inside)
    tl.store(SOFT + statistics, tl.where(counted > 0, soft, 0.0), mask=inside)
    tl.store(HARD + statistics, tl.where(counted > 0, hard, 0.0).to(tl.int32), mask=inside)
    tiles.store_rows(OUT + b * o_b + h * o_h, i, o_t, queries, out, D, DP)


@triton.jit
def prepare_kernel(
    OUT, DO, GRAD_PENALTY, ROWS, DELTA, PRESSURE, STATE, SEED, queries, o_b, o_h, o_t, d_b, d_h, d_t,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, NOISE: tl.constexpr,
):  # fmt: skip
    """What the backward kernels read per row: Delta = dO.O, the penalty's gradient if the row counts, the noise state.

    Grid (row blocks, B * H).
    """
    head = tl.program_id(1)
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = i < queries
    do = tiles.load_rows(DO + b * d_b + h * d_h, i, d_t, queries, D, DP, True)
    out = tiles.load_rows(OUT + b * o_b + h * o_h, i, o_t, queries, D, DP, True)
    counted = tl.load(ROWS + (b * queries + i) * 3 + 2, mask=inside, other=0)
    row = head.to(tl.int64) * queries + i
    tl.store(DELTA + row, tl.sum(do.to(tl.float32) * out.to(tl.float32), 1), mask=inside)
    tl.store(PRESSURE + row, tl.load(GRAD_PENALTY + h) * counted.to(tl.float32), mask=inside)
    if NOISE:
        tl.store(STATE + row, ew.row_state(tl.load(SEED), head, i).to(tl.int32, bitcast=True), mask=inside)


@triton.jit
def _dq_tile(
    dq, db, q, do, lse, delta, pressure, K, V, k_stride, v_stride, keys_total, first, last, j0, scale, bias, state,
    inv_temperature, inv_slope_temperature, D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, MASK: tl.constexpr,
    NOISE: tl.constexpr, SHARP_P: tl.constexpr, SHARP_S: tl.constexpr, FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    j = j0 + tl.arange(0, BN)
    k = tiles.load_rows(K, j, k_stride, keys_total, D, DP, MASK)
    v = tiles.load_rows(V, j, v_stride, keys_total, D, DP, MASK)
    s = tl.dot(q, k.T, input_precision=PRECISION)
    g = tl.dot(do, v.T, input_precision=PRECISION)
    visible = (j[None, :] >= first[:, None]) & (j[None, :] < last[:, None])
    _, ds, gate = ew.score_gradient(
        s, scale, bias, lse[:, None], delta[:, None], g, pressure[:, None], visible, state[:, None], j[None, :],
        inv_temperature, inv_slope_temperature, MASK, NOISE, SHARP_P, SHARP_S, FAST)  # fmt: skip
    dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq, db + tl.sum(gate, 1)


@triton.jit
def dq_kernel(
    Q, K, V, DO, DQ, LSE, DELTA, PRESSURE, STATE, DBIAS, BIAS, ROWS, scaling, inv_temperature,
    inv_slope_temperature, queries, keys, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, d_b, d_h, d_t, dq_b, dq_h, dq_t,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    NOISE: tl.constexpr, SHARP_P: tl.constexpr, SHARP_S: tl.constexpr, FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ and the bias gradient of each row. Grid (row blocks, B * H)."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    i = block * BM + tl.arange(0, BM)
    inside = i < queries
    row = ROWS + (b * queries + i) * 3
    first = tl.load(row, mask=inside, other=0)
    last = tl.load(row + 1, mask=inside, other=0)
    statistics = head.to(tl.int64) * queries + i
    q = tiles.load_rows(Q + b * q_b + h * q_h, i, q_t, queries, D, DP, True)
    do = tiles.load_rows(DO + b * d_b + h * d_h, i, d_t, queries, D, DP, True)
    lse = tl.load(LSE + statistics, mask=inside, other=-ew.HIDDEN)
    delta = tl.load(DELTA + statistics, mask=inside, other=0.0)
    pressure = tl.load(PRESSURE + statistics, mask=inside, other=0.0)
    state = tl.load(STATE + statistics, mask=inside, other=0).to(tl.uint32, bitcast=True) if NOISE else i
    K += b * k_b + (h // G) * k_h
    V += b * v_b + (h // G) * v_h
    scale = scaling * ew.LOG2E
    bias = tl.load(BIAS + h) * ew.LOG2E
    dq = tl.zeros((BM, DP), tl.float32)
    db = tl.zeros((BM,), tl.float32)
    start, full_start, full_end, end = tiles.bounds(first, last, BN)
    for PART in tl.static_range(3):
        low, high = tiles.part(start, full_start, full_end, end, PART)
        for j0 in range(low, high, BN):
            dq, db = _dq_tile(
                dq, db, q, do, lse, delta, pressure, K, V, k_t, v_t, keys, first, last, j0, scale, bias, state,
                inv_temperature, inv_slope_temperature, D, DP, BN, PART != 1, NOISE, SHARP_P, SHARP_S,
                FAST, PRECISION)  # fmt: skip
    tl.store(DBIAS + statistics, db, mask=inside)
    tiles.store_rows(DQ + b * dq_b + h * dq_h, i, dq_t, queries, dq * scaling, D, DP)


@triton.jit
def _dkdv_tile(
    dk, dv, db, k, v, Q, DO, DQ, LSE, DELTA, PRESSURE, STATE, q_stride, d_stride, dq_stride, queries, first, last,
    i0, j, scale, scaling, bias, inv_temperature, inv_slope_temperature,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, MASK: tl.constexpr, NOISE: tl.constexpr,
    SHARP_P: tl.constexpr, SHARP_S: tl.constexpr, SINGLE: tl.constexpr, FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    i = i0 + tl.arange(0, BM)
    inside = i < queries
    q = tiles.load_rows(Q, i, q_stride, queries, D, DP, MASK)
    do = tiles.load_rows(DO, i, d_stride, queries, D, DP, MASK)
    lse = tl.load(LSE + i, mask=inside, other=-ew.HIDDEN)
    delta = tl.load(DELTA + i, mask=inside, other=0.0)
    pressure = tl.load(PRESSURE + i, mask=inside, other=0.0)
    state = tl.load(STATE + i, mask=inside, other=0).to(tl.uint32, bitcast=True) if NOISE else i
    s = tl.dot(k, q.T, input_precision=PRECISION)  # transposed: keys x queries
    g = tl.dot(v, do.T, input_precision=PRECISION)
    visible = (i[None, :] >= first[:, None]) & (i[None, :] < last[:, None])
    weights, ds, gate = ew.score_gradient(
        s, scale, bias, lse[None, :], delta[None, :], g, pressure[None, :], visible, state[None, :], j[:, None],
        inv_temperature, inv_slope_temperature, MASK, NOISE, SHARP_P, SHARP_S, FAST)  # fmt: skip
    dv = tl.dot(weights.to(do.dtype), do, dv, input_precision=PRECISION)
    ds_low = ds.to(q.dtype)
    dk = tl.dot(ds_low, q, dk, input_precision=PRECISION)
    if SINGLE:
        db += tl.sum(gate, 1)
        dq = tl.dot(ds_low.T, k, input_precision=PRECISION) * scaling
        d = tl.arange(0, DP)
        pointers = DQ + i.to(tl.int64)[:, None] * dq_stride + d[None, :]
        tl.atomic_add(pointers, dq, mask=inside[:, None] & (d < D)[None, :], sem="relaxed")
    return dk, dv, db


@triton.jit
def dkdv_kernel(
    Q, K, V, DO, DQ, DK, DV, LSE, DELTA, PRESSURE, STATE, DBIAS, BIAS, COLUMNS, scaling, inv_temperature,
    inv_slope_temperature, queries, keys, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, d_b, d_h, d_t, dq_b, dq_h, dq_t,
    dk_b, dk_h, dk_t, dv_b, dv_h, dv_t,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    NOISE: tl.constexpr, SHARP_P: tl.constexpr, SHARP_S: tl.constexpr, SINGLE: tl.constexpr,
    FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV, summed over the query heads of a group. Grid (key blocks, B * H_kv).

    SINGLE also adds dQ (fp32, with atomics) and writes the bias gradient of each key block: DBIAS [B, H, key blocks].
    """
    block = tl.program_id(0)  # under a causal mask the first keys have the most queries
    KV: tl.constexpr = H // G
    b, kv = (tl.program_id(1) // KV).to(tl.int64), (tl.program_id(1) % KV).to(tl.int64)
    j = block * BN + tl.arange(0, BN)
    column = COLUMNS + (b * keys + j) * 2
    first = tl.load(column, mask=j < keys, other=0)
    last = tl.load(column + 1, mask=j < keys, other=0)
    k = tiles.load_rows(K + b * k_b + kv * k_h, j, k_t, keys, D, DP, True)
    v = tiles.load_rows(V + b * v_b + kv * v_h, j, v_t, keys, D, DP, True)
    dk = tl.zeros((BN, DP), tl.float32)
    dv = tl.zeros((BN, DP), tl.float32)
    scale = scaling * ew.LOG2E
    start, full_start, full_end, end = tiles.bounds(first, last, BM)
    for g in range(G):
        h = kv * G + g
        head = b * H + h
        bias = tl.load(BIAS + h) * ew.LOG2E
        row = head * queries
        db = tl.zeros((BN,), tl.float32)
        q_head, do_head, dq_head = Q + b * q_b + h * q_h, DO + b * d_b + h * d_h, DQ + b * dq_b + h * dq_h
        for PART in tl.static_range(3):
            low, high = tiles.part(start, full_start, full_end, end, PART)
            for i0 in range(low, high, BM):
                dk, dv, db = _dkdv_tile(
                    dk, dv, db, k, v, q_head, do_head, dq_head, LSE + row, DELTA + row, PRESSURE + row, STATE + row,
                    q_t, d_t, dq_t, queries, first, last, i0, j, scale, scaling, bias, inv_temperature,
                    inv_slope_temperature, D, DP, BM, PART != 1, NOISE, SHARP_P, SHARP_S, SINGLE, FAST,
                    PRECISION)  # fmt: skip
        if SINGLE:
            tl.store(DBIAS + head * tl.num_programs(0) + block, tl.sum(db))
    tiles.store_rows(DK + b * dk_b + kv * dk_h, j, dk_t, keys, dk * scaling, D, DP)
    tiles.store_rows(DV + b * dv_b + kv * dv_h, j, dv_t, keys, dv, D, DP)


class Forward(NamedTuple):
    """What the forward kernel returns: output [B, H, Q, D]; lse fp32, soft fp32 and hard int32 [B, H, Q]."""

    output: Tensor
    lse: Tensor
    soft: Tensor
    hard: Tensor


class Call(NamedTuple):
    """The settings of one call: temperatures T_p and T_s; `noise_seed` int64 [], None for the noise-free estimator."""

    scaling: float
    temperature: float = 1.0
    slope_temperature: float = 1.0
    noise_seed: Tensor | None = None


def _options(query: Tensor, key: Tensor, call: Call, kernel: str) -> dict:
    """Compile-time settings that the kernels share."""
    heads, width = query.shape[1], query.shape[3]
    tile = tile_for(kernel, width, call.noise_seed is not None, query.dtype)
    return {
        "H": heads, "G": heads // key.shape[1], "D": width, "DP": tiles.padded(width),
        "BM": tile.queries, "BN": tile.keys, "NOISE": call.noise_seed is not None,
        "SHARP_P": _sharpness(call.temperature), "FAST": not tiles.INTERPRETED,
        "PRECISION": tiles.precision(query.dtype),
        "num_warps": tile.warps, "num_stages": tile.stages, "maxnreg": tile.registers, **tiles.FUSED,
    }  # fmt: skip


def _sharpness(temperature: float) -> int:
    """1 / T where the kernels need no exponential for it, else 0."""
    return {1.0: 1, 0.5: 2}.get(temperature, 0)


def forward(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, spans: Spans, call: Call) -> Forward:
    """Gated attention and its edge counts.

    Args:
        query: [B, H, Q, D]; key, value: [B, H_kv, K, D]; fp32, bf16 or fp16, any strides.
        bias: gate bias [H], fp32; `+inf` forces a head open.
        call: its scaling is positive.
    """
    query, key, value = tiles.rows_contiguous(query, key, value)
    batch, heads, queries, width = query.shape
    # [B, Q, H, D] in memory, which is what the model's output projection reads
    output = query.new_empty(batch, queries, heads, width).transpose(1, 2)
    lse, soft = query.new_empty(2, batch, heads, queries, dtype=torch.float32).unbind(0)
    hard = query.new_empty(batch, heads, queries, dtype=torch.int32)
    options = _options(query, key, call, "forward")
    forward_kernel[triton.cdiv(queries, options["BM"]), batch * heads](
        query, key, value, output, lse, soft, hard, bias, spans.rows, call.noise_seed, call.scaling,
        1 / call.temperature, queries, key.shape[2], *tiles.strides(query, key, value, output), **options,
    )  # fmt: skip
    return Forward(output, lse, soft, hard)


def backward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, spans: Spans, output: Tensor, lse: Tensor,
    grad_output: Tensor, grad_penalty: Tensor, call: Call, deterministic: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dQ, dK, dV, bias gradient [H]) from the forward's output and log-sum-exp.

    `grad_penalty` [H] is the gradient of the smooth edge count. `deterministic=False` takes the single pass, whose dQ
    depends on the order of atomic additions in its last bits.
    """
    query, key, value, output, grad_output = tiles.rows_contiguous(query, key, value, output, grad_output)
    batch, heads, queries, _ = query.shape
    kv_heads, keys = key.shape[1:3]
    delta, pressure = torch.empty(2, *lse.shape, dtype=torch.float32, device=query.device).unbind(0)
    state = torch.empty_like(lse, dtype=torch.int32) if call.noise_seed is not None else delta
    sharp = {"SHARP_S": _sharpness(call.slope_temperature)}  # the forward pass has no slope
    options = _options(query, key, call, "dq") | sharp
    prepare_kernel[triton.cdiv(queries, 64), batch * heads](
        output, grad_output, grad_penalty.float().contiguous(), spans.rows, delta, pressure, state, call.noise_seed,
        queries, *tiles.strides(output, grad_output), H=heads, D=options["D"], DP=options["DP"], BM=64,
        NOISE=options["NOISE"],
    )  # fmt: skip
    numbers = (call.scaling, 1 / call.temperature, 1 / call.slope_temperature, queries, keys)
    grad_query, grad_bias = torch.empty_like(query), torch.empty_like(lse)
    if deterministic:
        dq_kernel[triton.cdiv(queries, options["BM"]), batch * heads](
            query, key, value, grad_output, grad_query, lse, delta, pressure, state, grad_bias, bias, spans.rows,
            *numbers, *tiles.strides(query, key, value, grad_output, grad_query), **options,
        )  # fmt: skip
    options = _options(query, key, call, "dkdv" if deterministic else "single") | sharp
    blocks = triton.cdiv(keys, options["BN"])
    if not deterministic:
        grad_query, grad_bias = torch.zeros_like(query, dtype=torch.float32), lse.new_empty(batch, heads, blocks)
    grad_key, grad_value = torch.empty_like(key), torch.empty_like(value)
    dkdv_kernel[blocks, batch * kv_heads](
        query, key, value, grad_output, grad_query, grad_key, grad_value, lse, delta, pressure, state, grad_bias, bias,
        spans.columns, *numbers, *tiles.strides(query, key, value, grad_output, grad_query, grad_key, grad_value),
        SINGLE=not deterministic, **options,
    )  # fmt: skip
    return grad_query.to(query.dtype), grad_key, grad_value, grad_bias.sum((0, 2))
