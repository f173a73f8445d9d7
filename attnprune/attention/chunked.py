"""Gated attention in chunks of queries, with its own backward pass, on any device.

Forward and backward hold at most one [B, H, chunk, K] block of scores; between them only q, k, v, the output and the
log-normaliser are kept, so memory is O(T * chunk). The gradients (Delta trick of FlashAttention plus one local
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

# Score elements held at once. Small enough for the elementwise chain to stay in cache, large enough for the matmuls.
CHUNK_ELEMENTS = 2**20

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
    """

    temperature: float = 1.0
    noise_seed: int | None = None
    on_chunk: OnChunk | None = None


class GatedOutput(NamedTuple):
    """Result of gated attention.

    output [B, H, Q, D]; penalty [H], the smooth edge count (differentiable; 0 under no_grad); open_edges int64 [H];
    visible_edges int64 scalar, the visible pairs of one head summed over the batch.
    """

    output: Tensor
    penalty: Tensor
    open_edges: Tensor
    visible_edges: Tensor


def row_blocks(visible: Tensor, rows_per_block: int) -> Iterator[Rows]:
    """Cut the queries of `visible` [B, 1, Q, K] into blocks, each with the range of keys that some row of it sees."""
    any_visible = visible.flatten(0, 1).any(0)
    queries, keys = any_visible.shape
    for start in range(0, queries, rows_per_block):
        seen = any_visible[start : start + rows_per_block].any(0).nonzero()
        low, high = (int(seen[0]), int(seen[-1]) + 1) if len(seen) else (0, min(1, keys))
        yield Rows(slice(start, min(start + rows_per_block, queries)), slice(low, high))


