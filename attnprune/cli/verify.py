"""attnprune verify PATH"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from attnprune.cli.options import Base, Json, Quiet, Revision
from attnprune.cli.output import out
from attnprune.errors import printable

if TYPE_CHECKING:
    from attnprune.sidecar.verify import Level


def verify(
    path: Annotated[str, typer.Argument(help="Sidecar or merged folder, or Hub repository.")],
    revision: Revision = None,
    base: Base = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check everything that can be checked: schema, hashes, tensors, base identity, and the stored probe."""
    out.configure(json=as_json, quiet=quiet)
    from attnprune.api.commands import verify as check

    def passed(level: Level) -> None:
        out.note(f"{level.name}: ok, {level.detail}")

    levels = check(path, base=base, revision=revision, on_level=passed)
    facts = [{"level": level.name, "detail": level.detail} for level in levels]
    out.result({"path": path, "verified": True, "levels": facts}, printable(f"{path}: verified"))
