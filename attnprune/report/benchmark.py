"""Benchmark records as tables."""

from __future__ import annotations

from collections.abc import Callable

from rich.markup import escape
from rich.table import Table

from attnprune.bench.record import Record, Row, Timing
from attnprune.units import percent, size


def render(record: Record) -> list[object]:
    """One table per configuration, what could not run below it, and a line on the machine."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in record.rows:
        groups.setdefault((row.suite, row.configuration), []).append(row)
    lines: list[object] = []
    for (suite, name), rows in groups.items():
        lines.append(_table(f"{suite}: {name}", [row for row in rows if row.timing is not None]))
        lines += [f"{row.provider} {row.status}: {row.note}" for row in rows if row.status != "ok"]
    machine = record.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    lines.append(f"{machine.device}, {machine.threads} of {machine.cores} cores, {versions}")
    return [*lines, *(f"left out by the time budget: {name}" for name in record.left_out)]


COLUMNS: dict[str, Callable[[Row], object]] = {
    "ms (20-80 %)": lambda row: row.timing and _milliseconds(row.timing),
    "vs SDPA": lambda row: row.ratio_to_sdpa and f"{row.ratio_to_sdpa:.2f}x",
    "vs eager": lambda row: row.ratio_to_eager and f"{row.ratio_to_eager:.2f}x",
    "vs Trainer": lambda row: row.ratio_to_trainer and f"{row.ratio_to_trainer:.2f}x",
    "memory": lambda row: None if row.peak_bytes is None else size(row.peak_bytes),
    "tokens/s": lambda row: row.tokens_per_second and f"{row.tokens_per_second:,.0f}",
    "of bound": lambda row: row.matmul_share and percent(row.matmul_share),
    "kernels": lambda row: _count(row.kernels),
    "launches": lambda row: _count(row.launches),
    "ops": lambda row: _count(row.operators),
    "waits": lambda row: _count(row.waits),
    "density": lambda row: row.density and percent(row.density),
    "error": lambda row: None if row.error is None else f"{row.error:.0e}",
}


def _count(number: int | None) -> str | None:
    return None if number is None else f"{number:,}"


def line(row: Row) -> str:
    """A row as one line, for the moment that it is measured."""
    if row.timing is None:
        return f"{row.provider} {row.status}: {row.note}"
    found = {name: read(row) for name, read in COLUMNS.items()}
    return f"{row.provider}: " + ", ".join(f"{name} {value}" for name, value in found.items() if value)


def _milliseconds(timing: Timing) -> str:
    median, low, high = (
        f"{value:.0f}" if value >= 100 else f"{value:.3g}"
        for value in (timing.median_ms, timing.low_ms, timing.high_ms)
    )
    return f"{median} ({low}-{high})"


def _table(title: str, rows: list[Row]) -> Table:
    """Only the columns that some row fills."""
    table = Table(title=escape(title), title_justify="left", title_style="bold", box=None)
    table.add_column("", no_wrap=True)
    cells = {name: [str(read(row) or "") for row in rows] for name, read in COLUMNS.items()}
    shown = [name for name, column in cells.items() if any(column)]
    for name in shown:
        table.add_column(name, justify="right", no_wrap=True)
    for index, row in enumerate(rows):
        table.add_row(row.provider, *(cells[name][index] for name in shown))
    return table
