"""From one model and a task to its part of the result: the search and the controls."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from attnprune.circuit import controls
from attnprune.circuit.model import patching
from attnprune.circuit.model.adapters import Anatomy, anatomy_of
from attnprune.circuit.nonsense import nonsense_control
from attnprune.circuit.published import published
from attnprune.circuit.result import (
    TOP_EDGES,
    Edge,
    Evaluation,
    GraphFacts,
    Level,
    LevelCircuit,
    ModelCircuit,
    Ranking,
    is_reached,
)
from attnprune.circuit.search.cache import Cache, check_same, digest
from attnprune.circuit.search.counts import Messages, counts_of, curve_of, needed_messages
from attnprune.circuit.search.ranking import Order, Scores, rank, score_edges
from attnprune.circuit.search.sizes import Sized
from attnprune.circuit.search.splits import (
    Settings,
    Split,
    Watch,
    faithfulness_bounds,
    faithfulness_interval,
    pattern_visible,
)
from attnprune.circuit.search.subject import Subject
from attnprune.circuit.search.whole import Found, search_all
from attnprune.circuit.tasks import Task, accuracy, check_ability
from attnprune.circuit.worth import ControlModel, Controls
from attnprune.errors import AttnPruneError

SMALL_GRAPH_STEPS = 64  # most points of EAP-IG where they cost nothing


@dataclass(frozen=True)
class Search:
    """What one search found on its levels, and the prompts that decided."""

    settings: Settings
    found: dict[Level, Found]
    levels: list[LevelCircuit]
    validation: Split


@dataclass(frozen=True)
class Analysis:
    """One model's part of the result, and what a comparison needs besides: its circuit, its sizes on validation."""

    model: ModelCircuit
    anatomy: Anatomy
    edges: Tensor
    scores: Tensor
    curves: dict[Ranking, list[Sized]]
    validation: Split
    test: Split
    searches: list[Search]

    def with_search(self, search: Search) -> Analysis:
        """With one more search of the same model."""
        levels = [*self.model.levels, *search.levels]
        return replace(
            self, model=self.model.model_copy(update={"levels": levels}), searches=[*self.searches, search]
        )  # fmt: skip


def search_again(subject: Subject, name: str) -> Search:
    """One more search of a model, with other prompts, and without controls. Raises what `analyse` raises."""
    with pattern_visible(subject.anatomy):
        train, validation, test = _splits(subject)
        _check(subject, validation, test, name)
        scores = score_edges(train, _steps(subject), subject.told, subject.cache)
        orders = rank(train, scores, subject.settings, subject.told, subject.cache)
        train.free()
        found = search_all(subject, train, validation, scores, orders)
        validation.free()
        return _searched(subject, validation, test, found)


def _splits(subject: Subject) -> tuple[Split, Split, Split]:
    return (
        subject.split("train", to_rank=True, by_template=True),
        subject.split("validation"),
        subject.split("test"),
    )


def _steps(subject: Subject) -> int:
    """Most points of EAP-IG."""
    is_small = subject.settings.is_small(subject.anatomy.graph.edge_count)
    return SMALL_GRAPH_STEPS if is_small else subject.settings.max_steps


def _searched(subject: Subject, validation: Split, test: Split, found: dict[Level, Found]) -> Search:
    """The circuits of all levels on the test prompts."""
    settings, levels = subject.settings, []
    for level, one in found.items():
        subject.told(f"test prompts, {level}", 0, 1)
        report = evaluation(test.on(one.units), one.chosen.edges, settings.seed)
        levels.append(
            LevelCircuit(
                level=level, seed=settings.seed, size=one.size(one.chosen), whole=one.whole,
                ranked=one.size(one.ranked),
                validation_faithfulness=one.chosen.faithfulness, faithfulness=report.faithfulness, lower=report.lower,
                upper=report.upper, reached=is_reached(settings.band, one.chosen.faithfulness, report),
            )
        )  # fmt: skip
    test.free()
    return Search(settings, found, levels, validation)


