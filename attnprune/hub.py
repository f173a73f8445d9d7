"""Reading from the Hub: the sparse model in a repository becomes a folder in the Hub's cache. No torch.

A repository is somebody else's: its files are listed first and refused by name and size, only those that the manifest
lists (and a tokenizer) are fetched, all at one commit, and what arrived is compared with the listed hashes. The folder
is then read as strictly as any other.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, TypeVar

from attnprune import checkpoints, format
from attnprune.errors import AttnPruneError, InputError
from attnprune.runs import CHECKPOINTS, RUN_FILE
from attnprune.sidecar import is_merged, open_artefact

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

T = TypeVar("T")
log = logging.getLogger(__name__)

_REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_MANIFEST_FILES = {"sidecar": format.MANIFEST_FILE, "merged": "config.json"}
BUSY = frozenset({429, 502, 503, 504})
TRIES = 5
_SMALL = 64 << 20  # bytes
TIMEOUT = 30.0  # seconds; the client has none of its own
# A merged folder's root files besides those of its manifest: configuration and tokenizer, whatever their names.
_TEXT_SUFFIXES = frozenset({".json", ".txt", ".model", ".jinja"})


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository: `digest` is its sha256 (large files) or its git blob hash (others)."""

    path: str
    size: int
    digest: str

    def holds(self, content: Path | bytes) -> bool:
        """Whether this is the content of a local file, or these bytes."""
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        return size == self.size and _digest(content, len(self.digest)) == self.digest


@dataclass(frozen=True)
class Listing:
    """A repository at one commit (`sha`, 40 hex digits)."""

    repo: str
    sha: str
    files: dict[str, RemoteFile]


def locate(path: str | Path, revision: str | None = None, *, weights: bool = True) -> Path:
    """The folder of a sparse model: a local one, or the Hub repository USER/NAME fetched into the Hub's cache.

    Args:
        revision: branch, tag or commit of the repository.
        weights: fetch everything; else only what `inspect` reads (a few kilobytes).

    Raises:
        InputError: no such repository or revision, a bad name, or files that a sparse model may not have.
        AttnPruneError: the Hub cannot be reached, or what it sent is damaged.
    """
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


def is_repo(path: str | Path) -> bool:
    """Whether this names a Hub repository: USER/NAME, and nothing of that name is here."""
    return isinstance(path, str) and _REPO.fullmatch(path) is not None and not Path(path).exists()


def check_repo_id(repo: str, *, owner: bool = True) -> None:
    """Refuse what cannot be a repository; without `owner` also a NAME alone will do, as some base models have.

    Raises:
        InputError: not USER/NAME in the Hub's characters and lengths.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError:
        repo = repo if len(repo) <= 60 else f"{repo[:60]}…"
        raise InputError(f"{repo!r}: bad repo id", hint="the form is USER/NAME") from None
    if owner and "/" not in repo:
        raise InputError(f"{repo!r}: bad repo id", hint="the form is USER/NAME")


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


def list_files(repo: str, revision: str | None = None) -> Listing:
    """The files of a repository at a revision.

    Raises:
        InputError: a file name that leaves the repository.
        huggingface_hub and HTTP errors: see `explained`.
    """
    info = model_info(repo, revision, files_metadata=True)
    if info.siblings is None or not re.fullmatch("[0-9a-f]{40}", str(info.sha)):
        raise ValueError("no files or no commit in the answer")  # not an empty repository
    files = {}
    for sibling in info.siblings:
        _check_name(repo, sibling.rfilename)
        digest = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
        files[sibling.rfilename] = RemoteFile(sibling.rfilename, sibling.size or 0, str(digest))
    return Listing(repo, str(info.sha), files)


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


def model_info(repo: str, revision: str | None = None, *, files_metadata: bool = False) -> ModelInfo:
    """The Hub's answer about a repository, waited for at most TIMEOUT seconds.

    Raises:
        huggingface_hub and HTTP errors: see `explained`.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="attnprune")
    return retrying(api.model_info, repo, revision=revision, files_metadata=files_metadata, timeout=TIMEOUT)


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
    check_strangers(listing.repo, listing.files, merged=kind == "merged")
    folder = _download(listing, _MANIFEST_FILES[kind], format.MAX_JSON_BYTES).parent
    listed = open_artefact(folder).manifest.files
    for name, entry in listed.items():
        found = listing.files.get(name)
        if found is None:
            raise InputError(f"{listing.repo}: {name} is missing")
        if found.size != entry.size or (len(found.digest) == 64 and found.digest != entry.sha256):
            raise InputError(f"{listing.repo}: {name} is damaged (not the file that its manifest describes)")
    for name in _wanted(kind, listing.files, list(listed), weights=weights):
        _download(listing, name, format.MAX_GATES_BYTES if name == format.GATES_FILE else None)
    return folder


def _remember(folder: Path, revision: str | None) -> None:
    """Note which commit a branch or tag is at, as the Hub's cache does, so that it is found offline."""
    name = PurePosixPath(revision or "main")
    if revision == folder.name or name.is_absolute() or ".." in name.parts:
        return
    reference = folder.parents[1] / "refs" / name
    with suppress(OSError):  # a cache that may only be read
        reference.parent.mkdir(parents=True, exist_ok=True)
        checkpoints.write_atomic(reference, folder.name)


def shown(path: Path) -> str:
    """How a folder is named to people: one in the Hub's cache by its repository and commit."""
    repo = path.parent.parent.name.split("--")
    if path.parent.name != "snapshots" or repo[0] != "models":
        return str(path)
    return f"{'/'.join(repo[1:])} @ {path.name[:12]}"


