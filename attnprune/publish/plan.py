"""What a push will send, replace and delete, decided before anything is written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from attnprune.errors import InputError
from attnprune.publish import card
from attnprune.runs.folder import DAMAGE_FILE, METRICS_FILE, RUN_FILE, load_run_file, without_local_paths
from attnprune.sidecar import format, hub, remote, strangers
from attnprune.sidecar.damage import read_damage
from attnprune.sidecar.folder import Sidecar

CARD = "README.md"
# A merged folder's files that its manifest does not list: transformers' own names for configuration and tokenizer.
TOKENIZER_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", *format.VOCABULARY_FILES,
)  # fmt: skip


@dataclass(frozen=True)
class PlannedFile:
    """A file to send, from disk or with content made here, and what the repository holds under its name."""

    name: str
    content: Path | bytes
    found: remote.RemoteFile | None

    @cached_property
    def state(self) -> Literal["new", "changed", "unchanged"]:
        """How it compares with what the repository holds."""
        if self.found is None:
            return "new"
        return "unchanged" if self.found.holds(self.content) else "changed"

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


@dataclass(frozen=True)
class Replaced:
    """What the repository holds now that is not this artefact.

    `what` says it in a few words; `result` is its measured result, None where it has none that can be read;
    `is_whole` says that every file of the repository goes, because it is no model of this base and form.
    """

    what: str
    result: format.ResultEntry | None
    is_whole: bool


@dataclass(frozen=True)
class Plan:
    """What a push will do. `parent` is the commit it builds on, None where the repository does not exist yet.

    With `replaced` it is carried out only on demand.
    """

    repo: str
    branch: str
    parent: str | None
    new_branch: bool
    private: bool
    create_pr: bool
    files: list[PlannedFile]
    deletions: list[str]
    card: Literal["written", "kept", "from the folder"]
    result: format.ResultEntry
    replaced: Replaced | None

    @property
    def changes(self) -> list[PlannedFile]:
        """The files that are not there yet."""
        return [file for file in self.files if file.state != "unchanged"]


@dataclass(frozen=True)
class HubBase:
    """The base model as the card names it, and its commit and license on the Hub."""

    repo_id: str | None
    commit: str | None = None
    license: str | None = None


def base_name(sidecar: Sidecar, base_model: str | None) -> str | None:
    """The Hub id of the base, `base_model` where it was a local one.

    None for the bundled model, and for a merged model of a local base: it holds all that loading takes.

    Raises:
        InputError: a sidecar of a local base without a Hub id, or another one than the sidecar names.
    """
    entry = sidecar.manifest.base
    if base_model is not None:
        remote.check_repo_id(base_model, owner=False)
        known = entry.repo_id if entry.kind == "hub" else "the bundled model" if entry.kind == "bundled" else base_model
        if base_model != known:
            raise InputError(f"--base-model: {sidecar.path} was made from {known}, not {base_model}")
    elif entry.repo_id is None and entry.kind != "bundled" and sidecar.manifest.merged is None:
        what = "a .gguf file" if entry.kind == "gguf" else "a local folder"
        raise InputError(f"{sidecar.path}: made from {what}", hint="name its base on the Hub: --base-model USER/NAME")
    return base_model or entry.repo_id


def look_up_base(sidecar: Sidecar, base_model: str | None) -> HubBase:
    """Look the base up.

    Raises:
        InputError: as `base_name`, or one that the Hub does not have, or that is of another family.
    """
    named, entry = base_name(sidecar, base_model), sidecar.manifest.base
    if named is None:
        return HubBase(None)
    with remote.explained(named, entry.revision):
        info = remote.model_info(named, entry.revision)
    family = (info.config or {}).get("model_type", entry.model_type)
    if entry.kind == "local" and family != entry.model_type:
        raise InputError(f"--base-model: {named} is a {family} model, not {entry.model_type}")
    data: Any = info.card_data
    license = getattr(data, "license", None)
    return HubBase(named, info.sha, license if isinstance(license, str) else None)


def listing_of(repo: str, branch: str) -> tuple[remote.Listing | None, bool | None]:
    """(files at the branch, whether it is private); (None, None) for a repository that is not there yet."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        private = remote.model_info(repo).private
    except RepositoryNotFoundError:
        return None, None
    try:
        return remote.list_files(repo, branch), private
    except RevisionNotFoundError:
        return remote.list_files(repo, "main"), private


def make_plan(
    sidecar: Sidecar,
    base: HubBase,
    repo: str,
    branch: str,
    listing: remote.Listing | None,
    *,
    private: bool,
    create_pr: bool,
) -> Plan:
    """Compare what would be sent with what `listing` says is there.

    Raises:
        InputError: the repository would hold code, or has no such branch.
    """
    present = {} if listing is None else listing.files
    there = _remote_manifest(listing)
    replaced = _replaced(sidecar, listing, there)
    is_whole = replaced is not None and replaced.is_whole
    contents = dict(_contents(sidecar, base))
    own_card = CARD in contents
    keep = {CARD, ".gitattributes", *contents}
    # What the model in the repository consists of now: files that are not sent again are deleted.
    stale = present if is_whole else {*there.files, card.PICTURE} if there is not None else ()
    new_branch = branch != "main" and (listing is None or _branch_is_missing(repo, branch))
    if new_branch and create_pr:
        raise InputError(f"--create-pr: {repo} has no branch {branch!r}")
    kept = not own_card and CARD in present and not is_whole and not _is_generated(repo, listing)
    deletions = sorted(name for name in stale if name in present and name not in keep)
    names = {*present, *contents} - set(deletions)
    strangers.check_names(f"{repo}: ", names, merged=sidecar.manifest.merged is not None)
    if sidecar.manifest.merged is not None:
        strangers.check_listed(f"{repo}: ", names, sidecar.manifest)
    return Plan(
        repo=repo,
        branch=branch,
        parent=None if listing is None else listing.sha,
        new_branch=new_branch,
        private=private,
        create_pr=create_pr,
        files=[PlannedFile(name, content, present.get(name)) for name, content in contents.items()],
        deletions=deletions,
        card="from the folder" if own_card else "kept" if kept else "written",
        result=sidecar.manifest.result,
        replaced=replaced,
    )


