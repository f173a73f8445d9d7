"""The Hub's answers: what a repository holds at one commit, tries and time-outs, and errors as one line. No torch."""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, TypeVar

from attnprune.errors import AttnPruneError, InputError
from attnprune.files import reason, sha256_of

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo


T = TypeVar("T")
log = logging.getLogger(__name__)

REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
BUSY = frozenset({429, 502, 503, 504})
TRIES = 5
TIMEOUT = 30.0  # seconds; the client has none of its own


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


def is_repo(path: str | Path) -> bool:
    """Whether this names a Hub repository: USER/NAME, and nothing of that name is here."""
    return isinstance(path, str) and REPO.fullmatch(path) is not None and not Path(path).exists()


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


def model_info(repo: str, revision: str | None = None, *, files_metadata: bool = False) -> ModelInfo:
    """The Hub's answer about a repository, waited for at most TIMEOUT seconds.

    Raises:
        huggingface_hub and HTTP errors: see `explained`.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="attnprune")
    return retrying(api.model_info, repo, revision=revision, files_metadata=files_metadata, timeout=TIMEOUT)


def _check_name(repo: str, name: str) -> None:
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or re.search(r"[\\\x00-\x1f]|^[A-Za-z]:|^~", name):
        raise InputError(f"{repo}: bad file name {name[:60]!r} in the repository")


def _digest(content: Path | bytes, digits: int) -> str:
    """sha256, or with `digits` 40 the git blob hash."""
    if digits == 64 and isinstance(content, Path):
        return sha256_of(content)
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
        found = f"{type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"
        raise AttnPruneError(f"{repo}: unexpected answer from the Hub ({found})") from error
    except OSError as error:
        raise AttnPruneError(f"{repo}: {reason(error)}") from error


def files_of(repo: str, commit: str, names: Iterable[str]) -> list[Path]:
    """Those of `names` that a repository has at a commit, fetched into the Hub's cache; offline, those that it has.

    Raises:
        InputError, AttnPruneError: see `explained`.
    """
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

    if constants.HF_HUB_OFFLINE:
        cached = (try_to_load_from_cache(repo, name, revision=commit) for name in names)
        return [Path(path) for path in cached if isinstance(path, str)]
    with explained(repo, commit):
        present = list_files(repo, commit).files
        return [
            Path(retrying(hf_hub_download, repo, name, revision=commit, library_name="attnprune"))
            for name in names
            if name in present
        ]


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
