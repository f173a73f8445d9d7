"""Circuit searches on the terminal: progress, tables, the curve as a picture. No torch."""

from __future__ import annotations

from contextlib import AbstractContextManager
from io import BytesIO
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from attnprune.circuit.result import (
    CircuitResult,
    Compare,
    Counts,
    Level,
    LevelCircuit,
    LevelRatio,
    ModelCircuit,
    Ratio,
    doubts,
)
from attnprune.circuit.worth import ControlModel, RandomCircuits
from attnprune.errors import printable
from attnprune.units import counted, duration, number, percent

OUTSIDE = {
    "corrupt": "corrupted activations",
    "mean": "mean activations",
    "zero": "nothing",
    "mixed": "corrupted, mean or no activations, for a third of the prompts each,",
}


class Watching(AbstractContextManager):
    """Shows what a search does: a bar with the time left on a terminal, else a line per stage."""

    def __init__(self, console: Console, *, live: bool, quiet: bool):
        self._console, self._quiet = console, quiet
        self._progress = None
        if live:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._progress = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
        self._stage: Any = None
        self._what = ""

    def __enter__(self) -> Watching:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        """`done` of `total` steps of this stage are over."""
        if self._progress is not None:
            if what != self._what:
                if self._stage is not None:
                    self._progress.remove_task(self._stage)
                self._stage = self._progress.add_task(escape(printable(what)), total=total)
            self._progress.update(self._stage, completed=done, total=total)
        elif what != self._what and not self._quiet:
            self._console.print(escape(printable(what)), style="dim", highlight=False)
        self._what = what


def summary(result: CircuitResult) -> list[Any]:
    """The answer for a person: sizes side by side, controls, what was measured."""
    lines: list[Any] = [sizes_table(result)]
    if any(len(model.levels) > 1 for model in result.models):
        lines.append(levels_table(result))
    lines.append(controls_table(result))
    if result.compare is not None and not result.compare.comparable:
        lines.append("not comparable: " + "; ".join(result.compare.reasons))
    lines.append(method_line(result))
    return lines + [f"note: {note}" for note in result.notes]


def _table(title: str, result: CircuitResult) -> Table:
    table = Table(title=escape(printable(title)), title_justify="left", title_style="bold", box=None)
    table.add_column("", style="dim")
    for model in result.models:
        table.add_column(escape(printable(f"{Path(model.name).name} ({model.kind})", 40)), justify="right")
    return table


def sizes_table(result: CircuitResult) -> Table:
    """Counts of the circuits and their ratios."""
    title = f"Smallest circuit found for faithfulness {result.method.target:g}: {result.task.name}"
    table = _table(title, result)
    compare = result.compare
    if compare is not None:
        table.add_column("ratio", justify="right")
        table.add_column("95 %", justify="right")

    def row(name: str, cells: list[str], ratio: list[str] | None = None) -> None:
        table.add_row(name, *cells, *([] if compare is None else ratio or ["", ""]))

    models = result.models
    row("edges", [_of(m.counts.edges, m.graph.edges) for m in models], compare and _chosen(compare.edges))
    row(
        "heads",
        [_of(m.counts.heads, m.graph.layers * m.graph.heads) for m in models],
        compare and _chosen(compare.heads),
    )
    row("MLPs", [_of(m.counts.mlps, m.graph.layers) for m in models], compare and _chosen(compare.mlps))
    row("messages/prompt", [_messages(m.counts) for m in models], compare and _chosen(compare.messages))
    if result.method.mask_steps:
        row("edges, learned", [f"{m.learned.edges:,}" if m.learned else "none smaller" for m in models])
    if result.method.mask_steps or result.method.refine or compare is not None:
        row("edges, ranked", [f"{m.ranked.edges:,}" for m in models], compare and _ranked(compare.edges))
        row("heads, ranked", [f"{m.ranked.heads:,}" for m in models], compare and _ranked(compare.heads))
    _published_rows(result, row)
    row("ranking", [m.ranking for m in models])
    row("faithfulness", [f"{m.test.faithfulness.value:.3f}" for m in models])
    row("  95 %", [f"{m.test.faithfulness.low:.2f} to {m.test.faithfulness.high:.2f}" for m in models])
    row("  one-sided 95 %", [_bounds(m) for m in models])
    row("  quartiles", [" ".join(f"{q:.2f}" for q in m.test.quartiles) for m in models])
    row("  validation", [f"{m.validation_faithfulness:.3f}" for m in models])
    row("target", [verdict(m, result) for m in models])
    row("accuracy", [percent(m.test.accuracy) for m in models])
    row("  model", [percent(m.accuracy) for m in models])
    row("  chance", [chance(result) for _ in models])
    row("KL to model", [number(m.test.kl) for m in models])
    row("metric, clean", [f"{m.clean:.3f}" for m in models])
    row("  corrupted", [f"{m.corrupted:.3f}" for m in models])
    row("EAP-IG gap", [percent(m.attribution.gap) for m in models])
    row("gates that flip", [_flips(m) for m in models])
    return table


