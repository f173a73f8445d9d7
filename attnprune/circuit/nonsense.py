"""The nonsense control: the whole search once more, for answers that mean nothing.

A learned mask may reach any loss on any labels, and with enough edges to choose from so may a ranking. So the search
runs with the same prompts and budget on a task that no circuit explains, and is asked for the change of the metric that
the model makes in the real one. Where it has to choose, it chooses in favour of the control: any evaluated size inside
the band counts, whatever larger ones do. As in any search, nothing is deleted from a circuit below half of the target.
"""

from __future__ import annotations

from torch import Tensor

from attnprune.circuit.search.deletion import delete_units, shortest
from attnprune.circuit.search.ranking import rank, score_edges
from attnprune.circuit.search.sizes import Sized, evaluate_sizes, learned_sizes, size_grid
from attnprune.circuit.search.splits import Settings, Split, faithfulness_bounds
from attnprune.circuit.search.subject import Subject
from attnprune.circuit.tasks import nonsense_task
from attnprune.circuit.worth import CLEARLY_BELOW, Nonsense


def nonsense_control(real: Subject, gap: float, steps: int, ranked: int, size: int, lower: float | None) -> Nonsense:
    """Search with answers that mean nothing.

    Args:
        real: what was searched.
        gap: clean minus corrupted metric of the model in the real task.
        steps: most points of EAP-IG.
        ranked, size: edges that the real search found by ranking and in the end.
        lower: lower bound of the real circuit on test prompts.
    """
    task = nonsense_task(real.task, real.settings.seed)
    subject = Subject(
        real.anatomy, task, f"{real.key} / nonsense", real.settings, real.watch, real.cache, gap
    )  # fmt: skip
    train, validation, test = (
        subject.split(part, to_rank=part == "train", by_template=part == "train")
        for part in ("train", "validation", "test")
    )
    scores = score_edges(train, steps, subject.told, subject.cache)
    orders = rank(train, scores, subject.settings, subject.told, subject.cache)
    train.free()
    grid = size_grid(subject.anatomy.graph.edge_count, subject.settings.sizes)
    curves = [evaluate_sizes(validation, order, grid, subject.told) for order in orders]
    tried = [point for curve in curves for point in curve]
    best = min(range(len(orders)), key=lambda i: min(_distance(point, subject.settings) for point in curves[i]))
    if subject.settings.mask_steps:
        how = (subject.settings, subject.told, subject.cache)
        tried += learned_sizes(subject.learning_split(), validation, orders[best], ranked, gap, *how)
    again = subject.split("train", name="train, all")
    if subject.settings.deletions:
        start = _nearest(tried, subject.settings)
        path = delete_units(again, start.edges, subject.settings, subject.told)
        tried += shortest(validation, path, subject.settings, subject.told)
    chosen = _nearest(tried, subject.settings)
    found = subject.settings.in_band(chosen.faithfulness)
    bounds = _bounds(test, chosen.edges, subject.settings.seed)
    floor = size <= CLEARLY_BELOW * chosen.size
    apart = lower is not None and bounds[1] < lower
    return Nonsense(
        edges=chosen.size if found else None, best=chosen.size, train=again.faithfulness(chosen.edges),
        validation=chosen.faithfulness, test=test.faithfulness(chosen.edges), lower=bounds[0], upper=bounds[1],
        clear=floor if found else apart,
    )  # fmt: skip


def _distance(point: Sized, settings: Settings) -> float:
    """How far a circuit is from the band; infinitely far, if what it computes is no number."""
    low, high = settings.band
    away = max(low - point.faithfulness, point.faithfulness - high, 0.0)
    return away if away == away else float("inf")


def _nearest(points: list[Sized], settings: Settings) -> Sized:
    """The circuit nearest to the band, the smallest of those inside."""
    return min(points, key=lambda point: (_distance(point, settings), point.size))


def _bounds(test: Split, edges: Tensor, seed: int) -> tuple[float, float]:
    return faithfulness_bounds(test.measure(edges).metric, test.clean, test.corrupted, seed)
