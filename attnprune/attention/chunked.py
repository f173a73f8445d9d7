"""Gated attention in chunks of queries, with its own backward pass, on any device.

Forward and backward hold at most one [B, H, chunk, K] block of scores; between them only q, k, v, the output and the
mask are kept, so memory is O(T * chunk). The gradients (Delta trick of FlashAttention plus one local
straight-through term) with P the softmax over all visible keys, g = dO.v and Delta = dO.O are

    dS = P * (A * g - Delta) + P * g * slope + d_penalty * penalty_slope
    dq = scaling * dS k    dk = scaling * dS^T q    dv = (P * A)^T dO    db = sum of the last two terms of dS
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnprune.attention import gates
from attnprune.attention.spans import KnownMask
from attnprune.attention.sparse import attend

# Rows and scores computed at once (measured on CPU): with fewer rows the matmuls are slow, with more a block computes
# more pairs that causality hides; more scores leave the cache.
CHUNK_ROWS = 64
CHUNK_ELEMENTS = 2**20

OnChunk = Callable[[slice, slice, Tensor], None]
# query, key, value, bias, sinks, visible, counted, as `gated_attention` has them
Inputs = Sequence[Any]


class Block(NamedTuple):
    """Some sequences of the batch, some of their query rows, and the range of keys that any of these sees.

    partial: the range within `cols` of the keys that some row does not see.
    """

    items: slice
    rows: slice
    cols: slice
    partial: slice

    def of(self, mask: Tensor) -> Tensor:
        """This part of a mask [B, 1, Q, K]."""
        return mask[self.items, :, self.rows, self.cols]


@dataclass(frozen=True)
class GateSettings:
    """What the gates do in one call.

    Attributes:
        temperature: penalty temperature T_p.
        slope_temperature: temperature T_s of the straight-through slope; infinite for the true gradient, without slope.
        noise_seed: seed of the logistic noise (`gumbel` estimator); None for the noise-free `threshold` estimator.
        on_chunk: called with (query slice, key slice, open-and-visible bool [N, H, C, K]) for every block, for
            statistics; it must not keep the tensor. A block may hold only N of the B sequences.
        deterministic: the kernels' backward pass without atomics (chunked is always deterministic).
        mask: what is known of `visible`, for the kernels.
    """

    temperature: float = 1.0
    slope_temperature: float = 1.0
    noise_seed: int | None = None
    on_chunk: OnChunk | None = None
    deterministic: bool = True
    mask: KnownMask | None = None


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


def blocks_of(visible: Tensor, heads: int) -> Iterator[Block]:
    """Cut the pairs of `visible` [B, 1, Q, K] into blocks of at most CHUNK_ELEMENTS scores, but at least one row."""
    batch, _, queries, keys = visible.shape
    row = max(1, heads * keys)
    count = max(1, min(queries, CHUNK_ROWS, CHUNK_ELEMENTS // row))
    together = max(1, CHUNK_ELEMENTS // (row * count))
    for first in range(0, batch, together):
        for start in range(0, queries, count):
            items, rows = slice(first, min(first + together, batch)), slice(start, min(start + count, queries))
            shown = visible[items, 0, rows]
            cols = _extent(shown.amax(1).any(0)) or slice(0, 1)
            yield Block(items, rows, cols, _extent(~shown[..., cols].amin(1).all(0)) or slice(0, 0))


def _extent(flags: Tensor) -> slice | None:
    """From the first to the last true flag [K]; None if there is none."""
    true = flags.nonzero()
    return slice(int(true[0]), int(true[-1]) + 1) if len(true) else None


def _fold(x: Tensor, kv_heads: int) -> Tensor:
    """[B, H, C, D] -> [B, H_kv, group * C, D], so grouped queries share one matmul without repeating keys."""
    batch, heads, rows, width = x.shape
    return x.reshape(batch, kv_heads, heads // kv_heads * rows, width)


def _products(query: Tensor, key: Tensor) -> Tensor:
    """q.k of all pairs, [B, H, C, K]."""
    folded = _fold(query, key.shape[1]) @ key.transpose(-1, -2)
    return folded.view(*query.shape[:3], key.shape[2])


def _hide(scores: Tensor, block: Block, visible: Tensor) -> None:
    """Set the hidden pairs of a block to -inf, in place; only where there are any, since masks are slow on CPU."""
    hidden = ~block.of(visible)[..., block.partial]
    scores[..., block.partial].masked_fill_(hidden, float("-inf"))


def _gates(logits: Tensor) -> Tensor:
    """`gates.gate_open` as 0.0 and 1.0: on CPU PyTorch is several times slower where it mixes floats with bools."""
    return torch.gt(logits, 0, out=torch.empty_like(logits))


class _Part:
    """Scores, gates and probabilities of one block, computed the same way forward and backward.

    Invisible pairs have score -inf, so their probability, gate and slopes are 0 without another mask.
    """

    def __init__(self, block: Block, query, key, bias, visible, sinks, scaling, softcap, settings: GateSettings):
        self.query = query[block.items, :, block.rows].to(bias.dtype) * scaling
        self.key = key[block.items, :, block.cols]
        scores = _products(self.query, self.key)
        self.softcap_slope = None
        if softcap is not None:
            scores = scores.div_(softcap).tanh_()
            self.softcap_slope = 1 - scores**2
            scores.mul_(softcap)
        _hide(scores, block, visible)
        self.logits = scores + bias[:, None, None]
        if bool(bias.isposinf().any()):  # heads forced open: -inf + inf is NaN
            _hide(self.logits, block, visible)
        self.noisy = self.logits
        if settings.noise_seed is not None:
            self.noisy = self.logits + _noise(settings.noise_seed, block, self.logits)
        self.open = _gates(self.noisy)
        self.probabilities = _softmax(scores, sinks)


def _noise(seed: int, block: Block, logits: Tensor) -> Tensor:
    """Logistic noise of a block's logits [N, H, C, K]; batch x head is the first index of the whole batch."""
    heads = logits.shape[1]
    lanes = torch.arange(block.items.start * heads, block.items.stop * heads, device=logits.device)
    queries, keys = (torch.arange(x.start, x.stop, device=logits.device) for x in (block.rows, block.cols))
    return gates.logistic_noise(seed, lanes, queries, keys, logits.dtype).view_as(logits)


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over the keys, with the sink in the denominator; a row without a visible key is 0."""
    probabilities = torch.softmax(scores, -1)
    if sinks is not None:
        log_sum = torch.logsumexp(scores, -1)
        probabilities *= torch.sigmoid(log_sum - sinks.to(scores.dtype)[None, :, None])[..., None]
    empty = scores.amax(-1, keepdim=True).isneginf()
    return probabilities.masked_fill_(empty, 0.0) if bool(empty.any()) else probabilities


def _run_time(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, visible: Tensor, sinks: Tensor | None,
    counted: Tensor | None, scaling: float, softcap: float | None, on_chunk: OnChunk | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(output, open edges [H]) without gradient or noise."""
    output = query.new_empty(*query.shape[:3], value.shape[-1])
    open_edges = torch.zeros_like(bias, dtype=torch.int64)
    key, value = key.to(bias.dtype), value.to(bias.dtype).contiguous()
    for block in blocks_of(visible, len(bias)):
        items, rows, cols, _ = block
        scores = _products(query[items, :, rows].to(bias.dtype) * scaling, key[items, :, cols])
        if softcap is not None:
            scores = scores.div_(softcap).tanh_().mul_(softcap)
        _hide(scores, block, visible)
        output[items, :, rows], live, is_open = attend(scores, value[items], cols.start, bias, sinks)
        if counted is not None:
            is_open *= block.of(counted).expand(scores.shape).reshape(-1, scores.shape[-1])[live]
        open_edges.index_add_(0, live // scores.shape[2] % len(bias), is_open.sum(-1).long())
        if on_chunk is not None:
            whole = torch.zeros_like(scores, dtype=torch.bool)
            whole.view(-1, scores.shape[-1])[live] = is_open.bool()
            on_chunk(rows, cols, whole)
    return output, open_edges


class _GatedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query, key, value, bias, sinks, visible, counted, scaling, softcap, settings):
        blocks = list(blocks_of(visible, len(bias)))
        inputs = (query, key, value, bias, sinks, visible, counted)
        output, penalty, open_edges = forward(inputs, blocks, scaling, softcap, settings)
        ctx.save_for_backward(*inputs, output)
        ctx.options = (blocks, scaling, softcap, settings)
        ctx.mark_non_differentiable(open_edges)
        return output, penalty, open_edges

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any):  # pyright: ignore[reportIncompatibleMethodOverride]
        *inputs, output = ctx.saved_tensors
        grad_output, grad_penalty, _ = grad_outputs
        return *backward(inputs, output, grad_output, grad_penalty, *ctx.options), None, None, None, None, None


