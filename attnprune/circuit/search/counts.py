"""How large a circuit is: its heads, MLPs and edges, and the attention messages that it needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attnprune.circuit.model.graph import Graph
from attnprune.circuit.result import Counts, Curve, Point, Ranking
from attnprune.circuit.search.sizes import Sized, between, stable
from attnprune.circuit.search.splits import Settings, Split, Watch
from attnprune.circuit.search.units import open_messages
from attnprune.circuit.tasks import Prompts

# Reports


def count_nodes(graph: Graph, edges: Tensor) -> tuple[int, int]:
    """(heads, MLPs) that write to an edge of a pruned circuit."""
    heads, mlps = graph.touched(edges)
    return int(heads.sum()), int(mlps.sum())


def curve_of(graph: Graph, name: Ranking, points: Sequence[Sized], settings: Settings) -> Curve:
    """A ranking's evaluated sizes for the result."""
    rows = []
    for point in points:
        heads, mlps = count_nodes(graph, point.edges)
        rows.append(Point(edges=point.size, heads=heads, mlps=mlps, faithfulness=point.faithfulness))
    inside = [row.edges for row in rows if settings.in_band(row.faithfulness)]
    return Curve(ranking=name, points=rows, first=inside[0], stable=rows[stable(points, settings)].edges)


class Messages(NamedTuple):
    """Attention messages per prompt: those that a circuit needs, and those of all heads that a gate lets through.

    Both count from the first token on that differs between clean and corrupted prompt; before it nothing can.
    """

    needed: float
    open: float


def needed_messages(
    split: Split, edges: Tensor, scores: dict[tuple[int, int], Tensor], settings: Settings, watch: Watch
) -> Messages:
    """How few messages (head, to, from) keep a circuit in the band; the others carry their corrupted values.

    Candidates are the messages of the circuit's heads whose gate is open in the clean or the corrupted run, by the size
    of their EAP-IG score on train prompts of the same template. Found by bisection, so up to a few percent. The target
    is the same for all circuits, so one that lies just above it keeps more messages than one with room.
    """
    heads, _ = split.anatomy.graph.touched(edges)
    strengths, candidates, visible = [], [], 0
    for group in split.groups:
        is_open = open_messages(group)
        visible += int(is_open.sum())
        candidates.append(is_open & heads[:, None, :, None, None])
        strengths.append(_message_strength(group.prompts, scores, is_open))
    ranked = torch.cat([s[c] for s, c in zip(strengths, candidates, strict=True)]).sort(descending=True).values

    def masks(count: int) -> list[Tensor]:
        limit = ranked[count - 1] if count else torch.inf
        return [c & (s >= limit) for s, c in zip(strengths, candidates, strict=True)]

    low, high = 0, len(ranked)  # `high` is in the band: with all messages the circuit is the one that was chosen
    for done in range(12):
        middle = between(low, high)
        if middle is None:
            break
        watch("attention messages", done, 12)
        inside = settings.in_band(split.faithfulness(edges, masks(middle)))
        low, high = (low, middle) if inside else (middle, high)
    kept = sum(int(mask.sum()) for mask in masks(high)) if high else 0
    return Messages(kept / len(split), visible / len(split))


def _message_strength(prompts: Prompts, scores: dict[tuple[int, int], Tensor], like: Tensor) -> Tensor:
    """|score| like [L, B, H, S, P + S], by each prompt's template; for one without train prompts, its length's mean."""
    same = [score for (length, _), score in scores.items() if length == prompts.length]
    other = torch.stack(same).mean(0) if same else torch.zeros(len(like), like.shape[2], prompts.length, prompts.length)
    rows = [scores.get((prompts.length, template), other) for template in prompts.template.tolist()]
    return torch.stack(rows, 1).abs()[..., -like.shape[3] :, :]


def counts_of(graph: Graph, edges: Tensor, messages: Messages | None = None) -> Counts:
    """Sizes of a circuit for the result."""
    heads, mlps = count_nodes(graph, edges)
    needed, visible = messages or (None, None)
    return Counts(heads=heads, mlps=mlps, edges=int(edges.sum()), messages=needed, open_messages=visible)
