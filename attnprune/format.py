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
from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, ValidationError, model_serializer

from attnprune.errors import InputError

FORMAT = "attnprune"
FORMAT_VERSION = "1.0"
FEATURES = frozenset({"gate:threshold", "weights:lora", "weights:delta"})

MANIFEST_FILE = "attnprune.json"
GATES_FILE = "gates.safetensors"
DELTA_FILE = "delta.safetensors"
ADAPTER_CONFIG_FILE = "adapter/adapter_config.json"
ADAPTER_FILE = "adapter/adapter_model.safetensors"
CODE_FILE = "modeling_attnprune.py"  # of a merged folder

MAX_JSON_BYTES = 1 << 20
MAX_HEADER_BYTES = 8 << 20
MAX_TENSORS = 20_000
MAX_RANK = 4
MAX_GATE = 1e4
MAX_GATES_BYTES = 256 << 20  # 1024 layers of 1024 heads
MAX_FILES = 1024

# Modules that hold an attention in the supported families; LoRA may change nothing else.
ATTENTION_MODULES = frozenset({"self_attn", "attn", "attention"})
# Files that some loader would execute; none belongs beside a sidecar.
CODE_SUFFIXES = frozenset({".py", ".pyc", ".so", ".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".npy", ".joblib"})
_NAME = re.compile(r"[A-Za-z0-9._-]{1,256}")
_LORA = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
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

    @model_serializer(mode="wrap")
    def _without_unset(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out our own optional keys where they have no value, and keep an unknown key even when it is null."""
        known = type(self).model_fields
        return {key: value for key, value in handler(self).items() if value is not None or key not in known}


class AdapterConfig(BaseModel):
    """adapter/adapter_config.json: the keys of PEFT that we understand; every other key is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    peft_type: Literal["LORA"]
    task_type: Literal["CAUSAL_LM"]
    base_model_name_or_path: str | None = None
    revision: str | None = None
    r: Positive
    lora_alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    target_modules: list[str] = Field(min_length=1, max_length=MAX_TENSORS)
    fan_in_fan_out: bool = False
    bias: Literal["none"] = "none"
    inference_mode: Literal[True] = True


class FileEntry(_Entry):
    """Size in bytes and sha256 of one file."""

    size: Size
    sha256: Sha256


class BaseEntry(_Entry):
    """The base model. `structure` hashes its (name, dtype, shape) list, `content` 256 sampled values per tensor."""

    kind: Literal["hub", "local", "gguf", "bundled"]
    repo_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?$")] | None = None
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = None
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


class MergedEntry(_Entry):
    """What a merged folder was made from: the dtype of its weights, the sidecar's own weights entry and probe."""

    dtype: str
    weights: WeightsEntry
    probe: ProbeEntry


class Manifest(_Entry):
    """attnprune.json: the only source of truth of a sidecar. `merged` is there only in a merged folder's block."""

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
    merged: MergedEntry | None = None

    def to_json(self) -> str:
        """Canonical text: sorted keys, two-space indent, final newline."""
        return json.dumps(self.model_dump(), sort_keys=True, indent=2, allow_nan=False) + "\n"


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
            raw = file.read(info.st_size + 1)
            after = os.fstat(file.fileno())
            if len(raw) != info.st_size or (after.st_size, after.st_mtime_ns) != (info.st_size, info.st_mtime_ns):
                raise InputError(f"{path}: changed while reading")
            return raw
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
    if len(manifest.files) > MAX_FILES:
        raise InputError(f"{name}: too many files ({len(manifest.files)})")
    for file in manifest.files:
        parts = PurePosixPath(file).parts
        if (
            not parts
            or any(not _NAME.fullmatch(part) or part in (".", "..") for part in parts)
            or "/".join(parts) != file
        ):
            raise InputError(f"{name}: bad file name {file!r}")
    return manifest


def parse_merged_config(values: Any, name: str = "config.json") -> Manifest:
    """The manifest in the parsed config.json of a merged model.

    Raises:
        InputError: no `attnprune` block, or one that does not pass.
    """
    if not isinstance(values, dict) or "attnprune" not in values:
        raise InputError(f"{name}: no attnprune block")
    return parse_manifest(json.dumps(values["attnprune"]).encode(), f"{name}: attnprune")


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


def check_finite(raw: bytes, name: str) -> None:
    """Refuse NaN and infinity in the floating-point tensors of a checked safetensors file, without torch.

    Raises:
        InputError: naming the tensor.
    """
    for tensor, (dtype, _, begin, end) in parse_safetensors(raw, name).items():
        if dtype == "BF16":  # the upper half of a float32: infinity and NaN have all exponent bits set
            bad = (np.frombuffer(raw, "<u2", (end - begin) // 2, begin) & 0x7F80) == 0x7F80
        elif dtype.startswith("F"):
            bad = ~np.isfinite(np.frombuffer(raw, _NUMPY[dtype], (end - begin) // _DTYPES[dtype], begin))
        else:
            raise InputError(f"{name}: {tensor}: dtype {dtype} is not allowed here")
        if bad.any():
            raise InputError(f"{name}: non-finite value in {tensor}")


def check_weights_entry(manifest: Manifest) -> None:
    """The kind of weights, the required features and the listed files must agree.

    Raises:
        InputError: naming what contradicts.
    """
    entry, listed = manifest.weights, set(manifest.files)
    expected = {"none": set(), "delta": {DELTA_FILE}, "lora": {ADAPTER_CONFIG_FILE, ADAPTER_FILE}}[entry.kind]
    for file in sorted({DELTA_FILE, ADAPTER_CONFIG_FILE, ADAPTER_FILE} & (expected ^ listed)):
        problem = "not listed in" if file in expected else f"unexpected for weights {entry.kind!r} in"
        raise InputError(f"{file}: {problem} {MANIFEST_FILE}")
    if entry.kind == "lora" and (entry.rank is None or entry.alpha is None or entry.alpha <= 0):
        raise InputError(f"{MANIFEST_FILE}: weights: lora needs a rank and an alpha above 0")


def parse_adapter_config(raw: bytes, manifest: Manifest) -> AdapterConfig:
    """Check adapter/adapter_config.json by our own list of keys, and that it says what the manifest says.

    Raises:
        InputError: an unknown key (PEFT has keys that import modules), a wrong value, or another rank or alpha.
    """
    values = parse_json(raw, ADAPTER_CONFIG_FILE)
    if not isinstance(values, dict):
        raise InputError(f"{ADAPTER_CONFIG_FILE}: expected an object")
    try:
        config = AdapterConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        message = "key not allowed" if first["type"] == "extra_forbidden" else first["msg"]
        raise InputError(f"{ADAPTER_CONFIG_FILE}: {where}: {message}") from None
    if (config.r, config.lora_alpha) != (manifest.weights.rank, manifest.weights.alpha):
        raise InputError(f"{ADAPTER_CONFIG_FILE}: rank or alpha differs from {MANIFEST_FILE}")
    return config


def check_lora(raw: bytes, manifest: Manifest, config: AdapterConfig) -> None:
    """Names, pairs, ranks and targets of adapter_model.safetensors, from its header.

    Names follow PEFT: `base_model.model.MODULE.lora_A.weight` [rank, in] and `...lora_B.weight` [out, rank].

    Raises:
        InputError: naming the tensor.
    """
    tensors = parse_safetensors(raw, ADAPTER_FILE)
    seen = set()
    for tensor, (_, shape, _, _) in tensors.items():
        match = _LORA.fullmatch(tensor)
        if match is None:
            raise InputError(f"{ADAPTER_FILE}: {tensor} is not a lora tensor")
        target, side = match.groups()
        suffixes = [wanted for wanted in config.target_modules if f".{target}".endswith(f".{wanted}")]
        if not suffixes or not ATTENTION_MODULES.intersection(target.split(".")):
            raise InputError(f"{ADAPTER_FILE}: target {target} is not allowed")
        seen.update(suffixes)
        if f"base_model.model.{target}.lora_{'B' if side == 'A' else 'A'}.weight" not in tensors:
            raise InputError(f"{ADAPTER_FILE}: lora tensor {tensor} has no partner")
        if len(shape) != 2 or shape[0 if side == "A" else 1] != manifest.weights.rank:
            raise InputError(f"{ADAPTER_FILE}: {tensor}: shape {list(shape)} is not of rank {manifest.weights.rank}")
    unused = sorted(set(config.target_modules) - seen)
    if unused:
        raise InputError(f"{ADAPTER_CONFIG_FILE}: target_modules: no tensors for {unused[0]!r}")
