"""Counting the edges of every head, block by block: what a head does over a text is sums, never a list of its pairs.

All blocks have one length and no padding, so what a layer lets its queries see is the same in each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from attnprune.attention.interface import Gate, gates_of
from attnprune.circuit.model.activations import Hooks, forward
from attnprune.circuit.model.adapters import Anatomy, Block
from attnprune.errors import InputError, UnsupportedModelError

EXAMPLES = 5  # of each head
COUNTED = ("self", "first", "previous", "same", "induction", "delimiter")  # what `kind_masks` stacks


def kind_masks(ids: Tensor, delimiters: Tensor) -> Tensor:
    """Which pairs are of which kind: bool [6, T, T] (kind, query, key) in the order of COUNTED.

    `ids` int64 [T] is a block, `delimiters` bool [T] says which of its tokens are delimiters.
    """
    place = torch.arange(len(ids), device=ids.device)
    query, key = place[:, None], place[None]
    earlier = key < query
    before = torch.cat([ids.new_full((1,), -1), ids[:-1]])
    return torch.stack([
        key == query, earlier & (key == 0), key == query - 1, earlier & (ids[:, None] == ids),
        earlier & (ids[:, None] == before), earlier & delimiters,
    ])  # fmt: skip


def chances(kinds: Tensor, visible: Tensor) -> Tensor:
    """The share of the keys that each query sees which are of a kind: fp64 [K, T] for masks [K, T, T] and [T, T]."""
    return (kinds & visible).sum(-1) / visible.sum(-1).clamp(min=1).double()


class Tally:
    """Sums over blocks under one way of counting, where a pair counts its weight.

    Attributes:
        found, expected: fp64 [H, K], weight on pairs of each kind, and what it would be on random visible keys.
        distances: fp64 [H, T], weight by query - key. rows: fp64 [H, T], weight by position of the query.
    """

    def __init__(self, heads: int, length: int, device: torch.device):
        def zeros(columns: int) -> Tensor:
            return torch.zeros(heads, columns, dtype=torch.float64, device=device)

        self.found, self.expected = zeros(len(COUNTED)), zeros(len(COUNTED))
        self.distances, self.rows = zeros(length), zeros(length)

    def add(self, weights: Tensor, kinds: Tensor, chance: Tensor) -> None:
        """Count a block: weights [H, T, T], masks [K, T, T], their chances [K, T]."""
        rows = weights.sum(-1).double()
        self.found += (weights.flatten(1) @ kinds.flatten(1).t().to(weights.dtype)).double()
        self.expected += rows @ chance.t()
        self.distances += by_distance(weights).double()
        self.rows += rows

    def at_distance(self, distance: int, visible: Tensor) -> tuple[Tensor, Tensor]:
        """(weight [H] at one distance, what it would be on random visible keys [H]); `visible` is [T, T]."""
        place = torch.arange(len(visible), device=visible.device)
        mask = place[None] == place[:, None] - distance
        return self.distances[:, distance], self.rows @ chances(mask[None], visible)[0]


def by_distance(weights: Tensor) -> Tensor:
    """Sums along the diagonals: [H, T, T] over (query, key <= query) -> [H, T] by query - key.

    With keys in reverse and one column more, rows of length T shift by one from query to query, and a distance is a
    column.
    """
    heads, length, _ = weights.shape
    shifted = functional.pad(weights.flip(-1), (0, 1)).reshape(heads, length + 1, length)
    return shifted.sum(1).roll(1, -1)


@dataclass
class Strongest:
    """The strongest edges of each head so far, [H, n] each."""

    strength: Tensor
    weight: Tensor
    block: Tensor
    query: Tensor
    key: Tensor

    @classmethod
    def none(cls, heads: int, device: torch.device) -> Strongest:
        real, whole = torch.zeros(heads, 0, device=device), torch.zeros(heads, 0, dtype=torch.int64, device=device)
        return cls(real, real, whole, whole, whole)

    def add(self, weights: Tensor, norms: Tensor, block: int) -> None:
        """Take in a block: weights [H, T, T] and the norm of what each head writes of each key's value [H, T]."""
        strength, query = (weights * norms[:, None]).max(1)  # each key with the query that gets most from it
        strength, key = strength.topk(min(EXAMPLES, strength.shape[1]))
        query = query.gather(1, key)
        weight = weights[torch.arange(len(weights), device=weights.device)[:, None], query, key]
        new = (strength, weight, torch.full_like(key, block), query, key)
        joined = [torch.cat([old, more], 1) for old, more in zip(vars(self).values(), new, strict=True)]
        best = joined[0].topk(min(EXAMPLES, joined[0].shape[1])).indices
        self.strength, self.weight, self.block, self.query, self.key = (x.gather(1, best) for x in joined)


