"""Gated attention in chunks of queries, with its own backward pass, on any device.

Forward and backward hold at most one [B, H, chunk, K] block of scores; between them only q, k, v, the output and the
mask are kept, so memory is O(T * chunk). The gradients (Delta trick of FlashAttention plus one local
straight-through term) with P the softmax over all visible keys, g = dO.v and Delta = dO.O are

    dS = P * (A * g - Delta) + P * g * slope + d_penalty * penalty_slope
    dq = scaling * dS k    dk = scaling * dS^T q    dv = (P * A)^T dO    db = sum of the last two terms of dS
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnprune import gates
from attnprune.attention.sparse import RUN_ELEMENTS, attend

# Score elements held at once. Small enough for the elementwise chain to stay in cache, large enough for the matmuls.
CHUNK_ELEMENTS = 2**18

OnChunk = Callable[[slice, slice, Tensor], None]


class Rows(NamedTuple):
    """A block of query rows and the range of keys that any of them sees."""

    rows: slice
    cols: slice


@dataclass(frozen=True)
class GateSettings:
    """What the gates do in one call.

    Attributes:
        temperature: penalty temperature T_p.
        noise_seed: seed of the logistic noise (`gumbel` estimator); None for the noise-free `threshold` estimator.
        on_chunk: called with (query slice, key slice, open-and-visible bool [B, H, C, K]) for every block, for
            statistics; it must not keep the tensor.
        deterministic: the kernels' backward pass without atomics (chunked is always deterministic).
    """

    temperature: float = 1.0
    noise_seed: int | None = None
    on_chunk: OnChunk | None = None
    deterministic: bool = True


class GatedOutput(NamedTuple):
    """Result of gated attention.

    output [B, H, Q, D]; penalty [H], the smooth edge count (differentiable; 0 at run time, without gradient and noise);
    open_edges int64 [H]; visible_edges int64 scalar, the visible pairs of one head summed over the batch; ran, the
    backend that computed this and why, set by `dispatch`.
    """

    output: Tensor
    penalty: Tensor
    open_edges: Tensor
    visible_edges: Tensor
    ran: tuple[str, str] | None = None


def row_blocks(visible: Tensor, rows_per_block: int) -> Iterator[Rows]:
    """Cut the queries of `visible` [B, 1, Q, K] into blocks, each with the range of keys that some row of it sees."""
    any_visible = visible.flatten(0, 1).any(0)
    queries, keys = any_visible.shape
    for start in range(0, queries, rows_per_block):
        seen = any_visible[start : start + rows_per_block].any(0).nonzero()
        low, high = (int(seen[0]), int(seen[-1]) + 1) if len(seen) else (0, min(1, keys))
        yield Rows(slice(start, min(start + rows_per_block, queries)), slice(low, high))


def _block_rows(query: Tensor, key: Tensor, elements: int) -> int:
    batch, heads, queries, _ = query.shape
    return max(1, min(queries, elements // max(1, batch * heads * key.shape[2])))


def _fold(x: Tensor, kv_heads: int) -> Tensor:
    """[B, H, C, D] -> [B, H_kv, group * C, D], so grouped queries share one matmul without repeating keys."""
    batch, heads, rows, width = x.shape
    return x.reshape(batch, kv_heads, heads // kv_heads * rows, width)


def _products(query: Tensor, key: Tensor) -> Tensor:
    """q.k of all pairs, [B, H, C, K]."""
    folded = _fold(query, key.shape[1]) @ key.transpose(-1, -2)
    return folded.view(*query.shape[:3], key.shape[2])


class _Block:
    """Scores, gates and probabilities of one block of rows, computed the same way forward and backward.

    Invisible pairs have score -inf, so their probability, gate and slopes are 0 without another mask.
    """

    def __init__(self, block: Rows, query, key, bias, visible, sinks, scaling, softcap, settings: GateSettings):
        batch, heads = query.shape[:2]
        self.kv_heads = key.shape[1]
        self.query = query[:, :, block.rows].to(bias.dtype) * scaling
        self.key = key[:, :, block.cols].to(bias.dtype)
        hidden = ~visible[:, :, block.rows, block.cols]
        rows, cols = self.query.shape[2], self.key.shape[2]
        scores = _products(self.query, self.key)
        self.softcap_slope = None
        if softcap is not None:
            scores = scores.div_(softcap).tanh_()
            self.softcap_slope = 1 - scores**2
            scores.mul_(softcap)
        scores.masked_fill_(hidden, float("-inf"))
        self.logits = scores + bias[:, None, None]
        if bool(bias.isposinf().any()):  # heads forced open: -inf + inf is NaN
            self.logits.masked_fill_(hidden, float("-inf"))
        self.noisy = self.logits
        if settings.noise_seed is not None:
            index = torch.arange(max(visible.shape[-2:]), device=query.device)
            lanes = torch.arange(batch * heads, device=query.device)
            drawn = gates.logistic_noise(
                settings.noise_seed, lanes, index[block.rows], index[block.cols], self.logits.dtype
            )
            self.noisy = self.logits + drawn.view(batch, heads, rows, cols)
        self.open = gates.gate_open(self.noisy)
        self.probabilities = _softmax(scores, hidden, sinks)


def _softmax(scores: Tensor, hidden: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over the keys, with the sink in the denominator; a row without a visible key is 0."""
    probabilities = torch.softmax(scores, -1)
    if sinks is not None:
        log_sum = torch.logsumexp(scores, -1)
        probabilities *= torch.sigmoid(log_sum - sinks.to(scores.dtype)[None, :, None])[..., None]
    empty = hidden.all(-1, keepdim=True)
    return probabilities.masked_fill_(empty, 0.0) if bool(empty.any()) else probabilities


