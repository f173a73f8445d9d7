"""Pushing to the Hub: a plan, then exactly the planned files, then a check of what arrived.

Only files that the manifest lists, the manifest, run.toml, metrics.jsonl, a tokenizer (merged form) and the card are
ever sent. Every commit names its parent, so a push that failed anywhere can be repeated: what has arrived is not sent
again, and somebody else's commit in between is noticed instead of overwritten.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

from attnprune import format, hub
from attnprune.errors import AttnPruneError, InputError
from attnprune.report import card
from attnprune.report.terminal import percent
from attnprune.runs import METRICS_FILE, RUN_FILE, load_run_file, without_local_paths
from attnprune.sidecar import Sidecar, has_release_code, is_merged, open_merged, read_manifest

CARD = "README.md"
# A merged folder's files that its manifest does not list: transformers' own names for configuration and tokenizer.
TOKENIZER_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "chat_template.jinja",
)  # fmt: skip


@dataclass(frozen=True)
class PlannedFile:
    """A file to send: from disk, or with content made here."""

    name: str
    content: Path | bytes
    state: Literal["new", "changed", "unchanged"]

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


@dataclass(frozen=True)
class Plan:
    """What a push will do. `parent` is the commit it builds on, None where the repository does not exist yet."""

    repo: str
    branch: str
    parent: str | None
    new_branch: bool
    private: bool
    create_pr: bool
    files: list[PlannedFile]
    deletions: list[str]
    card: Literal["written", "kept", "from the folder"]

    @property
    def changes(self) -> list[PlannedFile]:
        """The files that are not there yet."""
        return [file for file in self.files if file.state != "unchanged"]


@dataclass(frozen=True)
class Pushed:
    """Outcome: `commit` is the one that the card pins, `sent` the number of files that were not there before."""

    repo: str
    commit: str
    url: str
    sent: int


@dataclass(frozen=True)
class _Base:
    """The base model as the card names it, and its commit and license on the Hub."""

    repo_id: str | None
    commit: str | None = None
    license: str | None = None


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
        replace: the repository may hold another model; its files are deleted.
        on_plan: gets the plan before anything is written; False stops there, and the result is None.

    Raises:
        InputError: damaged folder, bad repository name, no login, no name for the base, or another model in `repo`.
        AttnPruneError: the Hub refused, changed meanwhile or could not be reached; it is safe to repeat.
    """
    hub.check_repo_id(repo)
    if not branch or re.fullmatch("[0-9a-f]{7,40}", branch):
        raise InputError(f"--revision: {branch!r} is not a branch")
    sidecar = _open(Path(folder))
    for name in sidecar.manifest.files:
        sidecar.read(name)
    with hub.explained(repo, branch):
        base = _base(sidecar, base_model)
        listing, private_now = _listing(repo, branch)
        if private and private_now is False:
            raise InputError(f"--private: {repo} exists and is public")
        plan = _plan(sidecar, base, repo, branch, listing, private=private, create_pr=create_pr, replace=replace)
        if not on_plan(plan):
            return None
        _check_login(repo)
        return _carry_out(plan, sidecar, base, listing)


def _open(folder: Path) -> Sidecar:
    """Other files may lie in the folder (.env, training_args.bin): they are not sent, so they do not matter here."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    if is_merged(folder):
        if not has_release_code(folder):
            raise InputError(f"{folder / format.CODE_FILE}: code differs from the release")
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


def base_name(sidecar: Sidecar, base_model: str | None) -> str | None:
    """The Hub id of the base, `base_model` where it was a local one; None for the bundled model.

    Raises:
        InputError: a local base without a Hub id, or another one than the sidecar names.
    """
    entry = sidecar.manifest.base
    if base_model is not None:
        hub.check_repo_id(base_model, owner=False)
        known = entry.repo_id if entry.kind == "hub" else "the bundled model" if entry.kind == "bundled" else base_model
        if base_model != known:
            raise InputError(f"--base-model: {sidecar.path} was made from {known}, not {base_model}")
    elif entry.repo_id is None and entry.kind != "bundled":
        what = "a .gguf file" if entry.kind == "gguf" else "a local folder"
        raise InputError(f"{sidecar.path}: made from {what}", hint="name its base on the Hub: --base-model USER/NAME")
    return base_model or entry.repo_id


def _base(sidecar: Sidecar, base_model: str | None) -> _Base:
    """Look the base up.

    Raises:
        InputError: as `base_name`, or one that the Hub does not have, or that is of another family.
    """
    named, entry = base_name(sidecar, base_model), sidecar.manifest.base
    if named is None:
        return _Base(None)
    with hub.explained(named, entry.revision):
        info = hub.model_info(named, entry.revision)
    family = (info.config or {}).get("model_type", entry.model_type)
    if entry.kind == "local" and family != entry.model_type:
        raise InputError(f"--base-model: {named} is a {family} model, not {entry.model_type}")
    data: Any = info.card_data
    license = getattr(data, "license", None)
    return _Base(named, info.sha, license if isinstance(license, str) else None)


def _listing(repo: str, branch: str) -> tuple[hub.Listing | None, bool | None]:
    """(files at the branch, whether it is private); (None, None) for a repository that is not there yet."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        private = hub.model_info(repo).private
    except RepositoryNotFoundError:
        return None, None
    try:
        return hub.list_files(repo, branch), private
    except RevisionNotFoundError:
        return hub.list_files(repo, "main"), private


