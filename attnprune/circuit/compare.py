"""From one or two models and a task to a result: the search and the controls of each, and the two side by side."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from attnprune.circuit import controls, patching
from attnprune.circuit.adapters import Anatomy, anatomy_of
from attnprune.circuit.cache import Cache, check_same, digest
from attnprune.circuit.masks import learn_circuits
from attnprune.circuit.ranking import Order, Scores, rank, score_edges
from attnprune.circuit.result import (
    TOP_EDGES,
    CircuitResult,
    Compare,
    ControlModel,
    Controls,
    Edge,
    Evaluation,
    Example,
    GraphFacts,
    Interval,
    Method,
    ModelCircuit,
    Ranking,
    Ratio,
    TaskFacts,
)
from attnprune.circuit.search import (
    Messages,
    Sized,
    count_nodes,
    counts_of,
    curve_of,
    delete,
    needed_messages,
    search_sizes,
    smallest_held,
)
from attnprune.circuit.splits import (
    BOOTSTRAP,
    Settings,
    Split,
    Watch,
    faithfulness_interval,
    pattern_visible,
    resamples,
)
from attnprune.circuit.tasks import Task, accuracy, check_ability
from attnprune.circuit.tasks.prompts import NO_TOKEN, Prompts

MAX_ACCURACY_GAP = 0.1
MAX_METRIC_RATIO = 2.0
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


class _Progress:
    """The models' names in front of what is going on."""

    def __init__(self, watch: Watch, label: str):
        self._watch, self._label = watch, label

    def __call__(self, what: str, done: int, total: int) -> None:
        self._watch(f"{self._label}: {what}", done, total)


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
    told = _Progress(watch, label)
    with pattern_visible(anatomy):
        train, validation, test = (
            Split(
                anatomy, getattr(task, part), f"{label} {part}", cache, settings.batch_size,
                to_rank=part == "train", by_template=part == "train",
            )
            for part in ("train", "validation", "test")
        )  # fmt: skip
        told("runs of the model", 0, 1)
        _check(validation, test, name, task, label, cache)
        is_small = anatomy.graph.edge_count <= settings.all_edges
        scores = score_edges(train, SMALL_GRAPH_STEPS if is_small else settings.max_steps, told, cache)
        orders = rank(train, scores, settings, told, cache)
        train.free()
        curves, order, ranked = search_sizes(validation, orders, settings, told)
        learned = None
        if settings.mask_steps:
            learned = _learned(task, label, train, validation, order, ranked, settings, told, cache)
        chosen = learned or ranked
        if settings.deletions:
            again = Split(anatomy, task.train, f"{label} train, all", cache, settings.batch_size)
            chosen = delete(again, validation, curves[order.name], chosen, settings, told)
            again.free()
        messages = _messages(validation, chosen, scores, settings, told, cache, label)
        validation.free()
        told("test prompts", 0, 1)
        report = _evaluation(test, chosen.edges, settings)
        found = _controls(test, chosen, ranked, scores, settings, told) if with_controls else Controls()
        test.free()
        if with_controls:
            gap = (validation.clean.mean() - validation.corrupted.mean()).item()
            found = found.model_copy(
                update={
                    kind: _broken(kind, anatomy, task, label, ranked.size, gap, settings, told, cache)
                    for kind in (["random_weights", "shuffled_gates"] if sparse else ["random_weights"])
                }
            )
    facts = _model_facts(name, sparse, anatomy, test)
    kept, best = _edges(anatomy, order, chosen.edges)
    heads, mlps = anatomy.graph.touched(chosen.edges)
    low, high = settings.band
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
        reached=report.faithfulness.high >= low and report.faithfulness.low <= high,
        controls=found,
        seconds=round(time.monotonic() - started, 1),
    )
    return Analysis(result, anatomy, chosen.edges, scores.edges, curves, validation, test)


def _check(validation: Split, test: Split, name: str, task: Task, label: str, cache: Cache) -> None:
    """Can the model do the task, do its parts add up, and is it the one the cache is about?"""
    group = validation.groups[0]
    check_same(cache, f"{label} first clean scores", group.prompts.score(group.clean.logits))
    for split in (validation, test):
        check_ability(f"{name}: {task.name}", task.metric, split.clean, split.corrupted)
    test.free()
    patching.self_check(validation.anatomy, group.clean, group.corrupted)