def _run_time(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, visible: Tensor, sinks: Tensor | None,
    counted: Tensor | None, scaling: float, softcap: float | None, on_chunk: OnChunk | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(output, open edges [H]) without gradient or noise."""
    batch, heads, queries, _ = query.shape
    output = query.new_empty(batch, heads, queries, value.shape[-1])
    open_edges = torch.zeros(heads, dtype=torch.int64, device=query.device)
    key, value = key.to(bias.dtype), value.to(bias.dtype)
    for rows, cols in row_blocks(visible, _block_rows(query, key, RUN_ELEMENTS)):
        scores = _products(query[:, :, rows].to(bias.dtype) * scaling, key[:, :, cols])
        if softcap is not None:
            scores = scores.div_(softcap).tanh_().mul_(softcap)
        scores.masked_fill_(~visible[:, :, rows, cols], float("-inf"))
        out, live, is_open = attend(scores, value[:, :, cols], bias, sinks)
        output[:, :, rows] = out.to(output.dtype)
        if counted is not None:
            is_open &= counted[:, :, rows, cols].expand(scores.shape).reshape(-1, scores.shape[-1])[live]
        open_edges.index_add_(0, live // scores.shape[2] % heads, is_open.sum(-1))
        if on_chunk is not None:
            whole = torch.zeros_like(scores, dtype=torch.bool)
            whole.view(-1, scores.shape[-1])[live] = is_open
            on_chunk(rows, cols, whole)
    return output, open_edges


class _GatedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query, key, value, bias, sinks, visible, counted, scaling, softcap, settings):
        compute = bias.dtype
        batch, heads, queries, _ = query.shape
        output = query.new_empty(batch, heads, queries, value.shape[-1])
        penalty = torch.zeros(heads, dtype=compute, device=query.device)
        open_edges = torch.zeros(heads, dtype=torch.int64, device=query.device)
        value32 = value.to(compute)
        blocks = list(row_blocks(visible, _block_rows(query, key, CHUNK_ELEMENTS)))
        for block in blocks:
            part = _Block(block, query, key, bias, visible, sinks, scaling, softcap, settings)
            rows, cols = block
            block_counted = None if counted is None else counted[:, :, rows, cols]
            soft = gates.edge_penalty(part.logits, settings.temperature)
            penalty += (soft if block_counted is None else soft.mul_(block_counted)).sum((0, 2, 3))
            # The run-time rule, whatever the estimator: counts are of the model that will be used.
            hard = part.open if part.noisy is part.logits else gates.gate_open(part.logits)
            hard = hard if block_counted is None else hard & block_counted
            open_edges += hard.sum((0, 2, 3))
            if settings.on_chunk is not None:
                settings.on_chunk(rows, cols, hard)
            out = _fold(part.probabilities.mul_(part.open), part.kv_heads) @ value32[:, :, cols]
            output[:, :, rows] = out.view(batch, heads, -1, out.shape[-1]).to(output.dtype)
        ctx.save_for_backward(query, key, value, bias, sinks, visible, counted, output)
        ctx.options = (blocks, scaling, softcap, settings)
        ctx.mark_non_differentiable(open_edges)
        return output, penalty, open_edges

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any):  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_output, grad_penalty, _ = grad_outputs
        query, key, value, bias, sinks, visible, counted, output = ctx.saved_tensors
        blocks, scaling, softcap, settings = ctx.options
        compute = bias.dtype
        batch, heads = query.shape[:2]
        grad_query = torch.empty_like(query)
        grad_key = torch.zeros(key.shape, dtype=compute, device=key.device)
        grad_value = torch.zeros(value.shape, dtype=compute, device=value.device)
        grad_bias = torch.zeros_like(bias)
        grad_sinks = None if sinks is None else torch.zeros(heads, dtype=compute, device=bias.device)
        value32 = value.to(compute)
        for block in blocks:
            part = _Block(block, query, key, bias, visible, sinks, scaling, softcap, settings)
            rows, cols = block
            d_out = grad_output[:, :, rows].to(compute)
            delta = (d_out * output[:, :, rows].to(compute)).sum(-1, keepdim=True)
            folded_out = _fold(d_out, part.kv_heads)
            probabilities = part.probabilities
            weights = _fold(probabilities * part.open, part.kv_heads)
            grad_value[:, :, cols] += weights.transpose(-1, -2) @ folded_out
            # d_pattern holds P * g, d_gate both straight-through terms
            d_pattern = (folded_out @ value32[:, :, cols].transpose(-1, -2)).view_as(probabilities).mul_(probabilities)
            d_gate = _gate_gradient(
                part, d_pattern, grad_penalty, None if counted is None else counted[:, :, rows, cols], settings
            )
            grad_bias += d_gate.sum((0, 2, 3))
            d_scores = d_pattern.mul_(part.open).addcmul_(probabilities, delta, value=-1).add_(d_gate)
            if part.softcap_slope is not None:
                d_scores *= part.softcap_slope
            folded = _fold(d_scores, part.kv_heads)
            d_query = (folded @ part.key).view(batch, heads, -1, query.shape[-1]) * scaling
            grad_query[:, :, rows] = d_query.to(query.dtype)
            grad_key[:, :, cols] += folded.transpose(-1, -2) @ _fold(part.query, part.kv_heads)
            if sinks is not None and grad_sinks is not None:
                sink_share = 1 - probabilities.sum(-1)
                grad_sinks -= (sink_share * delta.squeeze(-1)).sum((0, 2))
        grad_sinks = None if sinks is None or grad_sinks is None else grad_sinks.to(sinks.dtype)
        grads = (grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), grad_bias, grad_sinks)
        return *grads, None, None, None, None, None


def _gate_gradient(
    part: _Block, d_pattern: Tensor, grad_penalty: Tensor, counted: Tensor | None, settings: GateSettings
) -> Tensor:
    """`P * g * slope + d_penalty * penalty_slope`; without noise and at T_p = 1 the two slopes are one."""
    pressure = grad_penalty[:, None, None]
    slope = gates.straight_through_slope(part.noisy)
    if counted is None and part.noisy is part.logits and settings.temperature == 1:
        return slope.mul_(d_pattern + pressure)
    penalty_slope = gates.edge_penalty_slope(part.logits, settings.temperature).mul_(pressure)
    if counted is not None:
        penalty_slope.mul_(counted)
    return slope.mul_(d_pattern).add_(penalty_slope)


def gated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    visible: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    counted: Tensor | None = None,
    settings: GateSettings = GateSettings(),
) -> GatedOutput:
    """Gated attention with O(T * chunk) memory.

    Args:
        query: [B, H, Q, D]; key, value: [B, H_kv, K, D]; any float dtype. The arithmetic is in `bias.dtype`.
        bias: gate bias [H], fp32 (or fp64); `+inf` forces a head open.
        visible: bool [B or 1, 1, Q, K], the pairs that softmax sees.
        softcap: cap of the scores (Gemma 2) or None.
        sinks: attention-sink logits [H] or None.
        counted: bool like `visible`: the pairs that density and penalty count (both tokens real); default `visible`.
        settings: estimator, temperature and statistics hook.
    """
    visible = visible.expand(query.shape[0], 1, query.shape[2], key.shape[2])
    open_to_all = visible if counted is None else counted.expand_as(visible)
    if counted is not None:  # only padding makes a difference, and then every block pays for one more mask
        counted = None if torch.equal(open_to_all, visible) else open_to_all
    with torch.autocast(query.device.type, enabled=False):  # the scores decide gates: keep them in bias.dtype
        if settings.noise_seed is None and not torch.is_grad_enabled():
            output, open_edges = _run_time(
                query, key, value, bias, visible, sinks, counted, scaling, softcap, settings.on_chunk
            )
            return GatedOutput(output, torch.zeros_like(bias), open_edges, open_to_all.sum())
        output, penalty, open_edges = _GatedAttention.apply(
            query, key, value, bias, sinks, visible, counted, scaling, softcap, settings
        )  # pyright: ignore[reportGeneralTypeIssues]
    return GatedOutput(output, penalty, open_edges, open_to_all.sum())
