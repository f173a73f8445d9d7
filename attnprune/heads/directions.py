"""What a head can write: the singular directions of W_V W_O, as the tokens that they promote.

The weights alone say this, whatever the text. The output directions pass the norm behind the attention, if there is
one, and the final norm by their weights, without the division by a token's own size, which no direction has.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnprune.circuit.model.activations import norm_factor, norm_scale
from attnprune.circuit.model.adapters import Anatomy
from attnprune.tracing.moved import logits_of


class Written(NamedTuple):
    """The first output directions of a layer's heads: share [H, n] of the squared norm, token ids [H, n, count]."""

    share: Tensor
    raises: Tensor
    lowers: Tensor


@torch.no_grad()
def written(anatomy: Anatomy, layer: int, directions: int, count: int) -> Written:
    """The `count` tokens that each of the first directions promotes, and those that its opposite does."""
    share, outputs = singular(anatomy, layer, directions)
    model: Any = anatomy.model
    dtype = model.get_output_embeddings().weight.dtype
    block = anatomy.blocks[layer]
    if block.attention_post_norm is not None:
        outputs = outputs * norm_factor(block.attention_post_norm, outputs.to(dtype)).float()
    some = torch.linspace(-1, 1, outputs.shape[-1], device=outputs.device, dtype=dtype)[None]
    scale, centred = norm_scale(anatomy.final_norm, some)
    moved = logits_of(model, outputs, scale[0], centred)
    high, low = moved.topk(count), moved.topk(count, largest=False)
    turn = (low.values[..., :1].abs() > high.values[..., :1]).expand_as(high.indices)  # the larger side first
    return Written(share, torch.where(turn, low.indices, high.indices), torch.where(turn, high.indices, low.indices))


def singular(anatomy: Anatomy, layer: int, directions: int) -> tuple[Tensor, Tensor]:
    """(share of the squared norm [H, n], unit output directions [H, n, D]) of W_V W_O of each head, largest first.

    The product is of rank `width`: both factors are reduced to that size first.
    """
    graph, block = anatomy.graph, anatomy.blocks[layer]
    outward = block.output_weight(graph.heads).float()
    inward = block.projections["v"].weight.float().repeat_interleave(graph.heads // graph.kv_heads, 0)
    _, reads = torch.linalg.qr(inward)
    basis, writes = torch.linalg.qr(outward.transpose(1, 2))
    _, values, right = torch.linalg.svd(reads @ writes.transpose(1, 2), full_matrices=False)
    squares = values.square()
    share = squares / squares.sum(-1, keepdim=True).clamp(min=1e-30)
    return share[:, :directions], (right @ basis.transpose(1, 2))[:, :directions]
