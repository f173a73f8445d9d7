"""Pushing to the Hub: a plan, then exactly the planned files, then a check of what arrived.

Only files that the manifest lists, the manifest, run.toml, metrics.jsonl, damage.json, a tokenizer (merged form) and
the card are ever sent. Every commit names its parent, so a push that failed anywhere can be repeated: what has arrived
is not sent again, and somebody else's commit in between is noticed instead of overwritten.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from attnprune.errors import AttnPruneError, InputError
from attnprune.publish import card
from attnprune.publish.plan import (
    CARD,
    HubBase,
    Plan,
    PlannedFile,
    listing_of,
    look_up_base,
    make_plan,
    named,
    remote_card,
)
from attnprune.sidecar import format, remote
from attnprune.sidecar.contents import check_files, check_weights
from attnprune.sidecar.folder import Sidecar, check_release_code, is_merged, open_merged, read_manifest
from attnprune.units import percent


@dataclass(frozen=True)
class Pushed:
    """Outcome: `commit` is the one that the card pins, `sent` the number of files that were not there before."""

    repo: str
    commit: str
    url: str
    sent: int


def push(
    folder: str | Path,
    repo: str,
    *,
    base_model: str | None = None,
    private: bool = False,
    create_pr: bool = False,
    branch: str = "main",
    replace: bool = False,
    on_plan: Callable[[Plan], bool] = lambda plan: True,
) -> Pushed | None:
    """Push a sidecar or merged folder to the Hub repository `repo` and verify what arrived.

    Args:
        base_model: Hub id of the base, where the folder was made from a local model.
        replace: the repository may hold another artefact: another run on this base, whose files are replaced, or
            another model, whose files are deleted.
        on_plan: gets the plan before anything is written; False stops there, and the result is None.

    Raises:
        InputError: damaged folder, bad repository name, no login, no name for the base, or another
            artefact in `repo`.
        AttnPruneError: the Hub refused, changed meanwhile or could not be reached; it is safe to repeat.
    """
    remote.check_repo_id(repo)
    if not branch or re.fullmatch("[0-9a-f]{7,40}", branch):
        raise InputError(f"--revision: {branch!r} is not a branch")
    sidecar = _open(Path(folder))
    check_files(sidecar)
    if sidecar.manifest.merged is not None:
        check_weights(sidecar)
    with remote.explained(repo, branch):
        base = look_up_base(sidecar, base_model)
        listing, private_now = listing_of(repo, branch)
        if private and private_now is False:
            raise InputError(f"--private: {repo} exists and is public")
        plan = make_plan(sidecar, base, repo, branch, listing, private=private, create_pr=create_pr)
        wanted = on_plan(plan)
        if plan.replaced is not None and not replace:
            done = "deletes its files" if plan.replaced.is_whole else "replaces its files"
            raise InputError(f"{repo}: holds {plan.replaced.what}", hint=f"--replace {done}")
        if not wanted:
            return None
        _check_login(repo)
        return _carry_out(plan, sidecar, base, listing)


def _open(folder: Path) -> Sidecar:
    """Other files may lie beside a sidecar (.env, training_args.bin): they are not sent, so they do not matter here."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    if is_merged(folder):
        check_release_code(folder)
        if not (folder / "tokenizer_config.json").exists():
            raise InputError(f"{folder}: no tokenizer, so nobody could load it")
        return open_merged(folder)
    if not (folder / format.MANIFEST_FILE).exists():
        raise InputError(f"{folder}: no {format.MANIFEST_FILE}, so neither a finished sidecar nor a merged folder")
    return Sidecar(folder, read_manifest(folder))


def _check_login(repo: str) -> None:
    from huggingface_hub import get_token

    if get_token() is None:
        raise InputError(f"{repo}: not logged in", hint="set HF_TOKEN or run: hf auth login")


