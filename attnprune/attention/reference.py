"""The definition of gated attention, written for reading: dense, fp64, gradients by autograd.

It is the only truth the other implementations are tested against. It holds [batch, heads, queries, keys] tensors, so
it is for short sequences and for returning the pattern, never for training.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnprune.attention import gates


def gated_attention_reference(
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
    noise: Tensor | None = None,
    temperature: float = 1.0,
    slope_temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gated attention by its definition.

    Args:
        query: [B, H, Q, D]; key, value: [B, H_kv, K, D] with H a multiple of H_kv (grouped queries).
        bias: gate bias [H]; `+inf` forces a head open.
        visible: bool, broadcastable to [B, 1, Q, K]: the pairs that softmax sees.
        softcap: `softcap * tanh(s / softcap)` is applied to the scores, as Gemma 2 does.
        sinks: attention sinks [H]: a logit that takes part in the denominator and is never gated.
        counted: bool like `visible`: the pairs that the penalty counts (both tokens real); default `visible`.
        noise: [B, H, Q, K] or None.
        temperature, slope_temperature: T_p of the penalty and T_s of the gate's straight-through slope; with an
            infinite T_s there is none, and the gradient is that of the function itself.

    Returns:
        output [B, H, Q, D], pattern `P * A` [B, H, Q, K], and the edge penalty summed over counted pairs, [H].
        A row with no open edge (or nothing visible) outputs 0.
    """
    scores = _scores(query, key, scaling, softcap)
    value = value.repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = scores + bias[:, None, None]
    visible = visible.expand(query.shape[0], 1, *scores.shape[-2:])

    masked = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        column = sinks[None, :, None, None].expand(*masked.shape[:-1], 1)
        probabilities = torch.softmax(torch.cat([masked, column], -1), -1)[..., :-1]
    else:
        probabilities = torch.softmax(masked, -1)
    probabilities = probabilities.masked_fill(~visible, 0.0)  # also turns the NaN of an empty row into 0

    gate = gates.gate_open(logits, noise).to(scores.dtype)
    if math.isfinite(slope_temperature):
        soft = torch.sigmoid((logits if noise is None else logits + noise) / slope_temperature)
        gate = gate + soft - soft.detach()
    pattern = probabilities * gate
    counted = visible if counted is None else counted
    penalty = (gates.edge_penalty(logits, temperature) * counted).sum((0, 2, 3))
    return pattern @ value, pattern, penalty


def open_edges_reference(
    query: Tensor, key: Tensor, bias: Tensor, counted: Tensor, scaling: float, softcap: float | None = None
) -> Tensor:
    """Which counted edges are open at run time (without noise): bool [B, H, Q, K]."""
    return gates.gate_open(_scores(query, key, scaling, softcap) + bias[:, None, None]) & counted


def _scores(query: Tensor, key: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """What softmax sees before the mask, [B, H, Q, K]."""
    scores = scaling * query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(-1, -2)
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)
