"""Files that are whole or not there: hashes, writes that a kill cannot halve, logs whose last line may be torn,
temporary folders, targets that can be written, a lock on a folder."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from attnprune.errors import InputError

_PREFIX = ".attnprune-"  # of files and folders that are there for a moment; their names cannot be guessed


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Force a file's or folder's contents to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file (text as UTF-8) so that a kill or an error leaves the old content or the new one."""
    temporary = path.with_name(f"{_PREFIX}{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:  # never a file that is there already
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
        fsync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync(path.parent)


def append_line(file: Path, value: Any) -> None:
    """Append a JSON object or array as one line; `reopen_lines` reads the file again."""
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(value) + "\n")


def reopen_lines(
    file: Path, is_valid: Callable[[Any], bool], keep: Callable[[Any], bool] = lambda value: True
) -> list[Any]:
    """The values of a file that `append_line` wrote, none if it is missing, before more is appended.

    A kill or a full disk cuts the last line short, and a power loss leaves NULs or other bytes where text never reached
    the disk. Damaged lines at the end are therefore dropped, and so are the values that `keep` rejects; the file is
    written again without them.

    Args:
        is_valid: whether a value can be a line of this file.

    Raises:
        InputError: a damaged line before an intact one, which no interruption leaves; or the file cannot be read.
    """
    try:
        if file.exists() and not file.is_file():
            raise InputError(f"{file}: is not a file")
        raw = file.read_bytes() if file.exists() else b""
    except OSError as error:
        raise unusable(file, error) from None
    *lines, _ = raw.split(b"\n")  # a line counts once its end is written
    found = [_parse_line(line, is_valid) for line in lines]
    while found and found[-1] is None:
        found.pop()
    if None in found:
        number = found.index(None) + 1
        raise InputError(f"{file}: line {number} is damaged", hint="delete that line to go on without it")
    kept = [(line, value) for line, value in zip(lines, found, strict=False) if keep(value)]
    whole = b"".join(line + b"\n" for line, _ in kept)
    if whole != raw:
        write_atomic(file, whole)
    return [value for _, value in kept]


def _parse_line(line: bytes, is_valid: Callable[[Any], bool]) -> Any:
    """The value of a line, None for one that is damaged."""
    try:
        value = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, (dict, list)) and is_valid(value) else None


@contextmanager
def temporary_folder(parent: Path | None = None) -> Iterator[Path]:
    """A new folder with a name of its own in `parent` (None: the system's place for temporary files).

    It is removed with all that is in it on every way out that this process lives to see; a second signal while it is
    being removed waits until it is gone. What was renamed away stays.
    """
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    try:
        yield folder
    finally:
        try:
            shutil.rmtree(folder, ignore_errors=True)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def settle(folder: Path) -> None:
    """Give everything in a finished temporary folder the usual permissions, and force it to the disk.

    Temporary folders, and files that safetensors writes, can be read by their owner only.
    """
    os.umask(umask := os.umask(0))
    for path in (*folder.rglob("*"), folder):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
        fsync(path)


def check_new_folder(folder: Path) -> None:
    """Refuse a place that a finished folder cannot be renamed to; call it before any work.

    It may be missing, or an empty folder that a rename can replace.

    Raises:
        InputError: it is something else, a link, a mount point or where we are; its parent is missing or not writable.
    """
    try:
        if folder.is_symlink():
            raise InputError(f"{folder}: is a link", hint="give the folder's own path")
        if folder.exists():
            if not folder.is_dir() or any(folder.iterdir()):
                raise InputError(f"{folder}: exists and is not empty")
            if folder.samefile("."):
                raise InputError(f"{folder}: is the current folder", hint="give the name of a new one")
            if _is_mount(folder):
                raise InputError(f"{folder}: is a mount point", hint="give a new folder in it")
    except OSError as error:
        raise unusable(folder, error) from None
    check_writable(folder.parent)


def write_new_folder(folder: Path, contents: dict[str, str | bytes]) -> None:
    """Write a folder of files (text as UTF-8): all of it or nothing.

    Raises:
        InputError: as `check_new_folder`.
    """
    check_new_folder(folder)
    with temporary_folder(folder.absolute().parent) as made:
        for name, content in contents.items():
            (made / name).write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        settle(made)
        made.rename(folder)
    fsync(folder.absolute().parent)


def check_writable(folder: Path) -> None:
    """Refuse a folder in which no file can be made.

    Raises:
        InputError: it is missing, no folder, or not writable.
    """
    try:
        if not folder.is_dir():
            raise InputError(f"{folder}: {'is not a folder' if folder.exists() else 'no such folder'}")
    except OSError as error:
        raise unusable(folder, error) from None
    try:
        with tempfile.TemporaryFile(dir=folder):  # asks the system, which knows of more than permissions
            pass
    except OSError as error:
        raise InputError(f"{folder}: not writable: {reason(error)}") from None


def _is_mount(folder: Path) -> bool:
    """Whether something is mounted here. Only Linux's own list knows a folder mounted from the same file system."""
    table = Path("/proc/self/mountinfo")
    places = (line.split()[4] for line in table.read_bytes().splitlines()) if table.exists() else ()
    unescaped = (re.sub(rb"\\([0-7]{3})", lambda code: bytes([int(code[1], 8)]), place) for place in places)
    return os.path.ismount(folder) or os.fsencode(folder.resolve()) in unescaped


def unusable(path: Path, error: OSError) -> InputError:
    """The refusal of a path in the system's own words; a name that is too long comes last, where a line is cut."""
    if error.errno == errno.ENAMETOOLONG:
        return InputError(f"{reason(error)}: {path}")
    return InputError(f"{path}: {reason(error)}")


def reason(error: OSError | ValueError) -> str:
    """Why the system refused, in lower case as the second half of a message (a ValueError: a NUL in a name)."""
    return (getattr(error, "strerror", None) or str(error).partition("\n")[0]).lower()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run's folder, so that two runs cannot write to it. What of its path was missing is created, and removed
    again if it is left empty.

    The lock is on the folder itself: no file stays behind, and the kernel frees it when a process is killed.

    Raises:
        InputError: another run holds it, or it cannot be created.
    """
    try:
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise unusable(folder, error) from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise InputError(f"{folder}: in use by another run") from None
    try:
        yield
    finally:
        with suppress(OSError):
            for path in missing:
                path.rmdir()  # fails unless empty
        os.close(handle)


@contextmanager
def held(path: Path) -> Iterator[BinaryIO]:
    """An unfinished file, to read and to append to, for this process alone; a second one that wants it waits here.

    An empty one is removed.
    """
    with path.open("a+b") as part:
        fcntl.flock(part, fcntl.LOCK_EX)
        try:
            yield part
        finally:
            if part.seek(0, os.SEEK_END) == 0:
                path.unlink(missing_ok=True)
