"""What a circuit is worth: the same numbers for its complement, for random circuits and for models that are broken.

With enough edges to choose from, some circuit reaches any faithfulness, even in a model with random weights. A circuit
says something about a model if random ones of its size do not do it, if the rest of the model does not, and if a
broken model needs more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from attnprune.circuit.model.adapters import Anatomy
from attnprune.circuit.model.graph import Graph
from attnprune.circuit.result import ControlModel, RandomCircuits, Templates
from attnprune.circuit.search.cache import Cache
from attnprune.circuit.search.ranking import eap_ig_orders, score_edges
from attnprune.circuit.search.sizes import bisect, circuit_of_size, evaluate_sizes, size_grid, stable
from attnprune.circuit.search.splits import Settings, Split, Watch
from attnprune.circuit.tasks import Task, accuracy, check_ability
from attnprune.errors import AttnPruneError


def random_circuits(test: Split, size: int, draws: int, seed: int, watch: Watch) -> RandomCircuits:
    """Random edges, as many as it takes until `size` of them are no dangling parts."""
    graph = test.anatomy.graph
    edges = graph.mask().flatten().nonzero()[:, 0]
    generator = torch.Generator().manual_seed(seed)
    found = []
    for done in range(draws):
        watch("random circuits", done, draws)
        shuffled = edges[torch.randperm(len(edges), generator=generator)]
        found.append(test.faithfulness(circuit_of_size(graph, shuffled, size)))
    return RandomCircuits(draws=draws, faithfulness=sum(found) / draws, low=min(found), high=max(found))


def template_agreement(graph: Graph, scores: dict[int, Tensor], size: int) -> Templates:
    """Jaccard indices of the circuits of one size that the scores [U, V] of each template give."""
    circuits = []
    for score in scores.values():
        order, _ = eap_ig_orders(graph, score)
        circuits.append(circuit_of_size(graph, order.edges, size))
    matrix = [[jaccard(one, other) for other in circuits] for one in circuits]
    pairs = [matrix[i][j] for i in range(len(circuits)) for j in range(i)]
    return Templates(templates=list(scores), jaccard=matrix, mean=sum(pairs) / len(pairs) if pairs else None)


def jaccard(one: Tensor, other: Tensor) -> float:
    """Shared / all edges of two circuits; 1 for two empty ones."""
    union = int((one | other).sum())
    return int((one & other).sum()) / union if union else 1.0


def broken_model(
    anatomy: Anatomy, task: Task, key: str, size: int, gap: float, settings: Settings, watch: Watch, cache: Cache
) -> ControlModel:
    """Search a model as it is now, by EAP-IG alone and with fewer sizes; bisected if the model still does the task.

    `size`: of the circuit to compare with; `gap`: clean - corrupted of the intact model.
    """

    def told(what: str, done: int, total: int) -> None:
        watch(f"{key.rpartition(' / ')[2]}: {what}", done, total)

    splits = [
        Split(anatomy, getattr(task, part), f"{key} {part}", cache, settings.batch_size, to_rank=part == "train")
        for part in ("train", "validation", "test")
    ]
    train, validation, test = splits
    scores = score_edges(train, 4, told, cache)
    train.free()
    order, signed = eap_ig_orders(anatomy.graph, scores.edges)
    grid = size_grid(anatomy.graph.edge_count, settings.control_sizes)
    points = evaluate_sizes(validation, order, grid, told)
    reached = [point.metric.mean().item() for point in (*points, *evaluate_sizes(validation, signed, grid, told))]
    clean, corrupted = test.clean, test.corrupted
    try:
        check_ability(task.name, task.metric, clean, corrupted)
    except AttnPruneError:
        able = False
    else:
        able, points = True, bisect(validation, order, points, settings, told)  # as the intact model's
    smallest = points[stable(points, settings)].size
    return ControlModel(
        accuracy=accuracy(clean),
        clean=clean.mean().item(),
        corrupted=corrupted.mean().item(),
        able=able,
        edges=None if smallest == anatomy.graph.edge_count else smallest,
        faithfulness=validation.faithfulness(circuit_of_size(anatomy.graph, order.edges, size)),
        recovered=(max(reached) - validation.corrupted.mean().item()) / gap,
    )


@contextmanager
def random_weights(anatomy: Anatomy, seed: int) -> Iterator[None]:
    """All matrices are Gaussian with their own mean and spread inside the block; vectors (norms, biases) stay."""
    generator = torch.Generator().manual_seed(seed)
    matrices = [parameter for parameter in anatomy.model.parameters() if parameter.ndim > 1]

    def change(matrix: Tensor) -> Tensor:
        drawn = torch.randn(matrix.shape, generator=generator).to(matrix)
        return drawn * matrix.std() + matrix.mean()

    with _changed(matrices, [change] * len(matrices)):
        yield


@contextmanager
def shuffled_gates(anatomy: Anatomy, seed: int) -> Iterator[None]:
    """The gate biases of all heads change places inside the block."""
    gates: list[Any] = [block.gate for block in anatomy.blocks]
    biases: list[Tensor] = [gate.bias for gate in gates]
    mixed = torch.cat([bias.detach() for bias in biases])
    mixed = mixed[torch.randperm(len(mixed), generator=torch.Generator().manual_seed(seed)).to(mixed.device)]
    parts = mixed.split([len(bias) for bias in biases])
    with _changed(biases, [lambda _, part=part: part for part in parts]):
        yield


@contextmanager
def _changed(tensors: Sequence[Tensor], changes: Sequence[Callable[[Tensor], Tensor]]) -> Iterator[None]:
    saved = [tensor.detach().clone() for tensor in tensors]
    try:
        with torch.no_grad():
            for tensor, change in zip(tensors, changes, strict=True):
                tensor.copy_(change(tensor))
        yield
    finally:
        with torch.no_grad():
            for tensor, before in zip(tensors, saved, strict=True):
                tensor.copy_(before)
