"""The smallest circuit of a model: edges are ranked in several ways, sizes are decided by exact patching alone.

Train prompts rank the edges, validation prompts decide the size, test prompts are left for the report. A size counts
as reached if its faithfulness lies in the band [target, 2 - target] and that of every larger evaluated size too: the
curve of faithfulness over size is not monotone, and the first size inside may be luck. The size found is then bisected.

From a circuit half as large again whole blocks of edges are then deleted, the weakest first, as long as train prompts
stay inside the band. So many choices fit the prompts they are made on: validation prompts decide how far to go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, cast, get_args

import torch
from torch import Tensor

from attnprune.circuit import patching
from attnprune.circuit.adapters import Anatomy, open_gates
from attnprune.circuit.attribution import attribute
from attnprune.circuit.cache import Cache, digest
from attnprune.circuit.graph import Graph
from attnprune.circuit.patching import Activations
from attnprune.circuit.result import Attribution, Counts, Curve, Flips, Interval, Point, Ranking
from attnprune.circuit.tasks import Prompts

Watch = Callable[[str, int, int], None]
"""Told what is going on, and how many of how many steps of it are done."""

RANKINGS = get_args(Ranking)
ROUNDING = 1e-4  # of a faithfulness
BOOTSTRAP = 1000
_SMALLEST_SHARE = 0.0005  # of all edges: where the sizes begin
_CLOSE = 1.02  # ratio of two sizes that bisection tells apart
_STAGES = (0.1, 0.3, 0.6, 1.0)  # of what may be lost: how far each stage of deletion may go
_LARGER = 1.5  # where deletion begins, relative to the circuit found by size


@dataclass(frozen=True)
class Settings:
    """How thorough a search is.

    Attributes:
        target: faithfulness to reach.
        sizes: evaluated sizes per ranking before bisection, and in broken control models.
        max_steps: most points of EAP-IG; from 4 on they double until its gap is below 5 %.
        all_edges: graphs of up to this many edges are scored exactly, edge by edge.
        candidates: edges of larger graphs that are.
        nodes: whether nodes are patched exactly also in a dense model.
        exact_prompts: most train prompts of exact scores in a larger graph.
        deletions: most evaluations of block deletion; 0 leaves it out.
        draws: random circuits.
        batch_size: prompts in one run.
    """

    target: float = 0.9
    sizes: int = 14
    control_sizes: int = 8
    max_steps: int = 16
    all_edges: int = 5000
    candidates: int = 500
    nodes: bool = True
    exact_prompts: int = 16
    deletions: int = 240
    draws: int = 20
    batch_size: int = 32
    seed: int = 0

    @property
    def band(self) -> tuple[float, float]:
        """Faithfulness of a circuit that reaches the target."""
        return self.target - ROUNDING, 2 - self.target + ROUNDING

    def reached(self, faithfulness: float) -> bool:
        """Whether it lies in the band."""
        return self.band[0] <= faithfulness <= self.band[1]


QUICK = {
    "sizes": 8, "control_sizes": 4, "max_steps": 4, "candidates": 0, "nodes": False, "exact_prompts": 4,
    "deletions": 0, "draws": 3,
}  # fmt: skip


class Measured(NamedTuple):
    """A circuit on the prompts of a split [N]: the task's metric, and KL(model || circuit) of the next token, nats."""

    metric: Tensor
    kl: Tensor


class Group(NamedTuple):
    """Prompts of one length that run together, and their runs."""

    prompts: Prompts
    clean: Activations
    corrupted: Activations


