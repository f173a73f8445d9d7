"""Safetensors files under our own limits, with numpy alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnprune.errors import InputError
from attnprune.sidecar.format.names import MAX_HEADER_BYTES, MAX_RANK, MAX_TENSORS, NAME
from attnprune.sidecar.format.reading import parse_json

WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1}
_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U8": "u1"}
_PIECE = 16 << 20  # bytes that are looked at together, so that no copy of a whole tensor is made


def parse_safetensors(raw: Any, name: str) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """Check a safetensors file's header under our own limits; return {tensor: (dtype, shape, start, end)}.

    Args:
        raw: the file, as bytes or mapped.

    Raises:
        InputError: truncated, oversized or malformed header, or offsets that do not tile the data exactly.
    """
    if len(raw) < 10:
        raise InputError(f"{name}: file too short for safetensors")
    length = int.from_bytes(raw[:8], "little")
    if length > min(MAX_HEADER_BYTES, len(raw) - 8):
        raise InputError(f"{name}: header too large, or not a safetensors file")
    header = parse_json(raw[8 : 8 + length].rstrip(b" "), f"{name} header", MAX_HEADER_BYTES)
    if not isinstance(header, dict):
        raise InputError(f"{name}: bad header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InputError(f"{name}: metadata is not text")
    if len(header) > MAX_TENSORS:
        raise InputError(f"{name}: too many tensors ({len(header)})")
    start = 8 + length
    tensors: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
    for tensor, entry in header.items():
        if not NAME.fullmatch(tensor) or ".." in tensor:
            raise InputError(f"{name}: bad tensor name {tensor[:40]!r}")
        tensors[tensor] = _tensor_entry(name, tensor, entry, start)
    end = start
    for tensor, (_, _, begin, stop) in sorted(tensors.items(), key=lambda item: item[1][2]):
        if begin != end:
            raise InputError(f"{name}: bad offsets in {tensor}")
        end = stop
    if end != len(raw):
        raise InputError(f"{name}: {'data after the last tensor' if end < len(raw) else 'file is truncated'}")
    return tensors


def _tensor_entry(name: str, tensor: str, entry: Any, start: int) -> tuple[str, tuple[int, ...], int, int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InputError(f"{name}: bad header entry for {tensor}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in WIDTHS:
        raise InputError(f"{name}: {tensor}: dtype {dtype!r} is not allowed")
    if not isinstance(shape, list) or len(shape) > MAX_RANK:
        raise InputError(f"{name}: {tensor}: too many dimensions")
    if not all(type(size) is int and 0 < size < 2**31 for size in shape):
        raise InputError(f"{name}: bad shape in {tensor}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(o) is int and o >= 0 for o in offsets):
        raise InputError(f"{name}: bad offsets in {tensor}")
    count = 1
    for size in shape:
        count *= size
    if offsets[1] - offsets[0] != count * WIDTHS[dtype]:
        raise InputError(f"{name}: bad offsets in {tensor}")
    return dtype, tuple(shape), start + offsets[0], start + offsets[1]


def read_arrays(raw: bytes, name: str) -> dict[str, np.ndarray]:
    """All tensors of a checked safetensors file as numpy arrays (no BF16)."""
    arrays = {}
    for tensor, (dtype, shape, begin, end) in parse_safetensors(raw, name).items():
        if dtype not in _NUMPY:
            raise InputError(f"{name}: {tensor}: dtype {dtype} is not allowed here")
        arrays[tensor] = np.frombuffer(raw[begin:end], dtype=_NUMPY[dtype]).reshape(shape)
    return arrays


def check_finite(raw: Any, name: str) -> None:
    """Refuse NaN and infinity in the floating-point tensors of a safetensors file (bytes or a map), without torch.

    Raises:
        InputError: naming the tensor.
    """
    for tensor, (dtype, _, begin, end) in parse_safetensors(raw, name).items():
        if not dtype.startswith(("F", "BF")):
            raise InputError(f"{name}: {tensor}: dtype {dtype} is not allowed here")
        for start in range(begin, end, _PIECE):
            if not _is_finite(raw, dtype, start, min(_PIECE, end - start)):
                raise InputError(f"{name}: non-finite value in {tensor}")


def _is_finite(raw: Any, dtype: str, start: int, size: int) -> bool:
    if dtype == "BF16":  # the upper half of a float32: infinity and NaN have all exponent bits set
        return bool(((np.frombuffer(raw, "<u2", size // 2, start) & 0x7F80) != 0x7F80).all())
    return bool(np.isfinite(np.frombuffer(raw, _NUMPY[dtype], size // WIDTHS[dtype], start)).all())