def forward(
    inputs: Inputs, blocks: list[Block], scaling: float, softcap: float | None, settings: GateSettings
) -> tuple[Tensor, Tensor, Tensor]:
    """(output, penalty [H], open edges [H]) with what training needs: noise and penalty."""
    query, key, value, bias, sinks, visible, counted = inputs
    output = query.new_empty(*query.shape[:3], value.shape[-1])
    penalty = torch.zeros_like(bias)
    open_edges = torch.zeros_like(bias, dtype=torch.int64)
    key32, value32 = key.to(bias.dtype), value.to(bias.dtype)
    for block in blocks:
        part = _Part(block, query, key32, bias, visible, sinks, scaling, softcap, settings)
        items, rows, cols, _ = block
        block_counted = None if counted is None else block.of(counted)
        soft = gates.edge_penalty(part.logits, settings.temperature)
        penalty += (soft if block_counted is None else soft.mul_(block_counted)).sum((0, 2, 3))
        # The run-time rule, whatever the estimator: counts are of the model that will be used.
        hard = part.open if part.noisy is part.logits else _gates(part.logits)
        hard = hard if block_counted is None else hard * block_counted
        open_edges += hard.sum((0, 2, 3)).long()
        if settings.on_chunk is not None:
            settings.on_chunk(rows, cols, hard.bool())
        out = _fold(part.probabilities.mul_(part.open), key.shape[1]) @ value32[items, :, cols]
        output[items, :, rows] = out.view(*part.query.shape[:3], -1)
    return output, penalty, open_edges


