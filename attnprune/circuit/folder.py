"""A search's folder: its settings, its record, and the checks before anything heavy is imported. No torch.

DIR/circuit.json, or the same compressed, circuit.json.gz; circuit.html and curve.png, which are made from it;
eap-ig.json and eap-ig.pt, for other tools; cache/ with settings.json and what has been measured so far
"""

from __future__ import annotations

import gzip
import json
import shlex
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from attnprune.circuit.result import SCHEMA, CircuitResult
from attnprune.errors import InputError
from attnprune.files import check_writable, unusable
from attnprune.sidecar import format

SETTINGS_FILE = "settings.json"
CACHE_FOLDER = "cache"
RECORD_FILE, COMPRESSED_FILE = "circuit.json", "circuit.json.gz"
_BEFORE = {
    "mask_steps": 0,
    "ablate": "corrupt",
    "procedure": "exact",
    "levels": False,
    "searches": 1,
}  # of a search that was begun when there were no such settings
MAX_RECORD_BYTES = 256 << 20  # some two million edges


def default_name(model: str, task: str) -> str:
    """The folder of a search that is given none."""
    return f"{Path(model).name.removesuffix('.gguf')}-circuit-{Path(task).stem.replace(':', '-')}"


def is_begun(folder: Path) -> bool:
    """Whether a search was begun here, so that it can be continued."""
    return (folder / CACHE_FOLDER / SETTINGS_FILE).exists()


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds something or cannot be written, before torch is loaded.

    Raises:
        InputError
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder}: is not a folder")
        if folder.is_dir() and any(folder.iterdir()):
            resume = f"attnprune circuit --resume {shlex.quote(str(folder))}, or another --out"
            raise InputError(f"{folder}: is not empty", hint=resume if is_begun(folder) else "another --out")
        parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    except OSError as error:
        raise unusable(folder, error) from None
    check_writable(parent)


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings that the search in this folder was begun with.

    Raises:
        InputError: no search there, or damaged settings.
    """
    file = folder / CACHE_FOLDER / SETTINGS_FILE
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise InputError(f"{folder}: holds no search to continue", hint="start one with --out") from None
    wanted = {
        "model": str, "task": str, "against": (str, type(None)), "base": (str, type(None)), "target": float,
        "prompts": int, "seed": int, "quick": bool, "mask_steps": (int, type(None)), "deletions": (int, type(None)),
        "controls": bool, "ablate": str, "procedure": str, "batch_size": int, "command": str, "fingerprint": str,
    }  # fmt: skip
    if isinstance(values, dict):
        for key, value in _BEFORE.items():
            values.setdefault(key, value)
    if not isinstance(values, dict) or any(not isinstance(values.get(key), kind) for key, kind in wanted.items()):
        raise InputError(f"{file}: damaged", hint="start again in another folder")
    return values


def read_record(folder: Path) -> CircuitResult:
    """The result of a finished search: circuit.json, or circuit.json.gz where the first is not there.

    Raises:
        InputError: no record, one that cannot be read, or one of another schema.
    """
    try:
        if not folder.is_dir():
            raise InputError(f"{folder}: {'is not a folder' if folder.exists() else 'no such folder'}")
        file = next((folder / name for name in (RECORD_FILE, COMPRESSED_FILE) if (folder / name).is_file()), None)
    except OSError as error:  # a folder that may not be searched, a name that is too long
        raise unusable(folder, error) from None
    if file is None:
        raise InputError(f"{folder}: holds no {RECORD_FILE} and no {COMPRESSED_FILE}")
    raw = _read(file)
    try:
        result = CircuitResult.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        why = f"{where}: {first['msg']}" if where else first["msg"]
        raise InputError(f"{file}: not a record of {SCHEMA}: {why}") from None
    if not result.models:
        raise InputError(f"{file}: not a record of {SCHEMA}: no models")
    return result


def _read(file: Path) -> bytes:
    raw = format.read_regular(file.parent, file.name, MAX_RECORD_BYTES)
    if file.name != COMPRESSED_FILE:
        return raw
    try:
        raw = gzip.GzipFile(fileobj=BytesIO(raw)).read(MAX_RECORD_BYTES + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{file}: damaged: {error}") from None
    if len(raw) > MAX_RECORD_BYTES:
        raise InputError(f"{file}: larger than {MAX_RECORD_BYTES >> 20} MiB")
    return raw
