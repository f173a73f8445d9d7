"""attnprune inspect PATH"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from attnprune.cli.given import refuse, refuse_others
from attnprune.cli.options import AllowMismatch, Base, Json, Quiet, Revision
from attnprune.cli.output import out


def inspect(
    context: typer.Context,
    path: Annotated[str, typer.Argument(help="Sidecar or merged folder, or Hub repository.")],
    text: Annotated[
        str | None,
        typer.Option("--text", help="Show which edges stay open on this text, the busiest heads first. Default: none."),
    ] = None,
    layer: Annotated[int | None, typer.Option("--layer", help="With --text: only this layer. Default: all.")] = None,
    head: Annotated[int | None, typer.Option("--head", help="With --text: only this head. Default: all.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="With --text: every head and its strongest edges.")] = False,
    limit: Annotated[int, typer.Option("--limit", help="With --all, --layer, --head: edges per head.", min=1)] = 8,
    save_mask: Annotated[
        Path | None,
        typer.Option("--save-mask", help="With --text: write its edges as a bit mask to this new file. Default: none."),
    ] = None,
    damage: Annotated[
        bool, typer.Option("--damage", help="Show where it lost something, as eval --damage measured it.")
    ] = False,
    runtime: Annotated[
        bool, typer.Option("--runtime", help="Show which attention implementation runs here, and why.")
    ] = False,
    revision: Revision = None,
    base: Base = None,
    allow_base_mismatch: AllowMismatch = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what a sidecar learned: outcome, density of every head, distances; with --text the edges of a text."""
    out.configure(json=as_json, quiet=quiet)
    if damage:
        refuse_others(context, "--damage: shows a record", ("path", "damage", "revision", "as_json", "quiet"))
    if runtime:
        able = ("path", "runtime", "revision", "base", "allow_base_mismatch", "as_json", "quiet")
        refuse_others(context, "--runtime: runs no text", able)
    if text is None:
        refuse(context, "without --text", "layer", "head", "everything", "limit", "save_mask")
    if text is None and not runtime:
        refuse(context, "without --text or --runtime", "base", "allow_base_mismatch")
    is_chosen = everything or layer is not None or head is not None
    if not is_chosen:
        refuse(context, "without --all, --layer or --head", "limit")
    from attnprune.errors import InputError
    from attnprune.sidecar import masks
    from attnprune.sidecar.folder import open_artefact
    from attnprune.sidecar.hub import locate

    folder = locate(path, revision, weights=runtime or text is not None)
    sidecar = open_artefact(folder)
    if save_mask is not None:
        masks.check_target(save_mask)
    if damage:
        from attnprune.report.damage import as_data as damage_data
        from attnprune.report.damage import render as damage_tables
        from attnprune.sidecar.damage import read_damage

        found_damage = read_damage(sidecar)
        out.result(damage_data(sidecar, found_damage), *damage_tables(sidecar, found_damage))
        return
    if runtime:
        _show_backends(folder, base, allow_base_mismatch)
        return
    if text is None:
        from attnprune.report.sidecar import summary, summary_data

        data, shown = _frontier(folder)
        out.result(summary_data(sidecar) | data, *summary(sidecar), *shown)
        return
    from attnprune.report.edges import as_data, render, summary
    from attnprune.sidecar.edges import open_edges

    heads = sidecar.manifest.gate.heads
    if layer is not None and not 0 <= layer < len(heads):
        raise InputError(f"--layer: {layer} is not within 0 and {len(heads) - 1}")
    if head is not None and not 0 <= head < max(heads):
        raise InputError(f"--head: {head} is not within 0 and {max(heads) - 1}")
    from attnprune.sidecar.loading import load

    model, tokenizer = load(folder, base, allow_base_mismatch=allow_base_mismatch)
    found = open_edges(model, tokenizer, text)
    chosen = [e for e in found.edges if layer in (None, e.layer) and head in (None, e.head)]
    if save_mask is not None:
        masks.save(save_mask, found.mask(heads), found.input_ids)
        out.note(f"mask of all heads written to {save_mask}")
    lines = render(found, chosen, limit) if is_chosen else summary(found, sidecar.manifest.result)
    out.result(as_data(found, chosen), *lines)


def _frontier(folder: Path) -> tuple[dict[str, Any], list[Any]]:
    """What there is to show of the frontier that a sidecar belongs to: (for JSON, for a terminal)."""
    from attnprune.report.frontier import frontier_data, frontier_table
    from attnprune.runs.frontier import read_frontier

    found = read_frontier(folder)
    if found is None:
        return {}, []
    points, place = found
    return {"frontier": frontier_data(points), "place": place}, ["", frontier_table(points, place)]


def _show_backends(folder: Path, base: str | None, allow_base_mismatch: bool) -> None:
    from attnprune.attention.backends import backends
    from attnprune.report.backends import as_data, render
    from attnprune.sidecar.bases import pick_device
    from attnprune.sidecar.loading import load

    model, _ = load(folder, base, device=pick_device("auto"), allow_base_mismatch=allow_base_mismatch)
    found = backends(model)
    out.result(as_data(model, found), render(model, found))