def _block_rows(query: Tensor, key: Tensor) -> int:
    batch, heads, queries, _ = query.shape
    return max(1, min(queries, CHUNK_ELEMENTS // max(1, batch * heads * key.shape[2])))


def _fold(x: Tensor, kv_heads: int) -> Tensor:
    """[B, H, C, D] -> [B, H_kv, group * C, D], so grouped queries share one matmul without repeating keys."""
    batch, heads, rows, width = x.shape
    return x.reshape(batch, kv_heads, heads // kv_heads * rows, width)


class _Block:
    """Scores, gates and probabilities of one block of rows, computed the same way forward and backward."""

    def __init__(self, block: Rows, query, key, bias, visible, sinks, scaling, softcap, settings: GateSettings):
        self.block = block
        batch, heads = query.shape[:2]
        self.kv_heads = key.shape[1]
        self.query = query[:, :, block.rows].to(bias.dtype)
        self.key = key[:, :, block.cols].to(bias.dtype)
        self.visible = visible[:, :, block.rows, block.cols]
        rows, cols = self.query.shape[2], self.key.shape[2]
        scores = _fold(self.query, self.kv_heads) @ self.key.transpose(-1, -2)
        scores = scores.view(batch, heads, rows, cols).mul_(scaling)
        if softcap is not None:
            scores = scores.div_(softcap).tanh_().mul_(softcap)
        self.scores = scores
        self.logits = scores + bias[:, None, None]
        self.sinks = sinks
        self.noise = None
        if settings.noise_seed is not None:
            index = torch.arange(max(visible.shape[-2:]), device=query.device)
            lanes = torch.arange(batch * heads, device=query.device)
            drawn = gates.logistic_noise(
                settings.noise_seed, lanes, index[block.rows], index[block.cols], self.logits.dtype
            )
            self.noise = drawn.view(batch, heads, rows, cols)

    def open(self) -> Tensor:
        return gates.gate_open(self.logits, self.noise) & self.visible

    def log_normaliser(self) -> Tensor:
        masked = self.scores.masked_fill(~self.visible, float("-inf"))
        log_sum = torch.logsumexp(masked, -1)
        if self.sinks is not None:
            log_sum = torch.logaddexp(log_sum, self.sinks.to(log_sum.dtype)[None, :, None])
        return log_sum

    def probabilities(self, log_normaliser: Tensor) -> Tensor:
        # An empty row has log_normaliser -inf and no visible key: exp(nan) is masked away.
        return (self.scores - log_normaliser[..., None]).exp_().masked_fill_(~self.visible, 0.0)


class _GatedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query, key, value, bias, sinks, visible, counted, scaling, softcap, settings, with_penalty):
        compute = bias.dtype
        batch, heads, queries, _ = query.shape
        output = query.new_empty(batch, heads, queries, value.shape[-1])
        log_normaliser = torch.empty(batch, heads, queries, dtype=compute, device=query.device)
        penalty = torch.zeros(heads, dtype=compute, device=query.device)
        open_edges = torch.zeros(heads, dtype=torch.int64, device=query.device)
        value32 = value.to(compute)
        blocks = list(row_blocks(visible, _block_rows(query, key)))
        for block in blocks:
            part = _Block(block, query, key, bias, visible, sinks, scaling, softcap, settings)
            rows, cols = block
            log_normaliser[:, :, rows] = part.log_normaliser()
            is_open = part.open()
            weights = part.probabilities(log_normaliser[:, :, rows]).mul_(is_open)
            out = _fold(weights, part.kv_heads) @ value32[:, :, cols]
            output[:, :, rows] = out.view(batch, heads, -1, out.shape[-1]).to(output.dtype)
            block_counted = counted[:, :, rows, cols]
            if with_penalty:
                penalty += gates.edge_penalty(part.logits, settings.temperature).mul_(block_counted).sum((0, 2, 3))
            # The run-time rule, whatever the estimator: counts are of the model that will be used.
            hard = (gates.gate_open(part.logits) if part.noise is not None else is_open) & block_counted
            open_edges += hard.sum((0, 2, 3))
            if settings.on_chunk is not None:
                settings.on_chunk(rows, cols, hard)
        ctx.save_for_backward(query, key, value, bias, sinks, visible, counted, output, log_normaliser)
        ctx.options = (blocks, scaling, softcap, settings)
        ctx.mark_non_differentiable(open_edges)
        return output, penalty, open_edges

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any):  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_output, grad_penalty, _ = grad_outputs
        query, key, value, bias, sinks, visible, counted, output, log_normaliser = ctx.saved_tensors
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
            is_open = part.open()
            probabilities = part.probabilities(log_normaliser[:, :, rows])
            folded_out = _fold(d_out, part.kv_heads)
            d_pattern = (folded_out @ value32[:, :, cols].transpose(-1, -2)).view_as(probabilities)

            grad_value[:, :, cols] += _fold(probabilities * is_open, part.kv_heads).transpose(-1, -2) @ folded_out
            d_gate = gates.straight_through_slope(part.logits, part.noise).mul_(probabilities).mul_(d_pattern)
            slope = gates.edge_penalty_slope(part.logits, settings.temperature).mul_(counted[:, :, rows, cols])
            d_gate += slope.mul_(grad_penalty[:, None, None])
            grad_bias += d_gate.sum((0, 2, 3))
            d_scores = d_pattern.mul_(is_open).sub_(delta).mul_(probabilities).add_(d_gate)
            if softcap is not None:
                d_scores *= 1 - (part.scores / softcap) ** 2
            folded = _fold(d_scores, part.kv_heads)
            d_query = (folded @ part.key).view(batch, heads, -1, query.shape[-1]) * scaling
            grad_query[:, :, rows] = d_query.to(query.dtype)
            grad_key[:, :, cols] += scaling * folded.transpose(-1, -2) @ _fold(part.query, part.kv_heads)
            if sinks is not None and grad_sinks is not None:
                sink_share = (sinks.to(compute)[None, :, None] - log_normaliser[:, :, rows]).exp()
                grad_sinks -= (sink_share * delta.squeeze(-1)).sum((0, 2))
        grad_sinks = None if sinks is None or grad_sinks is None else grad_sinks.to(sinks.dtype)
        grads = (grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), grad_bias, grad_sinks)
        return *grads, None, None, None, None, None, None


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
    counted = visible if counted is None else counted.expand_as(visible)
    with torch.autocast(query.device.type, enabled=False):  # the scores decide gates: keep them in bias.dtype
        output, penalty, open_edges = _GatedAttention.apply(
            query, key, value, bias, sinks, visible, counted, scaling, softcap, settings, torch.is_grad_enabled()
        )  # pyright: ignore[reportGeneralTypeIssues]
    return GatedOutput(output, penalty, open_edges, counted.sum())
