"""attnprune trace MODEL --text TEXT"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from attnprune.cli.options import AnyModel, Base, Device, Json, Quiet
from attnprune.cli.output import command_line, out
from attnprune.errors import InputError


def trace(
    model: AnyModel,
    text: Annotated[str, typer.Option("--text", help="The text; what follows it is predicted.")],
    token: Annotated[
        int, typer.Option("--token", help="Trace the prediction behind this token: 0 the first, -1 the last.")
    ] = -1,
    target: Annotated[
        float, typer.Option("--target", help="Share of the prediction to keep, above 0 and up to 1.")
    ] = 0.9,
    against: Annotated[
        str | None,
        typer.Option(
            "--against", help="Token to compare the predicted one with. Default: the runner-up.", show_default=False
        ),
    ] = None,
    base: Base = None,
    dense: Annotated[
        bool, typer.Option("--dense/--no-dense", help="Trace the dense base of a sparse model as well.")
    ] = True,
    explain: Annotated[
        int, typer.Option("--explain", help="Say of so many messages why their edges are open.", min=0)
    ] = 0,
    seed: Annotated[int, typer.Option("--seed", help="Of the random sets.", min=0)] = 0,
    output: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Write trace.json, trace.html, trace.png here. Default: no files.", show_default=False
        ),
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find the smallest set of attention messages that keeps one prediction, all others closed exactly."""
    out.configure(json=as_json, quiet=quiet)
    from attnprune.files import check_new_folder

    if not 0 < target <= 1:
        raise InputError(f"--target {target:g}: is not above 0 and up to 1")
    if not text:
        raise InputError("--text: is empty")
    if output is not None:
        check_new_folder(output)
    from attnprune.report.circuits import Watching
    from attnprune.report.traces import summary
    from attnprune.tracing.run import trace as find

    with Watching(out.stderr, live=out.live, quiet=out.quiet) as watch:
        result = find(
            model, text, token=token, target=target, against=against, base=base, dense=dense, explain=explain,
            device=device, seed=seed, watch=watch, command=command_line(),
        )  # fmt: skip
    if output is not None:
        from attnprune.files import write_new_folder
        from attnprune.report.trace_page import render_page
        from attnprune.report.trace_picture import trace_png

        record = result.model_dump_json(indent=1) + "\n"
        write_new_folder(
            output, {"trace.json": record, "trace.html": render_page(result), "trace.png": trace_png(result)}
        )
    written = [] if output is None else [f"written to {output}"]
    out.result(result.model_dump(mode="json"), *summary(result), *written)
