"""Tensors of a checkpoint's safetensors files, read one at a time: no model is built, and none is held."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a folder's .safetensors files by name, floating ones in `dtype`, as a model would be given them.

    A tensor is read whenever it is asked for.
    """

    def __init__(self, folder: Path, dtype: torch.dtype):
        self._dtype = dtype
        self._places: dict[str, Path] = {}
        single = folder / "model.safetensors"
        for file in [single] if single.exists() else sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                self._places |= dict.fromkeys(opened.keys(), file)

    def only(self, names: Collection[str]) -> StoredTensors:
        """These tensors alone."""
        chosen = StoredTensors.__new__(StoredTensors)
        chosen._dtype = self._dtype
        chosen._places = {name: self._places[name] for name in names}
        return chosen

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._places[name], framework="pt") as opened:
            tensor = opened.get_tensor(name)
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
