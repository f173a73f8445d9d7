"""Gated attention at run time in plain PyTorch: closed gates save the softmax of dead rows and most of the values.

The same operations stand in `modeling_attnprune.py`, which has to end on the same side of every gate. Gates are 0.0 and
1.0 in the dtype of the scores: on CPU PyTorch is several times slower where it mixes them with bools.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

# Up to this share of open edges, fetching the value row of each edge is faster than the matmul (measured on CPU).
GATHER_SHARE = 0.03


def attend(
    scores: Tensor, value: Tensor, low: int, bias: Tensor, sinks: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What the open edges of a block of rows add up to.

    Args:
        scores: [B, H, R, C], -inf where the pair is not visible; overwritten.
        value: [B, H_kv, K, D], contiguous; the keys of `scores` are those from `low` to `low + C`.
        bias: [H]; sinks: [H] or None.

    Returns:
        output [B, H, R, D]; the live rows, those with an open edge, as int64 [N] into B * H * R; their gates [N, C].
    """
    batch, heads, rows, cols = scores.shape
    _, kv_heads, keys, width = value.shape
    flat = scores.view(-1, cols)
    # s > -b is s + b > 0 to the last bit, and false for a hidden pair also where a head is forced open (b = inf)
    threshold = (-bias)[:, None].expand(batch, heads, rows).reshape(-1)
    live = (~(flat.amax(-1) <= threshold)).nonzero().squeeze(-1)  # also the rows with a NaN
    if len(live) < len(flat):
        flat, threshold = flat.index_select(0, live), threshold[live]
    weights = torch.softmax(flat, -1)
    if sinks is not None:
        weights *= torch.sigmoid(torch.logsumexp(flat, -1) - sinks.to(flat.dtype)[live // rows % heads])[:, None]
    is_open = flat.gt_(threshold[:, None])
    count = is_open.sum(-1).long()
    if count.sum() > GATHER_SHARE * scores.numel():
        weights *= is_open
        if len(live) < batch * heads * rows:
            weights = weights.new_zeros(batch * heads * rows, cols).index_copy_(0, live, weights)
        output = weights.view(batch, kv_heads, -1, cols) @ value[:, :, low : low + cols]
    else:
        row, col = is_open.bool().nonzero(as_tuple=True)
        first = live // (heads // kv_heads * rows) * keys + low  # of the B * H_kv * K value rows
        edges = first[row] + col
        mixed = functional.embedding_bag(
            edges, value.view(-1, width), count.cumsum(0) - count, mode="sum", per_sample_weights=weights[row, col]
        )
        mixed.masked_fill_((count == 0)[:, None], float("nan"))  # live without an open edge: it had a NaN
        output = mixed.new_zeros(batch * heads * rows, width).index_copy_(0, live, mixed)
    return output.view(batch, heads, rows, width), live, is_open
