"""What a push is about to do, as a table and as a JSON-ready dictionary."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

from attnprune.report.tables import facts_table
from attnprune.units import size

if TYPE_CHECKING:
    from attnprune.publish.plan import Plan as PushPlan


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
        "files": {file.name: {"size": file.size, "state": file.state} for file in plan.files},
        "deleted": plan.deletions,
        "card": plan.card,
    }


def push_table(plan: PushPlan) -> Table:
    """What a push is about to do."""
    where = f"{plan.repo}, {'new' if plan.parent is None else 'existing'} repository"
    if plan.private and plan.parent is None:
        where += ", private"
    rows = [("repository", where), ("revision", plan.branch + (", new branch" if plan.new_branch else ""))]
    if plan.create_pr:
        rows.append(("", "as a pull request"))
    rows += [(file.state, f"{file.name} ({size(file.size)})") for file in plan.files]
    rows += [("deleted", name) for name in plan.deletions]
    rows.append(("card", _CARDS[plan.card]))
    total = sum(file.size for file in plan.changes)
    return facts_table("Push", [*rows, ("to send", f"{len(plan.changes)} files, {size(total)}")])
