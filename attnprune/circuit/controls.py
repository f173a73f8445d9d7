"""What a circuit is worth: the same numbers for its complement, for random circuits and for models that are broken.

With enough edges to choose from, some circuit reaches any faithfulness, even in a model with random weights. A circuit
says something about a model if random ones of its size do not do it, if the rest of the model does not, and if a
broken model needs more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from attnprune.circuit.model.adapters import Anatomy
from attnprune.circuit.model.graph import Graph
from attnprune.circuit.result import MARGIN
from attnprune.circuit.search.ranking import eap_ig_orders, score_edges
from attnprune.circuit.search.sizes import bisect, circuit_of_size, evaluate_sizes, size_grid, stable
from attnprune.circuit.search.splits import Split, Watch
from attnprune.circuit.search.subject import Subject
from attnprune.circuit.tasks import accuracy, check_ability
from attnprune.circuit.worth import KINDS, SHARES, ControlModel, RandomCircuits, Stress, Templates, Trial
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


def stress(subject: Subject, circuit: Tensor) -> Stress:
    """The circuit, bool [U, V], on test prompts with some or all of the other edges ablated, in three ways."""
    graph, settings = subject.anatomy.graph, subject.settings
    generator = torch.Generator().manual_seed(settings.seed)
    trials = []
    for kind in KINDS:
        test = subject.split("test", ablate=kind)
        for share in SHARES:
            subject.told(f"stress, {kind}", SHARES.index(share), len(SHARES))
            found = []
            for _ in range(settings.trials if share < 1 else 1):
                drawn = torch.rand(circuit.shape, generator=generator) >= share
                found.append(test.faithfulness(graph.prune(circuit | drawn)))
            if not test.clean.mean() > test.corrupted.mean():
                found = [math.nan]
            mean = sum(found) / len(found)
            trials.append(
                Trial(ablation=kind, share=share, draws=len(found), faithfulness=mean, low=min(found), high=max(found))
            )
        test.free()
    measured = [trial.faithfulness for trial in trials if trial.faithfulness is not None]
    low, high = settings.band
    return Stress(
        trials=trials,
        worst=max(measured, key=lambda value: abs(1 - value), default=None),
        holds=all(low - MARGIN <= value <= high + MARGIN for value in measured),
    )


def broken_model(subject: Subject, size: int, gap: float) -> ControlModel:
    """Search a model as it is now, by EAP-IG alone and with fewer sizes; bisected if the model still does the task.

    `size`: of the circuit to compare with; `gap`: clean - corrupted of the intact model.
    """
    anatomy, settings, task = subject.anatomy, subject.settings, subject.task

    def told(what: str, done: int, total: int) -> None:
        subject.watch(f"{subject.key.rpartition(' / ')[2]}: {what}", done, total)

    train, validation, test = (subject.split(part, to_rank=part == "train") for part in ("train", "validation", "test"))
    scores = score_edges(train, 4, told, subject.cache)
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