def backward(
    inputs: Inputs, output: Tensor, grad_output: Tensor, grad_penalty: Tensor, blocks: list[Block], scaling: float,
    softcap: float | None, settings: GateSettings,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of query, key, value, bias and sinks (None where there are none)."""
    query, key, value, bias, sinks, visible, counted = inputs
    compute, kv_heads = bias.dtype, key.shape[1]
    grad_query = torch.empty_like(query)
    grad_key = torch.zeros(key.shape, dtype=compute, device=key.device)
    grad_value = torch.zeros(value.shape, dtype=compute, device=value.device)
    grad_bias = torch.zeros_like(bias)
    grad_sinks = None if sinks is None else torch.zeros_like(bias)
    key32, value32 = key.to(compute), value.to(compute)
    for block in blocks:
        part = _Part(block, query, key32, bias, visible, sinks, scaling, softcap, settings)
        items, rows, cols, _ = block
        d_out = grad_output[items, :, rows].to(compute)
        delta = (d_out * output[items, :, rows].to(compute)).sum(-1, keepdim=True)
        folded_out = _fold(d_out, kv_heads)
        probabilities = part.probabilities
        weights = _fold(probabilities * part.open, kv_heads)
        grad_value[items, :, cols] += weights.transpose(-1, -2) @ folded_out
        # d_pattern holds P * g, d_gate both straight-through terms
        d_weights = folded_out @ value32[items, :, cols].transpose(-1, -2)
        d_pattern = d_weights.view_as(probabilities).mul_(probabilities)
        block_counted = None if counted is None else block.of(counted)
        d_gate = _gate_gradient(part, d_pattern, grad_penalty, block_counted, settings)
        grad_bias += d_gate.sum((0, 2, 3))
        d_scores = d_pattern.mul_(part.open).addcmul_(probabilities, delta, value=-1).add_(d_gate)
        if part.softcap_slope is not None:
            d_scores *= part.softcap_slope
        folded = _fold(d_scores, kv_heads)
        grad_query[items, :, rows] = (folded @ part.key).view_as(part.query).mul_(scaling)
        grad_key[items, :, cols] += folded.transpose(-1, -2) @ _fold(part.query, kv_heads)
        if sinks is not None and grad_sinks is not None:
            sink_share = 1 - probabilities.sum(-1)
            grad_sinks -= (sink_share * delta.squeeze(-1)).sum((0, 2))
    grad_sinks = None if sinks is None or grad_sinks is None else grad_sinks.to(sinks.dtype)
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), grad_bias, grad_sinks


def _gate_gradient(
    part: _Part, d_pattern: Tensor, grad_penalty: Tensor, counted: Tensor | None, settings: GateSettings
) -> Tensor:
    """`P * g * slope + d_penalty * penalty_slope`; without noise and at T_p = T_s the two slopes are one."""
    pressure = grad_penalty[:, None, None]
    slope = gates.straight_through_slope(part.noisy, temperature=settings.slope_temperature)
    if counted is None and part.noisy is part.logits and settings.temperature == settings.slope_temperature:
        return slope.mul_(d_pattern + pressure)
    penalty_slope = gates.edge_penalty_slope(part.logits, settings.temperature).mul_(pressure)
    if counted is not None:
        penalty_slope.mul_(counted)
    return slope.mul_(d_pattern).add_(penalty_slope)


def counted_where_it_matters(visible: Tensor, counted: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """(`counted` like `visible`, or None where it is all of it; the number of pairs that count)."""
    visible_edges = visible.count_nonzero()  # not sum(), which makes an int64 of every pair
    if counted is None:
        return None, visible_edges
    counted_edges = counted.expand_as(visible).count_nonzero()
    if counted_edges == visible_edges:  # only padding makes a difference, and then every block pays for one more mask
        return None, visible_edges
    return counted.expand_as(visible), counted_edges


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
        counted: bool like `visible`, a part of it: the pairs that density and penalty count (both tokens real);
            default `visible`.
        settings: estimator, temperature and statistics hook.
    """
    visible = visible.expand(query.shape[0], 1, query.shape[2], key.shape[2])
    counted, visible_edges = counted_where_it_matters(visible, counted)
    with torch.autocast(query.device.type, enabled=False):  # the scores decide gates: keep them in bias.dtype
        if settings.noise_seed is None and not torch.is_grad_enabled():
            output, open_edges = _run_time(
                query, key, value, bias, visible, sinks, counted, scaling, softcap, settings.on_chunk
            )
            return GatedOutput(output, torch.zeros_like(bias), open_edges, visible_edges)
        output, penalty, open_edges = _GatedAttention.apply(
            query, key, value, bias, sinks, visible, counted, scaling, softcap, settings
        )  # pyright: ignore[reportGeneralTypeIssues]
    return GatedOutput(output, penalty, open_edges, visible_edges)
