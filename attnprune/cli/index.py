"""attnprune index MODEL --data TEXT -o INDEX"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from attnprune.cli.options import Base, Device, Json, Quiet
from attnprune.cli.output import command_line, out


def index(
    model: Annotated[str, typer.Argument(help="Sidecar or merged folder, base model, Hub name, .gguf file or 'demo'.")],
    data: Annotated[
        list[str],
        typer.Option("--data", help="Text to look at: file, folder, pattern or Hub data set (repeatable)."),
    ],
    output: Annotated[Path, typer.Option("--out", "-o", help="Folder of the index; one that was begun goes on.")],
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
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Store every open edge of a text, to be asked with `attnprune edges`. Interrupted, the same command goes on."""
    out.configure(json=as_json, quiet=quiet)
    from attnprune.heads.indexing import index as build
    from attnprune.report.circuits import Watching
    from attnprune.report.edge_index import built

    with Watching(out.stderr, live=out.live, quiet=out.quiet) as watch:
        made = build(
            model, data, out=output, base=base, tokens=tokens, seq_len=seq_len, text_field=text_field, device=device,
            watch=watch, command=command_line(),
        )  # fmt: skip
    out.result({**made.record.model_dump(mode="json"), **made.total()}, *built(made))
