"""Gated attention at run time in plain PyTorch: closed gates save the softmax of dead rows and most of the values.

The same operations stand in `modeling_attnprune.py`, which has to end on the same side of every gate.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Score elements held at once; larger than in training, since most blocks go no further than their maximum.
RUN_ELEMENTS = 2**19
# Up to this share of open edges, fetching the value row of each edge is faster than the matmul (measured on CPU).
GATHER_SHARE = 0.01


def attend(scores: Tensor, value: Tensor, bias: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """What the open edges of a block of rows add up to.

    Args:
        scores: [B, H, R, C], -inf where the pair is not visible.
        value: [B, H_kv, C, D]; bias: [H]; sinks: [H] or None.

    Returns:
        output [B, H, R, D]; the live rows, those with an open edge, as int64 [N] into B * H * R; their gates, bool
        [N, C].
    """
    batch, heads, rows, cols = scores.shape
    kv_heads, width = value.shape[1], value.shape[3]
    flat = scores.view(-1, cols)
    largest = flat.amax(-1)
    # s > -b is s + b > 0 to the last bit, and false for a hidden pair also where a head is forced open (b = inf)
    threshold = (-bias)[:, None].expand(batch, heads, rows).reshape(-1)
    live = (largest > threshold).nonzero().squeeze(-1)
    output = value.new_zeros(batch * heads * rows, width)
    if len(live) == 0:
        return output.view(batch, heads, rows, width), live, scores.new_zeros(0, cols, dtype=torch.bool)
    if len(live) < len(flat):
        flat, largest, threshold = flat[live], largest[live], threshold[live]
    is_open = flat > threshold[:, None]
    weights = (flat - largest[:, None]).exp_()
    total = weights.sum(-1)
    if sinks is not None:
        total += (sinks.to(total.dtype)[live // rows % heads] - largest).exp_()
    if is_open.sum() > GATHER_SHARE * is_open.numel():
        weights = weights.mul_(is_open).div_(total[:, None])
        if len(live) < batch * heads * rows:
            weights = weights.new_zeros(batch * heads * rows, cols).index_copy_(0, live, weights)
        output = weights.view(batch, kv_heads, -1, cols) @ value
    else:
        row, col = is_open.nonzero(as_tuple=True)
        group = (live // (heads // kv_heads * rows))[row]  # of B * H_kv
        values = value.reshape(-1, width)[group * cols + col]
        output.index_add_(0, live[row], values.mul_((weights[row, col] / total[row])[:, None]))
    return output.view(batch, heads, rows, width), live, is_open
