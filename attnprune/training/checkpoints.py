"""Sealed training checkpoints: a checkpoint counts only once a manifest of all its files has reached the disk.

A run killed in the middle of a save leaves a folder without a valid seal, which `last_good` passes over.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from attnprune.files import fsync, sha256_of, write_atomic

SEAL = "attnprune_seal.json"
PREFIX = "checkpoint-"


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
