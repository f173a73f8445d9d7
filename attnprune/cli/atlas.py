"""attnprune atlas MODEL --data TEXT"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from attnprune.cli.options import Base, Device, Json, Quiet
from attnprune.cli.output import command_line, out


def atlas(
    model: Annotated[str, typer.Argument(help="Sidecar or merged folder, base model, Hub name, .gguf file or 'demo'.")],
    data: Annotated[
        list[str],
        typer.Option("--data", help="Text to look at: file, folder, pattern or Hub data set (repeatable)."),
    ],
    tokens: Annotated[int, typer.Option("--tokens", help="At most this many tokens of the text.", min=2)] = 16_384,
    seq_len: Annotated[
        int,
        typer.Option(
            "--seq-len", help="Tokens per block, up to 1,024. 0: as the sparse model was measured, else 512.", min=0
        ),
    ] = 0,
    text_field: Annotated[
        str, typer.Option("--text-field", help="Column of text or chat messages; without a column text, messages.")
    ] = "text",
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
    from attnprune.files import check_new_folder

    if output is not None:
        check_new_folder(output)
    from attnprune.heads.run import atlas as describe
    from attnprune.report.atlases import summary
    from attnprune.report.circuits import Watching

    with Watching(out.stderr, live=out.live, quiet=out.quiet) as watch:
        result = describe(
            model, data, base=base, dense=dense, tokens=tokens, seq_len=seq_len, text_field=text_field, device=device,
            watch=watch, command=command_line(),
        )  # fmt: skip
    if output is not None:
        from attnprune.files import write_new_folder
        from attnprune.report.atlas_page import render_page

        record = result.model_dump_json(indent=1) + "\n"
        write_new_folder(output, {"atlas.json": record, "atlas.html": render_page(result)})
    written = [] if output is None else [f"written to {output}"]
    out.result(result.model_dump(mode="json"), *summary(result), *written)
