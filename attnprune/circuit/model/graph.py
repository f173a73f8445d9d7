"""The computation graph of a decoder: who writes to the residual stream, who reads from it, and which edges are real.

Sources (writers), in the order they run: `input` (the stream that enters layer 0), then per layer the heads `a{l}.h{i}`
and the MLP `m{l}`. Destinations (readers): per layer the query input of every head `a{l}.h{i}<q>`, the key and value
inputs of every key/value head, the MLP `m{l}`; last `logits`. Counting and names are those of EAP-IG (Hanna et al.,
arXiv 2403.17806), except that heads which share a key/value head share its inputs, which are named `a{l}.kv{g}<k>`.

A circuit is a bool mask [sources, destinations] of the edges it keeps. Sources upstream of a destination are a prefix.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from attnprune.errors import InputError

Kind = Literal["q", "k", "v", "mlp"]
ATTENTION_KINDS: tuple[Kind, ...] = ("q", "k", "v")


@dataclass(frozen=True)
class Graph:
    """Sizes of a decoder. `parallel`: the MLP of a layer reads the same stream as its heads (GPT-NeoX)."""

    layers: int
    heads: int
    kv_heads: int
    parallel: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Of a mask over the edges."""
        return self.sources, self.destinations

    @property
    def sources(self) -> int:
        """Number of writers."""
        return 1 + self.layers * (self.heads + 1)

    @property
    def destinations(self) -> int:
        """Number of readers."""
        return self.layers * self._readers + 1

    @property
    def _readers(self) -> int:
        """Destinations of one layer."""
        return self.heads + 2 * self.kv_heads + 1

    @property
    def edge_count(self) -> int:
        """Number of real edges, by formula: 32,491 for GPT-2 small."""
        before = self.layers + (self.heads + 1) * self.layers * (self.layers - 1) // 2  # upstream of each attention
        own_heads = 0 if self.parallel else self.layers * self.heads
        return before * self._readers + own_heads + self.sources

    def head_sources(self, layer: int) -> slice:
        """Where the heads of a layer are among the sources."""
        start = 1 + layer * (self.heads + 1)
        return slice(start, start + self.heads)

    def mlp_source(self, layer: int) -> int:
        """Where the MLP of a layer is among the sources."""
        return self.head_sources(layer).stop

    def readers(self, layer: int, kind: Kind) -> slice:
        """Where the inputs of one kind of a layer are among the destinations."""
        sizes = {"q": self.heads, "k": self.kv_heads, "v": self.kv_heads, "mlp": 1}
        start = layer * self._readers
        for other, size in sizes.items():
            if other == kind:
                return slice(start, start + size)
            start += size
        raise InputError(f"{kind}: not a kind of input (q, k, v, mlp)")

    def upstream(self, layer: int, kind: Kind) -> int:
        """How many sources come before these inputs."""
        heads = self.head_sources(layer)
        return heads.stop if kind == "mlp" and not self.parallel else heads.start

    def layer_of_destination(self, destination: Tensor) -> Tensor:
        """Layer that reads (the number of layers for the logits)."""
        return destination // self._readers

    def layer_of_source(self, source: Tensor) -> Tensor:
        """Layer that writes (0 for the input)."""
        return (source - 1).clamp(min=0) // (self.heads + 1)

    def mask(self) -> Tensor:
        """The real edges: bool [sources, destinations]."""
        real = torch.zeros(self.sources, self.destinations, dtype=torch.bool)
        for layer in range(self.layers):
            for kind in (*ATTENTION_KINDS, "mlp"):
                real[: self.upstream(layer, kind), self.readers(layer, kind)] = True
        real[:, -1] = True
        return real

    @cached_property
    def source_names(self) -> tuple[str, ...]:
        """Names of the sources in order."""
        names = ["input"]
        for layer in range(self.layers):
            names += [*(f"a{layer}.h{head}" for head in range(self.heads)), f"m{layer}"]
        return tuple(names)

    @cached_property
    def destination_names(self) -> tuple[str, ...]:
        """Names of the destinations in order."""
        shared = "h" if self.kv_heads == self.heads else "kv"
        names = []
        for layer in range(self.layers):
            names += [f"a{layer}.h{head}<q>" for head in range(self.heads)]
            names += [f"a{layer}.{shared}{head}<{kind}>" for kind in "kv" for head in range(self.kv_heads)]
            names.append(f"m{layer}")
        return (*names, "logits")

    def edge_name(self, source: int, destination: int) -> str:
        """For example `a0.h1->a5.h5<q>`."""
        return f"{self.source_names[source]}->{self.destination_names[destination]}"

    def edge(self, name: str) -> tuple[int, int]:
        """(source, destination) of a name. Raises InputError for an edge that this graph does not have."""
        source, _, destination = name.partition("->")
        if source in self.source_names and destination in self.destination_names:
            found = self.source_names.index(source), self.destination_names.index(destination)
            if self.mask()[found]:
                return found
        raise InputError(f"{name}: no such edge in this model")

    def prune(self, kept: Tensor) -> Tensor:
        """Drop the edges that change nothing: from nodes that no kept path reaches, to nodes that reach no logits.

        A node without kept inputs runs on corrupted values throughout, so what it writes is the corrupted output
        anyway: the pruned circuit computes the same. `kept` [sources, destinations]; returns another mask.
        """
        kept = kept & self.mask().to(kept.device)
        reached = torch.zeros(self.sources, dtype=torch.bool, device=kept.device)
        reached[0] = True
        for layer in range(self.layers):
            per_head = [self._reached(kept, reached, layer, kind) for kind in ATTENTION_KINDS]
            reached[self.head_sources(layer)] = per_head[0] | per_head[1] | per_head[2]
            reached[self.mlp_source(layer)] = self._reached(kept, reached, layer, "mlp")
        kept = kept & reached[:, None]
        for layer in reversed(range(self.layers)):
            if not kept[self.mlp_source(layer)].any():
                kept[:, self.readers(layer, "mlp")] = False
            useful = kept[self.head_sources(layer)].any(1)
            for kind in ATTENTION_KINDS:
                kept[:, self.readers(layer, kind)] &= useful if kind == "q" else self._grouped(useful).any(1)
        return kept

    def used(self, kept: Tensor) -> Tensor:
        """The sources that write to a kept edge or read one, bool [sources]; the input always."""
        used, every = kept.any(1), torch.ones(self.sources, dtype=torch.bool, device=kept.device)
        used[0] = True
        for layer in range(self.layers):
            for kind in ATTENTION_KINDS:
                used[self.head_sources(layer)] |= self._reached(kept, every, layer, kind)
            used[self.mlp_source(layer)] |= self._reached(kept, every, layer, "mlp")[0]
        return used

    def _reached(self, kept: Tensor, reached: Tensor, layer: int, kind: Kind) -> Tensor:
        """Which heads (or whether the MLP) of a layer read something reached, through inputs of one kind."""
        read = (kept[:, self.readers(layer, kind)] & reached[:, None]).any(0)
        return read.repeat_interleave(self.heads // self.kv_heads) if kind in ("k", "v") else read

    def _grouped(self, per_head: Tensor) -> Tensor:
        """[heads] -> [kv_heads, heads that share it]."""
        return per_head.view(self.kv_heads, -1)

    def touched(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """(bool [layers, heads], bool [layers]): the heads and MLPs that write to a kept edge of a (pruned) circuit."""
        writes = kept.any(1)[1:].view(self.layers, self.heads + 1)
        return writes[:, :-1], writes[:, -1]
