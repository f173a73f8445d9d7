"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Base = Annotated[
    str | None,
    typer.Option("--base", help="Base model: Hub id, folder or .gguf file. Default: the one the sidecar names."),
]
Revision = Annotated[
    str | None, typer.Option("--revision", help="Branch, tag or commit of a Hub repository.", show_default=False)
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
AllowMismatch = Annotated[
    bool, typer.Option("--allow-base-mismatch", help="Accept a base of equal structure with other weights.")
]
