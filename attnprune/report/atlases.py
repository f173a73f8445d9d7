"""Atlases on the terminal: the heads with the most edges and what they do. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from attnprune.errors import printable
from attnprune.report.tables import filled
from attnprune.units import counted, duration, percent

if TYPE_CHECKING:
    from attnprune.heads.result import Atlas, Head, ModelAtlas

ROWS = 20  # heads of a table


def ranked(model: ModelAtlas) -> list[Head]:
    """The heads with open edges, those with the most first; of a dense model those that are most of one kind."""
    if model.kind == "sparse":
        return sorted((head for head in model.heads if not head.closed), key=lambda head: -head.open)
    return sorted(model.heads, key=lambda head: -head.reading.kinds[leading(head)].share)


def leading(head: Head) -> str:
    """The kind to name: the first label, or else the kind that is most above its control."""
    kinds = head.reading.kinds
    return next(iter(head.reading.labels), max(kinds, key=lambda name: kinds[name].share - kinds[name].control))


def kind_name(name: str, offset: int) -> str:
    """A kind as people read it."""
    return f"offset {offset}" if name == "offset" else name


def summary(result: Atlas) -> list[Any]:
    """The answer for a person: per model the heads ranked, how many have which label, the rule."""
    lines: list[Any] = [
        printable(
            f"{result.data}: {counted(result.tokens, 'token')} in {counted(result.blocks, 'block')} of {result.seq_len}"
        ), ""
    ]  # fmt: skip
    for model in result.models:
        lines += [heads_table(result, model), filled(labels_line(model)), ""]
    lines.append(filled(f"label: {result.rule}"))
    lines.append("control: edges (mass) of each query on uniformly drawn visible keys, exact")
    lines.append("(kind): no label; the kind that is most above its control")
    lines.append(f"{duration(result.seconds)}")
    return lines + [filled(f"note: {printable(note)}") for note in result.notes]


def heads_table(result: Atlas, model: ModelAtlas) -> Table:
    """The first heads: edges, label, its share and control; of a sparse model also the dense share beside it."""
    by = "open edges" if model.kind == "sparse" else "attention mass"
    title = f"{Path(model.name).name} ({model.kind}, by {by})"
    table = Table(title=escape(printable(title, 78)), title_justify="left", title_style="bold", box=None)
    columns = ["head", "open", "per query", "label", "share", "control", "by mass"]
    columns = columns if model.kind == "sparse" else ["head", "label", "share", "control"]
    both = len(result.models) > 1
    other = result.models[1 - result.models.index(model)] if both else None
    if other is not None:
        columns.append(other.kind)
    for name in columns:
        justify = "left" if name == "label" else "right"
        table.add_column(name, justify=justify, header_style="dim", no_wrap=True)
    heads = ranked(model)
    for head in heads[:ROWS]:
        table.add_row(
            *_cells(head, None if other is None else other.heads[head.layer * model.heads_per_layer + head.head])
        )
    if len(heads) > ROWS:
        table.add_row(f"[dim]+{len(heads) - ROWS:,}[/]")
    return table


def _cells(head: Head, other: Head | None) -> list[str]:
    reading, name = head.reading, leading(head)
    kind, label = reading.kinds[name], kind_name(name, reading.offset)
    cells = [f"{head.layer}.{head.head}"]
    if head.edges is not None:
        cells += [percent(head.open / head.visible), f"{head.edges_per_query:.3g}"]
    cells += [label if reading.labels else f"[dim]({label})[/]", percent(kind.share), percent(kind.control)]
    if head.edges is not None:
        cells.append(percent(head.mass.kinds[name].share))
    if other is not None:
        same = name != "offset" or other.reading.offset == reading.offset
        cells.append(percent(other.reading.kinds[name].share) if same else "")
    return cells


def labels_line(model: ModelAtlas) -> str:
    """How many heads have which label, and how many are closed."""
    counts: dict[str, int] = {}
    for head in model.heads:
        for label in head.reading.labels:
            counts[label] = counts.get(label, 0) + 1
    said = [f"{count} {name}" for name, count in sorted(counts.items(), key=lambda item: -item[1])]
    none = sum(not head.reading.labels and not head.closed for head in model.heads)
    said.append(f"{none} without a label")
    if model.kind == "sparse":
        said.append(f"{len(model.closed)} closed")
    return f"{counted(len(model.heads), 'head')}: " + ", ".join(said)
