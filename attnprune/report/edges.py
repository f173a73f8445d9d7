"""The open edges of a text: which heads do most, each head's edges, and everything for JSON."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from attnprune.units import counted, percent

if TYPE_CHECKING:
    from attnprune.sidecar.edges import Edge, TextEdges
    from attnprune.sidecar.format import ResultEntry

_SUBSCRIPT = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
HEADS = 12  # rows of the summary
EXAMPLES = 3  # edges in a row of the summary, as far as they fit
NEAR = 4  # tokens back, at most
NEAR_KIND, FAR_KIND = f"1-{NEAR} back", "further back"
BETWEEN = (NEAR_KIND, FAR_KIND)  # neither a query's own token nor the first, which every query can see

Heads = dict[tuple[int, int], list["Edge"]]


def as_data(found: TextEdges, chosen: list[Edge]) -> dict[str, Any]:
    """For JSON."""
    return {"tokens": found.tokens, "visible_edges": found.visible, "edges": [asdict(edge) for edge in chosen]}


def render(found: TextEdges, chosen: list[Edge], limit: int) -> list[Any]:
    """A table: one row per head, its strongest edges as `query ← key`."""
    if not chosen:
        return [headline(found), "", "none in this selection"]
    table = Table(title="open edges: query ← key, positions as subscripts (weight)", box=None, title_justify="left")
    for name, justify in (("head", "right"), ("edges", "right"), ("strongest", "left")):
        table.add_column(name, justify=justify, header_style="dim")  # pyright: ignore[reportArgumentType]
    for (layer, head), edges in by_head(chosen).items():
        more = f"  [dim]+{len(edges) - limit}[/]" if len(edges) > limit else ""
        table.add_row(f"{layer}.{head}", str(len(edges)), _strongest(found, edges, limit) + more)
    return [headline(found), "", table]


def summary(found: TextEdges, result: ResultEntry) -> list[Any]:
    """What is open on this text and why it is more than on long ones, then the heads that pass most on."""
    heads = by_head(found.edges)
    lines: list[Any] = [headline(found), *_kinds(found, result)]
    if not heads:
        return lines
    between = {name: [edge for edge in edges if _kind(edge) in BETWEEN] for name, edges in heads.items()}
    moved = {name: sum(edge.weight for edge in edges) / len(found.tokens) for name, edges in between.items()}
    ranked = sorted(heads, key=lambda name: (-moved[name], name))[:HEADS]
    table = Table(title="heads that read most from earlier tokens", box=None, title_justify="left", expand=True)
    for name in ("head", "edges", "weight", "mostly"):
        table.add_column(name, justify="left" if name == "mostly" else "right", header_style="dim", no_wrap=True)
    table.add_column("strongest: query ← key (weight)", header_style="dim", no_wrap=True, overflow="ellipsis", ratio=1)
    for name in ranked:
        edges = heads[name]
        kind, count = Counter(_kind(edge) for edge in edges).most_common(1)[0]
        mostly = f"{kind} {_whole(count, len(edges))}"
        strongest = _strongest(found, between[name] or edges, EXAMPLES)
        table.add_row(f"{name[0]}.{name[1]}", str(len(edges)), f"{moved[name]:.2f}", mostly, strongest)
    rest = len(heads) - len(ranked)
    lines += ["", table]
    if rest:
        lines.append(f"and {counted(rest, 'more head')} with open edges: --all, --layer, --head list them")
    return [*lines, "weight: attention of a query on tokens other than itself and the first, of 1"]


def headline(found: TextEdges) -> str:
    """How much is open."""
    share = len(found.edges) / found.visible
    tokens = len(found.tokens)
    edges = f"{len(found.edges):,} of {found.visible:,} edges open"
    return f"{counted(tokens, 'token')}, {edges} ({percent(share)} at T = {tokens})"


def by_head(edges: list[Edge]) -> Heads:
    """The edges of each (layer, head) that has some."""
    heads: Heads = defaultdict(list)
    for edge in edges:
        heads[edge.layer, edge.head].append(edge)
    return heads


def _kinds(found: TextEdges, result: ResultEntry) -> list[str]:
    """Density falls with the length, since most open edges are near: a short text has few others."""
    counts = Counter(_kind(edge) for edge in found.edges)
    parts = ", ".join(f"{kind} {_whole(count, len(found.edges))}" for kind, count in counts.most_common())
    stated = f"on held-out text {percent(result.density)} at T = {result.seq_len}"
    if result.density < len(found.edges) / found.visible / 2:
        stated += ", where most pairs are far apart and closed"
    return [f"of these {parts}", stated] if parts else [stated]


def _whole(count: int, total: int) -> str:
    return f"{100 * count / total:.0f} %"


def _kind(edge: Edge) -> str:
    if edge.query == edge.key:
        return "self"
    if edge.key == 0:
        return "first token"
    return NEAR_KIND if edge.query - edge.key <= NEAR else FAR_KIND


def _strongest(found: TextEdges, edges: list[Edge], limit: int) -> str:
    strongest = sorted(edges, key=lambda edge: -edge.weight)[:limit]
    return "  ".join(f"{_token(found, e.query)} ← {_token(found, e.key)} [dim]({e.weight:.2f})[/]" for e in strongest)


def _token(found: TextEdges, position: int) -> str:
    text = found.tokens[position]
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return f"[cyan]{escape(shown.replace(' ', '·'))}[/][dim]{str(position).translate(_SUBSCRIPT)}[/]"
