"""attnprune index MODEL --data TEXT -o INDEX"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from attnprune.cli.given import refuse
from attnprune.cli.options import AnyModel, Base, BlockLength, Device, Json, LookedAt, MostTokens, Quiet, TextField
from attnprune.cli.output import command_line, out


def index(
    context: typer.Context,
    model: AnyModel,
    data: LookedAt,
    output: Annotated[Path, typer.Option("--out", "-o", help="Folder of the index; one that was begun goes on.")],
    tokens: MostTokens = 16_384,
    seq_len: BlockLength = 0,
    text_field: TextField = "text",
    base: Base = None,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Store every open edge of a text, to be asked with `attnprune edges`. Interrupted, the same command goes on."""
    out.configure(json=as_json, quiet=quiet)
    if data == ["task"]:
        refuse(context, "with --data task", "seq_len", "text_field")
    from attnprune.heads.indexing import index as build
    from attnprune.report.circuits import Watching
    from attnprune.report.edge_index import built

    with Watching(out.stderr, live=out.live, quiet=out.quiet) as watch:
        made = build(
            model, tuple(data), out=output, base=base, tokens=tokens, seq_len=seq_len, text_field=text_field,
            device=device, watch=watch, on_note=out.note, command=command_line(),
        )  # fmt: skip
    out.result({**made.record.model_dump(mode="json"), **made.total()}, *built(made))
