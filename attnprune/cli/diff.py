"""attnprune diff A B"""

from __future__ import annotations

from typing import Annotated

import typer

from attnprune.cli.options import Json, Quiet
from attnprune.cli.output import out


def diff(
    a: Annotated[str, typer.Argument(help="Base model, sidecar or merged folder, or Hub repository.", metavar="A")],
    b: Annotated[str, typer.Argument(help="Sidecar or merged folder, or Hub repository.", metavar="B")],
    base: Annotated[
        str | None,
        typer.Option("--base", help="Base of A and B, for weights that cannot be compared without it. Default: none."),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", help="Heads and tensors shown.", min=1)] = 8,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what differs between two sparse models of one base, or between the base and a sparse model."""
    out.configure(json=as_json, quiet=quiet)
    from attnprune.api.commands import diff as compare
    from attnprune.report.diff import as_data, render

    found = compare(a, b, base=base)
    out.result(as_data(found), *render(found, limit))