def analyse(
    model: Any,
    name: str,
    task: Task,
    settings: Settings,
    *,
    with_controls: bool,
    label: str,
    watch: Watch,
    cache: Cache,
) -> Analysis:
    """Search one model. `label` is its key in the cache.

    Raises:
        AttnPruneError: the model cannot do the task.
        UnsupportedModelError: no adapter for its family.
        SelfCheckError: the parts found do not add up to the model.
        InputError: the cache holds another model's results.
    """
    started = time.monotonic()
    anatomy = anatomy_of(model)
    sparse = anatomy.gated
    subject = Subject(anatomy, task, label, settings, watch, cache)
    told = subject.told
    with pattern_visible(anatomy):
        train, validation, test = _splits(subject)
        told("runs of the model", 0, 1)
        _check(subject, validation, test, name)
        scores = score_edges(train, _steps(subject), told, cache)
        orders = rank(train, scores, settings, told, cache)
        train.free()
        levels = search_all(subject, train, validation, scores, orders)
        edges = levels["edges"]
        ranked, chosen = edges.ranked, edges.chosen
        messages = _messages(validation, chosen, scores, settings, told, cache, label)
        validation.free()
        counted = published(subject) if settings.procedure == "published" else None
        told("test prompts", 0, 1)
        search = _searched(subject, validation, test, levels)
        report = evaluation(test, chosen.edges, settings.seed)
        found = _controls(subject, test, chosen, ranked, scores) if with_controls else Controls()
        test.free()
        if with_controls:
            gap = (validation.clean.mean() - validation.corrupted.mean()).item()
            kinds = ["random_weights", *(["shuffled_gates"] if sparse else [])]
            broken: dict[str, Any] = {kind: _broken(kind, subject, ranked.size, gap) for kind in kinds}
            floor = nonsense_control(subject, gap, _steps(subject), ranked.size, chosen.size, report.lower)
            found = found.model_copy(update=broken | {"nonsense": floor})
    facts = _model_facts(name, sparse, anatomy, test)
    kept, best = _edges(anatomy, edges.order, chosen.edges)
    heads, mlps = anatomy.graph.touched(chosen.edges)
    result = ModelCircuit(
        **facts,
        attribution=scores.facts,
        curves=[curve_of(anatomy.graph, name, points, settings) for name, points in edges.curves.items()],
        ranking=edges.order.name,
        ranked=counts_of(anatomy.graph, ranked.edges),
        learned=edges.learned and counts_of(anatomy.graph, edges.learned.edges),
        counts=counts_of(anatomy.graph, chosen.edges, messages),
        heads=[f"a{layer}.h{head}" for layer, head in heads.nonzero().tolist()],
        mlps=[f"m{layer}" for layer in mlps.nonzero()[:, 0].tolist()],
        edges=kept,
        top_edges=best,
        validation_faithfulness=chosen.faithfulness,
        test=report,
        reached=is_reached(settings.band, chosen.faithfulness, report),
        levels=search.levels,
        published=counted,
        controls=found,
        seconds=round(time.monotonic() - started, 1),
    )
    return Analysis(result, anatomy, chosen.edges, scores.edges, edges.curves, validation, test, [search])


def _check(subject: Subject, validation: Split, test: Split, name: str) -> None:
    """Can the model do the task, do its parts add up, and is it the one the cache is about?"""
    task = subject.task
    group = validation.groups[0]
    check_same(subject.cache, f"{subject.key} first clean scores", group.prompts.score(group.clean.logits))
    for split in (validation, test):
        check_ability(f"{name}: {task.name}", task.metric, split.clean, split.corrupted, task.chance)
    test.free()
    plain = subject.split("validation", ablate="corrupt")
    for prompts in plain.prompts:  # the prefix that a group shares has its own length
        group = plain.collected(prompts)
        patching.self_check(subject.anatomy, group.clean, group.corrupted)


