"""One or two models on the same prompts: the comparison and the whole result."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from attnprune.circuit import controls
from attnprune.circuit.analysis import Analysis
from attnprune.circuit.record import Interval
from attnprune.circuit.result import (
    NOT_CLEAR,
    CircuitResult,
    Compare,
    Example,
    LevelRatio,
    Method,
    ModelCircuit,
    PublishedRatios,
    Ratio,
    TaskFacts,
    doubts,
    not_shown,
)
from attnprune.circuit.search.counts import count_nodes
from attnprune.circuit.search.splits import BOOTSTRAP, Settings, pattern_visible, resamples
from attnprune.circuit.tasks import Task
from attnprune.circuit.tasks.prompts import NO_TOKEN, Prompts

MAX_ACCURACY_GAP = 0.1
MAX_METRIC_RATIO = 2.0


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
        levels=level_ratios(first, second),
        published=_published_ratios(one, other),
        first_in_second=transfer[0],
        second_in_first=transfer[1],
        jaccard=controls.jaccard(first.edges, second.edges),
    )


def parity(one: ModelCircuit, other: ModelCircuit) -> list[str]:
    """Why the circuits of two models cannot be compared: they do not behave alike, or one is not shown to be one."""
    reasons = []
    if abs(one.accuracy - other.accuracy) > MAX_ACCURACY_GAP:
        reasons.append(f"accuracy {one.accuracy:.2f} and {other.accuracy:.2f}: more than {MAX_ACCURACY_GAP} apart")
    gaps = [model.clean - model.corrupted for model in (one, other)]
    if not max(gaps) <= MAX_METRIC_RATIO * min(gaps):
        reasons.append(f"metric gap {gaps[0]:.2f} and {gaps[1]:.2f}: more than a factor of {MAX_METRIC_RATIO:g} apart")
    reasons += [not_shown(model.name) for model in (one, other) if not model.reached]
    return reasons + [
        f"{model.name}: its circuit is {NOT_CLEAR}" for model in (one, other) if NOT_CLEAR in doubts(model)
    ]


def level_ratios(first: Analysis, second: Analysis) -> list[LevelRatio]:
    """The ratio of sizes on every level, geometric mean over the searches, each of the same prompts for both models.

    A resample draws searches, and in each of them validation prompts; all evaluated circuits are judged again on these.
    """
    count = len(first.searches)
    seed = first.searches[0].settings.seed
    picks = torch.randint(count, (BOOTSTRAP, count), generator=torch.Generator().manual_seed(seed))
    ratios = []
    for level in first.searches[0].found:
        point, drawn = [], []
        for pair in zip(first.searches, second.searches, strict=True):
            chosen = [search.found[level].size(search.found[level].chosen) for search in pair]
            rows = resamples(len(pair[0].validation), pair[0].settings.seed)
            sizes = [search.found[level].resampled(search.validation, rows, search.settings) for search in pair]
            point.append(math.log(chosen[1] / chosen[0]) if all(chosen) else math.nan)
            drawn.append((sizes[1] / sizes[0]).log())
        means = torch.stack(drawn, 1).gather(1, picks).mean(1)
        value = sum(point) / count
        low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.double)).exp().tolist()
        known = math.isfinite(value) and bool(means.isfinite().all())
        ratios.append(
            LevelRatio(
                level=level, searches=count, value=math.exp(value) if math.isfinite(value) else None,
                low=low if known else None, high=high if known else None,
            )
        )  # fmt: skip
    return ratios


def _published_ratios(one: ModelCircuit, other: ModelCircuit) -> PublishedRatios | None:
    mine, theirs = one.published, other.published
    if mine is None or theirs is None:
        return None
    if mine.heads is None or theirs.heads is None:
        return PublishedRatios(heads=None, edges=None, token_edges=None)
    return PublishedRatios(
        heads=_ratio(theirs.heads, mine.heads), edges=_ratio(theirs.edges, mine.edges),
        token_edges=_ratio(theirs.token_edges, mine.token_edges),
    )  # fmt: skip


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
        chance=task.chance,
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
            ablation=settings.ablate, target=settings.target, band=list(settings.band), quick=quick,
            mask_steps=settings.mask_steps, refine=bool(settings.deletions), bootstrap=BOOTSTRAP,
        ),
        models=[analysis.model for analysis in analyses],
        compare=compare(analyses[0], analyses[1], settings) if len(analyses) == 2 else None,
        seconds=round(seconds, 1),
        notes=notes,
    )  # fmt: skip
