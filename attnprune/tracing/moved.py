"""What a message's value moves: its way through the output map, the final norm and the unembedding, alone.

The final norm divides by a number that depends on the whole stream. Here that is its number in the full run, at the
position that receives the message, so that the shifts of all parts of a stream add up to its logits (before a soft cap
of Gemma 2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnprune.circuit.model.activations import norm_scale
from attnprune.tracing.messages import Messages

BATCH = 128  # messages whose logits are held at once

Shifts = list[tuple[int, float]]
"""Token ids and how far their logits move."""


def top_shifts(messages: Messages, chosen: Tensor, count: int) -> list[tuple[Shifts, Shifts]]:
    """Of each candidate [n] (their numbers) the tokens that it raises most and those that it lowers most."""
    found: list[tuple[Shifts, Shifts]] = []
    for part in chosen.split(BATCH):
        logits = shifts(messages, part)
        high, low = logits.topk(count), logits.topk(count, largest=False)
        columns = [x.tolist() for x in (high.indices, high.values, low.indices, low.values)]
        for up, by, down, less in zip(*columns, strict=True):
            found.append((list(zip(up, by, strict=True)), list(zip(down, less, strict=True))))
    return found


@torch.no_grad()
def shifts(messages: Messages, chosen: Tensor) -> Tensor:
    """How far candidates [n] (their numbers) move each logit against the mean of all, fp32 [n, V]."""
    query = messages.candidates[chosen, 2]
    scale, centred = norm_scale(messages.anatomy.final_norm, messages.stream)
    return logits_of(messages.anatomy.model, written_by(messages, chosen), scale[query], centred)


def logits_of(model: Any, written: Tensor, scale: Tensor, centred: bool) -> Tensor:
    """Logits of parts of the stream [..., D] against their mean, fp32 [..., V]; `scale` and `centred` of the final
    norm, see `norm_scale`."""
    unembedding: Tensor = model.get_output_embeddings().weight
    if centred:
        written = written - written.mean(-1, keepdim=True)
    moved = ((written * scale).to(unembedding.dtype) @ unembedding.t()).float()
    return moved - moved.mean(-1, keepdim=True)


def written_by(messages: Messages, chosen: Tensor) -> Tensor:
    """What candidates [n] (their numbers) add to the stream at their query in the full run, [n, D]."""
    graph = messages.anatomy.graph
    layer, head, query, key = messages.candidates[chosen].unbind(1)
    group = head // (graph.heads // graph.kv_heads)
    sent = messages.weights[layer, head, query, key, None] * messages.values[layer, group, key]
    written = messages.stream.new_empty(len(chosen), messages.anatomy.width)
    for index in layer.unique().tolist():
        block, mine = messages.anatomy.blocks[index], layer == index
        maps = block.output_weight(graph.heads)[head[mine]]
        made = torch.einsum("nw,nwd->nd", sent[mine].to(maps.dtype), maps)
        factor = messages.factors[index]
        written[mine] = made if factor is None else made * factor[query[mine]]
    return written
