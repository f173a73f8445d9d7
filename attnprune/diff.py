"""What differs between two sparse models, or between a base and a sparse model: gates, density, weights.

Two sidecars are compared with numpy alone; only a base model needs torch and transformers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from attnprune import format
from attnprune.errors import InputError, printable
from attnprune.report.terminal import facts_table, percent
from attnprune.sidecar import Sidecar, check_base, open_sidecar

Factors = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class HeadChange:
    """One head on both sides; a base model has no bias and density 1."""

    layer: int
    head: int
    bias_a: float | None
    bias_b: float
    density_a: float
    density_b: float


@dataclass(frozen=True)
class TensorChange:
    """`change` = ||W_b - W_a|| (Frobenius norm); `relative` = change / ||W_a||, None where W_a is not at hand."""

    name: str
    change: float
    relative: float | None


@dataclass(frozen=True)
class Difference:
    """A and B compared. `uncompared`: changed tensors whose difference needs the base model, or that one side lacks."""

    a: str
    b: str
    density_a: float
    density_b: float
    same_text: bool
    heads: list[HeadChange]
    tensors: list[TensorChange]
    uncompared: list[str]

    @property
    def opened(self) -> list[tuple[int, int]]:
        """(layer, head) of the heads that are closed in A and open in B."""
        return [(h.layer, h.head) for h in self.heads if h.density_a == 0 < h.density_b]

    @property
    def closed(self) -> list[tuple[int, int]]:
        """(layer, head) of the heads that are open in A and closed in B."""
        return [(h.layer, h.head) for h in self.heads if h.density_b == 0 < h.density_a]


@dataclass(frozen=True)
class _Side:
    """One side. `whole`: readers of whole tensors; `updates`: LoRA factors (b, a), W = base + b @ a; `rest`: what its
    other tensors are: "base" (as in the base) or "missing"."""

    path: str
    sidecar: Sidecar | None
    whole: Mapping[str, Callable[[], np.ndarray]] = field(default_factory=dict)
    updates: Mapping[str, Callable[[], Factors]] = field(default_factory=dict)
    rest: str = "base"


def compare(a: str, b: str) -> Difference:
    """Compare `a`, a base model, sidecar or merged folder, with `b`, a sidecar or merged folder.

    Densities are those measured when each was made; head densities are those of the calibration text.

    Raises:
        InputError: a damaged input, or two that were not made from one base.
    """
    right = _open(b)
    assert right.sidecar is not None
    left = _open_base(a, right.sidecar) if _is_base(a) else _open(a)
    if left.sidecar is not None:
        _check_same_base(left.sidecar, right.sidecar)
    tensors, uncompared = _tensor_changes(left, right)
    results = [side.sidecar.manifest.result if side.sidecar else None for side in (left, right)]
    assert results[1] is not None
    return Difference(
        a=a,
        b=b,
        density_a=1.0 if results[0] is None else results[0].density,
        density_b=results[1].density,
        same_text=results[0] is None or _text(results[0]) == _text(results[1]),
        heads=list(_head_changes(left.sidecar, right.sidecar)),
        tensors=tensors,
        uncompared=uncompared,
    )


def _text(result: format.ResultEntry) -> tuple[str, int]:
    return result.data_sha256, result.seq_len


def _check_same_base(a: Sidecar, b: Sidecar) -> None:
    left, right = a.manifest, b.manifest
    if left.gate.heads != right.gate.heads:
        shapes = [f"{len(m.gate.heads)} layers of {max(m.gate.heads)} heads" for m in (left, right)]
        raise InputError(f"{b.path}: another shape than {a.path}: {shapes[1]}, not {shapes[0]}")
    if (left.base.structure, left.base.content) != (right.base.structure, right.base.content):
        names = [m.base.repo_id or f"a {m.base.model_type} model" for m in (left, right)]
        raise InputError(f"{b.path}: made from another base ({names[1]}) than {a.path} ({names[0]})")


def _head_changes(a: Sidecar | None, b: Sidecar) -> Iterator[HeadChange]:
    for layer, (biases, densities) in enumerate(zip(b.biases(), b.density, strict=True)):
        for head, (bias, density) in enumerate(zip(biases, densities, strict=True)):
            before = None if a is None else float(a.biases()[layer][head])
            open_before = 1.0 if a is None else float(a.density[layer][head])
            yield HeadChange(layer, head, before, float(bias), open_before, float(density))


def _tensor_changes(a: _Side, b: _Side) -> tuple[list[TensorChange], list[str]]:
    names = {*b.whole, *b.updates} if a.sidecar is None else {*a.whole, *a.updates, *b.whole, *b.updates}
    if a.sidecar is None and b.rest == "missing":
        names |= set(a.whole)  # a merged folder should hold every tensor of its base
    changes, uncompared = [], []
    for name in sorted(names):
        change = _tensor_change(name, a, b)
        if change is None:
            uncompared.append(name)
        else:
            changes.append(change)
    return sorted(changes, key=lambda c: -(c.change if c.relative is None else c.relative)), uncompared


def _tensor_change(name: str, a: _Side, b: _Side) -> TensorChange | None:
    """None where the difference is not known without the base model."""
    if name in a.whole and name in b.whole:
        before, after = a.whole[name](), b.whole[name]()
        if before.shape != after.shape:
            raise InputError(f"{b.path}: {name} has shape {list(after.shape)}, not {list(before.shape)}")
        return _relative(name, _norm(after - before), _norm(before))
    if b.rest != "base" or name in b.whole:
        return None
    if name in a.whole and a.sidecar is not None:
        return None
    if a.rest != "base":
        return None
    size = _norm(a.whole[name]()) if name in a.whole else None
    return _relative(name, _low_rank_norm(a.updates.get(name), b.updates.get(name)), size)


def _relative(name: str, change: float, size: float | None) -> TensorChange:
    return TensorChange(name, change, change / size if size else None)


def _norm(values: np.ndarray) -> float:
    return math.sqrt(float(np.sum(np.square(values, dtype=np.float32), dtype=np.float64)))


def _low_rank_norm(a: Callable[[], Factors] | None, b: Callable[[], Factors] | None) -> float:
    """Frobenius norm of `b's update - a's update` from their factors: ||Q R A|| = ||R A||, never as a full matrix."""
    pairs = [(sign, side()) for sign, side in ((-1.0, a), (1.0, b)) if side is not None]
    columns = np.concatenate([sign * up for sign, (up, _) in pairs], axis=1, dtype=np.float64)
    rows = np.concatenate([down for _, (_, down) in pairs], axis=0, dtype=np.float64)
    return float(np.linalg.norm(np.linalg.qr(columns, mode="r") @ rows))


def _is_base(path: str) -> bool:
    folder = Path(path)
    if (folder / format.MANIFEST_FILE).exists() or _is_merged(folder):
        return False
    return not folder.is_dir() or (folder / "config.json").exists()


def _is_merged(folder: Path) -> bool:
    """Told without importing torch."""
    config = folder / "config.json"
    return config.is_file() and b'"attnprune_' in config.read_bytes()


def _open(path: str) -> _Side:
    if _is_merged(Path(path)) and not (Path(path) / format.MANIFEST_FILE).exists():
        from attnprune.merged import GATE_SUFFIX, read_manifest

        merged = Sidecar(Path(path), read_manifest(Path(path)))
        whole = {
            name: reader
            for file in sorted(merged.manifest.files)
            if file.endswith(".safetensors") and file != format.GATES_FILE
            for name, reader in _readers(merged.read(file), file).items()
            if not name.endswith(GATE_SUFFIX)
        }
        return _Side(path, merged, whole, rest="missing")
    sidecar = open_sidecar(path)
    raw, entry = sidecar.weight_bytes(), sidecar.manifest.weights
    if entry.kind == "delta":
        return _Side(path, sidecar, _readers(raw, format.DELTA_FILE))
    if entry.kind == "lora":
        assert entry.alpha is not None
        assert entry.rank is not None
        return _Side(path, sidecar, updates=_updates(_readers(raw, format.ADAPTER_FILE), entry.alpha / entry.rank))
    return _Side(path, sidecar)


def _open_base(name: str, sparse: Sidecar) -> _Side:
    from attnprune.runtime import load_base, torch_dtype

    model = load_base(name, dtype=torch_dtype(sparse.manifest.base.dtype)).model
    check_base(sparse.manifest, model)
    whole = {n: lambda p=p: p.detach().float().numpy() for n, p in model.named_parameters()}
    return _Side(name, None, whole)


def _updates(readers: Mapping[str, Callable[[], np.ndarray]], scale: float) -> dict[str, Callable[[], Factors]]:
    """LoRA factors by the name of the weight they change: (scale * B [out, rank], A [rank, in])."""
    ends = ("base_model.model.", ".lora_A.weight")
    targets = [name.removeprefix(ends[0]).removesuffix(ends[1]) for name in readers if name.endswith(ends[1])]

    def factors(target: str) -> Factors:
        down, up = (readers[f"{ends[0]}{target}.lora_{side}.weight"]() for side in "AB")
        return scale * up, down

    return {f"{target}.weight": lambda target=target: factors(target) for target in targets}


def _readers(raw: bytes, name: str) -> dict[str, Callable[[], np.ndarray]]:
    """A function per tensor of a safetensors file that decodes it to fp32, so that one at a time is in memory."""

    def decode(dtype: str, shape: tuple[int, ...], begin: int, end: int) -> np.ndarray:
        if dtype == "BF16":  # the upper half of an fp32
            bits = np.frombuffer(raw[begin:end], "<u2").astype("<u4") << 16
            return bits.view("<f4").reshape(shape)
        return np.frombuffer(raw[begin:end], f"<f{int(dtype[1:]) // 8}").reshape(shape).astype(np.float32)

    format.check_finite(raw, name)  # also refuses tensors that are not floating-point
    entries = format.parse_safetensors(raw, name)
    return {tensor: lambda entry=entry: decode(*entry) for tensor, entry in entries.items()}


def as_data(found: Difference) -> dict[str, Any]:
    """For JSON."""
    return asdict(found) | {"heads_opened": found.opened, "heads_closed": found.closed}


def render(found: Difference, limit: int) -> list[Any]:
    """The outcome, the heads that changed most, the tensors that changed most (`limit` rows each)."""
    parts: list[Any] = [_outcome(found)]
    for table in (_head_table(found, limit), _tensor_table(found, limit)):
        if table.row_count:
            parts += ["", table]
    return parts


def _outcome(found: Difference) -> Table:
    def names(heads: list[tuple[int, int]]) -> str:
        shown = " ".join(f"{layer}.{head}" for layer, head in heads[:12])
        return f"{len(heads)}" + (f": {shown}" + (" …" if len(heads) > 12 else "") if heads else "")

    moved = [h.bias_b - h.bias_a for h in found.heads if h.bias_a is not None]
    changed = sum(t.change > 0 for t in found.tensors)
    rows = [
        ("A", found.a),
        ("B", found.b),
        ("density", f"{percent(found.density_a)} -> {percent(found.density_b)}"
         + ("" if found.same_text else ", measured on different text or at another T")),
        ("opened", f"{names(found.opened)} (closed in A, open in B)"),
        ("closed", f"{names(found.closed)} (open in A, closed in B)"),
        ("biases", f"mean change {np.mean(moved):+.3f}, largest {max(moved, key=abs):+.3f}" if moved else "only in B"),
        ("weights", f"{changed} changed tensors" if found.tensors or not found.uncompared else "not compared"),
    ]  # fmt: skip
    if found.uncompared:
        rows.append(("", f"{len(found.uncompared)} tensors not compared: give the base or merged folders"))
    return facts_table("Difference", rows)


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
    table = Table(title="tensors that changed most: ||B - A||, and relative to ||A||", title_justify="left", box=None)
    for name, justify in (("tensor", "left"), ("change", "right"), ("relative", "right")):
        table.add_column(name, justify=justify, header_style="dim")  # pyright: ignore[reportArgumentType]
    for change in [t for t in found.tensors if t.change > 0][:limit]:
        relative = "" if change.relative is None else percent(change.relative)
        table.add_row(escape(printable(change.name)), f"{change.change:.4g}", relative)
    return table