def levels_table(result: CircuitResult) -> Table:
    """The smallest circuits of every level and search, and the ratio of two models."""
    table = _table("Levels, each with a search of its own (size, faithfulness on test prompts)", result)
    ratios: dict[Level, LevelRatio] = {}
    if result.compare is not None:
        ratios = {ratio.level: ratio for ratio in result.compare.levels}
    if ratios:
        table.add_column("ratio", justify="right")
        table.add_column("95 %", justify="right")
    for level, name in LEVELS.items():
        for place, rows in enumerate(zip(*(levels_of(model, level) for model in result.models), strict=False)):
            cells = [level_cell(row) for row in rows]
            table.add_row(
                name if place == 0 else f"  seed {rows[0].seed}", *cells, *(_level_ratio(ratios, level, place))
            )
    return table


LEVELS: dict[Level, str] = {"nodes": "heads and MLPs", "edges": "edges", "messages": "messages/prompt"}


def levels_of(model: ModelCircuit, level: Level) -> list[LevelCircuit]:
    """A level's circuits, one of every search."""
    return [one for one in model.levels if one.level == level]


def level_cell(one: LevelCircuit) -> str:
    """Size and faithfulness."""
    shown = "" if one.reached else ", not shown"
    return f"{one.size:,.5g} of {one.whole:,.6g} at {one.faithfulness.value:.2f}{shown}"


def _level_ratio(ratios: dict[Level, LevelRatio], level: Level, place: int) -> list[str]:
    if not ratios:
        return []
    return level_ratio(ratios[level]) if level in ratios and place == 0 else ["", ""]


def level_ratio(ratio: LevelRatio) -> list[str]:
    """[ratio, interval]."""
    if ratio.value is None:
        return ["", ""]
    bounds = "" if ratio.low is None or ratio.high is None else f"{ratio.low:.2f} to {ratio.high:.2f}"
    return [f"{ratio.value:.2f}x", bounds]


def _published_rows(result: CircuitResult, row: Any) -> None:
    """What the published procedure counts, if it was asked for."""
    counted = [m.published for m in result.models]
    ratios = None if result.compare is None else result.compare.published
    for name, key in PUBLISHED.items():
        cells = ["" if c is None else "not reached" if c.heads is None else f"{getattr(c, key):,g}" for c in counted]
        if any(cells):
            value = None if ratios is None else getattr(ratios, key)
            row(name, cells, ["" if value is None else f"{value:.2f}x", ""])


PUBLISHED = {
    "published: heads": "heads",
    "  edges among them": "edges",
    "  open attention edges": "token_edges",
}


def verdict(model: ModelCircuit, result: CircuitResult) -> str:
    """Whether the target was reached, as far as the prompts show, and what the controls have against the circuit."""
    reached = "reached" if model.reached else f"not shown with {counted(result.task.test, 'prompt')}"
    return "; ".join([reached, *doubts(model)])


def not_shown(model: ModelCircuit, result: CircuitResult) -> str:
    """Why a finished search ends with exit code 3."""
    test, method = model.test, result.method
    return (
        f"{model.name}: finished and saved, but faithfulness {method.target:g} is not shown with {result.task.test} "
        f"prompts: {test.faithfulness.value:.3f} on them, with 95 % confidence above {number(test.lower)} and below "
        f"{number(test.upper)}, which must lie between {method.band[0] - method.margin:.3g} and "
        f"{method.band[1] + method.margin:.3g}"
    )


def chance(result: CircuitResult) -> str:
    """The accuracy of a guess."""
    return "not recorded" if result.task.chance is None else percent(result.task.chance)


def _bounds(model: ModelCircuit) -> str:
    lower, upper = model.test.lower, model.test.upper
    return "not recorded" if lower is None or upper is None else f"{lower:.3f} to {upper:.3f}"


def _of(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,}"


def _messages(counts: Counts) -> str:
    if counts.messages is None or counts.open_messages is None:
        return ""
    return f"{counts.messages:,.1f} of {counts.open_messages:,.1f}"


def _flips(model: ModelCircuit) -> str:
    flips = model.attribution.flips
    return "" if model.kind == "dense" or flips is None else _of(flips.flipped, flips.open)


def _chosen(ratio: Ratio) -> list[str]:
    return ["" if ratio.value is None else f"{ratio.value:.2f}x", ""]


