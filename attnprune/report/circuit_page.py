"""A circuit search as one HTML page that needs no network: picture, curve, controls, method. No torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from attnprune.files import write_atomic
from attnprune.report.circuits import (
    LEVELS,
    OUTSIDE,
    chance,
    curve_png,
    level_cell,
    level_ratio,
    levels_of,
    nonsense,
    verdict,
    worst,
)
from attnprune.report.pages import build, toggle
from attnprune.report.pages import text as _text
from attnprune.units import counted, duration, number, percent

if TYPE_CHECKING:
    from attnprune.circuit.record import Interval
    from attnprune.circuit.result import CircuitResult, Compare, ModelCircuit, Ratio
    from attnprune.circuit.worth import ControlModel

# What the page's script reads. Text from users (names, prompts) is not among it: that is escaped here.
_DRAWN = {"graph", "curves", "ranking", "ranked", "counts", "edges", "top_edges", "validation_faithfulness", "test"}
_DATA = {"method": {"band"}, "models": {"__all__": _DRAWN}}

SCRIPTS = ("page.js", "circuit_graph.js", "circuit_view.js", "circuit_focus.js")  # in this order, as one


def render_page(result: CircuitResult) -> str:
    """The page as text (UTF-8). Its content security policy allows no request and no script but its own."""
    return build(
        "circuit.html", ("page.css", "circuit.css"), SCRIPTS, result.model_dump_json(include=_DATA),
        title=_text(f"Circuit of {' and '.join(model.name for model in result.models)}: {result.task.name}"),
        intro=_intro(result), toggle=toggle([(m.kind, m.name, m.name) for m in result.models]), report=_report(result),
        method=_method(result),
    )  # fmt: skip


def _intro(result: CircuitResult) -> str:
    """One line per model, and why a comparison does not hold."""
    lines = []
    for model in result.models:
        f = model.test.faithfulness
        lines.append(
            f"<p><b>{_text(model.name)}</b> <span class=dim>({model.kind})</span>: {model.counts.edges:,} of "
            f"{model.graph.edges:,} edges, {model.counts.heads} of {model.graph.layers * model.graph.heads:,} heads, "
            f"{model.counts.mlps} of {model.graph.layers} MLPs; faithfulness {f.value:.2f} [{f.low:.2f}, {f.high:.2f}] "
            f"on test prompts, target {result.method.target:g} {verdict(model, result)}</p>"
        )
    if result.compare is not None and not result.compare.comparable:
        why = _text("; ".join(result.compare.reasons))
        lines.append(f'<p class="card warn"><b>The two models cannot be compared:</b> {why}</p>')
    return "\n".join(lines)


def _report(result: CircuitResult) -> str:
    """The table of circuits and controls: a column per model, and the ratio of two."""
    models, compare = result.models, result.compare
    rows: list[tuple[str, list[str], str]] = []

    def row(name: str, cell: Callable[[ModelCircuit], str], ratio: Ratio | None = None) -> None:
        cells = [cell(model) for model in models]
        if any(cells):
            rows.append((name, cells, _ratio(ratio)))

    row("task accuracy", lambda m: f"{percent(m.accuracy)} (chance {chance(result)})")
    row("metric, clean and corrupted prompts", lambda m: f"{m.clean:.3g} and {m.corrupted:.3g}")
    row("edges", lambda m: f"{m.counts.edges:,} ({percent(m.counts.edges / m.graph.edges)})", compare and compare.edges)
    row("edges by ranking alone", lambda m: f"{m.ranked.edges:,}" if m.ranked.edges != m.counts.edges else "")
    row("edges by learning a mask", lambda m: f"{m.learned.edges:,}" if m.learned else "")
    row("heads", lambda m: f"{m.counts.heads} of {m.graph.layers * m.graph.heads}", compare and compare.heads)
    row("MLPs", lambda m: f"{m.counts.mlps} of {m.graph.layers}", compare and compare.mlps)
    row("attention messages per prompt", _messages, compare and compare.messages)
    row("faithfulness, validation prompts", lambda m: f"{m.validation_faithfulness:.3f}")
    row("faithfulness, test prompts", lambda m: _interval(m.test.faithfulness))
    row("one-sided 95 % bounds", lambda m: "" if m.test.lower is None else _between(m.test.lower, m.test.upper))
    row(f"target {result.method.target:g}", lambda m: verdict(m, result))
    row("the same per prompt, quartiles", lambda m: ", ".join(f"{value:.2f}" for value in m.test.quartiles))
    row("accuracy of the circuit", lambda m: f"{percent(m.test.accuracy)} (chance {chance(result)})")
    row("KL(model ‖ circuit)", lambda m: f"{number(m.test.kl, '.3g')} nats")
    row("control: all other edges", lambda m: "" if (f := m.controls.complement) is None else f"faithfulness {f:.3f}")
    row("control: the same search for answers that mean nothing", nonsense)
    row("control: other edges ablated in other ways, worst", worst)
    row("control: random circuits of this size", _random)
    row("control: random weights", lambda m: _broken(m.controls.random_weights, result))
    row("control: shuffled gates", lambda m: _broken(m.controls.shuffled_gates, result))
    row("agreement between templates", _templates)
    for level, name in LEVELS.items():
        title = f"level, with a search of its own: {name}"
        ratio = next((one for one in compare.levels if one.level == level), None) if compare is not None else None
        cells = ["; ".join(map(level_cell, levels_of(model, level))) for model in models]
        if any(cells) and any(len(model.levels) > 1 for model in models):
            rows.append((title, cells, "" if ratio is None else ", ".join(filter(None, level_ratio(ratio)))))
    row("counted as published", _published)
    row("ranking", lambda m: f"{m.ranking}, {m.attribution.steps} points, gap {percent(m.attribution.gap)}")
    row("gates that differ, clean to corrupted", _flips)
    row("time", lambda m: duration(m.seconds))
    head = "".join(f"<th>{_text(model.name)}</th>" for model in models)
    head += "" if compare is None else "<th>second / first</th>"
    body = "\n".join(
        f"<tr><th>{name}</th>{''.join(f'<td>{_text(cell)}</td>' for cell in cells)}"
        f"{'' if compare is None else f'<td>{_text(ratio)}</td>'}</tr>"
        for name, cells, ratio in rows
    )
    table = f"<table id=report><thead><tr><th></th>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>"
    return table + ("" if compare is None else _transfer(compare))


def _transfer(compare: Compare) -> str:
    one, other = number(compare.first_in_second, ".2f"), number(compare.second_in_first, ".2f")
    return (
        f"<p>Faithfulness of the first circuit in the second model {one}, of the second in the first {other}; they "
        f"share {percent(compare.jaccard)} of their edges.</p>"
    )


def _interval(number: Interval) -> str:
    return f"{number.value:.3f} [{number.low:.3f}, {number.high:.3f}]"


def _between(lower: float, upper: float | None) -> str:
    return f"above {lower:.3f}, below {number(upper)}"


def _ratio(ratio: Ratio | None) -> str:
    """The ratio of the chosen circuits, and that of the circuits found by ranking with its interval."""
    if ratio is None:
        return ""
    value = "" if ratio.value is None else f"{ratio.value:.2f}"
    ranked = ratio.ranked
    before = "" if ranked is None else f"by ranking {ranked.value:.2f} [{ranked.low:.2f}, {ranked.high:.2f}]"
    return "; ".join(part for part in (value, before) if part)


def _messages(model: ModelCircuit) -> str:
    counts = model.counts
    needed = "" if counts.messages is None else f"{counts.messages:,.1f}"
    return needed + ("" if counts.open_messages is None else f" ({counts.open_messages:,.1f} open in all heads)")


def _published(model: ModelCircuit) -> str:
    found = model.published
    if found is None:
        return ""
    if found.heads is None:
        return f"not reached: all heads bring back {found.recovered:.2f}"
    tokens = f"{found.token_edges:,.1f} open attention edges per prompt"
    return f"{counted(found.heads, 'head')}, {counted(found.edges, 'edge')} among them, {tokens}"


def _random(model: ModelCircuit) -> str:
    drawn = model.controls.random
    if drawn is None:
        return ""
    low, high = number(drawn.low), number(drawn.high)
    return f"faithfulness {number(drawn.faithfulness)}, from {low} to {high} in {drawn.draws} draws"


def _broken(control: ControlModel | None, result: CircuitResult) -> str:
    """What EAP-IG finds in a model that was broken on purpose."""
    if control is None:
        return ""
    accuracy = f"(accuracy {percent(control.accuracy)}, chance {chance(result)})"
    if control.able:
        size = "all edges" if control.edges is None else counted(control.edges, "edge")
        found = f"still does the task {accuracy}; {size}; {number(control.faithfulness)} at the circuit's size"
    else:  # a share of hardly any gap says nothing
        found = f"does not do the task {accuracy}"
    best = control.recovered
    return found + ("" if best is None else f"; at best {best:.3f} of the intact model's gap")


def _templates(model: ModelCircuit) -> str:
    found = model.controls.templates
    return "" if found is None or found.mean is None else f"Jaccard {found.mean:.2f} over {len(found.templates)}"


def _flips(model: ModelCircuit) -> str:
    flips = model.attribution.flips
    return "" if flips is None else f"{flips.flipped:,} of {flips.open:,} open"


def _method(result: CircuitResult) -> str:
    """How it was measured, in one paragraph; the prompts; the command."""
    task, method = result.task, result.method
    low, high = method.band
    lines = [
        f"Task {_text(task.name)}, metric {task.metric.replace('_', ' ')}; {task.train} prompt pairs to rank edges, "
        f"{task.validation} to decide sizes, {task.test} for every number called test; {len(task.templates)} "
        f"templates, {task.lengths[0]} to {task.lengths[1]} tokens, seed {task.seed}, prompts "
        f"{_text(task.fingerprint[:12])}. Outside of a circuit edges carry {OUTSIDE[method.ablation]}. "
        f"Faithfulness is {_text(method.faithfulness)}; "
        f"on validation prompts a circuit has to lie in [{low:g}, {high:g}]. "
        f"The size is the smallest from which on all larger evaluated sizes are inside as well"
        f"{f', then a mask was learned on {task.more or task.train} pairs if that helped' if method.mask_steps else ''}"
        f"{', then edges were deleted in blocks if that helped' if method.refine else ''}. Heads and MLPs "
        f"count if they write to a kept edge. Intervals: 95 %, {method.bootstrap:,} bootstrap resamples over prompts. "
        f"The target is reached if both one-sided 95 % bounds on test prompts lie inside too, or at most "
        f"{method.margin:g} outside; otherwise it is not shown, and more prompts may show it. Bounds: "
        f"{_text(method.bounds)}. Chance: the accuracy of a guess among the answers and the wrong tokens."
        f"{' A quick run: fewer prompts and sizes.' if method.quick else ''}",
        f"<span class=dim>clean</span> <code>{_text(task.example.clean)}</code> → "
        f"<code>{_text(' / '.join(task.example.answers))}</code><br><span class=dim>corrupted</span> "
        f"<code>{_text(task.example.corrupted)}</code> → <code>{_text(' / '.join(task.example.wrong))}</code>",
        *(_text(note) for note in result.notes),
        f"<code>{_text(result.command)}</code> <span class=dim>({duration(result.seconds)})</span>",
    ]
    return "\n".join(f"<p>{line}</p>" for line in lines)


def write_pictures(result: CircuitResult, folder: Path) -> list[Path]:
    """Page and curve of a search, both made before one is written; the files written (no curve without matplotlib)."""
    contents = {"circuit.html": render_page(result), "curve.png": curve_png(result)}
    made = {folder / name: content for name, content in contents.items() if content is not None}
    for file, content in made.items():
        write_atomic(file, content)
    return list(made)
