"""A comparison of two models as tables and as JSON-ready dictionaries."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
from rich.table import Table

from attnprune.report.tables import facts_table
from attnprune.sidecar.diff import Difference, HeadChange
from attnprune.units import counted, percent


def as_data(found: Difference) -> dict[str, Any]:
    """Everything that was found, for JSON; heads are [layer, head]."""
    return asdict(found) | {"heads_opened": found.opened, "heads_closed": found.closed}


def render(found: Difference, limit: int) -> list[Any]:
    """The outcome, the heads and the tensors that changed most (`limit` rows each)."""
    parts: list[Any] = [_outcome(found)]
    for table in (_head_table(found, limit), _tensor_table(found, limit)):
        if table.row_count:
            parts += ["", table]
    return parts


def _outcome(found: Difference) -> Table:
    def listed(heads: list[tuple[int, int]]) -> str:
        names = [f"{layer}.{head}" for layer, head in heads[:12]] + ["…"] * (len(heads) > 12)
        return f"{len(heads)}: {' '.join(names)}" if heads else "0"

    count = len(found.tensors)
    weights = [f"{counted(count, 'tensor')} {'differs' if count == 1 else 'differ'}"] if found.tensors else []
    weights += [f"{counted(len(found.uncompared), 'tensor')} not compared"] if found.uncompared else []
    rows = [
        ("A", found.a),
        ("B", found.b),
        ("density", f"{percent(found.density_a)} -> {percent(found.density_b)}"),
        ("heads opened", listed(found.opened)),
        ("heads closed", listed(found.closed)),
        ("biases", _biases([h.bias_b - h.bias_a for h in found.heads if h.bias_a is not None])),
        ("weights", ", ".join(weights) or "equal"),
    ]
    table = facts_table("From A to B", rows + [("note", note) for note in found.notes])
    table.columns[1].overflow = "fold"  # a long path is not cut
    return table


def _biases(moved: list[float]) -> str:
    if not moved:
        return "only in B"
    return f"mean change {np.mean(moved):+.3f}, largest {max(moved, key=abs):+.3f}" if any(moved) else "equal"


def _head_table(found: Difference, limit: int) -> Table:
    table = Table(title="heads that changed most", title_justify="left", box=None)
    for name in ("head", "density A", "density B", "bias A", "bias B"):
        table.add_column(name, justify="right", header_style="dim")

    def moved(h: HeadChange) -> tuple[float, float]:
        return abs(h.density_b - h.density_a), abs(h.bias_b - (h.bias_a or 0.0))

    for h in [h for h in sorted(found.heads, key=moved, reverse=True) if any(moved(h))][:limit]:
        bias = "" if h.bias_a is None else f"{h.bias_a:.3f}"
        table.add_row(f"{h.layer}.{h.head}", percent(h.density_a), percent(h.density_b), bias, f"{h.bias_b:.3f}")
    return table


def _tensor_table(found: Difference, limit: int) -> Table:
    table = Table(title="tensors that changed most", title_justify="left", box=None)
    table.add_column("tensor", header_style="dim", overflow="fold")
    for name in ("||B - A||", "of ||A||"):
        table.add_column(name, justify="right", header_style="dim")
    for t in found.tensors[:limit]:
        table.add_row(t.name, f"{t.change:.4g}", "" if t.relative is None else percent(t.relative))
    return table
