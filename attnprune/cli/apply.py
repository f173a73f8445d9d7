"""attnprune apply [BASE] SIDECAR"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from attnprune.cli.given import refuse
from attnprune.cli.options import AllowMismatch, Base, Json, Quiet, Revision
from attnprune.cli.output import out
from attnprune.errors import InputError


def apply(
    context: typer.Context,
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="[BASE] SIDECAR",
            help="The base model (may be left out) and the sidecar, a folder or Hub repository.",
        ),
    ],
    merge: Annotated[
        Path | None, typer.Option("--merge", help="Write a merged model folder here. Default: none.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="With --merge: float32, bfloat16 or float16. Default: the base's.")
    ] = None,
    revision: Revision = None,
    base: Base = None,
    allow_base_mismatch: AllowMismatch = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, write nothing.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Load SIDECAR onto its base, check the stored probe, and with --merge write an ordinary model folder."""
    out.configure(json=as_json, quiet=quiet)
    if merge is None:
        refuse(context, "without --merge", "dtype")
    if len(paths) > 2:
        raise InputError("apply: takes a base and a sidecar, or a sidecar alone")
    if len(paths) == 2 and base is not None:
        raise InputError(f"--base: {paths[0]} is named as the base already", hint="leave out one of them")
    base, path = (paths[0], paths[1]) if len(paths) == 2 else (base, paths[0])
    from attnprune.files import check_new_folder
    from attnprune.sidecar.folder import check_release_code, open_artefact
    from attnprune.sidecar.hub import locate, shown

    if merge is not None:
        check_new_folder(merge)  # before anything is fetched or anything heavy imported
    folder = locate(path, revision)
    sidecar = open_artefact(folder)
    if sidecar.manifest.merged is not None:
        if merge is not None:
            raise InputError(f"{path}: is merged already")
        check_release_code(folder)
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise InputError(f"--dtype: {dtype!r} is not float32, bfloat16 or float16")
    from attnprune.sidecar import loading
    from attnprune.sidecar.merged import write_merged

    if merge is None or dry_run:
        loading.load(folder, base, allow_base_mismatch=allow_base_mismatch)  # runs the probe
    facts = {"sidecar": str(sidecar.path), "probe_verified": not allow_base_mismatch, "merged": None}
    lines = [f"{shown(folder)}: the stored probe is reproduced" if not allow_base_mismatch else "probe not checked"]
    if merge is not None and not dry_run:
        before = sidecar.manifest.probe
        loaded, same = loading.load_for_merge(folder, base, dtype=dtype, allow_base_mismatch=allow_base_mismatch)
        after = write_merged(*loaded, sidecar, merge, same_dtype=same).probe
        facts |= {"merged": str(merge), "probe_loss": after.loss, "probe_open_edges": after.open_edges}
        lines += [
            f"merged: {merge}",
            f"  probe loss {before.loss:.6f} -> {after.loss:.6f}, open edges {before.open_edges} -> {after.open_edges}",
            f"  load it with: AutoModelForCausalLM.from_pretrained({str(merge)!r}, trust_remote_code=True)",
        ]
    out.result(facts, *lines)
