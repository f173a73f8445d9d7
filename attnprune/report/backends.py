"""Which implementation of gated attention runs, as a table and as JSON-ready dictionaries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from attnprune.attention.backends import PhaseBackend


def as_data(model: Any, found: list[PhaseBackend]) -> dict[str, Any]:
    """For JSON."""
    return {"device": str(model.device), "dtype": str(model.dtype)[6:], "runtime": [f._asdict() for f in found]}


def render(model: Any, found: list[PhaseBackend]) -> Table:
    """For a person."""
    title = f"Attention on {model.device}, {str(model.dtype)[6:]}"
    table = Table(title=title, title_justify="left", title_style="bold", box=None)
    for column in ("phase", "backend", "layers", "why"):
        table.add_column(column)
    for f in found:
        table.add_row(f.phase, f.backend, str(f.layers), f.reason)
    return table