def _learned(
    task: Task, label: str, train: Split, validation: Split, order: Order, ranked: Sized, settings: Settings,
    watch: Watch, cache: Cache,
) -> Sized | None:  # fmt: skip
    """The smallest learned circuit, if validation prompts hold one that is smaller than the ranked one."""
    more = Split(train.anatomy, task.more or task.train, f"{label} more", cache, settings.batch_size)
    gap = (train.clean.mean() - train.corrupted.mean()).item()
    if gap <= 0:  # no behaviour to keep on the train prompts
        return None
    circuits = learn_circuits(more, order.edges, ranked.size, gap, settings, watch, cache)
    smaller = [edges for edges in circuits if int(edges.sum()) < ranked.size]
    return smallest_held(validation, smaller, settings, watch)


def _messages(
    validation: Split, chosen: Sized, scores: Scores, settings: Settings, watch: Watch, cache: Cache, label: str
) -> Messages:
    def compute() -> list[float]:
        return list(needed_messages(validation, chosen.edges, scores.messages, settings, watch))

    return Messages(*cache.numbers(f"{label} messages {settings.target} {digest(chosen.edges)}", compute))


def _evaluation(test: Split, edges: Tensor, settings: Settings) -> Evaluation:
    measured = test.measure(edges)
    gap = test.clean.mean() - test.corrupted.mean()
    each = 1 + (measured.metric - test.clean) / gap
    return Evaluation(
        faithfulness=faithfulness_interval(measured.metric, test.clean, test.corrupted, settings.seed),
        metric=measured.metric.mean().item(),
        accuracy=accuracy(measured.metric),
        kl=measured.kl.mean().item(),
        quartiles=each.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist(),
    )


def _controls(test: Split, chosen: Sized, ranked: Sized, scores: Scores, settings: Settings, watch: Watch) -> Controls:
    graph = test.anatomy.graph
    return Controls(
        complement=test.faithfulness(graph.mask() & ~chosen.edges),
        random=controls.random_circuits(test, chosen.size, settings.draws, settings.seed, watch),
        templates=controls.template_agreement(graph, scores.templates, ranked.size),
    )


def _broken(
    kind: str, anatomy: Anatomy, task: Task, label: str, size: int, gap: float, settings: Settings, watch: Watch,
    cache: Cache,
) -> ControlModel:  # fmt: skip
    """A control that changes the model itself for a while."""
    change = {"random_weights": controls.random_weights, "shuffled_gates": controls.shuffled_gates}[kind]
    key = f"{label} / {kind.replace('_', ' ')}"
    with change(anatomy, settings.seed):
        return controls.broken_model(anatomy, task, key, size, gap, settings, watch, cache)


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


def compare(first: Analysis, second: Analysis, settings: Settings) -> Compare:
    """Two models of one graph on the same prompts."""
    one, other = first.model, second.model
    ratios = _size_ratios(first, second, settings)
    transfer = []
    for circuit, host in ((first, second), (second, first)):
        with pattern_visible(host.anatomy):
            transfer.append(host.test.faithfulness(circuit.edges))
            host.test.free()
    reasons = parity(one, other)
    return Compare(
        comparable=not reasons,
        reasons=reasons,
        heads=Ratio(value=_ratio(other.counts.heads, one.counts.heads), ranked=ratios["heads"]),
        mlps=Ratio(value=_ratio(other.counts.mlps, one.counts.mlps), ranked=ratios["mlps"]),
        edges=Ratio(value=_ratio(other.counts.edges, one.counts.edges), ranked=ratios["edges"]),
        messages=Ratio(value=_ratio(other.counts.messages, one.counts.messages), ranked=None),
        first_in_second=transfer[0],
        second_in_first=transfer[1],
        jaccard=controls.jaccard(first.edges, second.edges),
    )


def parity(one: ModelCircuit, other: ModelCircuit) -> list[str]:
    """Why the circuits of two models cannot be compared: they do not behave alike, or one was not found."""
    reasons = []
    if abs(one.accuracy - other.accuracy) > MAX_ACCURACY_GAP:
        reasons.append(f"accuracy {one.accuracy:.2f} and {other.accuracy:.2f}: more than {MAX_ACCURACY_GAP} apart")
    gaps = [model.clean - model.corrupted for model in (one, other)]
    if not max(gaps) <= MAX_METRIC_RATIO * min(gaps):
        reasons.append(f"metric gap {gaps[0]:.2f} and {gaps[1]:.2f}: more than a factor of {MAX_METRIC_RATIO:g} apart")
    reasons += [
        f"{model.name}: its circuit misses the target on test prompts" for model in (one, other) if not model.reached
    ]
    return reasons


def _ratio(over: float | None, under: float | None) -> float | None:
    return over / under if over is not None and under else None