def _messages(
    validation: Split, chosen: Sized, scores: Scores, settings: Settings, watch: Watch, cache: Cache, label: str
) -> Messages:
    def compute() -> list[float]:
        return list(needed_messages(validation, chosen.edges, scores.messages, settings, watch))

    return Messages(*cache.numbers(f"{label} messages {settings.target} {digest(chosen.edges)}", compute))


def evaluation(test: Split, edges: Tensor, seed: int) -> Evaluation:
    """A circuit, bool [U, V], on the test prompts.

    Raises:
        AttnPruneError: its metric is not finite.
    """
    measured = test.measure(edges)
    if not measured.metric.isfinite().all():
        raise AttnPruneError("the circuit found for validation prompts gives no finite metric on test prompts")
    gap = test.clean.mean() - test.corrupted.mean()
    each = 1 + (measured.metric - test.clean) / gap
    metrics = (measured.metric, test.clean, test.corrupted)
    lower, upper = faithfulness_bounds(*metrics, seed)
    return Evaluation(
        faithfulness=faithfulness_interval(*metrics, seed),
        lower=lower,
        upper=upper,
        each=torch.stack(metrics, 1).tolist(),
        metric=measured.metric.mean().item(),
        accuracy=accuracy(measured.metric),
        kl=measured.kl.mean().item(),
        quartiles=each.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist(),
    )


def _controls(subject: Subject, test: Split, chosen: Sized, ranked: Sized, scores: Scores) -> Controls:
    graph, settings = subject.anatomy.graph, subject.settings
    return Controls(
        complement=test.faithfulness(graph.mask() & ~chosen.edges),
        random=controls.random_circuits(test, chosen.size, settings.draws, settings.seed, subject.told),
        templates=controls.template_agreement(graph, scores.templates, ranked.size),
        stress=controls.stress(subject, chosen.edges),
    )


def _broken(kind: str, subject: Subject, size: int, gap: float) -> ControlModel:
    """A control that changes the model itself for a while."""
    change = {"random_weights": controls.random_weights, "shuffled_gates": controls.shuffled_gates}[kind]
    key = f"{subject.key} / {kind.replace('_', ' ')}"
    with change(subject.anatomy, subject.settings.seed):
        return controls.broken_model(replace(subject, key=key), size, gap)


def _model_facts(name: str, sparse: bool, anatomy: Anatomy, test: Split) -> dict[str, Any]:
    graph = anatomy.graph
    kind: Literal["dense", "sparse"] = "sparse" if sparse else "dense"
    return {
        "name": name,
        "kind": kind,
        "family": anatomy.model.config.model_type.removeprefix("attnprune_"),
        "graph": GraphFacts(
            layers=graph.layers, heads=graph.heads, kv_heads=graph.kv_heads, parallel=graph.parallel,
            sources=graph.sources, destinations=graph.destinations, edges=graph.edge_count,
        ),
        "accuracy": accuracy(test.clean),
        "clean": test.clean.mean().item(),
        "corrupted": test.corrupted.mean().item(),
    }  # fmt: skip


def _edges(anatomy: Anatomy, order: Order, circuit: Tensor) -> tuple[list[Edge], list[Edge]]:
    """(the circuit's edges, the best edges of the ranking), both in its order."""
    graph = anatomy.graph
    kept_in_order = order.edges[circuit.flatten()[order.edges]]

    def named(flat: Tensor) -> list[Edge]:
        made = []
        for index in flat.tolist():
            source, destination = divmod(index, graph.destinations)
            score, kept = order.scores[source, destination].item(), bool(circuit[source, destination])
            made.append(Edge(name=graph.edge_name(source, destination), score=score, kept=kept))
        return made

    return named(kept_in_order), named(order.edges[:TOP_EDGES])
