"""Strict readers for any file and any JSON of an artefact: size limits, no link out, no NaN, no key given twice."""

from __future__ import annotations

import json
import mmap
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from attnprune.errors import InputError
from attnprune.files import reason
from attnprune.sidecar.format.names import MAX_JSON_BYTES


def parse_json(raw: bytes, name: str, limit: int = MAX_JSON_BYTES) -> Any:
    """Strict JSON: UTF-8 of at most `limit` bytes, no NaN or infinity, no duplicate keys, bounded nesting.

    Raises:
        InputError: naming the file and the problem.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = {}
        for key, value in pairs:
            if key in values:
                raise InputError(f"{name}: {key!r} given twice")
            values[key] = value
        return values

    def finite(text: str) -> float:
        number = float(text)
        if not np.isfinite(number):
            raise InputError(f"{name}: bad number {text[:20]}")
        return number

    if len(raw) > limit:
        raise InputError(f"{name}: larger than {limit >> 20} MiB")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{name}: not UTF-8") from None
    try:
        return json.loads(text, object_pairs_hook=unique, parse_float=finite, parse_constant=finite)
    except json.JSONDecodeError as error:
        raise InputError(f"{name}: not valid JSON (line {error.lineno})") from None
    except RecursionError:
        raise InputError(f"{name}: nested too deeply") from None
    except ValueError as error:
        raise InputError(f"{name}: bad number: {error}") from None


def read_regular(folder: Path, name: str, limit: int | None = None, size: int | None = None) -> bytes:
    """The bytes of a file of the folder; refuses links out of it, devices, pipes and oversized files.

    Args:
        limit: the most bytes that are read.
        size: the exact size the file must have; another one is refused before anything is read.

    Raises:
        InputError: missing, not a regular file, unreadable, too large, of another size, or changed while reading.
    """
    path = folder / name
    with _opened(folder, name, limit, size) as file:
        info = os.fstat(file.fileno())
        raw = file.read(info.st_size + 1)
        after = os.fstat(file.fileno())
        if len(raw) != info.st_size or (after.st_size, after.st_mtime_ns) != (info.st_size, info.st_mtime_ns):
            raise InputError(f"{path}: changed while reading")
        return raw


def map_regular(folder: Path, name: str, size: int | None = None) -> mmap.mmap:
    """As `read_regular`, but the file is mapped instead of read, so that it need not fit in memory.

    Raises:
        InputError: as `read_regular`, or an empty file.
    """
    with _opened(folder, name, None, size) as file:
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise InputError(f"{folder / name}: is empty") from None


@contextmanager
def _opened(folder: Path, name: str, limit: int | None, size: int | None) -> Iterator[BinaryIO]:
    path = folder / name
    try:
        real = path.resolve(strict=True)
        # Hub caches keep snapshots as links into blobs/, so a link may leave the folder but not the cache root.
        root = folder.resolve()
        cache = next((p for p in root.parents if p.name == "snapshots"), None)
        allowed = [root] if cache is None else [root, cache.parent / "blobs"]
        if not any(real.is_relative_to(place) for place in allowed):
            raise InputError(f"{path}: link leaves the folder")
        with open(real, "rb", opener=lambda p, flags: os.open(p, flags | os.O_NONBLOCK)) as file:
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode):
                raise InputError(f"{path}: not a regular file")
            if limit is not None and info.st_size > limit:
                raise InputError(f"{path}: larger than {limit >> 20} MiB")
            if size is not None and info.st_size != size:
                raise InputError(f"{path}: is damaged (size differs from the manifest)")
            yield file
    except FileNotFoundError:
        raise InputError(f"{path}: is missing") from None
    except IsADirectoryError:
        raise InputError(f"{path}: not a regular file") from None
    except RuntimeError:
        raise InputError(f"{path}: too many links") from None
    except OSError as error:
        raise InputError(f"{path}: {reason(error)}") from None
