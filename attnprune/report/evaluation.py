"""Measurements side by side, as a table and as JSON-ready dictionaries."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from attnprune.errors import printable
from attnprune.units import percent

if TYPE_CHECKING:
    from attnprune.measure import Report
    from attnprune.training.harness import Score


def report_data(report: Report) -> dict[str, Any]:
    """A measurement for JSON; without `exact_match` where there was nothing to match."""
    return {key: value for key, value in asdict(report).items() if key != "exact_match" or value is not None}


def extreme(open_edges: int, visible_edges: int) -> str | None:
    """A warning where nothing or everything is open, which is no result; None where some is."""
    if open_edges == 0:
        return "NOTHING IS OPEN: 0 % of the edges. The attention passes nothing on, so no token sees another one."
    if open_edges == visible_edges:
        return "EVERYTHING IS OPEN: 100 % of the edges. This is the dense model; nothing was closed."
    return None


def report_table(reports: list[Report]) -> Table:
    """Measurements side by side, one column per text."""
    table = Table(box=None)
    table.add_column("", style="dim")
    for report in reports:
        table.add_column(escape(printable(report.data)), justify="right")

    def row(name: str, cell: Any) -> None:
        cells = [cell(r) for r in reports]
        if any(cells):
            table.add_row(name, *cells)

    row("loss", lambda r: f"{r.loss:.6f}")
    row("base loss", lambda r: "" if r.base_loss is None else f"{r.base_loss:.6f}")
    row("loss - base", lambda r: "" if r.base_loss is None else f"{r.loss_gap:+.6f}")
    row("open-gate control", lambda r: "" if r.control_loss is None else f"{r.control_loss:.6f}")
    row("KL(base || sparse)", lambda r: "" if r.kl is None else f"{r.kl:.6f}")
    row("same next token", lambda r: "" if r.agreement is None else percent(r.agreement))
    row("density", lambda r: "" if r.density is None else percent(r.density))
    row("edges per query", lambda r: "" if r.edges_per_query is None else f"{r.edges_per_query:.4g}")
    row("open edges", lambda r: "" if r.density is None else f"{r.open_edges:,}")
    row("visible edges", lambda r: "" if r.density is None else f"{r.visible_edges:,}")
    row("exact answers", lambda r: "" if r.exact_match is None else percent(r.exact_match))
    row("T", lambda r: str(r.seq_len))
    row("tokens", lambda r: f"{r.tokens:,}")
    return table


def warnings_of(reports: list[Report]) -> list[str]:
    """A line for each measurement of gates that are all closed or all open."""
    found = [(r.data, extreme(r.open_edges, r.visible_edges)) for r in reports if r.density is not None]
    return [f"{data}: {line}" for data, line in found if line]


def scores_data(found: dict[str, list[Score]], notes: list[str]) -> dict[str, Any]:
    """Scores of tasks for JSON."""
    return {"tasks": {model: [asdict(score) for score in scores] for model, scores in found.items()}, "notes": notes}


def scores_table(found: dict[str, list[Score]]) -> Table:
    """Scores of tasks, one column per model, each with its standard error."""
    table = Table(box=None, caption="value ± standard error, by lm-eval", caption_justify="left")
    table.add_column("task", overflow="fold")
    table.add_column("metric", style="dim")
    for model in found:
        table.add_column(model, justify="right")
    for row in zip(*found.values(), strict=True):
        cells = [f"{s.value:.4f}" + ("" if s.error is None else f" ± {s.error:.4f}") for s in row]
        table.add_row(escape(printable(row[0].task)), escape(printable(row[0].metric)), *cells)
    return table
