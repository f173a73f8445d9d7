"""What differs between two sparse models, or between a base and a sparse model: gates, density, weights.

Two sidecars are compared with numpy alone; only a base model needs torch and transformers. One pair of tensors is
compared at a time, and the files of a merged folder are mapped, so that two whole models need not fit in memory.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from attnprune.errors import InputError
from attnprune.late import Shown
from attnprune.sidecar import format
from attnprune.sidecar.folder import Sidecar, is_merged, open_artefact
from attnprune.sidecar.identity import check_base
from attnprune.sidecar.weights import DTYPES, Factors, Reader, Weights, stored_weights
from attnprune.units import percent

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


@dataclass(frozen=True, repr=False)
class Difference(Shown):
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

    def __repr__(self) -> str:
        return (
            f"Difference({self.a!r} -> {self.b!r}: density {percent(self.density_a)} -> {percent(self.density_b)}, "
            f"{len(self.opened)} heads opened, {len(self.closed)} closed, {len(self.tensors)} tensors differ)"
        )

    @property
    def opened(self) -> list[tuple[int, int]]:
        """(layer, head) of the heads that are closed in A and open in B."""
        return [(h.layer, h.head) for h in self.heads if h.density_a == 0 < h.density_b]

    @property
    def closed(self) -> list[tuple[int, int]]:
        """(layer, head) of the heads that are open in A and closed in B."""
        return [(h.layer, h.head) for h in self.heads if h.density_b == 0 < h.density_a]


def compare(a: str, b: str, base: str | None = None) -> Difference:
    """Compare `a` (base model by any of its names, sidecar or merged folder) with `b` (sidecar or merged folder).

    `base` completes two sparse models that cannot be compared without the weights they were made from.

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
    right = stored_weights(sparse)
    if other is None:
        if base is not None:
            raise InputError(f"--base: {a} is a base model itself", hint="leave out --base")
        left, right = _with_base(a, sparse, right)
    else:
        left = stored_weights(other)
        if base is not None:
            names = {*left.whole, *left.updates, *right.whole, *right.updates}
            left, right = (_completed(base, s, w, names) for s, w in ((other, left), (sparse, right)))
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


def _notes(a: Weights, b: Weights, same_text: bool, uncompared: list[str]) -> Iterator[str]:
    if not same_text:
        yield "measured on different texts or block lengths, so the densities and closed heads may differ anyway"
    if a.dtype != b.dtype and a.whole.keys() & b.whole.keys():
        yield f"A holds {a.dtype} weights, B {b.dtype}: what rounding alone changed is counted too"
    if a.dtype not in ("float32", "float64") and {*a.updates, *b.updates} - {*uncompared}:
        yield f"LoRA updates are compared as they are, before merging rounds the weights to {a.dtype}"
    if uncompared:
        yield "what was not compared takes the weights of the base: name it with --base"


# --- what the two arguments are


def _is_base(path: str) -> bool:
    folder = Path(path)
    if not os.path.isdir(path):
        return True  # a Hub id, a .gguf file or "demo"
    return (folder / "config.json").exists() and not (folder / format.MANIFEST_FILE).exists() and not is_merged(folder)


def _open(path: str) -> Sidecar:
    sidecar = open_artefact(path)
    _ = sidecar.mapped  # the weights of a merged folder are hashed before anything in them is compared
    dtype = sidecar.manifest.base.dtype
    if dtype not in DTYPES.values():
        raise InputError(f"{path}: base.dtype: {dtype!r} is not one of {', '.join(DTYPES.values())}")
    return sidecar


def _check_same_base(a: Sidecar, b: Sidecar) -> None:
    configurations = [sidecar.manifest.base.config for sidecar in (a, b)]
    if None in configurations:  # format 1.0
        configurations = [None, None]

    def identity(sidecar: Sidecar, config: dict[str, Any] | None) -> tuple[Any, ...]:
        base = sidecar.manifest.base
        return base.structure, base.content, sidecar.manifest.gate.heads, config

    def described(sidecar: Sidecar) -> str:
        base, heads = sidecar.manifest.base, sidecar.manifest.gate.heads
        return f"{base.repo_id or base.model_type} in {base.dtype}, {len(heads)} layers of {max(heads)} heads"

    if identity(a, configurations[0]) != identity(b, configurations[1]):
        raise InputError(f"{b.path}: made from another base ({described(b)}) than {a.path} ({described(a)})")


def _head_changes(a: Sidecar | None, b: Sidecar) -> Iterator[HeadChange]:
    heads = b.manifest.gate.heads
    biases_a = [[None] * count for count in heads] if a is None else [layer.tolist() for layer in a.biases()]
    densities_a = [np.ones(count) for count in heads] if a is None else a.density
    for layer, rows in enumerate(zip(biases_a, b.biases(), densities_a, b.density, strict=True)):
        for head, (bias_a, bias_b, density_a, density_b) in enumerate(zip(*rows, strict=True)):
            yield HeadChange(layer, head, bias_a, float(bias_b), float(density_a), float(density_b))


def _with_base(name: str, sparse: Sidecar, right: Weights) -> tuple[Weights, Weights]:
    """The weights of the base that change in `right`, and `right` as it is once loaded onto that base."""
    from attnprune.sidecar import loading

    model = _base_model(name, sparse)
    parameters = dict(model.named_parameters())
    if right.updates:
        before = {n: _reader(parameters[n].clone()) for n in right.updates if n in parameters}
        loading.merge_lora(model, sparse.weights(), sparse.manifest.weights)
        whole = {n: _reader(parameters[n]) for n in before}
        right = replace(right, whole=whole, updates={})
    else:
        before = {n: _reader(p) for n, p in parameters.items() if right.complete or n in right.whole}
    left = Weights(name, sparse.manifest.base.dtype, complete=True, whole=before)
    return left, replace(right, complete=True)


def _completed(name: str, sparse: Sidecar, weights: Weights, names: set[str]) -> Weights:
    """The tensors `names` of a sparse model, those that it shares with its base from there."""
    from attnprune.sidecar import loading

    if weights.complete:
        return weights
    model = _base_model(name, sparse)
    if weights.updates:
        loading.merge_lora(model, sparse.weights(), sparse.manifest.weights)
    parameters = dict(model.named_parameters())
    whole = {n: weights.whole.get(n) or _reader(parameters[n]) for n in names if n in parameters}
    return replace(weights, whole=whole, updates={})


def _base_model(name: str, sparse: Sidecar) -> Any:
    """The model that a sidecar was made from.

    Raises:
        InputError: it is another one.
    """
    from attnprune.sidecar import loading
    from attnprune.sidecar.quantised import dequantise, is_quantised

    base = sparse.manifest.base
    revision = base.revision if name == base.repo_id else None
    model = loading.load_named_base(sparse, name, revision).model
    try:
        check_base(sparse.manifest, model)
    except InputError as error:
        raise InputError(f"{name}: {error.message}") from None  # the hint names an option that diff does not have
    return dequantise(model) if is_quantised(model) else model


def _reader(tensor: Any) -> Reader:
    """A parameter as numpy has it, which knows no bfloat16."""
    return lambda: (tensor.float() if tensor.element_size() < 4 else tensor).detach().numpy()


# --- what changed in them


def _tensor_changes(a: Weights, b: Weights) -> tuple[list[TensorChange], list[str]]:
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


def _tensor_change(name: str, a: Weights, b: Weights) -> TensorChange | None:
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
