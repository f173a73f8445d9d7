"""attnprune verify PATH"""

from __future__ import annotations

from typing import Annotated

import typer

from attnprune.cli.options import Base, Json, Quiet, Revision
from attnprune.cli.output import out
from attnprune.errors import printable


def verify(
    path: Annotated[str, typer.Argument(help="Sidecar or merged folder, or Hub repository.")],
    revision: Revision = None,
    base: Base = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check everything that can be checked: schema, hashes, tensors, base identity, and the stored probe."""
    out.configure(json=as_json, quiet=quiet)
    from attnprune.sidecar.hub import locate
    from attnprune.sidecar.verify import climb

    levels = []
    for level in climb(locate(path, revision), base):
        levels.append(level)
        if level.error is None:
            out.note(f"{level.name}: ok, {level.detail}")
    failed = levels[-1].error
    if failed is not None:
        failed.message = f"{levels[-1].name}: {failed.message}"
        raise failed
    facts = [{"level": level.name, "detail": level.detail} for level in levels]
    out.result({"path": path, "verified": True, "levels": facts}, printable(f"{path}: verified"))