def _size_ratios(first: Analysis, second: Analysis, settings: Settings) -> dict[str, Interval | None]:
    """Ratios of the sizes found by ranking. In each resample both models get the same prompts and all their evaluated
    sizes are judged again, so the interval holds the choice of size, and of the ranking."""
    rows = resamples(len(first.validation), settings.seed)
    sizes = [_resampled_sizes(analysis, rows, settings) for analysis in (first, second)]
    point = [_resampled_sizes(analysis, torch.arange(rows.shape[1])[None], settings)[0] for analysis in (first, second)]
    found: dict[str, Interval | None] = {}
    for column, name in enumerate(("heads", "mlps", "edges")):
        drawn = sizes[1][:, column] / sizes[0][:, column]
        if not bool(drawn.isfinite().all()) or not float(point[0][column]):
            found[name] = None
            continue
        low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
        found[name] = Interval(value=float(point[1][column] / point[0][column]), low=low, high=high)
    return found


def _resampled_sizes(analysis: Analysis, rows: Tensor, settings: Settings) -> Tensor:
    """(heads, MLPs, edges) of the smallest stable circuit in each resample, [resamples, 3]."""
    clean, corrupted = (x.double()[rows].mean(1) for x in (analysis.validation.clean, analysis.validation.corrupted))
    low, high = settings.band
    best: Tensor | None = None
    for points in analysis.curves.values():
        metric = torch.stack([point.metric.double()[rows].mean(1) for point in points])  # [sizes, resamples]
        faithfulness = (metric - corrupted) / (clean - corrupted)
        inside = (faithfulness >= low) & (faithfulness <= high)
        inside[-1] = True  # the whole model
        index = inside.flip(0).long().cumprod(0).sum(0)  # so many of the largest in a row are inside
        nodes = [(*count_nodes(analysis.anatomy.graph, point.edges), point.size) for point in points]
        sizes = torch.tensor(nodes, dtype=torch.double)[len(points) - index]
        best = sizes if best is None else torch.where((sizes[:, 2] < best[:, 2])[:, None], sizes, best)
    assert best is not None
    return best


def task_facts(task: Task, tokenizer: Any, seed: int) -> TaskFacts:
    """The task for the result."""
    counts = {part: sum(map(len, getattr(task, part))) for part in ("train", "more", "validation", "test")}
    first = task.test[0]
    return TaskFacts(
        name=task.name, metric=task.metric, templates=list(task.templates), fingerprint=task.fingerprint, seed=seed,
        **counts, lengths=[task.test[0].length, task.test[-1].length],
        example=Example(
            clean=first.texts[0][0], corrupted=first.texts[0][1],
            answers=_tokens(first, "answers", tokenizer), wrong=_tokens(first, "wrong", tokenizer),
        ),
    )  # fmt: skip


def _tokens(prompts: Prompts, name: str, tokenizer: Any) -> list[str]:
    return [tokenizer.decode([token]) for token in getattr(prompts, name)[0].tolist() if token != NO_TOKEN]


def result_of(
    analyses: list[Analysis], facts: TaskFacts, settings: Settings, *, command: str, quick: bool, seconds: float,
    notes: list[str],
) -> CircuitResult:  # fmt: skip
    """Everything together; two analyses are compared."""
    return CircuitResult(
        command=command,
        task=facts,
        method=Method(
            ablation="corrupt", target=settings.target, band=list(settings.band), quick=quick,
            mask_steps=settings.mask_steps, refine=bool(settings.deletions), bootstrap=BOOTSTRAP,
        ),
        models=[analysis.model for analysis in analyses],
        compare=compare(analyses[0], analyses[1], settings) if len(analyses) == 2 else None,
        seconds=round(seconds, 1),
        notes=notes,
    )  # fmt: skip


def eap_ig_data(analysis: Analysis) -> dict[str, Any] | None:
    """Scores and circuit as the EAP-IG package stores a graph; None where heads share key/value heads."""
    graph = analysis.anatomy.graph
    if graph.heads != graph.kv_heads:
        return None
    heads, mlps = graph.touched(analysis.edges)
    nodes = {"input": {"in_graph": True}}
    for layer in range(graph.layers):
        nodes |= {f"a{layer}.h{head}": {"in_graph": bool(heads[layer, head])} for head in range(graph.heads)}
        nodes[f"m{layer}"] = {"in_graph": bool(mlps[layer])}
    nodes["logits"] = {"in_graph": True}
    edges = {
        graph.edge_name(source, destination): {
            "score": analysis.scores[source, destination].item(),
            "in_graph": bool(analysis.edges[source, destination]),
        }
        for source, destination in graph.mask().nonzero().tolist()
    }
    sizes = {"n_layers": graph.layers, "n_heads": graph.heads, "parallel_attn_mlp": graph.parallel}
    return {"cfg": sizes | {"d_model": analysis.anatomy.width}, "nodes": nodes, "edges": edges}
