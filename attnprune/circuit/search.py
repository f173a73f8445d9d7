"""The smallest circuit of a model: edges are ranked in several ways, sizes are decided by exact patching alone.

Train prompts rank the edges, validation prompts decide the size, test prompts are left for the report. A size counts
as reached if its faithfulness lies in the band [target, 2 - target] and that of every larger evaluated size too: the
curve of faithfulness over size is not monotone, and the first size inside may be luck. The size found is then bisected.

What an edge does depends on which others are kept. So from as many of the best edges a mask is learned by gradients
(`attnprune.circuit.masks`), on more train prompts, and then whole blocks of edges are deleted, the weakest first, as
long as train prompts stay inside the band: from the learned circuit, or, if validation prompts hold none that is
smaller, from a larger one (by a third or more). Every stage asks the gradients inside the circuit that is left. So many
choices fit the prompts they are made on: validation prompts decide how far to go.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple, cast

import torch
from torch import Tensor

from attnprune.circuit.attribution import attribute_circuit
from attnprune.circuit.graph import Graph
from attnprune.circuit.ranking import Order
from attnprune.circuit.result import Counts, Curve, Point, Ranking
from attnprune.circuit.splits import Group, Settings, Split, Watch, ratio_of_means
from attnprune.circuit.tasks import Prompts

_SMALLEST_SHARE = 0.0005  # of all edges: where the sizes begin
_CLOSE = 1.02  # ratio of two sizes that bisection tells apart
# Stages of deletion: how much of what may be lost, and into how many blocks a circuit is cut before a stage gives up.
_STAGES = ((0.1, 32), (0.3, 64), (0.6, 128), (1.0, None))
_LARGER = 1.3  # where deletion begins, relative to the circuit found by size


def circuit_of_size(graph: Graph, order: Tensor, size: int) -> Tensor:
    """The circuit of the best edges of an order that has at most `size` edges once dangling parts are gone."""
    low, high = 0, len(order)  # best edges; pruning keeps the order, so more of them never give a smaller circuit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if int(_best(graph, order, middle).sum()) <= size else (low, middle - 1)
    return _best(graph, order, low)


def _best(graph: Graph, order: Tensor, count: int) -> Tensor:
    mask = torch.zeros(graph.sources * graph.destinations, dtype=torch.bool)
    mask[order[:count]] = True
    return graph.prune(mask.view(graph.sources, graph.destinations))


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
    graph = split.anatomy.graph
    sizes = list(sizes)
    found = {graph.edge_count: Sized(graph.mask(), graph.edge_count, split.clean, 1.0)}
    for done, size in enumerate(sizes):
        watch(f"sizes by {order.name}", done, len(sizes))
        sized = _evaluated(split, circuit_of_size(graph, order.edges, size))
        found[sized.size] = sized
    return [found[count] for count in sorted(found)]


def _evaluated(split: Split, edges: Tensor) -> Sized:
    metric = split.measure(edges).metric
    faithfulness = ratio_of_means(metric, split.clean, split.corrupted)
    return Sized(edges, int(edges.sum()), metric, faithfulness)


def stable(points: Sequence[Sized], settings: Settings) -> int:
    """Index of the smallest circuit that is in the band together with all larger ones; at worst the whole model."""
    for index in reversed(range(len(points))):
        if not settings.reached(points[index].faithfulness):
            return index + 1
    return 0


def bisect(split: Split, order: Order, points: list[Sized], settings: Settings, watch: Watch) -> list[Sized]:
    """More sizes between the smallest stable one and the next smaller one, until they are 2 % apart."""
    points = list(points)
    for done in range(12):
        index = stable(points, settings)
        low, high = points[index - 1].size if index else 0, points[index].size
        middle = _between(low, high)
        if middle is None:
            return points
        watch(f"bisection by {order.name}", done, 12)
        sized = _evaluated(split, circuit_of_size(split.anatomy.graph, order.edges, middle))
        if sized.size <= low:  # no circuits between: look in the upper part
            middle = (low + high + 1) // 2
            sized = _evaluated(split, circuit_of_size(split.anatomy.graph, order.edges, middle))
        if sized.size in (low, high):
            return points
        points = sorted([*points, sized], key=lambda point: point.size)
    return points


def _between(low: int, high: int) -> int | None:
    """The size in the middle of two on a log scale; None if they are neighbours or as close as bisection goes."""
    if high - low < 2 or high <= low * _CLOSE:
        return None
    return min(high - 1, max(low + 1, round((max(low, 1) * high) ** 0.5)))


def search_sizes(
    split: Split, orders: list[Order], settings: Settings, watch: Watch
) -> tuple[dict[Ranking, list[Sized]], Order, Sized]:
    """(evaluated sizes of each ranking, the best ranking, its smallest stable circuit)."""
    grid = size_grid(split.anatomy.graph.edge_count, settings.sizes)
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


def smallest_held(split: Split, circuits: list[Tensor], settings: Settings, watch: Watch) -> Sized | None:
    """The smallest of some circuits that validation prompts keep in the band."""
    ordered = sorted(circuits, key=lambda edges: int(edges.sum()))
    for done, edges in enumerate(ordered):
        watch("learned circuits that hold", done, len(ordered))
        found = _evaluated(split, edges)
        if settings.reached(found.faithfulness):
            return found
    return None


def delete(
    train: Split, validation: Split, points: list[Sized], best: Sized, settings: Settings, watch: Watch
) -> Sized:
    """A smaller circuit by deletion, or `best`: the smallest stable one of a ranking (`points`), or a learned one."""
    start, ranked = best, points[stable(points, settings)]
    if best is ranked:
        start = next((point for point in points if point.size >= _LARGER * ranked.size), points[-1])
    found = shortest(validation, delete_blocks(train, start.edges, settings, watch), settings, watch)
    return min(best, found, key=lambda sized: sized.size)


def delete_blocks(train: Split, start: Tensor, settings: Settings, watch: Watch) -> list[Tensor]:
    """Delete edges while train prompts stay in the band: the weakest first, a block that fails in halves.

    The weakest by `attribute_circuit` at the beginning of each stage.

    The band opens in stages, or the first large blocks would use up all that may be lost. Returns the circuits on the
    way, largest first. In the last stage each edge has been tried alone, unless `settings.deletions` ran out.
    """
    path, done = [start], 0
    reached = train.faithfulness(start)
    first = max(settings.target, min(reached, 2 - reached))  # the band has two sides
    for stage, (share, parts) in enumerate(_STAGES, 1):
        stricter = replace(settings, target=first - share * (first - settings.target))
        weakest = _weakest_first(train, path[-1])
        blocks = list(weakest.split(max(1, len(weakest) // 8)))
        smallest = len(weakest) // parts if parts else 1
        while blocks and done < stage * settings.deletions // len(_STAGES):
            watch("deletion of edges", done, settings.deletions)
            block = blocks.pop(0)
            without = path[-1].flatten().clone()
            block = block[without[block]]  # pruning may have taken some along
            if not len(block):
                continue
            without[block] = False
            candidate = train.anatomy.graph.prune(without.view_as(start))
            done += 1
            if stricter.reached(train.faithfulness(candidate)):
                path.append(candidate)
            elif len(block) > max(1, smallest):
                blocks[:0] = block.split((len(block) + 1) // 2)
    return path


def _weakest_first(train: Split, circuit: Tensor) -> Tensor:
    """The edges of a circuit (flat indices) by the predicted change of the metric without each of them."""

    def score(group: Group) -> Tensor:
        found = attribute_circuit(train.anatomy, group.clean, group.corrupted, circuit, group.prompts.score)
        return len(group.prompts) * found.double().cpu()

    scores = torch.stack([score(group) for group in train.groups]).sum(0).abs().flatten()
    edges = circuit.flatten().nonzero()[:, 0]
    return edges[scores[edges].argsort(stable=True)]


def shortest(split: Split, path: list[Tensor], settings: Settings, watch: Watch) -> Sized:
    """The last circuit of a path of deletions that validation prompts keep in the band, by bisection."""
    found = _evaluated(split, path[0])
    low, high = 0, len(path)
    while high - low > 1:
        watch("deletions that hold", low, len(path))
        middle = (low + high) // 2
        candidate = _evaluated(split, path[middle])
        if settings.reached(candidate.faithfulness):
            low, found = middle, candidate
        else:
            high = middle
    return found


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
    inside = [row.edges for row in rows if settings.reached(row.faithfulness)]
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
        clean, corrupted = cast(Tensor, group.clean.patterns), cast(Tensor, group.corrupted.patterns)
        is_open = ((clean != 0) | (corrupted != 0)).cpu()  # [L, B, H, S, P + S]
        is_open &= _may_differ(group.prompts)[None, :, None, -is_open.shape[3] :, None]
        visible += int(is_open.sum())
        candidates.append(is_open & heads[:, None, :, None, None])
        strengths.append(_message_strength(group.prompts, scores, is_open))
    ranked = torch.cat([s[c] for s, c in zip(strengths, candidates, strict=True)]).sort(descending=True).values

    def masks(count: int) -> list[Tensor]:
        limit = ranked[count - 1] if count else torch.inf
        return [c & (s >= limit) for s, c in zip(strengths, candidates, strict=True)]

    low, high = 0, len(ranked)  # `high` is in the band: with all messages the circuit is the one that was chosen
    for done in range(12):
        middle = _between(low, high)
        if middle is None:
            break
        watch("attention messages", done, 12)
        inside = settings.reached(split.faithfulness(edges, masks(middle)))
        low, high = (low, middle) if inside else (middle, high)
    kept = sum(int(mask.sum()) for mask in masks(high)) if high else 0
    return Messages(kept / len(split), visible / len(split))


def _may_differ(prompts: Prompts) -> Tensor:
    """The positions from the first differing token on, bool [B, length]."""
    return (prompts.clean != prompts.corrupted).cpu().cummax(1).values


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