def _carry_out(plan: Plan, sidecar: Sidecar, base: HubBase, listing: remote.Listing | None) -> Pushed:
    from huggingface_hub import HfApi

    api, parent = HfApi(library_name="attnprune"), plan.parent
    if parent is None:
        remote.retrying(api.create_repo, plan.repo, private=plan.private or None)
        created = remote.list_files(plan.repo)
        if set(created.files) - {".gitattributes"}:
            raise AttnPruneError(f"{plan.repo}: somebody else changed it meanwhile", hint="try again")
        parent = created.sha
    if plan.new_branch:
        remote.retrying(api.create_branch, plan.repo, branch=plan.branch, revision=parent, exist_ok=True)
    target = _Target(plan.repo, plan.branch, parent, plan.create_pr)
    if plan.changes or plan.deletions:
        target = _commit(api, target, f"attnprune: {_title(sidecar)}", plan.changes, plan.deletions)
        pinned = target.parent
    else:
        pinned = _pinned(plan, listing)
    assert pinned is not None
    expected = {file.name: file.content for file in plan.files}
    if plan.card == "written":
        text = card.model_card(_with(sidecar, base), plan.repo, pinned, base.repo_id, base.license).encode()
        expected[CARD] = text
        there = remote.list_files(plan.repo, target.parent or target.revision).files.get(CARD)
        file = PlannedFile(CARD, text, there)
        if file.state != "unchanged":
            target = _commit(api, target, "attnprune: model card", [file], [])
    _check_arrived(plan.repo, target, expected)
    return Pushed(plan.repo, pinned, target.url or f"{api.endpoint}/{plan.repo}", len(plan.changes))


def _with(sidecar: Sidecar, base: HubBase) -> Sidecar:
    return Sidecar(sidecar.path, named(sidecar.manifest, base))


def _title(sidecar: Sidecar) -> str:
    form = "sidecar" if sidecar.manifest.merged is None else "merged model"
    return f"{form} at density {percent(sidecar.manifest.result.density)}"


@dataclass(frozen=True)
class _Target:
    """Where the next commit goes: `revision` is the branch or pull request, `parent` its newest commit."""

    repo: str
    revision: str
    parent: str | None
    create_pr: bool
    url: str | None = None


def _commit(api: Any, target: _Target, title: str, files: list[PlannedFile], deletions: list[str]) -> _Target:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    operations: list[Any] = [
        CommitOperationAdd(f.name, BytesIO(f.content) if isinstance(f.content, bytes) else f.content) for f in files
    ]
    operations += [CommitOperationDelete(name) for name in deletions]
    done = remote.retrying(
        api.create_commit, target.repo, operations, commit_message=title, revision=target.revision,
        parent_commit=target.parent, create_pr=target.create_pr,
    )  # fmt: skip
    if target.create_pr:
        return _Target(target.repo, done.pr_revision, done.oid, create_pr=False, url=done.pr_url)
    return _Target(target.repo, target.revision, done.oid, create_pr=False, url=target.url)


def _pinned(plan: Plan, listing: remote.Listing | None) -> str:
    """The commit that the card names: the one it already names if this model's files are there, else the newest."""
    from huggingface_hub.errors import HfHubHTTPError

    assert listing is not None
    for commit in re.findall(r'"([0-9a-f]{40})"', remote_card(plan.repo, listing.sha))[:1]:
        try:
            there = remote.list_files(plan.repo, commit).files
        except HfHubHTTPError:
            break
        if all(PlannedFile(file.name, file.content, there.get(file.name)).state == "unchanged" for file in plan.files):
            return commit
    return listing.sha


def _check_arrived(repo: str, target: _Target, expected: dict[str, Path | bytes]) -> None:
    """Compare sizes and hashes on the Hub with what was sent.

    Raises:
        AttnPruneError: naming the file that differs.
    """
    there = remote.list_files(repo, target.parent or target.revision).files
    for name, content in expected.items():
        if PlannedFile(name, content, there.get(name)).state != "unchanged":
            raise AttnPruneError(f"{repo}: {name} on the Hub is not what was sent", hint="push again")
