"""Circuits counted as published: heads by activation patching, cumulated, and the edges among them.

After Draye et al. (arXiv 2512.05865), as far as it is known: heads are ranked by how much of the metric comes back when
the clean output of each is put into the corrupted run, and put back together, the best first, until the share is
reached. Edges are not searched: all between the heads found are counted, and at the level of tokens every open
attention edge of theirs. No mask, no deletion, no validation. So the number of edges follows from that of the heads and
from the density of the model alone, which is what this procedure is here to show.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from attnprune.circuit.model.activations import collect
from attnprune.circuit.model.effects import node_effects
from attnprune.circuit.model.graph import ATTENTION_KINDS, Graph
from attnprune.circuit.model.restored import restored
from attnprune.circuit.search.splits import Split
from attnprune.circuit.search.subject import Subject
from attnprune.circuit.worth import Published


def published(subject: Subject) -> Published:
    """The published procedure on the validation prompts."""
    graph, target = subject.anatomy.graph, subject.settings.target
    split = subject.split("validation", to_rank=True, name="validation, whole runs", ablate="corrupt")
    order = _ranked(subject, split)
    shares: dict[int, float] = {}

    def share(count: int) -> float:
        if count not in shares:
            subject.told("heads put back", min(len(shares), 15), 16)
            shares[count] = _recovered(subject, split, _first(graph, order, count))
        return shares[count]

    count = 1
    while count < len(order) and share(count) < target:
        count = min(2 * count, len(order))
    low = count // 2  # fails, if it is more than no head
    while count - low > 1 and share(count) >= target:
        middle = (low + count) // 2
        low, count = (low, middle) if share(middle) >= target else (middle, count)
    heads = _first(graph, order, count)
    names = [f"a{layer}.h{head}" for layer, head in heads.nonzero().tolist()]
    found = Published(
        heads=count if share(count) >= target else None, recovered=share(count), edges=edges_among(graph, heads),
        token_edges=_open_edges(subject, split, heads), names=names,
    )  # fmt: skip
    split.free()
    return found


def edges_among(graph: Graph, heads: Tensor) -> int:
    """Edges from one of the heads, bool [L, H], into the query, key or value of another."""
    kept, groups = torch.zeros(graph.sources, graph.destinations, dtype=torch.bool), graph.kv_heads
    for layer in range(graph.layers):
        kept[graph.head_sources(layer)] = heads[layer][:, None]
    reads = torch.zeros(graph.destinations, dtype=torch.bool)
    for layer in range(graph.layers):
        for kind in ATTENTION_KINDS:
            mine = heads[layer] if kind == "q" else heads[layer].view(groups, -1).any(1)
            reads[graph.readers(layer, kind)] = mine
    return int((kept & reads & graph.mask()).sum())


def _first(graph: Graph, order: Tensor, count: int) -> Tensor:
    heads = torch.zeros(graph.layers * graph.heads, dtype=torch.bool)
    heads[order[:count]] = True
    return heads.view(graph.layers, graph.heads)


def _ranked(subject: Subject, split: Split) -> Tensor:
    """All heads [L * H], those first that bring most of the metric back."""
    graph = subject.anatomy.graph
    sources = torch.cat([torch.arange(graph.sources)[graph.head_sources(layer)] for layer in range(graph.layers)])

    def compute() -> dict[str, Tensor]:
        found = []
        for done, group in enumerate(split.groups):
            subject.told("heads put back one by one", done, len(split.groups))
            found.append(
                node_effects(subject.anatomy, group.corrupted, group.clean, sources, group.prompts.score).cpu()
            )
        return {"effects": torch.cat(found, 1).mean(1)}

    effects = subject.cache.tensors(f"{split.key} heads put back", compute)["effects"]
    return effects.argsort(descending=True, stable=True)


def _recovered(subject: Subject, split: Split, heads: Tensor) -> float:
    """The share of the gap that comes back with these heads."""

    def compute() -> float:
        metric = torch.cat(
            [g.prompts.score(restored(subject.anatomy, g.clean, g.corrupted, heads)).cpu() for g in split.groups]
        )
        gap = split.clean.mean() - split.corrupted.mean()
        return ((metric.mean() - split.corrupted.mean()) / gap).item()

    names = " ".join(map(str, heads.flatten().nonzero()[:, 0].tolist()))
    return float(subject.cache.numbers(f"{split.key} heads {names}", compute))


def _open_edges(subject: Subject, split: Split, heads: Tensor) -> float:
    """Attention edges (head, to, from) of these heads that a gate lets through in the clean run, per prompt."""

    def compute() -> float:
        total = 0
        for prompts in split.prompts:
            patterns = cast(Tensor, collect(subject.anatomy, prompts.clean, 1).patterns)  # of whole prompts
            total += int((patterns != 0).transpose(1, 2)[heads.to(patterns.device)].sum())
        return total / len(split)

    return float(subject.cache.numbers(f"{split.key} open edges {heads.flatten().nonzero()[:, 0].tolist()}", compute))