class LayerCounts:
    """What the heads of one layer did so far.

    Attributes:
        edges: by open edges; mass: by P * A.
        open: int64 [H], open edges; queries: int64 [H], queries with one.
        visible: bool [T, T], what a query sees, the same in every block.
        strongest: the examples.
    """

    visible: Tensor

    def __init__(self, block: Block, heads: int, length: int):
        maps = block.output_weight(heads).detach().float()
        device = maps.device
        self._gram = maps @ maps.transpose(1, 2)  # |v W_O|^2 = v W_O W_O^T v^T
        self.edges, self.mass = Tally(heads, length, device), Tally(heads, length, device)
        self.open = torch.zeros(heads, dtype=torch.int64, device=device)
        self.queries = torch.zeros_like(self.open)
        self.strongest = Strongest.none(heads, device)

    def add(self, is_open: Tensor, pattern: Tensor, value: Tensor, visible: Tensor, kinds: Tensor, block: int) -> None:
        """Count a block: gates and P * A [H, T, T], values [H_kv, T, width], masks [T, T] and [K, T, T]."""
        self.visible = visible
        chance, pattern = chances(kinds, visible), pattern.float()
        self.edges.add(is_open.float(), kinds, chance)
        self.mass.add(pattern, kinds, chance)
        self.open += is_open.sum((1, 2))
        self.queries += is_open.any(-1).sum(1)
        values = value.float().repeat_interleave(len(is_open) // len(value), 0)
        norms = (values @ self._gram * values).sum(-1).clamp(min=0).sqrt()
        self.strongest.add(pattern, norms, block)


class Layer(Protocol):
    """What takes in the blocks of one layer."""

    def add(self, is_open: Tensor, pattern: Tensor, value: Tensor, visible: Tensor, kinds: Tensor, block: int) -> None:
        """A block: gates and P * A [H, T, T], values [H_kv, T, width], masks [T, T] and [K, T, T]."""


def count(
    anatomy: Anatomy, ids: Tensor, delimiters: Tensor, watch: Callable[[int, int], None] = lambda done, of: None
) -> list[LayerCounts]:
    """Run blocks of tokens, int64 [N, T], one after the other; what the heads of each layer did. As `each_block`."""
    counts = [LayerCounts(block, anatomy.graph.heads, ids.shape[1]) for block in anatomy.blocks]
    watch(0, len(ids))
    for number in each_block(anatomy, ids, delimiters, counts):
        if number + 1 < len(ids):
            watch(number + 1, len(ids))
    return counts


@torch.no_grad()
def each_block(
    anatomy: Anatomy, ids: Tensor, delimiters: Tensor, layers: Sequence[Layer], first: int = 0
) -> Iterator[int]:
    """Run blocks of tokens, int64 [N, T], from one on; the number of each once every layer has taken it in.

    The model shows its pattern (`attnprune.circuit.search.splits.pattern_visible`). `delimiters` is bool [N, T].

    Raises:
        InputError: the model computes something that is not finite.
        UnsupportedModelError: gates of a merged model that was not loaded by `attnprune.load`.
    """
    gates = gates_of(anatomy.model)
    if len(gates) != len(anatomy.blocks):
        raise UnsupportedModelError("these gates cannot be watched", hint="load the model with attnprune.load")
    device = gates[0].bias.device
    try:
        for number in range(first, len(ids)):
            kinds = kind_masks(ids[number].to(device), delimiters[number].to(device))
            with Hooks() as hooks:
                for gate, layer in zip(gates, layers, strict=True):
                    _watch_gate(hooks, gate, layer, kinds, number)
                logits = forward(anatomy, ids[number : number + 1].to(device), 1)
            if not bool(logits.isfinite().all()):
                raise InputError(f"{anatomy.model.config.model_type}: the logits are not finite on this text")
            yield number
    finally:
        for gate in gates:
            gate.on_chunk = None


def _watch_gate(hooks: Hooks, gate: Gate, layer: Layer, kinds: Tensor, number: int) -> None:
    """Count what the next forward does: a gate tells its open edges in chunks, and its pattern at the end."""
    is_open = torch.zeros(len(gate.bias), *kinds.shape[1:], dtype=torch.bool, device=kinds.device)

    def note(rows: slice, cols: slice, part: Tensor) -> None:
        is_open[:, rows, cols] = part[0]

    def ask(_: torch.nn.Module, args: Any, options: dict[str, Any]) -> Any:
        return args, {**options, "return_pattern": True}

    def add(_: torch.nn.Module, args: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        layer.add(is_open, output[1][0], args[2][0], args[3][0, 0], kinds, number)

    gate.on_chunk = note
    hooks.add(gate.register_forward_pre_hook(ask, with_kwargs=True))
    hooks.add(gate.register_forward_hook(add))
