"""The sidecar format, version 1: file and tensor names, the manifest's schema, strict readers. No torch.

The prose specification is formats/attnprune-v1.md.
"""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from attnprune.errors import InputError

FORMAT = "attnprune"
FORMAT_VERSION = "1.0"
FEATURES = frozenset({"gate:threshold", "weights:lora", "weights:delta"})

MANIFEST_FILE = "attnprune.json"
GATES_FILE = "gates.safetensors"
DELTA_FILE = "delta.safetensors"
ADAPTER_CONFIG_FILE = "adapter/adapter_config.json"
ADAPTER_FILE = "adapter/adapter_model.safetensors"

MAX_JSON_BYTES = 1 << 20
MAX_HEADER_BYTES = 8 << 20
MAX_TENSORS = 20_000
MAX_RANK = 4
MAX_GATE = 1e4
_NAME = re.compile(r"[A-Za-z0-9._-]{1,256}")
_VERSION = re.compile(r"[1-9][0-9]{0,3}(\.[0-9]{1,4})?")
_DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1}
_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U8": "u1"}

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Size = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1, le=1024)]


class _Entry(BaseModel):
    """A manifest object: unknown keys are kept, so a newer minor version survives a round trip."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)


class FileEntry(_Entry):
    """Size in bytes and sha256 of one file."""

    size: Size
    sha256: Sha256


class BaseEntry(_Entry):
    """The base model. `structure` hashes its (name, dtype, shape) list, `content` 256 sampled values per tensor."""

    kind: Literal["hub", "local", "gguf", "bundled"]
    repo_id: str | None = None
    revision: str | None = None
    model_type: str
    dtype: str
    structure: Sha256
    content: Sha256


class GateEntry(_Entry):
    """An edge is open when `score + bias > threshold`; heads[i] is the number of heads of layer i."""

    logit: Literal["score+bias"]
    threshold: Literal[0]
    heads: list[Positive] = Field(min_length=1, max_length=1024)


class WeightsEntry(_Entry):
    """How the weights differ from the base: not at all, by LoRA adapters, or by whole changed tensors."""

    kind: Literal["none", "lora", "delta"]
    rank: Positive | None = None
    alpha: Finite | None = None
    tensors: Size = 0


class ResultEntry(_Entry):
    """Measured on held-out text with this very artefact. Losses and kl in nats per token."""

    loss: Finite
    base_loss: Finite
    control_loss: Finite | None = None
    kl: Finite
    density: Annotated[float, Field(ge=0, le=1)]
    edges_per_query: Finite
    open_edges: Size
    visible_edges: Size
    exact_match: Finite
    seq_len: Size
    tokens: Size
    data: str
    data_sha256: Sha256
    steps: Size
    seed: Size
    constraint: Literal["loss", "kl", "density"]
    limit: Finite
    feasible: bool


class ProbeEntry(_Entry):
    """A short text whose loss (nats per token) and open-edge count a reader reproduces within the tolerances."""

    input_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=64)]
    loss: Finite
    open_edges: Size
    tolerance: Finite
    edge_tolerance: Size


class Manifest(_Entry):
    """attnprune.json: the only source of truth of a sidecar."""

    format: Literal["attnprune"]
    format_version: Annotated[str, Field(pattern=r"^[1-9][0-9]{0,3}\.[0-9]{1,4}$")]
    requires: list[str]
    created_by: str
    base: BaseEntry
    gate: GateEntry
    weights: WeightsEntry
    result: ResultEntry
    probe: ProbeEntry
    files: dict[str, FileEntry]

    def to_json(self) -> str:
        """Canonical text: sorted keys, two-space indent, final newline."""
        return json.dumps(self.model_dump(exclude_none=True), sort_keys=True, indent=2, allow_nan=False) + "\n"


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


def read_regular(folder: Path, name: str, limit: int | None = None) -> bytes:
    """The bytes of a file of the folder; refuses links out of it, devices, pipes and oversized files.

    Raises:
        InputError: missing, not a regular file, unreadable, or larger than `limit`.
    """
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
            return file.read()
    except FileNotFoundError:
        raise InputError(f"{path}: is missing") from None
    except IsADirectoryError:
        raise InputError(f"{path}: not a regular file") from None
    except RuntimeError:
        raise InputError(f"{path}: too many links") from None
    except OSError as error:
        raise InputError(f"{path}: {(error.strerror or str(error)).lower()}") from None


def parse_manifest(raw: bytes, name: str = MANIFEST_FILE) -> Manifest:
    """Check and parse a manifest.

    Raises:
        InputError: not JSON, a newer major version, an unknown required feature, or a key of the wrong type.
    """
    values = parse_json(raw, name)
    if not isinstance(values, dict):
        raise InputError(f"{name}: expected an object")
    if values.get("format") != FORMAT:
        raise InputError(f"{name}: not an attnprune manifest")
    version = values.get("format_version")
    if isinstance(version, str) and _VERSION.fullmatch(version) and int(version.split(".")[0]) > 1:
        raise InputError(f"{name}: format {version} needs a newer attnprune", hint="pip install -U attnprune")
    try:
        manifest = Manifest.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{name}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    unknown = [feature for feature in manifest.requires if feature not in FEATURES]
    if unknown:
        raise InputError(f"{name}: needs {unknown[0]!r}, which this version does not know")
    for file in manifest.files:
        parts = PurePosixPath(file).parts
        if (
            not parts
            or any(not _NAME.fullmatch(part) or part in (".", "..") for part in parts)
            or "/".join(parts) != file
        ):
            raise InputError(f"{name}: bad file name {file!r}")
    return manifest


def parse_safetensors(raw: bytes, name: str) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """Check a safetensors file's header under our own limits; return {tensor: (dtype, shape, start, end)}.

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
        if not _NAME.fullmatch(tensor) or ".." in tensor:
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
    if not isinstance(dtype, str) or dtype not in _DTYPES:
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
    if offsets[1] - offsets[0] != count * _DTYPES[dtype]:
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
