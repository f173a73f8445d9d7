"""The weights of a sidecar or merged folder as numpy arrays, decoded one tensor at a time.

The files of a merged folder are mapped, so that two whole models need not fit in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from attnprune.sidecar import format
from attnprune.sidecar.folder import Sidecar, is_merged

Reader = Callable[[], np.ndarray]
Factors = tuple[np.ndarray, np.ndarray]

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_GATE = "attnprune_gate"


@dataclass(frozen=True)
class Weights:
    """The weights of one side. `whole`: readers of tensors; `updates`: of LoRA factors (b, a), W = base + b @ a.

    `complete`: there are no other tensors. Else the others are those of the base. `dtype`: of the model's weights.
    """

    path: str
    dtype: str
    complete: bool
    whole: Mapping[str, Reader] = field(default_factory=dict)
    updates: Mapping[str, Callable[[], Factors]] = field(default_factory=dict)


def stored_weights(sidecar: Sidecar) -> Weights:
    """The weights of a sidecar or merged folder, checked, as they are stored."""
    if is_merged(sidecar.path):
        return _merged_weights(sidecar)
    path, entry, dtype = str(sidecar.path), sidecar.manifest.weights, sidecar.manifest.base.dtype
    raw = sidecar.weight_bytes()
    if entry.kind == "delta":
        return Weights(path, dtype, complete=False, whole=_readers(raw, format.DELTA_FILE, dtype))
    if entry.kind == "lora":
        assert entry.alpha is not None
        assert entry.rank is not None
        return Weights(path, dtype, complete=False, updates=_updates(raw, entry.alpha / entry.rank))
    return Weights(path, dtype, complete=False)


def _merged_weights(sidecar: Sidecar) -> Weights:
    whole: dict[str, Reader] = {}
    dtypes = set()
    for file, raw in sidecar.mapped.items():
        format.check_finite(raw, file)
        whole |= _readers(raw, file)
        entries = format.parse_safetensors(raw, file).items()
        dtypes |= {DTYPES[stored] for name, (stored, *_) in entries if _GATE not in name}
    return Weights(str(sidecar.path), " and ".join(sorted(dtypes)), complete=True, whole=whole)


def _updates(raw: bytes, scale: float) -> dict[str, Callable[[], Factors]]:
    """LoRA factors by the name of the weight they change: (scale * B [out, rank], A [rank, in])."""
    readers = _readers(raw, format.ADAPTER_FILE)
    start, end = "base_model.model.", ".lora_A.weight"
    targets = [name.removeprefix(start).removesuffix(end) for name in readers if name.endswith(end)]

    def factors(target: str) -> Factors:
        down, up = (readers[f"{start}{target}.lora_{side}.weight"]().astype(np.float64) for side in "AB")
        return scale * up, down

    return {f"{target}.weight": partial(factors, target) for target in targets}


def _readers(raw: Any, file: str, dtype: str | None = None) -> dict[str, Reader]:
    """A function per tensor of a checked safetensors file that decodes it, gates left out.

    Args:
        dtype: round to this one, as loading does with a delta.
    """

    def decode(stored: str, shape: tuple[int, ...], begin: int) -> np.ndarray:
        values = np.frombuffer(raw, _NUMPY[stored], math.prod(shape), begin).reshape(shape)
        if stored == "BF16":  # the upper half of an fp32
            values = (values.astype("<u4") << 16).view("<f4")
        return values if dtype is None else _rounded(values, dtype)

    entries = format.parse_safetensors(raw, file).items()
    return {name: partial(decode, *entry[:3]) for name, entry in entries if _GATE not in name}


def _rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """Round to the nearest value of a dtype, ties to even; bfloat16 is held in fp32."""
    with np.errstate(over="ignore"):  # infinity is refused later
        if dtype != "bfloat16":
            return values.astype(dtype, copy=False)
        bits = values.astype("<f4").view("<u4")
        return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view("<f4")
