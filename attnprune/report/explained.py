"""Why an edge is open, on the terminal. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from attnprune.errors import printable
from attnprune.units import number

if TYPE_CHECKING:
    from attnprune.circuit.explained import ExplainedEdge
    from attnprune.circuit.record import Writer

SHOWN = 8


def summary(found: ExplainedEdge) -> list[Any]:
    """The score, and what was written into the query and into the key, largest first."""
    gate = "a dense model, which has no gate" if found.bias is None else f"bias {found.bias:+.3f}"
    state = "open" if found.is_open else "closed"
    tokens = [printable(repr(found.prompt[place])) for place in (found.query, found.key)]
    head = f"{found.edge} ({tokens[0]} reads {tokens[1]}): score {found.score:.3f}, {gate}: {state}"
    sides = [("query", found.by_query, found.query_remainder), ("key", found.by_key, found.key_remainder)]
    return [escape(head), *(_side(*side) for side in sides), _NOTE]


_NOTE = (
    "terms: with the norm held as it was; they and the remainder (biases) add up to the score. without: the term is "
    "removed from what this head reads, and the norm runs again"
)


def _side(name: str, writers: list[Writer], remainder: float) -> Table:
    table = Table(title=f"written into the {name}", title_justify="left", title_style="bold", box=None)
    for column in ("", "term", "score without", "then"):
        table.add_column(column, justify="left" if column == "" else "right")
    for writer in writers[:SHOWN]:
        state = "" if writer.open_without is None else "open" if writer.open_without else "closed"
        table.add_row(
            writer.source, f"{writer.value:+.3f}", "" if writer.without is None else number(writer.without), state
        )
    rest = writers[SHOWN:]
    if rest:
        table.add_row(f"{len(rest)} others", f"{sum(writer.value for writer in rest):+.3f}", "", "")
    table.add_row("remainder", f"{remainder:+.3f}", "", "")
    return table