class Split:
    """The runs of one split of a task through one model; circuits are evaluated on it. Collected when first needed.

    `to_rank`: keep all of the clean runs, which scores need and evaluations do not. `by_template`: one template a run.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        batches: Sequence[Prompts],
        key: str,
        cache: Cache,
        batch_size: int,
        *,
        to_rank: bool = False,
        by_template: bool = False,
    ):
        self.anatomy, self.key = anatomy, key
        self._cache = cache
        self._to_rank = to_rank
        device = anatomy.model.device
        self.prompts = [part.to(device) for batch in batches for part in _parts(batch, batch_size, by_template)]
        self._groups: list[Group] = []

    def __len__(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def groups(self) -> list[Group]:
        """The prompts with their runs."""
        if not self._groups:
            self._groups = [self._collected(prompts) for prompts in self.prompts]
        return self._groups

    def _collected(self, prompts: Prompts) -> Group:
        clean, corrupted = patching.collect_pair(self.anatomy, prompts.clean, prompts.corrupted, 1)
        if not self._to_rank:
            clean = clean._replace(outputs=clean.outputs[:0].clone(), streams=clean.streams[:0].clone())
        return Group(prompts, clean, corrupted)

    def free(self) -> None:
        """Drop the runs; they are collected again when needed."""
        self._groups = []

    @property
    def clean(self) -> Tensor:
        """Metric [N] of the model itself."""
        return self._scored("clean", lambda group: group.clean.logits)

    @property
    def corrupted(self) -> Tensor:
        """Metric [N] on the corrupted prompts, by the answers of the clean ones."""
        return self._scored("corrupted", lambda group: group.corrupted.logits)

    def _scored(self, name: str, logits: Callable[[Group], Tensor]) -> Tensor:
        def compute() -> list[float]:
            return [x for group in self.groups for x in group.prompts.score(logits(group)).tolist()]

        return torch.tensor(self._cache.numbers(f"{self.key} {name}", compute))

    def measure(self, edges: Tensor, messages: Sequence[Tensor] | None = None) -> Measured:
        """Evaluate a circuit; `messages` has a mask [L, B, H, S, S] for each group."""

        def compute() -> list[list[float]]:
            parts = [
                _measured(self.anatomy, group, edges, mask) for group, mask in zip(self.groups, masks, strict=True)
            ]
            return [torch.cat(part).tolist() for part in zip(*parts, strict=True)]

        masks = [None] * len(self.prompts) if messages is None else list(messages)
        key = f"{self.key} {digest(edges, *(messages or ()))}"
        return Measured(*map(torch.tensor, self._cache.numbers(key, compute)))

    def faithfulness(self, edges: Tensor, messages: Sequence[Tensor] | None = None) -> float:
        """The ratio of means."""
        return ratio_of_means(self.measure(edges, messages).metric, self.clean, self.corrupted)


def _parts(batch: Prompts, size: int, by_template: bool) -> Iterable[Prompts]:
    groups = [torch.arange(len(batch))]
    if by_template:
        groups = [(batch.template == template).nonzero()[:, 0] for template in batch.template.unique()]
    return [batch.take(rows) for group in groups for rows in group.split(size)]


@torch.no_grad()
def _measured(anatomy: Anatomy, group: Group, edges: Tensor, messages: Tensor | None) -> tuple[Tensor, Tensor]:
    logits = patching.run_circuit(anatomy, group.clean, group.corrupted, edges, messages)
    full, own = (x[:, -1].float().log_softmax(-1) for x in (group.clean.logits, logits))
    return group.prompts.score(logits).cpu(), (full.exp() * (full - own)).sum(-1).clamp(min=0).cpu()


def ratio_of_means(circuit: Tensor, clean: Tensor, corrupted: Tensor) -> float:
    """Faithfulness of a circuit from metrics [N]; 0 where clean and corrupted prompts do not differ at all."""
    gap = (clean.double().mean() - corrupted.double().mean()).item()
    return (circuit.double().mean() - corrupted.double().mean()).item() / gap if gap else 0.0


def faithfulness_interval(circuit: Tensor, clean: Tensor, corrupted: Tensor, seed: int) -> Interval:
    """Faithfulness with its 95 % bootstrap interval over prompts."""
    rows = resamples(len(clean), seed)
    means = [x.double()[rows].mean(1) for x in (circuit, clean, corrupted)]
    gap = means[1] - means[2]
    drawn = torch.where(gap == 0, 0.0, (means[0] - means[2]) / gap)
    low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    return Interval(value=ratio_of_means(circuit, clean, corrupted), low=low, high=high)


def resamples(count: int, seed: int) -> Tensor:
    """Rows of bootstrap resamples, int64 [BOOTSTRAP, count]."""
    return torch.randint(count, (BOOTSTRAP, count), generator=torch.Generator().manual_seed(seed))


def pattern_visible(anatomy: Anatomy) -> AbstractContextManager[None]:
    """Inside the block the model shows its attention pattern: a dense one runs with open gates."""
    return nullcontext() if anatomy.gated else open_gates(anatomy.model)


# Rankings


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


def rank(train: Split, scores: Scores, sparse: bool, settings: Settings, watch: Watch, cache: Cache) -> list[Order]:
    """The rankings of a model. Exact ones cost more: those of nodes are made where gradients do not see the gates."""
    graph = train.anatomy.graph
    orders = eap_ig_orders(graph, scores.edges)
    small = graph.edge_count <= settings.all_edges
    if not (sparse or settings.nodes or small):
        return orders
    prompts = len(train) if small else settings.exact_prompts
    nodes = _mean_nodes(train, prompts, watch, cache)
    by_nodes = _by_nodes(graph, nodes)
    orders.append(_order(graph, "exact nodes", by_nodes, by_nodes, scores.edges.abs()))
    if small or settings.candidates:
        candidates = graph.mask() if small else _candidates(graph, orders, settings.candidates)
        effects = _mean_edges(train, candidates, prompts, watch, cache)
        strength = torch.where(candidates, effects.abs() + 1e-30, 0.0)
        orders.append(_order(graph, "exact edges", effects, strength, scores.edges.abs()))
    return orders


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


def _candidates(graph: Graph, orders: list[Order], count: int) -> Tensor:
    """The best edges of all rankings in turn."""
    mask = torch.zeros(graph.sources * graph.destinations, dtype=torch.bool)
    for place in range(count):
        if int(mask.sum()) >= count:
            break
        mask[[int(order.edges[place]) for order in orders]] = True
    return mask.view(graph.sources, graph.destinations)


def _some(train: Split, count: int) -> list[Group]:
    """Groups with the first prompts of each template, about `count` prompts in all."""
    each = max(1, -(-count // len(train.groups)))
    chosen = []
    for group in train.groups[:count]:
        rows = slice(None, each)
        clean, corrupted = group.clean.take(rows), group.corrupted.take(rows)
        chosen.append(Group(group.prompts.take(torch.arange(len(clean.ids))), clean, corrupted))
    return chosen


def _mean_nodes(train: Split, count: int, watch: Watch, cache: Cache) -> Tensor:
    """Mean exact effect [U] of corrupting each node."""

    def compute() -> dict[str, Tensor]:
        graph, groups = train.anatomy.graph, _some(train, count)
        layers = graph.layer_of_source(torch.arange(graph.sources))
        parts = []
        for layer in range(graph.layers):
            watch("exact effects of nodes", layer, graph.layers)
            nodes = (layers == layer).nonzero()[:, 0]
            parts.append(_mean(patching.node_effects, train.anatomy, groups, nodes))
        return {"effects": torch.cat(parts)}

    return cache.tensors(f"{train.key} nodes", compute)["effects"]


def _mean_edges(train: Split, candidates: Tensor, count: int, watch: Watch, cache: Cache) -> Tensor:
    """Mean exact effect [U, V] of corrupting each candidate edge."""
    graph = train.anatomy.graph
    edges = candidates.nonzero()
    layers = graph.layer_of_destination(edges[:, 1])
    effects = torch.zeros(graph.sources, graph.destinations)
    done = 0
    for layer in layers.unique().tolist():
        chosen = edges[layers == layer]
        watch("exact effects of edges", done, len(edges))
        found = cache.tensors(
            f"{train.key} edges {layer} {digest(chosen)}",
            lambda e=chosen: {"effects": _mean(patching.edge_effects, train.anatomy, _some(train, count), e)},
        )
        effects[chosen[:, 0], chosen[:, 1]] = found["effects"]
        done += len(chosen)
    return effects


def _mean(effects: Callable[..., Tensor], anatomy: Anatomy, groups: list[Group], what: Tensor) -> Tensor:
    """Mean over the prompts of all groups of exact effects [n, B]."""
    found = [effects(anatomy, g.clean, g.corrupted, what, g.prompts.score, pairs=64).cpu() for g in groups]
    return torch.cat(found, 1).float().mean(1)


# Sizes


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
        if high - low < 2 or high <= low * _CLOSE:
            return points
        watch(f"bisection by {order.name}", done, 12)
        middle = min(high - 1, max(low + 1, round((max(low, 1) * high) ** 0.5)))
        sized = _evaluated(split, circuit_of_size(split.anatomy.graph, order.edges, middle))
        if sized.size <= low:  # no circuits between: look in the upper part
            middle = (low + high + 1) // 2
            sized = _evaluated(split, circuit_of_size(split.anatomy.graph, order.edges, middle))
        if sized.size in (low, high):
            return points
        points = sorted([*points, sized], key=lambda point: point.size)
    return points


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
        if below < min(smallest(other).size for other in orders):  # it can still win
            curves[order.name] = bisect(split, order, curves[order.name], settings, watch)
    best = min(orders, key=lambda order: smallest(order).size)
    return curves, best, smallest(best)


def refine(
    train: Split, validation: Split, order: Order, points: list[Sized], settings: Settings, watch: Watch
) -> Sized:
    """A smaller circuit by deletion of edges, or the smallest stable one of a ranking (`points`) if that is smaller."""
    index = stable(points, settings)
    enough = [point for point in points[index:] if point.size >= _LARGER * points[index].size]
    path = delete_blocks(train, order, (enough or points[-1:])[0].edges, settings, watch)
    found = shortest(validation, path, settings, watch)
    return min(points[index], found, key=lambda sized: sized.size)


def delete_blocks(train: Split, order: Order, start: Tensor, settings: Settings, watch: Watch) -> list[Tensor]:
    """Delete edges while train prompts stay in the band: the weakest first, a block that fails in halves.

    The band opens in stages, or the first large blocks would use up all that may be lost. Returns the circuits on the
    way, largest first. In every stage each edge has been tried, unless its share of `settings.deletions` ran out.
    """
    path, done = [start], 0
    for stage, share in enumerate(_STAGES, 1):
        stricter = replace(settings, target=1 - share * (1 - settings.target))
        weakest = order.edges[path[-1].flatten()[order.edges]].flip(0)
        blocks = list(weakest.split(max(1, len(weakest) // 8)))
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
            elif len(block) > 1:
                blocks[:0] = block.split((len(block) + 1) // 2)
    return path


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
    of their EAP-IG score on train prompts of the same template. Found by bisection, so up to a few percent.
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
        if high - low < 2 or high <= low * _CLOSE:
            break
        watch("attention messages", done, 12)
        middle = min(high - 1, max(low + 1, round((max(low, 1) * high) ** 0.5)))
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
