"""Models in another data type, without a value becoming infinite on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from attnprune.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def any_dtype(dtype: Any) -> torch.dtype:
    """A dtype, or one by its name.

    Raises:
        InputError: none that a model is cast to.
    """
    known = DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if not isinstance(known, torch.dtype) or known not in DTYPES.values():
        raise InputError(f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
    return known


def cast(model: Any, dtype: torch.dtype) -> Any:
    """Change a model's tensors to `dtype`, in place, as if they had been read in it; returns the model.

    Gates stay fp32, and so do buffers that are not stored (rotary frequencies), which transformers keeps as well.

    Raises:
        InputError: not a floating dtype of at least 16 bits, or a tensor that is not finite in it; nothing is changed.
    """
    if dtype not in DTYPES.values():
        raise InputError(f"dtype: {dtype} is not one of {', '.join(DTYPES)}")
    for name, tensor in _stored(model):
        _check(name, tensor, tensor.to(dtype))
    for _, tensor in _stored(model):
        tensor.data = tensor.to(dtype)
    return model


def check_cast(model: Any, source: Callable[[], Any]) -> None:
    """Refuse a model that was read in some dtype and is not finite in it.

    Args:
        source: reads it in a dtype that holds every value, for the message; called only if there is something to say.

    Raises:
        InputError: naming the tensor.
    """
    bad = {name: tensor for name, tensor in _stored(model) if not _is_finite(tensor)}
    if bad:
        wide = dict(_stored(source()))
        for name, tensor in bad.items():
            _check(name, wide[name], tensor)


def _stored(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The floating tensors of a checkpoint of this model, gates left out; tied ones once."""
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        codes = type(tensor).__name__ == "Params4bit"  # which may be stored as if they were floating
        if tensor.is_floating_point() and not codes and "attnprune_gate" not in name and id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _check(name: str, before: Tensor, after: Tensor) -> None:
    """Refuse a tensor that is not finite `after` a cast."""
    if _is_finite(after):
        return
    dtype = str(after.dtype).removeprefix("torch.")
    if not _is_finite(before):
        raise InputError(f"{name}: holds an infinite value or NaN already, before any cast")
    raise InputError(
        f"{name}: a value of {before.detach().abs().max():.4g} is too large for {dtype} "
        f"(at most {torch.finfo(after.dtype).max:.4g})",
        hint="bfloat16 and float32 reach further" if after.dtype == torch.float16 else None,
    )
