"""A model to look at: sparse or dense, by name or in memory, and the dense base beside a sparse one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from attnprune.errors import InputError, unpacked
from attnprune.sidecar import bases, hub, identity, loading
from attnprune.sidecar.folder import Sidecar, is_merged, open_artefact


class Named(NamedTuple):
    """A loaded model.

    Attributes:
        sidecar: what a sparse model by name was opened from.
        is_base: it is the dense base of a sparse one, beside which it stands.
    """

    name: str
    model: Any
    tokenizer: Any
    sidecar: Sidecar | None = None
    is_base: bool = False


def models_of(
    model: Any, tokenizer: Any, base: str | Path | None, device: str, dense: bool, notes: list[str]
) -> Iterator[Named]:
    """The model, and where `dense` the base of a sparse one by name; each is loaded when it is its turn.

    Args:
        model: a name; or a model in memory with its `tokenizer`, or both as `attnprune.load` gives them.
        notes: gets a line where a base cannot be found.

    Raises:
        InputError: no such model, a tokenizer too few or too many, a base for a model that has none or another one, a
            device for a model in memory, which stays where it is.
    """
    if not isinstance(model, str | Path):
        for name, is_given in (("base", base is not None), ("device", device != "auto")):
            if is_given:
                raise InputError(f"{name}: is for models given by name")
        yield in_memory(model, tokenizer)
        return
    if tokenizer is not None:
        raise InputError("tokenizer: goes with a model in memory; that of a model by name is its own")
    base = None if base is None else str(base)
    check_base(base, str(model))
    first = by_name(str(model), base, device)
    yield first
    if not dense or first.sidecar is None:
        return
    if base is None and is_merged(first.sidecar.path):
        notes.append("the dense base is not beside it: a merged folder does not hold it; name it with --base")
        return
    name, _ = loading.which_base(first.sidecar, base)
    loaded = loading.load_dense(first.sidecar, base, bases.pick_device(device))
    if is_merged(first.sidecar.path):  # of a sidecar, loading it has compared them
        try:
            identity.check_base(first.sidecar.manifest, loaded.model)
        except InputError as error:
            raise InputError(f"{name}: is not the base of {first.name}: {error.message}") from None
    yield Named(name, loaded.model, loaded.tokenizer, is_base=True)


def by_name(name: str, base: str | None, device: str) -> Named:
    """A sparse model on its base, or a base model, of which `base` says nothing.

    Raises:
        InputError: no such model.
    """
    where, folder = bases.pick_device(device), hub.sparse_folder(name)
    if folder is not None:
        return Named(name, *loading.load(folder, base, device=where), open_artefact(folder))
    loaded = bases.load_base(name, device=where)
    return Named(name, loaded.model, loaded.tokenizer)


def check_base(base: str | None, *names: str) -> None:
    """Refuse a base for models that are all dense, before any weights are read.

    Raises:
        InputError: naming them.
    """
    if base is not None and all(hub.sparse_folder(name) is None for name in names):
        are = "is a dense model itself" if len(names) == 1 else "are dense models themselves"
        raise InputError(f"--base: {' and '.join(names)} {are}")


def in_memory(model: Any, tokenizer: Any) -> Named:
    """A model and its tokenizer, apart or as a pair.

    Raises:
        InputError: something else, or no tokenizer.
    """
    model, tokenizer = unpacked(model, tokenizer)
    if not isinstance(model, nn.Module) or getattr(model, "config", None) is None:
        raise InputError(f"model: {type(model).__name__} is neither a name nor a transformers model")
    if tokenizer is None:
        raise InputError("tokenizer: a model in memory needs its tokenizer")
    if not callable(tokenizer) or not hasattr(tokenizer, "decode"):
        raise InputError(f"tokenizer: {type(tokenizer).__name__} is not a tokenizer")
    return Named(type(model).__name__, model, tokenizer)