def _branch_is_missing(repo: str, branch: str) -> bool:
    from huggingface_hub import HfApi

    if branch == "main" or branch.startswith("refs/pr/"):
        return False
    refs = remote.retrying(HfApi(library_name="attnprune").list_repo_refs, repo)
    if branch in {ref.name for ref in refs.tags}:
        raise InputError(f"--revision: {branch} is a tag of {repo}", hint="push to a branch")
    return branch not in {ref.name for ref in refs.branches}


def _contents(sidecar: Sidecar, base: HubBase) -> Iterator[tuple[str, Path | bytes]]:
    """Every file to send except a generated card, by its name in the repository."""
    folder, manifest = sidecar.path, named(sidecar.manifest, base)
    if manifest.merged is None:
        yield format.MANIFEST_FILE, manifest.to_json().encode()
        if (folder / RUN_FILE).is_file():
            yield RUN_FILE, without_local_paths(load_run_file(folder / RUN_FILE)).to_toml().encode()
        optional = (METRICS_FILE, DAMAGE_FILE, CARD)
    else:
        values = format.parse_json(format.read_regular(folder, "config.json", format.MAX_JSON_BYTES), "config.json")
        values["attnprune"] = json.loads(manifest.to_json())
        yield "config.json", _without_local_paths(values)
        templates = sorted((folder / format.TEMPLATES_FOLDER).glob("*.jinja"))
        optional = (*TOKENIZER_FILES, *(file.relative_to(folder).as_posix() for file in templates), CARD)
    for name in manifest.files:
        yield name, folder / name
    for name in optional:
        if (folder / name).exists() and name not in manifest.files:
            raw = format.read_regular(folder, name)  # no link out of the folder
            if name == DAMAGE_FILE:
                read_damage(sidecar)  # a person would take it for this one's
            if name == "tokenizer_config.json":
                raw = _without_local_paths(format.parse_json(raw, name, format.MAX_LARGE_JSON_BYTES))
            if name != CARD or card.MARK.encode() not in raw:  # a generated card names another repository
                yield name, raw
    yield card.PICTURE, card.density_png(sidecar.density)


def _without_local_paths(values: dict[str, Any]) -> bytes:
    """transformers' JSON without the keys in which its older versions wrote where a file lay."""
    kept = {key: value for key, value in values.items() if key not in format.LOCAL_PATHS}
    return (json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def named(manifest: format.Manifest, base: HubBase) -> format.Manifest:
    """A local base gets the name under which others find it; its fingerprints say whether it is the same."""
    if manifest.base.kind != "local" or base.repo_id is None:
        return manifest
    entry = manifest.base.model_copy(update={"repo_id": base.repo_id, "revision": base.commit})
    return manifest.model_copy(update={"base": entry})


def _remote_manifest(listing: remote.Listing | None) -> format.Manifest | None:
    """The manifest in a repository, None where there is none that can be read."""
    kind = None if listing is None else hub.kind_of(listing.files)
    if listing is None or kind is None:
        return None
    try:
        return hub.read_remote_manifest(listing)
    except InputError:
        return None


def _replaced(sidecar: Sidecar, listing: remote.Listing | None, there: format.Manifest | None) -> Replaced | None:
    """What else a repository holds; None where it is empty or holds this artefact."""
    if listing is None or set(listing.files) <= {CARD, ".gitattributes"}:
        return None
    if there is None:
        return Replaced("other files, and no sparse model", None, is_whole=True)
    if (there.merged is None) != (sidecar.manifest.merged is None):
        what = "a sidecar" if there.merged is None else "a merged model"
        return Replaced(what, there.result, is_whole=True)
    if there.base.content != sidecar.manifest.base.content:
        what = f"a sparse model of another base ({there.base.repo_id or there.base.model_type})"
        return Replaced(what, there.result, is_whole=True)
    if _artefact(there) != _artefact(sidecar.manifest):
        return Replaced("another sparse model of this base", there.result, is_whole=False)
    return None


def _artefact(manifest: format.Manifest) -> dict[str, str]:
    """sha256 of the tensors that make an artefact what it is; a merged model's code and tokenizer files change with the
    release that merged it."""
    return {name: entry.sha256 for name, entry in manifest.files.items() if name.endswith(".safetensors")}


def _is_generated(repo: str, listing: remote.Listing | None) -> bool:
    if listing is None or listing.files[CARD].size > format.MAX_JSON_BYTES:
        return False
    return card.MARK in remote_card(repo, listing.sha)


def remote_card(repo: str, commit: str) -> str:
    """README.md of a repository at a commit; empty where there is none."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        path = remote.retrying(hf_hub_download, repo, CARD, revision=commit, library_name="attnprune")
    except EntryNotFoundError:
        return ""
    return Path(path).read_text(encoding="utf-8", errors="replace")
