"""What differs between two sparse models, or between a base and a sparse model: gates, density, weights.

Two sidecars are compared with numpy alone; only a base model needs torch and transformers. One pair of tensors is
compared at a time, and the files of a merged folder are mapped, so that two whole models need not fit in memory.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from attnprune import format
from attnprune.errors import InputError
from attnprune.report.terminal import facts_table, percent
from attnprune.sidecar import Sidecar, check_base, is_merged, open_artefact

Reader = Callable[[], np.ndarray]
Factors = tuple[np.ndarray, np.ndarray]

_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_GATE = "attnprune_gate"
_PIECE = 1 << 20  # values whose fp64 copies are in memory at once


@dataclass(frozen=True)
class HeadChange:
    """One head on both sides. Biases are in units of the score, densities shares of the edges on the text that its
    side was measured on; a base model has no bias and density 1."""

    layer: int
    head: int
    bias_a: float | None
    bias_b: float
    density_a: float
    density_b: float


@dataclass(frozen=True)
class TensorChange:
    """`change` = ||B - A|| (Frobenius norm); `relative` = change / ||A||, None where A is zero or not at hand."""

    name: str
    change: float
    relative: float | None


@dataclass(frozen=True)
class Difference:
    """A and B compared.

    Densities are those in the manifests; a merged folder keeps that of its sidecar. `same_text`: both were measured on
    the same blocks. `tensors`: those that differ, largest relative change first. `uncompared`: those whose difference
    needs the weights of the base. `notes`: what a reader of the numbers should know.
    """

    a: str
    b: str
    density_a: float
    density_b: float
    same_text: bool
    heads: list[HeadChange]
    tensors: list[TensorChange]
    uncompared: list[str]
    notes: list[str]

    @property
    def opened(self) -> list[tuple[int, int]]:
        """(layer, head) of the heads that are closed in A and open in B."""
        return [(h.layer, h.head) for h in self.heads if h.density_a == 0 < h.density_b]

    @property
    def closed(self) -> list[tuple[int, int]]:
        """(layer, head) of the heads that are open in A and closed in B."""
        return [(h.layer, h.head) for h in self.heads if h.density_b == 0 < h.density_a]


@dataclass(frozen=True)
class _Weights:
    """The weights of one side. `whole`: readers of tensors; `updates`: of LoRA factors (b, a), W = base + b @ a.

    `complete`: there are no other tensors. Else the others are those of the base. `dtype`: of the model's weights.
    """

    path: str
    dtype: str
    complete: bool
    whole: Mapping[str, Reader] = field(default_factory=dict)
    updates: Mapping[str, Callable[[], Factors]] = field(default_factory=dict)


def compare(a: str, b: str) -> Difference:
    """Compare `a` (base model by any of its names, sidecar or merged folder) with `b` (sidecar or merged folder).

    Raises:
        InputError: a damaged input, `b` is a base model, or the two were not made from one base.
        AttnPruneError: the base is on the Hub, which cannot be reached.
    """
    if _is_base(b):
        hint = "a base model goes first: attnprune diff BASE SIDECAR"
        raise InputError(f"{b}: no sidecar or merged folder", hint=hint)
    sparse = _open(b)
    other = None if _is_base(a) else _open(a)
    if other is not None:
        _check_same_base(other, sparse)
    heads = list(_head_changes(other, sparse))
    right = _weights(sparse)
    left, right = _with_base(a, sparse, right) if other is None else (_weights(other), right)
    tensors, uncompared = _tensor_changes(left, right)
    same_text = other is None or _text(other) == _text(sparse)  # every edge of a base is open on any text
    return Difference(
        a=a,
        b=b,
        density_a=1.0 if other is None else other.manifest.result.density,
        density_b=sparse.manifest.result.density,
        same_text=same_text,
        heads=heads,
        tensors=tensors,
        uncompared=uncompared,
        notes=list(_notes(left, right, same_text, uncompared)),
    )


def _text(sidecar: Sidecar) -> tuple[str, int]:
    result = sidecar.manifest.result
    return result.data_sha256, result.seq_len


def _notes(a: _Weights, b: _Weights, same_text: bool, uncompared: list[str]) -> Iterator[str]:
    if not same_text:
        yield "measured on different texts or block lengths, so the densities and closed heads may differ anyway"
    if a.dtype != b.dtype and a.whole.keys() & b.whole.keys():
        yield f"A holds {a.dtype} weights, B {b.dtype}: what rounding alone changed is counted too"
    if a.dtype not in ("float32", "float64") and {*a.updates, *b.updates} - {*uncompared}:
        yield f"LoRA updates are compared as they are, before merging rounds the weights to {a.dtype}"
    if uncompared:
        yield (
            "what was not compared takes the weights of the base: merge the sidecars "
            "(attnprune apply SIDECAR --merge OUT) and compare the merged folders"
        )


# --- what the two arguments are


def _is_base(path: str) -> bool:
    folder = Path(path)
    if not os.path.isdir(path):
        return True  # a Hub id, a .gguf file or "demo"
    return (folder / "config.json").exists() and not (folder / format.MANIFEST_FILE).exists() and not is_merged(folder)


def _open(path: str) -> Sidecar:
    sidecar = open_artefact(path)
    dtype = sidecar.manifest.base.dtype
    if dtype not in _NAMES.values():
        raise InputError(f"{path}: base.dtype: {dtype!r} is not one of {', '.join(_NAMES.values())}")
    return sidecar


def _check_same_base(a: Sidecar, b: Sidecar) -> None:
    def identity(sidecar: Sidecar) -> tuple[str, str, list[int]]:
        manifest = sidecar.manifest
        return manifest.base.structure, manifest.base.content, manifest.gate.heads

    def described(sidecar: Sidecar) -> str:
        base, heads = sidecar.manifest.base, sidecar.manifest.gate.heads
        return f"{base.repo_id or base.model_type} in {base.dtype}, {len(heads)} layers of {max(heads)} heads"

    if identity(a) != identity(b):
        raise InputError(f"{b.path}: made from another base ({described(b)}) than {a.path} ({described(a)})")


def _head_changes(a: Sidecar | None, b: Sidecar) -> Iterator[HeadChange]:
    heads = b.manifest.gate.heads
    biases_a = [[None] * count for count in heads] if a is None else [layer.tolist() for layer in a.biases()]
    densities_a = [np.ones(count) for count in heads] if a is None else a.density
    for layer, rows in enumerate(zip(biases_a, b.biases(), densities_a, b.density, strict=True)):
        for head, (bias_a, bias_b, density_a, density_b) in enumerate(zip(*rows, strict=True)):
            yield HeadChange(layer, head, bias_a, float(bias_b), float(density_a), float(density_b))


# --- weights


def _weights(sidecar: Sidecar) -> _Weights:
    """The weights of a sidecar or merged folder, checked, as they are stored."""
    if is_merged(sidecar.path):
        return _merged_weights(sidecar)
    path, entry, dtype = str(sidecar.path), sidecar.manifest.weights, sidecar.manifest.base.dtype
    raw = sidecar.weight_bytes()
    if entry.kind == "delta":
        return _Weights(path, dtype, complete=False, whole=_readers(raw, format.DELTA_FILE, dtype))
    if entry.kind == "lora":
        assert entry.alpha is not None
        assert entry.rank is not None
        return _Weights(path, dtype, complete=False, updates=_updates(raw, entry.alpha / entry.rank))
    return _Weights(path, dtype, complete=False)


def _merged_weights(sidecar: Sidecar) -> _Weights:
    whole: dict[str, Reader] = {}
    dtypes = set()
    for file in sorted(sidecar.manifest.files):
        if file.endswith(".safetensors") and file != format.GATES_FILE:
            raw = _map(sidecar, file)
            format.check_finite(raw, file)
            whole |= _readers(raw, file)
            entries = format.parse_safetensors(raw, file).items()
            dtypes |= {_NAMES[stored] for name, (stored, *_) in entries if _GATE not in name}
    return _Weights(str(sidecar.path), " and ".join(sorted(dtypes)), complete=True, whole=whole)


def _map(sidecar: Sidecar, name: str) -> Any:
    """A listed file as bytes, its size and hash checked as `Sidecar.read` does, but mapped instead of read."""
    path, entry = sidecar.path / name, sidecar.manifest.files[name]
    if not path.is_file():  # opening a pipe would wait for its writer
        raise InputError(f"{path}: is missing")
    try:
        with path.open("rb") as file:
            raw = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file
        raise InputError(f"{path}: cannot be read: {error}") from None
    if len(raw) != entry.size or hashlib.sha256(raw).hexdigest() != entry.sha256:
        raise InputError(f"{path}: is damaged (size or sha256 differs from the manifest)")
    return raw


def _with_base(name: str, sparse: Sidecar, right: _Weights) -> tuple[_Weights, _Weights]:
    """The weights of the base that change in `right`, and `right` as it is once loaded onto that base."""
    from attnprune import runtime

    base = sparse.manifest.base
    revision = base.revision if name == base.repo_id else None
    model = runtime.load_base(name, revision=revision, dtype=runtime.torch_dtype(base.dtype)).model
    try:
        check_base(sparse.manifest, model)
    except InputError as error:
        raise InputError(f"{name}: {error.message}") from None  # the hint names an option that diff does not have

    def reader(tensor: Any) -> Reader:  # numpy has no bfloat16
        return lambda: (tensor.float() if tensor.element_size() < 4 else tensor).detach().numpy()

    parameters = dict(model.named_parameters())
    if right.updates:
        before = {n: reader(parameters[n].clone()) for n in right.updates if n in parameters}
        runtime.merge_lora(model, sparse.weights(), sparse.manifest.weights)
        whole = {n: reader(parameters[n]) for n in before}
        right = replace(right, whole=whole, updates={})
    else:
        before = {n: reader(p) for n, p in parameters.items() if right.complete or n in right.whole}
    left = _Weights(name, base.dtype, complete=True, whole=before)
    return left, replace(right, complete=True)


def _updates(raw: bytes, scale: float) -> dict[str, Callable[[], Factors]]:
    """LoRA factors by the name of the weight they change: (scale * B [out, rank], A [rank, in])."""
    readers = _readers(raw, format.ADAPTER_FILE)
    start, end = "base_model.model.", ".lora_A.weight"
    targets = [name.removeprefix(start).removesuffix(end) for name in readers if name.endswith(end)]

    def factors(target: str) -> Factors:
        down, up = (readers[f"{start}{target}.lora_{side}.weight"]().astype(np.float64) for side in "AB")
        return scale * up, down

    return {f"{target}.weight": partial(factors, target) for target in targets}


def _readers(raw: bytes, file: str, dtype: str | None = None) -> dict[str, Reader]:
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


# --- what changed in them


def _tensor_changes(a: _Weights, b: _Weights) -> tuple[list[TensorChange], list[str]]:
    """(tensors that differ, names of those that cannot be compared)"""
    changes, uncompared = [], []
    for name in sorted({*a.whole, *a.updates, *b.whole, *b.updates}):
        change = _tensor_change(name, a, b)
        if change is None:
            uncompared.append(name)
        elif not math.isfinite(change.change):
            raise InputError(f"{b.path}: {name}: values too large to compare")
        elif change.change > 0:
            changes.append(change)
    relative = {c.name: math.inf if c.relative is None else c.relative for c in changes}
    return sorted(changes, key=lambda c: (-relative[c.name], -c.change)), uncompared


def _tensor_change(name: str, a: _Weights, b: _Weights) -> TensorChange | None:
    """None where the difference is not known without the base."""
    if name in a.whole and name in b.whole:
        before, after = a.whole[name](), b.whole[name]()
        if before.shape != after.shape:
            raise InputError(f"{b.path}: {name} has shape {list(after.shape)}, in {a.path} {list(before.shape)}")
        change, size = _norm(before, after), _norm(before)
        return TensorChange(name, change, change / size if size else None)
    if a.complete and b.complete:
        raise InputError(f"{b.path}: {name} is not in both models")
    if a.complete or b.complete or name in a.whole or name in b.whole:
        return None
    updates = [side.updates[name]() for side in (a, b) if name in side.updates]
    if len({(up.shape[0], down.shape[1]) for up, down in updates}) > 1:
        raise InputError(f"{b.path}: {name} has another shape than in {a.path}")
    return TensorChange(name, _update_norm(updates), None)


def _norm(before: np.ndarray, after: np.ndarray | None = None) -> float:
    """Frobenius norm of `before`, or of `after - before`, summed in fp64."""
    total, first, second = 0.0, before.reshape(-1), None if after is None else after.reshape(-1)
    for start in range(0, first.size, _PIECE):
        piece = first[start : start + _PIECE].astype(np.float64)
        if second is not None:
            piece -= second[start : start + _PIECE]
        total += float(piece @ piece)
    return math.sqrt(total)


def _update_norm(updates: list[Factors]) -> float:
    """Frobenius norm of one LoRA update or of the difference of two, from their factors: ||Q R A|| = ||R A||."""
    if len(updates) == 2 and all(np.array_equal(one, other) for one, other in zip(*updates, strict=True)):
        return 0.0  # where rounding would leave 1e-16
    columns = np.concatenate([sign * up for sign, (up, _) in zip((1, -1), updates, strict=False)], axis=1)
    rows = np.concatenate([down for _, down in updates])
    return float(np.linalg.norm(np.linalg.qr(columns, mode="r") @ rows))


# --- for JSON and for a person


def as_data(found: Difference) -> dict[str, Any]:
    """Everything that was found, for JSON; heads are [layer, head]."""
    return asdict(found) | {"heads_opened": found.opened, "heads_closed": found.closed}


def render(found: Difference, limit: int) -> list[Any]:
    """The outcome, the heads and the tensors that changed most (`limit` rows each)."""
    parts: list[Any] = [_outcome(found)]
    for table in (_head_table(found, limit), _tensor_table(found, limit)):
        if table.row_count:
            parts += ["", table]
    return parts


def _outcome(found: Difference) -> Table:
    def listed(heads: list[tuple[int, int]]) -> str:
        names = [f"{layer}.{head}" for layer, head in heads[:12]] + ["…"] * (len(heads) > 12)
        return f"{len(heads)}: {' '.join(names)}" if heads else "0"

    weights = [f"{len(found.tensors)} tensors differ"] if found.tensors else []
    weights += [f"{len(found.uncompared)} tensors not compared"] if found.uncompared else []
    rows = [
        ("A", found.a),
        ("B", found.b),
        ("density", f"{percent(found.density_a)} -> {percent(found.density_b)}"),
        ("heads opened", listed(found.opened)),
        ("heads closed", listed(found.closed)),
        ("biases", _biases([h.bias_b - h.bias_a for h in found.heads if h.bias_a is not None])),
        ("weights", ", ".join(weights) or "equal"),
    ]
    table = facts_table("From A to B", rows + [("note", note) for note in found.notes])
    table.columns[1].overflow = "fold"  # a long path is not cut
    return table


def _biases(moved: list[float]) -> str:
    if not moved:
        return "only in B"
    return f"mean change {np.mean(moved):+.3f}, largest {max(moved, key=abs):+.3f}" if any(moved) else "equal"


def _head_table(found: Difference, limit: int) -> Table:
    table = Table(title="heads that changed most", title_justify="left", box=None)
    for name in ("head", "density A", "density B", "bias A", "bias B"):
        table.add_column(name, justify="right", header_style="dim")

    def moved(h: HeadChange) -> tuple[float, float]:
        return abs(h.density_b - h.density_a), abs(h.bias_b - (h.bias_a or 0.0))

    for h in [h for h in sorted(found.heads, key=moved, reverse=True) if any(moved(h))][:limit]:
        bias = "" if h.bias_a is None else f"{h.bias_a:.3f}"
        table.add_row(f"{h.layer}.{h.head}", percent(h.density_a), percent(h.density_b), bias, f"{h.bias_b:.3f}")
    return table


def _tensor_table(found: Difference, limit: int) -> Table:
    table = Table(title="tensors that changed most", title_justify="left", box=None)
    table.add_column("tensor", header_style="dim", overflow="fold")
    for name in ("||B - A||", "of ||A||"):
        table.add_column(name, justify="right", header_style="dim")
    for t in found.tensors[:limit]:
        table.add_row(t.name, f"{t.change:.4g}", "" if t.relative is None else percent(t.relative))
    return table
