"""Sealed training checkpoints: a checkpoint counts only once a manifest of all its files has reached the disk.

A run killed in the middle of a save leaves a folder without a valid seal, which `last_good` passes over.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

SEAL = "attnprune_seal.json"
PREFIX = "checkpoint-"


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
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        fsync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync(path.parent)


def seal(folder: Path) -> None:
    """Record size and sha256 of every file of a checkpoint, after forcing them to the disk."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.name != SEAL)
    for file in files:
        fsync(file)
    listing = {file.name: {"size": file.stat().st_size, "sha256": sha256_of(file)} for file in files}
    write_atomic(folder / SEAL, json.dumps(listing, indent=1, sort_keys=True))


def is_intact(folder: Path) -> bool:
    """Whether a checkpoint is sealed and all its files are as they were."""
    try:
        listing = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        return bool(listing) and all(
            (folder / name).stat().st_size == entry["size"] and sha256_of(folder / name) == entry["sha256"]
            for name, entry in listing.items()
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return False


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    found = [folder for folder in run.glob(f"{PREFIX}*") if folder.name[len(PREFIX) :].isdecimal()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimiser step of a checkpoint folder."""
    return int(checkpoint.name[len(PREFIX) :])


def last_good(run: Path) -> tuple[Path | None, list[Path]]:
    """(newest intact checkpoint or None, the damaged or incomplete ones that are newer)."""
    skipped = []
    for folder in reversed(checkpoints(run)):
        if is_intact(folder):
            return folder, skipped
        skipped.append(folder)
    return None, skipped


def rotate(run: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints; call it only after the newest is sealed."""
    for folder in checkpoints(run)[:-keep]:
        shutil.rmtree(folder, ignore_errors=True)
