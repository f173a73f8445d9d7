"""The open edges of a text as a table and as JSON-ready dictionaries."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from attnprune.sidecar.edges import Edge, TextEdges

_SUBSCRIPT = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def as_data(found: TextEdges, chosen: list[Edge]) -> dict[str, Any]:
    """For JSON."""
    return {"tokens": found.tokens, "visible_edges": found.visible, "edges": [asdict(edge) for edge in chosen]}


def render(found: TextEdges, chosen: list[Edge], limit: int) -> list[Any]:
    """A table: one row per head, its strongest edges as `query ← key`."""
    by_head: dict[tuple[int, int], list[Edge]] = defaultdict(list)
    for edge in chosen:
        by_head[edge.layer, edge.head].append(edge)
    table = Table(title="open edges: query ← key, positions as subscripts (weight)", box=None, title_justify="left")
    for name, justify in (("head", "right"), ("edges", "right"), ("strongest", "left")):
        table.add_column(name, justify=justify, header_style="dim")  # pyright: ignore[reportArgumentType]
    for (layer, head), edges in by_head.items():
        strongest = sorted(edges, key=lambda edge: -edge.weight)[:limit]
        more = f"  [dim]+{len(edges) - limit}[/]" if len(edges) > limit else ""
        cells = "  ".join(
            f"{_token(found, e.query)} ← {_token(found, e.key)} [dim]({e.weight:.2f})[/]" for e in strongest
        )
        table.add_row(f"{layer}.{head}", str(len(edges)), cells + more)
    share = len(found.edges) / found.visible
    head = f"{len(found.tokens)} tokens, {len(found.edges):,} of {found.visible:,} edges open ({100 * share:.3g} %)"
    return [head, "", table] if chosen else [head, "none in this selection"]


def _token(found: TextEdges, position: int) -> str:
    text = found.tokens[position]
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return f"[cyan]{escape(shown.replace(' ', '·'))}[/][dim]{str(position).translate(_SUBSCRIPT)}[/]"
