"""A search on one level: sizes by ranking, a learned mask, deletion; the same for edges, nodes and messages."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnprune.circuit.result import Level, Ranking
from attnprune.circuit.search.cache import digest
from attnprune.circuit.search.deletion import delete, grow
from attnprune.circuit.search.ranking import Order, Scores, exact_prompts, mean_nodes
from attnprune.circuit.search.sizes import Sized, learned_sizes, search_sizes, smallest_held
from attnprune.circuit.search.splits import Settings, Split
from attnprune.circuit.search.subject import Subject
from attnprune.circuit.search.units import Edges, Messages, Nodes, Units


@dataclass(frozen=True)
class Found:
    """What a search on one level found.

    Attributes:
        units: what its circuits are made of.
        curves: evaluated sizes of every ranking; order: the best one.
        ranked, learned, chosen: the smallest circuit by ranking, by a mask (None: none smaller held), in the end.
        masks: circuits of masks on their way; path: of the deletion.
        larger: the chosen circuit with 1, 2, 4, ... of the other units that would help it most.
        sizes: what counts as the size of every evaluated circuit, by its digest.
    """

    units: Units
    curves: dict[Ranking, list[Sized]]
    order: Order
    ranked: Sized
    masks: list[Sized]
    learned: Sized | None
    chosen: Sized
    path: list[Sized]
    larger: list[Sized]
    sizes: dict[str, float]

    @property
    def whole(self) -> float:
        """The size of the whole model."""
        return self.sizes[digest(self.units.mask())]

    def size(self, circuit: Sized) -> float:
        """What counts: nodes, edges, or messages per prompt."""
        return self.sizes[digest(circuit.edges)]

    def resampled(self, validation: Split, rows: Tensor, settings: Settings) -> Tensor:
        """Size, [resamples], of the circuit with the fewest units when all are judged again on rows of prompts."""
        clean, corrupted = (x.double()[rows].mean(1) for x in (validation.clean, validation.corrupted))
        low, high = settings.band
        fewest = torch.full((len(rows),), torch.inf, dtype=torch.double)
        sizes = fewest.clone()

        def holds(point: Sized) -> Tensor:
            faithfulness = (point.metric.double()[rows].mean(1) - corrupted) / (clean - corrupted)
            return (faithfulness >= low) & (faithfulness <= high)

        def take(point: Sized, where: Tensor) -> None:
            better = where & (point.size < fewest)
            fewest[better], sizes[better] = point.size, self.size(point)

        for chain in [*self.curves.values(), self.path]:
            stable = torch.ones(len(rows), dtype=torch.bool)
            for point in sorted(chain, key=lambda point: -point.size):
                stable &= holds(point)
                take(point, stable)
        for point in [*self.masks, *self.larger]:  # any that holds counts, as of masks in the search
            take(point, holds(point))
        return sizes


def search_level(
    subject: Subject, train: Split, validation: Split, orders: list[Order], units: Units, kind: str = ""
) -> Found:
    """The smallest circuit of these units. `kind` is what they are called."""
    settings, view = subject.settings, validation.on(units)

    def told(what: str, done: int, total: int) -> None:
        subject.told(f"{kind}, {what}" if kind else what, done, total)

    curves, order, ranked = search_sizes(view, orders, settings, told)
    masks: list[Sized] = []
    gap = (train.clean.mean() - train.corrupted.mean()).item()
    if settings.mask_steps and gap > 0:  # else there is no behaviour to keep on the train prompts
        more = subject.learning_split().on(units)
        masks = learned_sizes(more, view, order, ranked.size, gap, settings, told, subject.cache)
    learned = smallest_held(masks, ranked.size, settings)
    chosen, path, larger = learned or ranked, [], []
    if settings.deletions:
        again = subject.split("train", name="train, all").on(units)
        chosen, path = delete(again, view, curves[order.name], chosen, settings, told)
        larger = grow(again, view, chosen, told)
        again.free()
    every = [*(point for curve in curves.values() for point in curve), *masks, *path, chosen, *larger]
    sizes = {digest(point.edges): units.size(validation.groups, point.edges) for point in every}
    return Found(units, curves, order, ranked, masks, learned, chosen, path, larger, sizes)


def search_nodes(subject: Subject, train: Split, validation: Split, scores: Scores) -> Found:
    """Heads and MLPs: by EAP-IG over what they write, and by exact patching of each."""
    units = Nodes(subject.anatomy)
    exact = mean_nodes(train, exact_prompts(train, subject.settings), subject.told, subject.cache)
    orders = [_order("eap-ig abs", scores.edges.sum(1), units.mask()), _order("exact nodes", exact, units.mask())]
    return search_level(subject, train, validation, orders, units, "heads and MLPs")


def search_messages(subject: Subject, train: Split, validation: Split, scores: Scores) -> Found:
    """Attention messages: by EAP-IG, by size and by how much they support the metric."""
    units = Messages(subject.anatomy, train.prompts)
    effects = units.flat(scores.messages)
    signed = Order("eap-ig signed", effects.argsort(stable=True), effects)
    return search_level(
        subject, train, validation, [_order("eap-ig abs", effects, units.mask()), signed], units, "messages"
    )


def _order(name: Ranking, scores: Tensor, real: Tensor) -> Order:
    units = real.nonzero()[:, 0]
    return Order(name, units[scores[units].abs().argsort(descending=True, stable=True)], scores)


def search_all(
    subject: Subject, train: Split, validation: Split, scores: Scores, orders: list[Order]
) -> dict[Level, Found]:
    """All levels that the settings ask for; edges always."""
    found: dict[Level, Found] = {"edges": search_level(subject, train, validation, orders, Edges(subject.anatomy))}
    if subject.settings.levels:
        found["nodes"] = search_nodes(subject, train, validation, scores)
        found["messages"] = search_messages(subject, train, validation, scores)
    return found
