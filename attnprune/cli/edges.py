"""attnprune edges INDEX --key TOKEN --query TOKEN --head L.H --kind KIND"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attnprune.cli.options import Json, Quiet
from attnprune.cli.output import out
from attnprune.errors import InputError

if TYPE_CHECKING:
    from attnprune.heads.store import By


def edges(
    index: Annotated[Path, typer.Argument(help="Folder that `attnprune index` made.")],
    key: Annotated[
        list[str] | None,
        typer.Option(
            "--key", help='Token that is read, with its space: " Mary" (repeatable). Default: any.', show_default=False
        ),
    ] = None,
    query: Annotated[
        list[str] | None,
        typer.Option("--query", help="Token that reads (repeatable). Default: any.", show_default=False),
    ] = None,
    head: Annotated[
        str | None, typer.Option("--head", help="Layer and head: 3.1. Default: any.", show_default=False)
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            "--kind", help="self, first, previous, same, induction or delimiter. Default: any.", show_default=False
        ),
    ] = None,
    by: Annotated[str, typer.Option("--by", help="Rank by count of edges or by their weight.")] = "count",
    top: Annotated[int, typer.Option("--top", help="Rows of each table.", min=1)] = 10,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Ask an index: which heads link two tokens, where a head reads, the strongest edges with text around."""
    out.configure(json=as_json, quiet=quiet)
    from attnprune.heads.store import open_index
    from attnprune.report.edge_index import as_data, render

    filters = {"key": key or None, "query": query or None, "head": _head(head), "kind": kind}
    data = as_data(open_index(index), filters, _order(by), top)
    out.result(data, *render(data))


def _order(by: str) -> By:
    if by not in ("count", "weight"):
        raise InputError(f"--by {by}: is neither count nor weight")
    return by


def _head(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,4})\.(\d{1,4})", text)
    if found is None:
        raise InputError(f"--head {text}: is not LAYER.HEAD", hint="for example --head 3.1")
    return int(found[1]), int(found[2])
