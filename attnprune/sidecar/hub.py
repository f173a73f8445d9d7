"""Reading from the Hub: the sparse model in a repository becomes a folder in the Hub's cache. No torch.

A repository is somebody else's: its files are listed first and refused by name and size, only those that the manifest
lists (and a tokenizer) are fetched, all at one commit, and what arrived is compared with the listed hashes. The folder
is then read as strictly as any other.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path, PurePosixPath

from attnprune.errors import AttnPruneError, InputError
from attnprune.files import write_atomic
from attnprune.runs.folder import CHECKPOINTS, DAMAGE_FILE, RUN_FILE
from attnprune.sidecar import format, strangers
from attnprune.sidecar.folder import is_merged, open_artefact
from attnprune.sidecar.remote import (
    Listing,
    RemoteFile,
    check_repo_id,
    explained,
    is_repo,
    list_files,
    model_info,
    retrying,
)

_LIMITS = {format.GATES_FILE: format.MAX_GATES_BYTES, DAMAGE_FILE: format.MAX_JSON_BYTES}
_MANIFEST_FILES = {"sidecar": format.MANIFEST_FILE, "merged": "config.json"}
# A merged folder's root files besides those of its manifest: configuration and tokenizer, whatever their names. Any
# other JSON is fetched as well, since it may name code.
_TEXT_SUFFIXES = frozenset({".json", ".txt", ".model", ".jinja"})


def locate(path: str | Path, revision: str | None = None, *, weights: bool = True) -> Path:
    """The folder of a sparse model: a local one, or the Hub repository USER/NAME fetched into the Hub's cache.

    Args:
        revision: branch, tag or commit of the repository.
        weights: fetch everything; else only what `inspect` reads (a few kilobytes).

    Raises:
        InputError: no such repository or revision, a bad name or none, or files that a sparse model may not have.
        AttnPruneError: the Hub cannot be reached, or what it sent is damaged.
    """
    if path == "":  # as a path it would be the current folder
        raise InputError("the name of the model is empty")
    if not is_repo(path):
        if revision is not None:
            raise InputError(f"{path}: is not a Hub repository USER/NAME, so it has no revisions")
        return Path(path)
    return fetch(str(path), revision, weights=weights)


def locate_sparse(path: str | Path, revision: str | None = None) -> Path | None:
    """As `locate`, or None where the Hub repository holds another model, a base for example."""
    if not is_repo(path):
        return locate(path, revision)
    return fetch(str(path), revision) if _holds_sparse_model(str(path), revision) else None


def sparse_folder(name: str) -> Path | None:
    """The folder of a sparse model (sidecar, unfinished run or merged form); None for any other name: a base model."""
    folder = locate_sparse(name)
    if folder is None:
        return None
    is_sparse = (folder / format.MANIFEST_FILE).exists() or (folder / CHECKPOINTS).is_dir() or is_merged(folder)
    return folder if is_sparse else None


def _holds_sparse_model(repo: str, revision: str | None) -> bool:
    from huggingface_hub import constants, try_to_load_from_cache

    check_repo_id(repo)
    if constants.HF_HUB_OFFLINE:
        names = (format.MANIFEST_FILE, format.CODE_FILE)
        return any(isinstance(try_to_load_from_cache(repo, name, revision=revision), str) for name in names)
    with explained(repo, revision):
        return kind_of(list_files(repo, revision).files) is not None


def fetch(repo: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """Fetch a repository's sparse model at one commit into the Hub's cache and return its folder there.

    Offline (HF_HUB_OFFLINE=1) the cache is used as it is.

    Raises:
        InputError, AttnPruneError: as `locate`.
    """
    from huggingface_hub import constants

    check_repo_id(repo)
    if revision == "":
        raise InputError("--revision: is empty")
    with explained(repo, revision):
        if constants.HF_HUB_OFFLINE:
            return _cached(repo, revision, weights=weights)
        folder = _fetched(list_files(repo, revision), weights=weights)
        _remember(folder, revision)
        return folder


def base_commit(name: str, revision: str | None = None) -> str:
    """The commit (40 hex digits) of a base model, so that its tokenizer and weights are of one version.

    Offline (HF_HUB_OFFLINE=1) it is the one in the cache.

    Raises:
        InputError: no such repository or revision, or one that holds an adapter.
        AttnPruneError: the Hub cannot be reached.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    if constants.HF_HUB_OFFLINE:
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
        if not isinstance(cached, str):
            raise AttnPruneError(
                f"{name}: not in the cache, and the Hub cannot be reached (HF_HUB_OFFLINE)",
                hint="give a local folder or .gguf file",
            )
        return Path(cached).parent.name
    with explained(name, revision):
        info = model_info(name, revision)
        if "adapter_config.json" in {sibling.rfilename for sibling in info.siblings or []}:
            raise InputError(
                f"{name}: adapter_config.json would load another base model", hint="merge the adapter first"
            )
        _remember(
            Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "snapshots" / str(info.sha), revision
        )
        return str(info.sha)


