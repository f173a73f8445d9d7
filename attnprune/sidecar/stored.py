"""Tensors of a checkpoint's safetensors files, read one at a time: no model is built, and none is held."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from attnprune.sidecar.identity import Fingerprint, fingerprint_of
from attnprune.sidecar.quiet import quiet


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


def fingerprint_of_files(location: str, revision: str | None, config: Any, dtype: torch.dtype) -> Fingerprint | None:
    """The fingerprint of a base in full precision from its files: a folder's, or a Hub repository's in the cache.

    None where their names are not those of the model, which transformers then renames or puts together.
    """
    folder = Path(location)
    if revision is not None:
        found = try_to_load_from_cache(location, "config.json", revision=revision)
        if not isinstance(found, str):
            return None
        folder = Path(found).parent
    with quiet(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    stored = StoredTensors(folder, dtype)
    if not shapes.keys() <= stored.keys():
        return None
    wanted = stored.only(shapes)
    return fingerprint_of(wanted) if all(wanted[name].shape == shape for name, shape in shapes.items()) else None
