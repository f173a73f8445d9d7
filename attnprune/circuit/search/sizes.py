"""The smallest circuit of a model: edges are ranked in several ways, sizes are decided by exact patching alone.

Train prompts rank the edges, validation prompts decide the size, test prompts are left for the report. A size holds if
its faithfulness lies in the band [target, 2 - target] and that of every larger evaluated size too: the curve of
faithfulness over size is not monotone, and the first size inside may be luck. The size found is then bisected.

What an edge does depends on which others are kept. So from as many of the best edges, or from few of them where there
are many, a mask is learned by gradients (`attnprune.circuit.search.masks`), on more train prompts, and then whole
blocks of edges are deleted (`attnprune.circuit.search.deletion`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from attnprune.circuit.result import Ranking
from attnprune.circuit.search.cache import Cache
from attnprune.circuit.search.masks import first_sizes, learn_circuits
from attnprune.circuit.search.ranking import Order
from attnprune.circuit.search.splits import Settings, Split, Watch, ratio_of_means


class _Prunable(Protocol):
    """A graph, or what circuits of a split are made of."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def prune(self, kept: Tensor) -> Tensor: ...


_SMALLEST_SHARE = 0.0005  # of all edges: where the sizes begin
_CLOSE = 1.02  # ratio of two sizes that bisection tells apart


def circuit_of_size(units: _Prunable, order: Tensor, size: int) -> Tensor:
    """The circuit of the best edges of an order that has at most `size` edges once dangling parts are gone."""
    low, high = 0, len(order)  # best edges; pruning keeps the order, so more of them never give a smaller circuit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if int(_best(units, order, middle).sum()) <= size else (low, middle - 1)
    return _best(units, order, low)


def _best(units: _Prunable, order: Tensor, count: int) -> Tensor:
    mask = torch.zeros(units.shape, dtype=torch.bool)
    mask.view(-1)[order[:count]] = True
    return units.prune(mask)


def size_grid(edges: int, count: int) -> list[int]:
    """About `count` sizes, equally spaced on a log scale, below all edges."""
    first = max(2.0, _SMALLEST_SHARE * edges)
    ratio = (edges / first) ** (1 / count)
    return sorted({round(first * ratio**step) for step in range(count)} - {edges})


class Sized(NamedTuple):
    """A circuit that was evaluated on the validation prompts."""

    edges: Tensor
    size: int
    metric: Tensor
    faithfulness: float


def evaluate_sizes(split: Split, order: Order, sizes: Iterable[int], watch: Watch) -> list[Sized]:
    """Circuits of these sizes and the whole model, smallest first; equal ones count once."""
    units = split.units
    sizes = list(sizes)
    found = {units.edge_count: whole(split)}
    for done, size in enumerate(sizes):
        watch(f"sizes by {order.name}", done, len(sizes))
        sized = evaluated(split, circuit_of_size(units, order.edges, size))
        found[sized.size] = sized
    return [found[count] for count in sorted(found)]


def whole(split: Split) -> Sized:
    """The model itself, or, where its metric is not the one that is wanted, what it measures."""
    units = split.units
    return evaluated(split, units.mask()) if split.is_asked else Sized(units.mask(), units.edge_count, split.clean, 1.0)


def evaluated(split: Split, edges: Tensor) -> Sized:
    """A circuit, bool [U, V], with what it measures on a split."""
    metric = split.measure(edges).metric
    faithfulness = ratio_of_means(metric, split.clean, split.corrupted)
    return Sized(edges, int(edges.sum()), metric, faithfulness)


def stable(points: Sequence[Sized], settings: Settings) -> int:
    """Index of the smallest circuit that is in the band together with all larger ones; at worst the whole model."""
    for index in reversed(range(len(points))):
        if not settings.in_band(points[index].faithfulness):
            return index + 1
    return 0


def bisect(split: Split, order: Order, points: list[Sized], settings: Settings, watch: Watch) -> list[Sized]:
    """More sizes between the smallest stable one and the next smaller one, until they are 2 % apart."""
    points = list(points)
    for done in range(12):
        index = stable(points, settings)
        low, high = points[index - 1].size if index else 0, points[index].size
        middle = between(low, high)
        if middle is None:
            return points
        watch(f"bisection by {order.name}", done, 12)
        sized = evaluated(split, circuit_of_size(split.units, order.edges, middle))
        if sized.size <= low:  # no circuits between: look in the upper part
            middle = (low + high + 1) // 2
            sized = evaluated(split, circuit_of_size(split.units, order.edges, middle))
        if sized.size in (low, high):
            return points
        points = sorted([*points, sized], key=lambda point: point.size)
    return points


def between(low: int, high: int) -> int | None:
    """The size in the middle of two on a log scale; None if they are neighbours or as close as bisection goes."""
    if high - low < 2 or high <= low * _CLOSE:
        return None
    return min(high - 1, max(low + 1, round((max(low, 1) * high) ** 0.5)))


def search_sizes(
    split: Split, orders: list[Order], settings: Settings, watch: Watch
) -> tuple[dict[Ranking, list[Sized]], Order, Sized]:
    """(evaluated sizes of each ranking, the best ranking, its smallest stable circuit)."""
    grid = size_grid(split.units.edge_count, settings.sizes)
    curves: dict[Ranking, list[Sized]] = {order.name: evaluate_sizes(split, order, grid, watch) for order in orders}

    def smallest(order: Order) -> Sized:
        return curves[order.name][stable(curves[order.name], settings)]

    for order in sorted(orders, key=lambda order: smallest(order).size):
        index = stable(curves[order.name], settings)
        below = curves[order.name][index - 1].size if index else 0
        # The others only if they can still win; the first is EAP-IG, what the result is compared with.
        if order is orders[0] or below < min(smallest(other).size for other in orders):
            curves[order.name] = bisect(split, order, curves[order.name], settings, watch)
    best = min(orders, key=lambda order: smallest(order).size)
    return curves, best, smallest(best)


def learned_sizes(
    more: Split, validation: Split, order: Order, size: int, gap: float, settings: Settings, watch: Watch, cache: Cache
) -> list[Sized]:
    """What masks give, on the validation prompts: from every beginning that a search may have, until one holds.

    Args:
        more: prompts to learn on.
        size: edges that a ranking needs; only smaller circuits count as found.
        gap: mean metric of clean minus corrupted prompts.
    """
    found: list[Sized] = []
    for first in first_sizes(size, validation.units.edge_count, settings):
        circuits = learn_circuits(more, order.edges, first, gap, settings, watch, cache)
        for done, edges in enumerate(circuits):
            watch("learned circuits that hold", done, len(circuits))
            found += [evaluated(validation, edges)] if edges.any() else []
        if smallest_held(found, size, settings):
            break
    return found


def smallest_held(points: Iterable[Sized], below: float, settings: Settings) -> Sized | None:
    """The smallest of some circuits with fewer than `below` edges that validation prompts keep in the band."""
    held = [point for point in points if point.size < below and settings.in_band(point.faithfulness)]
    return min(held, key=lambda point: point.size, default=None)
