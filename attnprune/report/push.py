"""What a push is about to do, as a table and as a JSON-ready dictionary."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

from attnprune.report.tables import facts_table
from attnprune.units import counted, percent, size

if TYPE_CHECKING:
    from attnprune.publish.plan import Plan as PushPlan
    from attnprune.publish.plan import PlannedFile
    from attnprune.sidecar.format.manifest import ResultEntry


_CARDS = {
    "written": "README.md, written last: it names the commit",
    "from the folder": "README.md of the folder",
    "kept": "README.md on the Hub was not written by attnprune and is kept",
}


def push_data(plan: PushPlan) -> dict[str, Any]:
    """A push plan for JSON."""
    return {
        "repo": plan.repo,
        "revision": plan.branch,
        "parent": plan.parent,
        "files": {file.name: _file_data(file) for file in plan.files},
        "deleted": plan.deletions,
        "replaced": plan.replaced and {"what": plan.replaced.what, "result": _result_data(plan.replaced.result)},
        "result": _result_data(plan.result),
        "card": plan.card,
    }


def _file_data(file: PlannedFile) -> dict[str, Any]:
    facts = {"size": file.size, "state": file.state}
    return facts if file.found is None else facts | {"size_there": file.found.size}


def _result_data(result: ResultEntry | None) -> dict[str, Any] | None:
    return result and {key: getattr(result, key) for key in ("density", "loss", "seq_len", "steps", "seed")}


def push_table(plan: PushPlan) -> Table:
    """What a push is about to do."""
    where = f"{plan.repo}, {'new' if plan.parent is None else 'existing'} repository"
    if plan.private and plan.parent is None:
        where += ", private"
    rows = [("repository", where), ("revision", plan.branch + (", new branch" if plan.new_branch else ""))]
    if plan.create_pr:
        rows.append(("", "as a pull request"))
    if plan.replaced is not None:
        rows += [("replaces", f"{plan.replaced.what}{_outcome(plan.replaced.result)}"), ("by", _form(plan))]
    rows += [(file.state, f"{file.name} ({_sizes(file)})") for file in plan.files]
    rows += [("deleted", name) for name in plan.deletions]
    rows.append(("card", _CARDS[plan.card]))
    total = sum(file.size for file in plan.changes)
    return facts_table("Push", [*rows, ("to send", f"{counted(len(plan.changes), 'file')}, {size(total)}")])


def _form(plan: PushPlan) -> str:
    form = "a merged model" if "config.json" in {file.name for file in plan.files} else "a sidecar"
    return f"{form}{_outcome(plan.result)}"


def _outcome(result: ResultEntry | None) -> str:
    if result is None:
        return ""
    measured = f"density {percent(result.density)}, loss {result.loss:.4f} at T = {result.seq_len}"
    return f": {measured}, {result.steps:,} steps, seed {result.seed}"


def _sizes(file: PlannedFile) -> str:
    if file.found is None or file.state == "unchanged":
        return size(file.size)
    return f"{size(file.found.size)} replaced by {size(file.size)}"
