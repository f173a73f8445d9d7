"""Answers of an index of edges: tables of heads and tokens, the strongest edges with text around. No torch."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from attnprune.errors import printable
from attnprune.report.tables import filled
from attnprune.units import counted, percent, size

if TYPE_CHECKING:
    from attnprune.heads.store import By, Index, Row

TOKEN = 40  # characters of a token
TABLES = {"heads": "head", "keys": "key", "queries": "query"}  # with the filter that leaves it nothing to say


def built(index: Index) -> list[str]:
    """What was stored and how large it is."""
    record, total = index.record, index.total()
    tokens, held = record.blocks * record.seq_len, sum(file.stat().st_size for file in index.path.iterdir())
    asked = shlex.join(["attnprune", "edges", str(index.path), *_busiest_key(index)])
    return [
        printable(
            f"{record.data}: {counted(tokens, 'token')} in {counted(record.blocks, 'block')} of {record.seq_len}"
        ),
        f"{counted(total['count'], 'open edge')}, {total['count'] / tokens:.4g} a token, {size(held)}",
        printable(f"written to {index.path}; ask with: {asked}"),
    ]


def _busiest_key(index: Index) -> list[str]:
    """The option that asks for the token that is read most, of those that can be typed."""
    texts = (row["text"] for row in index.keys(limit=20))
    return next((["--key", text] for text in texts if text.isprintable()), [])


def as_data(index: Index, filters: Mapping[str, Any], by: By, top: int) -> dict[str, Any]:
    """The answer as JSON: all edges, those that pass, and a table for everything that the filters leave open,
    with how many rows more than `top` there are."""
    tables = {name: getattr(index, name)(by=by, **filters) for name, fixed in TABLES.items()
              if filters.get(fixed) is None}  # fmt: skip
    return {
        "model": index.record.model, "data": index.record.data, "blocks": index.blocks,
        "blocks_in_all": index.record.blocks, "total": index.total(), "passing": index.total(**filters),
        **{name: rows[:top] for name, rows in tables.items()},
        "more": {name: len(rows[top:]) for name, rows in tables.items()},
        "contexts": index.contexts(limit=top, **filters), "notes": index.notes,
    }  # fmt: skip


def render(data: Mapping[str, Any]) -> list[Any]:
    """The answer for a person."""
    total, passing = data["total"], data["passing"]
    share = percent(passing["count"] / total["count"]) if total["count"] else "none"
    lines: list[Any] = [
        printable(f"{data['model']} on {data['data']}"),
        f"{passing['count']:,} of {total['count']:,} open edges ({share}), weight {passing['weight']:,.1f}",
    ]
    if data["blocks"] < data["blocks_in_all"]:
        lines.append(f"not finished: {data['blocks']:,} of {data['blocks_in_all']:,} blocks so far")
    notes = [filled(f"note: {printable(note)}") for note in data["notes"]]
    if not passing["count"]:
        return lines + notes
    for name in TABLES:
        if name in data:
            lines += ["", _table(name, data[name], data["more"][name], passing)]
    return [*lines, "", _contexts(data["contexts"]), "«key» is read by ⟦query⟧; weight: P_ij A_ij", *notes]


def _table(name: str, rows: list[Row], more: int, passing: Row) -> Table:
    table = Table(box=None)
    table.add_column(name, header_style="bold", overflow="ellipsis")  # what has to give way is a long token
    for column in ("edges", "share", "weight", "share"):
        table.add_column(column, justify="right", header_style="dim", no_wrap=True)
    for row in rows:
        what = f"{row['layer']}.{row['head']}" if name == "heads" else f"[cyan]{_token(row['text'], TOKEN)}[/]"
        weight = row["weight"] / passing["weight"] if passing["weight"] else 0
        shares = percent(row["count"] / passing["count"]), percent(weight)
        table.add_row(what, f"{row['count']:,}", shares[0], f"{row['weight']:,.1f}", shares[1])
    if more:
        table.add_row(f"[dim]+{more:,} more[/]")
    return table


def _contexts(rows: list[Row]) -> Table:
    table = Table(box=None)
    for column in ("weight", "head", "block"):
        table.add_column(column, justify="right", header_style="dim", no_wrap=True)
    table.add_column("strongest edges", header_style="bold", overflow="fold")
    for row in rows:
        head = f"{row['layer']}.{row['head']}"
        table.add_row(f"{row['weight']:.3f}", head, f"{row['block']:,}", escape(printable(row["text"])))
    return table


def _token(text: str, limit: int) -> str:
    return escape(printable(text.replace(" ", "·"), limit))
