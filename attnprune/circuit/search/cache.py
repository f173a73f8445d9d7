"""What a search has measured so far, in a folder, so that an interrupted one continues where it was."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from attnprune.errors import InputError
from attnprune.files import append_line, reopen_lines, write_atomic

_NUMBERS, _TENSORS = "evaluations.jsonl", "scores"


def digest(*tensors: Tensor) -> str:
    """A short name for tensors."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(str(tuple(tensor.shape)).encode() + tensor.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:32]


def _slug(key: str) -> str:
    return re.sub("[^a-z0-9.-]+", "-", key.lower())


class Cache:
    """Results by key. Whatever was asked for once is not computed again; without a folder it lives in memory only."""

    def __init__(self, folder: Path | None = None):
        self._folder = folder
        self._numbers: dict[str, Any] = {}
        self._tensors: dict[str, dict[str, Tensor]] = {}
        if folder is not None:
            (folder / _TENSORS).mkdir(parents=True, exist_ok=True)
            self._numbers = dict(reopen_lines(folder / _NUMBERS, _is_entry))

    def numbers(self, key: str, compute: Callable[[], Any]) -> Any:
        """A JSON value (floats keep every bit)."""
        if key not in self._numbers:
            self._numbers[key] = compute()
            if self._folder is not None:
                append_line(self._folder / _NUMBERS, [key, self._numbers[key]])
        return self._numbers[key]

    def tensors(self, key: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Named tensors, on the CPU."""
        if key in self._tensors:
            return self._tensors[key]
        file = None if self._folder is None else self._folder / _TENSORS / f"{_slug(key)}.safetensors"
        found = None if file is None else _stored(file)
        if found is None:
            found = {name: tensor.detach().cpu().contiguous() for name, tensor in compute().items()}
            if file is not None:
                write_atomic(file, save(found))
        self._tensors[key] = found
        return found


def _is_entry(line: Any) -> bool:
    return isinstance(line, list) and len(line) == 2 and isinstance(line[0], str)


def _stored(file: Path) -> dict[str, Tensor] | None:
    """The tensors in a file, None where it is missing or was cut short: they are computed again."""
    try:
        return load(file.read_bytes()) if file.exists() else None
    except SafetensorError:
        return None


def check_same(cache: Cache, key: str, values: Tensor) -> None:
    """Refuse to go on with results of other weights: compare with what was stored under this key.

    Raises:
        InputError: they differ by more than rounding.
    """
    stored = torch.tensor(cache.numbers(key, values.tolist))
    if stored.shape != values.shape or not torch.allclose(stored, values.cpu(), rtol=1e-3, atol=1e-3):
        raise InputError(f"{key}: not the model that this search was begun with", hint="use another --out")