def _plan(
    sidecar: Sidecar,
    base: _Base,
    repo: str,
    branch: str,
    listing: hub.Listing | None,
    *,
    private: bool,
    create_pr: bool,
    replace: bool,
) -> Plan:
    present = {} if listing is None else listing.files
    there = _remote_manifest(listing)
    foreign = _foreign(sidecar, listing, there)
    if foreign is not None and not replace:
        raise InputError(f"{repo}: holds {foreign}", hint="--replace deletes its files")
    contents = dict(_contents(sidecar, base))
    own_card = CARD in contents
    keep = {CARD, ".gitattributes", *contents}
    # What the model in the repository consists of now: files that are not sent again are deleted.
    stale = present if foreign is not None else {*there.files, card.PICTURE} if there is not None else ()
    new_branch = branch != "main" and (listing is None or _branch_is_missing(repo, branch))
    if new_branch and create_pr:
        raise InputError(f"--create-pr: {repo} has no branch {branch!r}")
    kept = not own_card and CARD in present and foreign is None and not _is_generated(repo, listing)
    deletions = sorted(name for name in stale if name in present and name not in keep)
    hub.check_strangers(repo, {*present, *contents} - set(deletions), merged=sidecar.manifest.merged is not None)
    return Plan(
        repo=repo,
        branch=branch,
        parent=None if listing is None else listing.sha,
        new_branch=new_branch,
        private=private,
        create_pr=create_pr,
        files=[PlannedFile(n, c, _state(c, present.get(n))) for n, c in contents.items()],
        deletions=deletions,
        card="from the folder" if own_card else "kept" if kept else "written",
    )


def _branch_is_missing(repo: str, branch: str) -> bool:
    from huggingface_hub import HfApi

    if branch == "main" or branch.startswith("refs/pr/"):
        return False
    refs = hub.retrying(HfApi(library_name="attnprune").list_repo_refs, repo)
    if branch in {ref.name for ref in refs.tags}:
        raise InputError(f"--revision: {branch} is a tag of {repo}", hint="push to a branch")
    return branch not in {ref.name for ref in refs.branches}


def _state(content: Path | bytes, found: hub.RemoteFile | None) -> Literal["new", "changed", "unchanged"]:
    if found is None:
        return "new"
    return "unchanged" if found.holds(content) else "changed"


def _contents(sidecar: Sidecar, base: _Base) -> Iterator[tuple[str, Path | bytes]]:
    """Every file to send except a generated card, by its name in the repository."""
    folder, manifest = sidecar.path, _named(sidecar.manifest, base)
    if manifest.merged is None:
        yield format.MANIFEST_FILE, manifest.to_json().encode()
        if (folder / RUN_FILE).is_file():
            yield RUN_FILE, without_local_paths(load_run_file(folder / RUN_FILE)).to_toml().encode()
        optional = (METRICS_FILE, CARD)
    else:
        values = format.parse_json(format.read_regular(folder, "config.json", format.MAX_JSON_BYTES), "config.json")
        values["attnprune"] = json.loads(manifest.to_json())
        yield "config.json", _without_local_paths(values)
        optional = (*TOKENIZER_FILES, CARD)
    for name in manifest.files:
        yield name, folder / name
    for name in optional:
        if (folder / name).exists():
            raw = format.read_regular(folder, name)  # no link out of the folder
            if name == "tokenizer_config.json":
                raw = _without_local_paths(format.parse_json(raw, name, 64 << 20))
            if name != CARD or card.MARK.encode() not in raw:  # a generated card names another repository
                yield name, raw
    yield card.PICTURE, card.density_png(sidecar.density)


