"""Orders in which a search looks at a model's edges: by gradients, and by exact patching where it is affordable."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor

from attnprune.circuit.model.adapters import Anatomy
from attnprune.circuit.model.attribution import attribute
from attnprune.circuit.model.effects import edge_effects, node_effects
from attnprune.circuit.model.graph import Graph
from attnprune.circuit.result import Attribution, Flips, Ranking
from attnprune.circuit.search.cache import Cache
from attnprune.circuit.search.splits import Settings, Split, Watch
from attnprune.circuit.search.units import Group


class Order(NamedTuple):
    """Edges in the order of a ranking: flat indices [E], best first, and the scores [U, V] behind it."""

    name: Ranking
    edges: Tensor
    scores: Tensor


class Scores(NamedTuple):
    """EAP-IG on the train prompts.

    edges [U, V]: mean change of the metric when the edge is corrupted. templates: the same for each template alone.
    messages: mean scores [L, H, S, S] by (length, template).
    """

    edges: Tensor
    templates: dict[int, Tensor]
    messages: dict[tuple[int, int], Tensor]
    facts: Attribution


def score_edges(train: Split, max_steps: int, watch: Watch, cache: Cache) -> Scores:
    """EAP-IG over all prompts, one template at a time; its points double from 4 until the gap is below 5 %."""
    sizes = torch.tensor([len(prompts) for prompts in train.prompts], dtype=torch.float)
    change = train.corrupted - train.clean
    steps = 4
    while True:
        saved = cache.tensors(f"{train.key} eap-ig {steps}", partial(_attributed, train, steps, watch))
        mean = (sizes[:, None, None] * saved["edges"]).sum(0) / sizes.sum()
        gap = ((mean[0].sum() - change.mean()).abs() / change.abs().mean().clamp(min=1e-30)).item()
        if gap < 0.05 or 2 * steps > max_steps:
            break
        steps *= 2
    templates: dict[int, list[int]] = {}
    messages: dict[tuple[int, int], list[int]] = {}
    for index, prompts in enumerate(train.prompts):
        template = int(prompts.template[0])
        templates.setdefault(template, []).append(index)
        messages.setdefault((prompts.length, template), []).append(index)

    def mean_of(rows: list[int], each: Callable[[int], Tensor]) -> Tensor:
        return torch.stack([sizes[row] * each(row) for row in rows]).sum(0) / sizes[rows].sum()

    flips = saved["flips"].sum(0).tolist()
    return Scores(
        mean,
        {template: mean_of(rows, lambda row: saved["edges"][row]) for template, rows in templates.items()},
        {key: mean_of(rows, lambda row: saved[f"messages {row}"]) for key, rows in messages.items()},
        Attribution(steps=steps, gap=gap, flips=Flips(flipped=flips[0], open=flips[1])),
    )


def _attributed(train: Split, steps: int, watch: Watch) -> dict[str, Tensor]:
    found = []
    for done, group in enumerate(train.groups):
        watch(f"EAP-IG with {steps} points", done, len(train.groups))
        found.append(attribute(train.anatomy, group.clean, group.corrupted, group.prompts.score, steps=steps))
    messages = {f"messages {row}": cast(Tensor, one.messages) for row, one in enumerate(found)}
    flips = torch.tensor([one.flips for one in found])
    return {"edges": torch.stack([one.edges.float() for one in found]), "flips": flips} | messages


def rank(train: Split, scores: Scores, settings: Settings, watch: Watch, cache: Cache) -> list[Order]:
    """The rankings of a model, EAP-IG first. Exact ones see gates, which gradients do not, and what is saturated."""
    graph = train.anatomy.graph
    orders = eap_ig_orders(graph, scores.edges)
    prompts = exact_prompts(train, settings)
    nodes = mean_nodes(train, prompts, watch, cache)
    by_nodes = _by_nodes(graph, nodes)
    orders.append(_order(graph, "exact nodes", by_nodes, by_nodes, scores.edges.abs()))
    if settings.is_small(graph.edge_count):
        effects = _mean_edges(train, prompts, watch, cache)
        orders.append(_order(graph, "exact edges", effects, effects.abs(), scores.edges.abs()))
    return orders


def exact_prompts(train: Split, settings: Settings) -> int:
    """Prompts that exact effects are measured on."""
    return len(train) if settings.is_small(train.anatomy.graph.edge_count) else settings.exact_prompts


def eap_ig_orders(graph: Graph, scores: Tensor) -> list[Order]:
    """The rankings by size of a score [U, V], and by how much the edge supports the metric."""
    return [
        _order(graph, "eap-ig abs", scores, scores.abs()),
        _order(graph, "eap-ig signed", scores, -scores),
    ]


def _order(graph: Graph, name: Ranking, scores: Tensor, strength: Tensor, ties: Tensor | None = None) -> Order:
    """All edges by `strength`, equal ones by `ties`."""
    edges = graph.mask().flatten().nonzero()[:, 0]
    if ties is not None:
        edges = edges[ties.flatten()[edges].argsort(descending=True, stable=True)]
    return Order(name, edges[strength.flatten()[edges].argsort(descending=True, stable=True)], scores)


def _by_nodes(graph: Graph, effects: Tensor) -> Tensor:
    """Node effects [U] as edge scores [U, V]: the smaller effect of the two ends (logits count as infinitely large)."""
    size = effects.abs()
    reader = torch.full((graph.destinations,), torch.inf)
    for layer in range(graph.layers):
        heads = size[graph.head_sources(layer)]
        reader[graph.readers(layer, "q")] = heads
        for kind in ("k", "v"):
            reader[graph.readers(layer, kind)] = heads.view(graph.kv_heads, -1).amax(1)
        reader[graph.readers(layer, "mlp")] = size[graph.mlp_source(layer)]
    return torch.minimum(size[:, None], reader) * graph.mask()


def _some(train: Split, count: int) -> list[Group]:
    """Groups with the first prompts of each template, about `count` prompts in all."""
    each = max(1, -(-count // len(train.groups)))
    chosen = []
    for group in train.groups[:count]:
        rows = slice(None, each)
        clean, corrupted = group.clean.take(rows), group.corrupted.take(rows)
        chosen.append(Group(group.prompts.take(torch.arange(len(clean.ids))), clean, corrupted))
    return chosen


def mean_nodes(train: Split, count: int, watch: Watch, cache: Cache) -> Tensor:
    """Mean exact effect [U] of corrupting each node."""

    def compute() -> dict[str, Tensor]:
        graph, groups = train.anatomy.graph, _some(train, count)
        layers = graph.layer_of_source(torch.arange(graph.sources))
        parts = []
        for layer in range(graph.layers):
            watch("exact effects of nodes", layer, graph.layers)
            nodes = (layers == layer).nonzero()[:, 0]
            parts.append(_mean(node_effects, train.anatomy, groups, nodes))
        return {"effects": torch.cat(parts)}

    return cache.tensors(f"{train.key} nodes", compute)["effects"]


def _mean_edges(train: Split, count: int, watch: Watch, cache: Cache) -> Tensor:
    """Mean exact effect [U, V] of corrupting each edge."""
    graph = train.anatomy.graph
    edges = graph.mask().nonzero()
    layers = graph.layer_of_destination(edges[:, 1])
    effects = torch.zeros(graph.sources, graph.destinations)
    done = 0
    for layer in layers.unique().tolist():
        chosen = edges[layers == layer]
        watch("exact effects of edges", done, len(edges))
        found = cache.tensors(
            f"{train.key} edges {layer}",
            lambda e=chosen: {"effects": _mean(edge_effects, train.anatomy, _some(train, count), e)},
        )
        effects[chosen[:, 0], chosen[:, 1]] = found["effects"]
        done += len(chosen)
    return effects


def _mean(effects: Callable[..., Tensor], anatomy: Anatomy, groups: list[Group], what: Tensor) -> Tensor:
    """Mean over the prompts of all groups of exact effects [n, B]."""
    found = [effects(anatomy, g.clean, g.corrupted, what, g.prompts.score, pairs=64).cpu() for g in groups]
    return torch.cat(found, 1).float().mean(1)
