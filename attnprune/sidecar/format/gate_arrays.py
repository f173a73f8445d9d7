"""The tensors of gates.safetensors: biases, and statistics that must describe one mask."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from attnprune.errors import InputError
from attnprune.sidecar.format.manifest import Manifest
from attnprune.sidecar.format.names import GATES_FILE, MAX_GATE
from attnprune.sidecar.format.tensors import parse_safetensors

_GATE = "attnprune_gate"
_BIAS = re.compile(rf"[A-Za-z_.]+\.([0-9]+)\.[a-z_]+\.{_GATE}\.bias")


def check_gates(arrays: dict[str, np.ndarray], manifest: Manifest) -> None:
    """Names, shapes, dtypes and values of gates.safetensors, strict both ways.

    Raises:
        InputError: naming the layer or tensor.
    """
    expected: dict[str, tuple[str, tuple[int, ...] | None]] = {"stats.offset_edges": ("<i4", None)}
    edges = arrays.get("stats.offset_edges", np.zeros(1))
    if edges.ndim != 1 or edges[0] != 0 or (np.diff(edges) <= 0).any():
        raise InputError(f"{GATES_FILE}: stats.offset_edges is not a rising list from 0")
    buckets = len(edges) - 1
    for layer, heads in enumerate(manifest.gate.heads):
        expected[f"layers.{layer}.gate.bias"] = ("<f4", (heads,))
        expected[f"layers.{layer}.gate.closed"] = ("|u1", (heads,))
        expected[f"layers.{layer}.stats.density"] = ("<f4", (heads,))
        expected[f"layers.{layer}.stats.open_by_offset"] = ("<f4", (heads, buckets))
        expected[f"layers.{layer}.stats.sink"] = ("<f4", (heads,))
    wrong = sorted(set(expected) ^ set(arrays))
    if wrong:
        raise InputError(f"{GATES_FILE}: {wrong[0]} is {'missing' if wrong[0] in expected else 'unexpected'}")
    for name, (dtype, shape) in expected.items():
        array = arrays[name]
        if array.dtype.str != dtype or (shape is not None and array.shape != shape):
            raise InputError(f"{GATES_FILE}: {name}: expected {dtype} {shape}, got {array.dtype.str} {array.shape}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise InputError(f"{GATES_FILE}: {name} is not finite")
        if name.endswith("gate.bias") and np.abs(array).max() > MAX_GATE:
            raise InputError(f"{GATES_FILE}: {name} is out of range")
        if ".stats." in name and name.startswith("layers.") and (array.min() < 0 or array.max() > 1):
            raise InputError(f"{GATES_FILE}: bad statistics in {name}")
        if name.endswith("gate.closed") and array.max() > 1:
            raise InputError(f"{GATES_FILE}: {name} is not a flag")
        if name.endswith("stats.density"):
            _check_statistics(name.removesuffix("stats.density"), arrays, edges)


def _check_statistics(layer: str, arrays: dict[str, np.ndarray], edges: np.ndarray) -> None:
    """The statistics of a layer describe one mask: closed heads have no edges, distances add up to the density."""
    density = arrays[f"{layer}stats.density"]
    profile = arrays[f"{layer}stats.open_by_offset"]
    sink, closed = arrays[f"{layer}stats.sink"], arrays[f"{layer}gate.closed"]
    if ((density == 0) != (closed == 1)).any():
        raise InputError(f"{GATES_FILE}: bad statistics: {layer}gate.closed contradicts the density")
    empty = density == 0
    if (profile[empty] != 0).any() or (sink[empty] != 0).any() or not (profile[~empty] > 0).any(1).all():
        raise InputError(f"{GATES_FILE}: bad statistics: {layer}stats.open_by_offset contradicts the density")
    # Pairs at distance d in a block of T tokens: T - d. A sliding window shows fewer, so its density is higher.
    length, (low, high) = int(edges[-1]), (edges[:-1].astype(np.float64), edges[1:].astype(np.float64))
    pairs = (high - low) * (2 * length - low - high + 1) / 2
    if (profile @ pairs / pairs.sum() > density * (1 + 1e-4) + 1e-9).any():
        raise InputError(f"{GATES_FILE}: bad statistics: {layer}stats.open_by_offset exceeds the density")


def check_gates_inside(weights: Mapping[str, Any], arrays: dict[str, np.ndarray], manifest: Manifest) -> None:
    """The gates inside a merged model's weights ({file: its bytes}) are those of gates.safetensors, bit for bit.

    Raises:
        InputError: naming the tensor, or the layer that has none.
    """
    layers: dict[int, str] = {}
    for file, raw in weights.items():
        for tensor, (dtype, shape, begin, end) in parse_safetensors(raw, file).items():
            if _GATE not in tensor:
                continue
            match = _BIAS.fullmatch(tensor)
            layer = int(match[1]) if match is not None else -1
            if not 0 <= layer < len(manifest.gate.heads) or layer in layers:
                raise InputError(f"{file}: {tensor} is not the gate of a layer, or the second one of its layer")
            layers[layer] = tensor
            stored = arrays[f"layers.{layer}.gate.bias"]
            if dtype != "F32" or shape != stored.shape or raw[begin:end] != stored.tobytes():
                raise InputError(f"{file}: {tensor} differs from {GATES_FILE}")
    missing = set(range(len(manifest.gate.heads))) - set(layers)
    if missing:
        raise InputError(f"the weights do not hold this model's gates: layer {min(missing)} has none")