def _without_local_paths(values: dict[str, Any]) -> bytes:
    """transformers' JSON without the keys in which its older versions wrote where a file lay."""
    places = ("_name_or_path", "name_or_path", "special_tokens_map_file", "tokenizer_file")
    kept = {key: value for key, value in values.items() if key not in places}
    return (json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _named(manifest: format.Manifest, base: _Base) -> format.Manifest:
    """A local base gets the name under which others find it; its fingerprints say whether it is the same."""
    if manifest.base.kind != "local" or base.repo_id is None:
        return manifest
    entry = manifest.base.model_copy(update={"repo_id": base.repo_id, "revision": base.commit})
    return manifest.model_copy(update={"base": entry})


def _remote_manifest(listing: hub.Listing | None) -> format.Manifest | None:
    """The manifest in a repository, None where there is none that can be read."""
    kind = None if listing is None else hub.kind_of(listing.files)
    if listing is None or kind is None:
        return None
    try:
        return hub.read_remote_manifest(listing)
    except InputError:
        return None


def _foreign(sidecar: Sidecar, listing: hub.Listing | None, manifest: format.Manifest | None) -> str | None:
    """What else a repository holds, in words; None where it is empty or holds this model."""
    if listing is None or set(listing.files) <= {CARD, ".gitattributes"}:
        return None
    if manifest is None:
        return "other files, and no sparse model"
    if (manifest.merged is None) != (sidecar.manifest.merged is None):
        return "a sidecar" if manifest.merged is None else "a merged model"
    if manifest.base.content != sidecar.manifest.base.content:
        return f"a sparse model of another base ({manifest.base.repo_id or manifest.base.model_type})"
    return None


def _is_generated(repo: str, listing: hub.Listing | None) -> bool:
    if listing is None or listing.files[CARD].size > format.MAX_JSON_BYTES:
        return False
    return card.MARK in _remote_card(repo, listing.sha)


def _remote_card(repo: str, commit: str) -> str:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        path = hub.retrying(hf_hub_download, repo, CARD, revision=commit, library_name="attnprune")
    except EntryNotFoundError:
        return ""
    return Path(path).read_text(encoding="utf-8", errors="replace")


def _carry_out(plan: Plan, sidecar: Sidecar, base: _Base, listing: hub.Listing | None) -> Pushed:
    from huggingface_hub import HfApi

    api, parent = HfApi(library_name="attnprune"), plan.parent
    if parent is None:
        hub.retrying(api.create_repo, plan.repo, private=plan.private or None)
        created = hub.list_files(plan.repo)
        if set(created.files) - {".gitattributes"}:
            raise AttnPruneError(f"{plan.repo}: somebody else changed it meanwhile", hint="try again")
        parent = created.sha
    if plan.new_branch:
        hub.retrying(api.create_branch, plan.repo, branch=plan.branch, revision=parent, exist_ok=True)
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
        there = hub.list_files(plan.repo, target.parent or target.revision).files.get(CARD)
        state = _state(text, there)
        if state != "unchanged":
            target = _commit(api, target, "attnprune: model card", [PlannedFile(CARD, text, state)], [])
    _check_arrived(plan.repo, target, expected)
    return Pushed(plan.repo, pinned, target.url or f"{api.endpoint}/{plan.repo}", len(plan.changes))


def _with(sidecar: Sidecar, base: _Base) -> Sidecar:
    return Sidecar(sidecar.path, _named(sidecar.manifest, base))


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
    done = hub.retrying(
        api.create_commit, target.repo, operations, commit_message=title, revision=target.revision,
        parent_commit=target.parent, create_pr=target.create_pr,
    )  # fmt: skip
    if target.create_pr:
        return _Target(target.repo, done.pr_revision, done.oid, create_pr=False, url=done.pr_url)
    return _Target(target.repo, target.revision, done.oid, create_pr=False, url=target.url)


def _pinned(plan: Plan, listing: hub.Listing | None) -> str:
    """The commit that the card names: the one it already names if this model's files are there, else the newest."""
    from huggingface_hub.errors import HfHubHTTPError

    assert listing is not None
    for commit in re.findall(r'"([0-9a-f]{40})"', _remote_card(plan.repo, listing.sha))[:1]:
        try:
            there = hub.list_files(plan.repo, commit).files
        except HfHubHTTPError:
            break
        if all(_state(file.content, there.get(file.name)) == "unchanged" for file in plan.files):
            return commit
    return listing.sha


def _check_arrived(repo: str, target: _Target, expected: dict[str, Path | bytes]) -> None:
    """Compare sizes and hashes on the Hub with what was sent.

    Raises:
        AttnPruneError: naming the file that differs.
    """
    there = hub.list_files(repo, target.parent or target.revision).files
    for name, content in expected.items():
        if _state(content, there.get(name)) != "unchanged":
            raise AttnPruneError(f"{repo}: {name} on the Hub is not what was sent", hint="push again")
