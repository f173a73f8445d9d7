"""attnprune push DIR USER/NAME"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnprune.cli.options import Base, Json, Quiet
from attnprune.cli.output import out
from attnprune.errors import InputError
from attnprune.units import counted

if TYPE_CHECKING:
    from attnprune.publish.plan import Plan


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Sidecar or merged folder.")],
    repo: Annotated[str, typer.Argument(metavar="USER/NAME", help="Hub repository; created if it is not there.")],
    merged: Annotated[bool, typer.Option("--merged", help="Merge the sidecar into its base and push that.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Create the repository as private.")] = False,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")] = False,
    revision: Annotated[str, typer.Option("--revision", help="Branch; created if it is not there.")] = "main",
    base_model: Annotated[
        str | None,
        typer.Option("--base-model", help="Hub id of the base, if it was a local folder or .gguf file. Default: none."),
    ] = None,
    base: Base = None,
    replace: Annotated[
        bool,
        typer.Option("--replace", help="Replace another run that the repository holds; delete another model."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Push a sidecar (or its merged form) to the Hub: a plan first, then the listed files only, then a check."""
    out.configure(json=as_json, quiet=quiet)
    from attnprune.api.commands import push as send
    from attnprune.report.push import push_data, push_table

    if base is not None and not merged:
        raise InputError("--base: goes with --merged", hint="the base's name on the Hub is --base-model")
    facts: dict[str, Any] = {}

    def show(plan: Plan) -> bool:
        facts.update(push_data(plan))  # now: a merged form lies in a temporary folder
        out.show(push_table(plan))
        return not dry_run

    done = send(
        folder, repo, merged=merged, base=base, base_model=base_model, private=private, create_pr=create_pr,
        revision=revision, replace=replace, on_plan=show,
    )  # fmt: skip
    if done is None:
        out.result(facts)
        return
    facts |= {"commit": done.commit, "url": done.url, "sent": done.sent}
    sent = f"{counted(done.sent, 'file')} sent"
    outcome = sent if done.sent or facts["deleted"] else "nothing to send, all files are there"
    out.result(facts, f"{outcome}; verified: {done.url}", f"load it with revision {done.commit}")
