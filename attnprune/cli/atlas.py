"""attnprune atlas MODEL --data TEXT"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from attnprune.cli.given import refuse
from attnprune.cli.options import AnyModel, Base, BlockLength, Device, Json, LookedAt, MostTokens, Quiet, TextField
from attnprune.cli.output import command_line, out


def atlas(
    context: typer.Context,
    model: AnyModel,
    data: LookedAt,
    tokens: MostTokens = 16_384,
    seq_len: BlockLength = 0,
    text_field: TextField = "text",
    base: Base = None,
    dense: Annotated[
        bool, typer.Option("--dense/--no-dense", help="Look at the dense base of a sparse model as well.")
    ] = True,
    output: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Write atlas.json and atlas.html here. Default: no files.", show_default=False
        ),
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Describe every head over a text: how often it opens, how far it reads, and what kind of edges it has."""
    out.configure(json=as_json, quiet=quiet)
    if data == ["task"]:
        refuse(context, "with --data task", "seq_len", "text_field")
    from attnprune.files import check_new_folder

    if output is not None:
        check_new_folder(output)
    from attnprune.heads.run import atlas as describe
    from attnprune.report.atlases import summary
    from attnprune.report.circuits import Watching

    with Watching(out.stderr, live=out.live, quiet=out.quiet) as watch:
        result = describe(
            model, tuple(data), base=base, dense=dense, tokens=tokens, seq_len=seq_len, text_field=text_field,
            device=device, watch=watch, command=command_line(),
        )  # fmt: skip
    if output is not None:
        from attnprune.files import write_new_folder
        from attnprune.report.atlas_page import render_page

        record = result.model_dump_json(indent=1) + "\n"
        write_new_folder(output, {"atlas.json": record, "atlas.html": render_page(result)})
    written = [] if output is None else [f"written to {output}"]
    out.result(result.model_dump(mode="json"), *summary(result), *written)