def _ranked(ratio: Ratio) -> list[str]:
    found = ratio.ranked
    return ["", ""] if found is None else [f"{found.value:.2f}x", f"{found.low:.2f} to {found.high:.2f}"]


def controls_table(result: CircuitResult) -> Table:
    """What the circuits are worth."""
    table = _table("Controls (faithfulness on test prompts)", result)
    models = [(m, m.controls) for m in result.models]

    def row(name: str, cells: list[str]) -> None:
        if any(cells):
            table.add_row(name, *cells)

    row("all other edges", ["" if c.complement is None else f"{c.complement:.3f}" for _, c in models])
    row("nonsense answers", [nonsense(m) for m, _ in models])
    row("worst other ablation", [worst(m) for m, _ in models])
    row(
        "random circuits",
        ["" if (r := c.random) is None else _drawn(r) for _, c in models],
    )
    row("random weights", [_broken(c.random_weights, m) for m, c in models])
    row("gates shuffled", [_broken(c.shuffled_gates, m) for m, c in models])
    row(
        "Jaccard, templates",
        ["" if c.templates is None or c.templates.mean is None else f"{c.templates.mean:.2f}" for _, c in models],
    )
    if result.compare is not None:
        row("in the other model", _transfer(result.compare))
        row("Jaccard, models", [f"{result.compare.jaccard:.2f}", ""])
    return table


def nonsense(model: ModelCircuit) -> str:
    """What the same search makes of answers that mean nothing."""
    found = model.controls.nonsense
    if found is None:
        return ""
    size = "no circuit" if found.edges is None else counted(found.edges, "edge")
    return f"{size}; at best {number(found.test)} (train {number(found.train)})"


def worst(model: ModelCircuit) -> str:
    """Where the circuit is farthest from the model when other edges are ablated in other ways."""
    found = None if model.controls.stress is None else model.controls.stress.worst_trial
    return "" if found is None else f"{number(found.faithfulness)}, {100 * found.share:g} % {found.ablation}"


def _drawn(random: RandomCircuits) -> str:
    return f"{number(random.faithfulness)} [{number(random.low, '.2f')}, {number(random.high, '.2f')}]"


def _broken(control: ControlModel | None, model: ModelCircuit) -> str:
    if control is None:
        return ""
    if not control.able:
        return f"cannot do it, {percent(control.recovered or 0.0)} recovered"
    intact = next(curve.stable for curve in model.curves if curve.ranking == "eap-ig abs")
    return "not reached" if control.edges is None else f"{counted(control.edges, 'edge')} (intact {intact:,})"


def _transfer(compare: Compare) -> list[str]:
    return [number(compare.first_in_second), number(compare.second_in_first)]


def method_line(result: CircuitResult) -> str:
    """How it was measured, on one line."""
    task, method = result.task, result.method
    low, high = method.band
    learning = f"{task.more:,} to learn a mask, " if task.more else ""
    return (
        f"{task.metric.replace('_', ' ')}, {OUTSIDE[method.ablation]} outside the circuit, ratio of means in "
        f"[{low:.3g}, {high:.3g}] on validation prompts, by ranking at all larger sizes as well; reached if both "
        f"one-sided 95 % bounds on test prompts are inside or at most {method.margin:g} outside; "
        f"{task.train} prompts to rank, {learning}{task.validation} to choose, {task.test} to report; "
        f"seed {task.seed}; {duration(result.seconds)}"
    )


def curve_png(result: CircuitResult) -> bytes | None:
    """Faithfulness over edges of every model and ranking as a PNG; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes: Any = figure.subplots()
    for colour, model in zip(("C0", "C1"), result.models, strict=False):
        for curve in model.curves:
            chosen = curve.ranking == model.ranking
            points = [p for p in curve.points if p.edges]
            axes.plot(
                [p.edges for p in points], [p.faithfulness for p in points], color=colour, marker="." if chosen else "",
                alpha=1.0 if chosen else 0.25, label=f"{Path(model.name).name}, {curve.ranking}" if chosen else None,
            )  # fmt: skip
        axes.plot([model.counts.edges], [model.validation_faithfulness], "*", color=colour, markersize=12)
    axes.axhspan(*result.method.band, color="0.9", zorder=0)
    axes.set(xscale="log", xlabel="edges", ylabel="faithfulness (validation)", ylim=(-0.3, 1.6))
    axes.set_title(result.task.name, parse_math=False)  # names are a user's, and "$" is no formula in them
    for text in axes.legend().get_texts():
        text.set_parse_math(False)
    picture = BytesIO()
    figure.savefig(picture, dpi=150, format="png")
    return picture.getvalue()