def kind_of(names: dict[str, RemoteFile]) -> str | None:
    """ "sidecar", "merged" (which config.json has yet to confirm), or None, by the names in a repository."""
    if format.MANIFEST_FILE in names:
        return "sidecar"
    return "merged" if {"config.json", format.CODE_FILE} <= set(names) else None


def read_remote_manifest(listing: Listing) -> format.Manifest:
    """The manifest of the sparse model in a repository that `kind_of` knows.

    Raises:
        InputError: it does not pass.
    """
    kind = kind_of(listing.files)
    assert kind is not None
    return open_artefact(_download(listing, _MANIFEST_FILES[kind], format.MAX_JSON_BYTES).parent).manifest


def _fetched(listing: Listing, *, weights: bool) -> Path:
    kind = kind_of(listing.files)
    if kind is None:
        raise InputError(f"{listing.repo}: holds neither a sidecar nor a merged model of attnprune")
    strangers.check_names(f"{listing.repo}: ", listing.files, merged=kind == "merged")
    folder = _download(listing, _MANIFEST_FILES[kind], format.MAX_JSON_BYTES).parent
    manifest = open_artefact(folder).manifest
    if manifest.merged is not None:
        strangers.check_listed(f"{listing.repo}: ", listing.files, manifest)
    listed = manifest.files
    for name, entry in listed.items():
        found = listing.files.get(name)
        if found is None:
            raise InputError(f"{listing.repo}: {name} is missing")
        if found.size != entry.size or (len(found.digest) == 64 and found.digest != entry.sha256):
            raise InputError(f"{listing.repo}: {name} is damaged (not the file that its manifest describes)")
    for name in _wanted(kind, listing.files, list(listed), weights=weights):
        _download(listing, name, _LIMITS.get(name))
    return folder


def _remember(folder: Path, revision: str | None) -> None:
    """Note which commit a branch or tag is at, as the Hub's cache does, so that it is found offline."""
    name = PurePosixPath(revision or "main")
    if revision == folder.name or name.is_absolute() or ".." in name.parts:
        return
    reference = folder.parents[1] / "refs" / name
    with suppress(OSError):  # a cache that may only be read
        reference.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(reference, folder.name)


def shown(path: Path) -> str:
    """How a folder is named to people: one in the Hub's cache by its repository and commit."""
    repo = path.parent.parent.name.split("--")
    if path.parent.name != "snapshots" or repo[0] != "models":
        return str(path)
    return f"{'/'.join(repo[1:])} @ {path.name[:12]}"


def _wanted(kind: str, present: dict[str, RemoteFile], listed: list[str], *, weights: bool) -> list[str]:
    """What to fetch besides the manifest, small files first, so that a folder with its weights is whole."""
    damage = [DAMAGE_FILE] if kind == "sidecar" and DAMAGE_FILE in present else []
    if not weights:
        return [format.GATES_FILE, *damage, *([format.CODE_FILE] if kind == "merged" else [])]
    extra = [RUN_FILE, *damage] if kind == "sidecar" else [n for n in present if _is_text(n)]
    return [*(name for name in extra if name in present and name not in listed), *listed]


def _is_text(name: str) -> bool:
    path = PurePosixPath(name)
    suffix = path.suffix.lower()
    if path.parent == PurePosixPath(format.TEMPLATES_FOLDER):
        return suffix == ".jinja"
    return suffix == ".json" or ("/" not in name and suffix in _TEXT_SUFFIXES)


def _download(listing: Listing, name: str, limit: int | None = None) -> Path:
    from huggingface_hub import hf_hub_download

    file = listing.files.get(name)
    if file is None:
        raise InputError(f"{listing.repo}: {name} is missing")
    if limit is not None and file.size > limit:
        raise InputError(f"{listing.repo}: {name} is larger than {limit >> 20} MiB")
    path = Path(retrying(hf_hub_download, listing.repo, name, revision=listing.sha, library_name="attnprune"))
    if not file.holds(path):  # a cached file too: it may have been damaged later
        blob = path.resolve()
        path.unlink()  # or the cache would serve it for ever
        if blob.parent == path.parents[len(PurePosixPath(name).parts) + 1].resolve() / "blobs":
            blob.unlink(missing_ok=True)  # a link that leads elsewhere is not ours to follow
        raise AttnPruneError(f"{listing.repo}: damaged download of {name}", hint="try again")
    return path


def _cached(repo: str, revision: str | None, *, weights: bool) -> Path:
    from huggingface_hub import try_to_load_from_cache

    for name in (format.MANIFEST_FILE, "config.json"):
        path = try_to_load_from_cache(repo, name, revision=revision)
        if isinstance(path, str):
            break
    else:
        raise AttnPruneError(f"{repo}: offline, and not in the cache", hint="unset HF_HUB_OFFLINE")
    folder = Path(path).parent
    sidecar = open_artefact(folder)
    missing = [n for n in (sidecar.manifest.files if weights else [format.GATES_FILE]) if not (folder / n).exists()]
    if missing:
        raise AttnPruneError(f"{repo}: offline, and {missing[0]} is not in the cache", hint="unset HF_HUB_OFFLINE")
    return folder
