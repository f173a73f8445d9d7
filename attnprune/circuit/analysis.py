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
from attnprune.circuit.result import TOP_EDGES, Edge, Evaluation, GraphFacts, ModelCircuit, Ranking, is_reached
from attnprune.circuit.search.cache import Cache, check_same, digest
from attnprune.circuit.search.counts import Messages, counts_of, curve_of, needed_messages
from attnprune.circuit.search.deletion import delete
from attnprune.circuit.search.masks import learn_circuits
from attnprune.circuit.search.ranking import Order, Scores, rank, score_edges
from attnprune.circuit.search.sizes import Sized, search_sizes, smallest_held
from attnprune.circuit.search.splits import (
    Settings,
    Split,
    Watch,
    faithfulness_bounds,
    faithfulness_interval,
    pattern_visible,
)
from attnprune.circuit.search.subject import Subject
from attnprune.circuit.tasks import Task, accuracy, check_ability
from attnprune.circuit.worth import ControlModel, Controls
from attnprune.errors import AttnPruneError

SMALL_GRAPH_STEPS = 64  # most points of EAP-IG where they cost nothing


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
        train, validation, test = (
            subject.split(part, to_rank=part == "train", by_template=part == "train")
            for part in ("train", "validation", "test")
        )
        told("runs of the model", 0, 1)
        _check(subject, validation, test, name)
        is_small = anatomy.graph.edge_count <= settings.all_edges
        steps = SMALL_GRAPH_STEPS if is_small else settings.max_steps
        scores = score_edges(train, steps, told, cache)
        orders = rank(train, scores, settings, told, cache)
        train.free()
        curves, order, ranked = search_sizes(validation, orders, settings, told)
        learned = None
        if settings.mask_steps:
            learned = _learned(subject, train, validation, order, ranked)
        chosen = learned or ranked
        if settings.deletions:
            again = subject.split("train", name="train, all")
            chosen = delete(again, validation, curves[order.name], chosen, settings, told)
            again.free()
        messages = _messages(validation, chosen, scores, settings, told, cache, label)
        validation.free()
        counted = published(subject) if settings.procedure == "published" else None
        told("test prompts", 0, 1)
        report = evaluation(test, chosen.edges, settings.seed)
        found = _controls(subject, test, chosen, ranked, scores) if with_controls else Controls()
        test.free()
        if with_controls:
            gap = (validation.clean.mean() - validation.corrupted.mean()).item()
            kinds = ["random_weights", *(["shuffled_gates"] if sparse else [])]
            broken: dict[str, Any] = {kind: _broken(kind, subject, ranked.size, gap) for kind in kinds}
            floor = nonsense_control(subject, gap, steps, ranked.size, chosen.size, report.lower)
            found = found.model_copy(update=broken | {"nonsense": floor})
    facts = _model_facts(name, sparse, anatomy, test)
    kept, best = _edges(anatomy, order, chosen.edges)
    heads, mlps = anatomy.graph.touched(chosen.edges)
    result = ModelCircuit(
        **facts,
        attribution=scores.facts,
        curves=[curve_of(anatomy.graph, name, points, settings) for name, points in curves.items()],
        ranking=order.name,
        ranked=counts_of(anatomy.graph, ranked.edges),
        learned=learned and counts_of(anatomy.graph, learned.edges),
        counts=counts_of(anatomy.graph, chosen.edges, messages),
        heads=[f"a{layer}.h{head}" for layer, head in heads.nonzero().tolist()],
        mlps=[f"m{layer}" for layer in mlps.nonzero()[:, 0].tolist()],
        edges=kept,
        top_edges=best,
        validation_faithfulness=chosen.faithfulness,
        test=report,
        reached=is_reached(settings.band, chosen.faithfulness, report),
        published=counted,
        controls=found,
        seconds=round(time.monotonic() - started, 1),
    )
    return Analysis(result, anatomy, chosen.edges, scores.edges, curves, validation, test)


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


def _learned(subject: Subject, train: Split, validation: Split, order: Order, ranked: Sized) -> Sized | None:
    """The smallest learned circuit, if validation prompts hold one that is smaller than the ranked one."""
    settings = subject.settings
    more = subject.split("more" if subject.task.more else "train", name="more")
    gap = (train.clean.mean() - train.corrupted.mean()).item()
    if gap <= 0:  # no behaviour to keep on the train prompts
        return None
    circuits = learn_circuits(more, order.edges, ranked.size, gap, settings, subject.told, subject.cache)
    smaller = [edges for edges in circuits if int(edges.sum()) < ranked.size]
    return smallest_held(validation, smaller, settings, subject.told)


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