def _wanted(kind: str, present: dict[str, RemoteFile], listed: list[str], *, weights: bool) -> list[str]:
    """What to fetch besides the manifest, small files first, so that a folder with its weights is whole."""
    if not weights:
        return [format.GATES_FILE, *([format.CODE_FILE] if kind == "merged" else [])]
    extra = (
        [RUN_FILE] if kind == "sidecar" else [n for n in present if "/" not in n and Path(n).suffix in _TEXT_SUFFIXES]
    )
    return [*(name for name in extra if name in present and name not in listed), *listed]


def _download(listing: Listing, name: str, limit: int | None = None) -> Path:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    file = listing.files.get(name)
    if file is None:
        raise InputError(f"{listing.repo}: {name} is missing")
    if limit is not None and file.size > limit:
        raise InputError(f"{listing.repo}: {name} is larger than {limit >> 20} MiB")
    was_cached = isinstance(try_to_load_from_cache(listing.repo, name, revision=listing.sha), str)
    path = Path(retrying(hf_hub_download, listing.repo, name, revision=listing.sha, library_name="attnprune"))
    small = file.size <= _SMALL  # cheap enough to notice a cache that was damaged later
    if (small or not was_cached) and not file.holds(path):
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


def _check_name(repo: str, name: str) -> None:
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or re.search(r"[\\\x00-\x1f]|^[A-Za-z]:|^~", name):
        raise InputError(f"{repo}: bad file name {name[:60]!r} in the repository")


def check_strangers(repo: str, names: Iterable[str], *, merged: bool) -> None:
    """The rules of `sidecar.check_strangers` for the names in a repository, before anything is fetched or sent.

    Raises:
        InputError: pickle or code other than a merged model's own, or an adapter at the root.
    """
    for name in sorted(names):
        ours = merged and name == format.CODE_FILE
        if PurePosixPath(name).suffix.lower() in format.CODE_SUFFIXES and not ours:
            raise InputError(f"{repo}: {name}: pickle or code beside a sparse model is refused")
        if name == "adapter_config.json":
            raise InputError(f"{repo}: adapter_config.json at the root would be loaded without the gates")


def _digest(content: Path | bytes, digits: int) -> str:
    """sha256, or with `digits` 40 the git blob hash."""
    if digits == 64 and isinstance(content, Path):
        return checkpoints.sha256_of(content)
    raw = content if isinstance(content, bytes) else content.read_bytes()
    if digits == 64:
        return hashlib.sha256(raw).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest()


def retrying(call: Callable[..., T], *arguments: object, **options: object) -> T:
    """Call the Hub, and again (at most TRIES times) while it says that it is busy.

    Raises:
        What the last call raised.
    """
    from huggingface_hub.errors import HfHubHTTPError

    for attempt in range(1, TRIES + 1):
        try:
            return call(*arguments, **options)
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status not in BUSY or attempt == TRIES:
                raise
            wait = _seconds(error.response.headers.get("Retry-After"), 2.0 ** (attempt - 1))
            log.warning("the Hub is busy (%d): retried %d times, waiting %.3g s", status, attempt, wait)
            time.sleep(wait)
    raise AssertionError("unreachable")


def _seconds(text: str | None, default: float) -> float:
    try:
        return min(60.0, max(0.0, float(text or "")))
    except ValueError:
        return default


@contextmanager
def explained(repo: str, revision: str | None = None) -> Iterator[None]:
    """Turn what huggingface_hub raises into one line and an exit code.

    Raises:
        InputError: not found, no such revision, or not logged in.
        AttnPruneError: no right to write, changed meanwhile, busy, broken or unreachable.
    """
    from huggingface_hub import errors

    try:
        yield
    except AttnPruneError:
        raise
    except errors.HfHubHTTPError as error:
        raise _explain_status(repo, revision, error) from error
    except UnicodeEncodeError as error:  # a header of letters beyond ASCII
        raise InputError(f"{repo}: the token is not valid", hint="log in with: hf auth login") from error
    except RuntimeError as error:  # an upload by huggingface_hub's worker threads
        if not isinstance(error.__cause__, errors.HfHubHTTPError):
            raise
        raise _explain_status(repo, revision, error.__cause__) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HTTPError, ConnectionError) as error:
        message = f"{repo}: the Hub cannot be reached, or the transfer broke off"
        raise AttnPruneError(message, hint="try again") from error
    except (ValueError, KeyError, TypeError, AttributeError, LookupError) as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"
        raise AttnPruneError(f"{repo}: unexpected answer from the Hub ({reason})") from error
    except OSError as error:
        raise AttnPruneError(f"{repo}: {(error.strerror or str(error).splitlines()[0]).lower()}") from error


def _explain_status(repo: str, revision: str | None, error: Exception) -> AttnPruneError:
    from huggingface_hub import errors

    status = error.response.status_code  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(f"{repo}: no revision {revision!r}")
    if isinstance(error, errors.GatedRepoError):
        return InputError(f"{repo}: gated; ask for access on its page", hint="then: hf auth login")
    if isinstance(error, errors.RepositoryNotFoundError):
        return InputError(f"{repo}: not found on the Hub, or private", hint="log in with: hf auth login")
    if isinstance(error, errors.EntryNotFoundError):
        return AttnPruneError(f"{repo}: a file vanished meanwhile", hint="try again")
    if status == 401:
        return InputError(f"{repo}: not logged in, or the token is not valid", hint="log in with: hf auth login")
    if status == 403:
        return AttnPruneError(f"{repo}: no write access with this token")
    if status in (409, 412):
        return AttnPruneError(f"{repo}: somebody else changed it meanwhile", hint="try again")
    return AttnPruneError(f"{repo}: the Hub answered {status}; nothing is lost, and it is safe to repeat")
