"""Looking at gates and moving them for a while: which edges are open, every gate open, chosen heads closed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from attnprune.attention.interface import UNPACK, Gate, gates_forced_open, gates_of
from attnprune.errors import InputError, whole

Recorder = Callable[[slice, slice, Tensor], None]
"""Gets (queries, keys, is_open [B, H, Q, K]) of each part of a layer's attention."""


@contextmanager
def recording(gates: Sequence[Gate], recorders: Sequence[Recorder]) -> Iterator[None]:
    """Tell each gate's recorder which edges are open in the forward passes inside the block."""
    before = [gate.on_chunk for gate in gates]
    try:
        for gate, recorder in zip(gates, recorders, strict=True):
            gate.on_chunk = recorder
        yield
    finally:
        for gate, hook in zip(gates, before, strict=True):
            gate.on_chunk = hook


@torch.no_grad()
def masks(model: nn.Module, ids: Tensor | Sequence[int]) -> list[Tensor]:
    """Which edges are open on a text: for each layer, which query reads from which key in which head.

    Args:
        model: a model with gates (`attnprune.load`, `attach`).
        ids: token ids [T], or [B, T] without padding.

    Returns:
        One sparse bool tensor per layer, as transformers gives its attentions: [H, T, T] (head, query, key) of ids [T],
        [B, H, T, T] of ids [B, T]. `mask.indices()` lists the open edges in order, `mask.to_dense()` is the pattern.

    Raises:
        InputError: a model without gates, no ids, or ids of another shape, more than the context, or of no token.
    """
    gates, rows = _gates(model), _rows(model, ids)
    found: list[list[Tensor]] = [[] for _ in gates]

    def recorder(layer: int) -> Recorder:
        def record(queries: slice, keys: slice, is_open: Tensor) -> None:
            start = torch.tensor([0, 0, queries.start, keys.start], device=is_open.device)
            found[layer].append(is_open.nonzero() + start)

        return record

    with recording(gates, [recorder(layer) for layer in range(len(gates))]):
        model(input_ids=rows, use_cache=False)
    batch, length = rows.shape
    whole = [
        _sparse(torch.cat(parts), (batch, len(gate.bias), length, length))
        for parts, gate in zip(found, gates, strict=True)
    ]
    return whole if torch.as_tensor(ids).ndim == 2 else [mask[0] for mask in whole]


def _sparse(edges: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Rows of indices [N, 4] as a sparse bool tensor, in order."""
    for column in reversed(range(edges.shape[1])):
        edges = edges[edges[:, column].argsort(stable=True)]
    values = torch.ones(len(edges), dtype=torch.bool, device=edges.device)
    return torch.sparse_coo_tensor(edges.T, values, shape, is_coalesced=True, check_invariants=False)


@contextmanager
def open_gates(model: nn.Module) -> Iterator[None]:
    """Run the model with every gate open inside the block: the dense model with the sparse model's weights.

    Heads that `close_heads` closes stay closed, whichever of the two stands in the other.

    Raises:
        InputError: a model without gates.
    """
    _gates(model)
    with gates_forced_open(model):
        yield


@contextmanager
def close_heads(model: nn.Module, heads: Iterable[tuple[int, int]]) -> Iterator[None]:
    """Close every gate of some heads inside the block, which is their ablation: a closed head outputs 0.

    It may stand in another `close_heads` and in or around `open_gates`, for a dense model without these heads.

    Args:
        heads: (layer, head) pairs.

    Raises:
        InputError: a model without gates, or no such head.
    """
    gates = _gates(model)
    closed: dict[int, set[int]] = {}
    for layer, head in _pairs(gates, heads):
        closed.setdefault(layer, set()).add(head)
    before = [gate.closed for gate in gates]
    try:
        for layer, numbers in closed.items():
            gates[layer].closed |= numbers
        yield
    finally:
        for gate, numbers in zip(gates, before, strict=True):
            gate.closed = numbers


def _gates(model: nn.Module) -> list[Gate]:
    if not isinstance(model, nn.Module):
        raise InputError(f"{type(model).__name__} is not a model", hint=UNPACK)
    gates = gates_of(model)
    if not gates:
        raise InputError("this model has no gates", hint="attnprune.load(path) gives one, attnprune.attach(model) too")
    return gates


def _pairs(gates: list[Gate], heads: Any) -> list[tuple[int, int]]:
    """(layer, head) pairs that the model has."""
    try:
        pairs = list(heads)
    except TypeError:
        raise InputError(f"close_heads: {heads!r} is no list of (layer, head)") from None
    return [_head(gates, pair) for pair in pairs]


def _head(gates: list[Gate], pair: Any) -> tuple[int, int]:
    """A (layer, head) that the model has."""
    try:
        layer, head = map(whole, pair)
    except (TypeError, ValueError):
        raise InputError(f"close_heads: {pair!r} is not (layer, head)") from None
    if not 0 <= layer < len(gates):
        raise InputError(f"close_heads: layer {layer} is not within 0 and {len(gates) - 1}")
    if not 0 <= head < len(gates[layer].bias):
        raise InputError(f"close_heads: head {head} is not within 0 and {len(gates[layer].bias) - 1}")
    return layer, head


def _rows(model: Any, ids: Tensor | Sequence[int]) -> Tensor:
    """Token ids as [B, T] on the model's device."""
    try:
        rows = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError):
        raise InputError("masks: ids are token ids [T] or [B, T]", hint="tokenizer(text).input_ids") from None
    if rows.ndim not in (1, 2) or rows.is_floating_point() or rows.dtype == torch.bool or not rows.numel():
        hint = "tokenizer(text).input_ids"
        raise InputError(f"masks: ids are token ids [T] or [B, T] (got {rows.dtype} {list(rows.shape)})", hint=hint)
    rows = rows.reshape(-1, rows.shape[-1]).long()
    vocabulary, context = model.config.vocab_size, getattr(model.config, "max_position_embeddings", None)
    if int(rows.min()) < 0 or int(rows.max()) >= vocabulary:
        raise InputError(f"masks: ids are not within 0 and {vocabulary - 1}")
    if context is not None and rows.shape[1] > context:
        raise InputError(f"masks: {rows.shape[1]} tokens are more than the model's context of {context}")
    return rows.to(next(model.parameters()).device)
