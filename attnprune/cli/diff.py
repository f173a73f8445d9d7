"""attnprune diff A B"""

from __future__ import annotations

from typing import Annotated

import typer

from attnprune.cli.options import Json, Quiet
from attnprune.cli.output import out


def diff(
    a: Annotated[str, typer.Argument(help="Sidecar or merged folder, or the base model.", metavar="A")],
    b: Annotated[str, typer.Argument(help="Sidecar or merged folder.", metavar="B")],
    limit: Annotated[int, typer.Option("--limit", help="Heads and tensors shown.", min=1)] = 8,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what differs between two sparse models of one base, or between the base and a sparse model."""
    out.configure(json=as_json, quiet=quiet)
    from attnprune import diff as difference

    found = difference.compare(a, b)
    out.result(difference.as_data(found), *difference.render(found, limit))
