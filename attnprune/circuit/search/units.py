"""What circuits are made of: edges, nodes (heads and MLPs), or attention messages from token to token.

A circuit is a bool tensor of its level's shape. Ranking, sizes, masks and deletion are the same on every level; what a
circuit computes, and how its metric changes with a unit, is said here. All of it is exact patching.

Nodes: an edge is kept if both of its ends are; input and logits always are. Messages: (head, to, from), the same for
all prompts of one template and length; every edge is kept, and other messages are those of the corrupted run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from attnprune.circuit.model import patching
from attnprune.circuit.model.activations import Activations
from attnprune.circuit.model.adapters import Anatomy
from attnprune.circuit.model.attribution import edge_gradients
from attnprune.circuit.model.effects import Metric
from attnprune.circuit.model.graph import ATTENTION_KINDS
from attnprune.circuit.model.messages import message_gradients, run_messages
from attnprune.circuit.tasks import Prompts

Key = tuple[int, int]
"""(length, template) of prompts."""


class Group(NamedTuple):
    """Prompts of one length that run together, and their runs."""

    prompts: Prompts
    clean: Activations
    corrupted: Activations


class Units(Protocol):
    """A level: its units in a tensor of `shape`, `edge_count` of them real."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def edge_count(self) -> int: ...

    def mask(self) -> Tensor:
        """All real units."""
        ...

    def prune(self, kept: Tensor) -> Tensor:
        """Without units that change nothing."""
        ...

    def logits(self, group: Group, kept: Tensor) -> Tensor:
        """What a circuit computes for the prompts of a group."""
        ...

    def gradients(self, group: Group, kept: Tensor, metric: Metric) -> Tensor:
        """Gradient of the metric, mean over the prompts, by how much of a unit is kept."""
        ...

    def size(self, groups: Sequence[Group], kept: Tensor) -> float:
        """What counts as the size of a circuit."""
        ...


class Edges:
    """Component edges, [U, V]."""

    def __init__(self, anatomy: Anatomy):
        self._anatomy, self._graph = anatomy, anatomy.graph
        self.shape, self.edge_count = self._graph.shape, self._graph.edge_count
        self.mask, self.prune = self._graph.mask, self._graph.prune

    def logits(self, group: Group, kept: Tensor) -> Tensor:
        """One circuit run."""
        return patching.run_circuit(self._anatomy, group.clean, group.corrupted, kept)

    def gradients(self, group: Group, kept: Tensor, metric: Metric) -> Tensor:
        """Of one circuit run."""
        return edge_gradients(self._anatomy, group.clean, group.corrupted, kept, metric)

    def size(self, groups: Sequence[Group], kept: Tensor) -> float:
        """The number of edges."""
        return float(kept.sum())


class Nodes:
    """Heads and MLPs, [U], numbered as sources; the input is none of them."""

    def __init__(self, anatomy: Anatomy):
        self._edges, self._graph = Edges(anatomy), anatomy.graph
        self.shape, self.edge_count = (self._graph.sources,), self._graph.sources - 1

    def mask(self) -> Tensor:
        """All of them."""
        every = torch.ones(self.shape, dtype=torch.bool)
        every[0] = False
        return every

    def prune(self, kept: Tensor) -> Tensor:
        """Without nodes that nothing reaches, or that reach nothing."""
        writing = self.edges(kept).any(1)
        writing[0] = False
        return writing

    def edges(self, kept: Tensor) -> Tensor:
        """The edges among nodes, input and logits, bool [U, V], pruned."""
        return self._graph.prune(_and_input(kept)[:, None] & self._readers(kept))

    def logits(self, group: Group, kept: Tensor) -> Tensor:
        """One run of their edges."""
        return self._edges.logits(group, self.edges(kept))

    def gradients(self, group: Group, kept: Tensor, metric: Metric) -> Tensor:
        """Of the edges that begin and of those that end at a node."""
        edges = self._edges.gradients(group, self.edges(kept), metric).cpu()
        read = (edges * _and_input(kept)[:, None]).sum(0)
        total = (edges * self._readers(kept)).sum(1)
        graph = self._graph
        for layer in range(graph.layers):
            for kind in ATTENTION_KINDS:
                mine = read[graph.readers(layer, kind)]
                shared = 1 if kind == "q" else graph.heads // graph.kv_heads
                total[graph.head_sources(layer)] += mine.repeat_interleave(shared)
            total[graph.mlp_source(layer)] += read[graph.readers(layer, "mlp")][0]
        total[0] = 0
        return total

    def size(self, groups: Sequence[Group], kept: Tensor) -> float:
        """The number of heads and MLPs."""
        return float(kept.sum())

    def _readers(self, kept: Tensor) -> Tensor:
        """Which destinations [V] are inputs of nodes; a shared key or value is one of any head of its group."""
        graph, reads = self._graph, torch.ones(self._graph.destinations, dtype=torch.bool)
        for layer in range(graph.layers):
            heads = kept[graph.head_sources(layer)]
            for kind in ATTENTION_KINDS:
                reads[graph.readers(layer, kind)] = heads if kind == "q" else heads.view(graph.kv_heads, -1).any(1)
            reads[graph.readers(layer, "mlp")] = kept[graph.mlp_source(layer)]
        return reads


def _and_input(nodes: Tensor) -> Tensor:
    writes = nodes.clone()
    writes[0] = True
    return writes


class Messages:
    """Attention messages of every (length, template) of some prompts, from the first token on that may differ, [n].

    Prompts of another template have all of theirs. A message counts where a gate lets it through in either run.
    """

    def __init__(self, anatomy: Anatomy, prompts: Sequence[Prompts]):
        self._anatomy = anatomy
        graph = anatomy.graph
        differs: dict[Key, Tensor] = {}
        for batch in prompts:
            for row, template in zip(may_differ(batch), batch.template.tolist(), strict=True):
                key = (batch.length, template)
                differs[key] = differs.get(key, row) | row
        self._real = {}
        for key, to in sorted(differs.items(), key=lambda item: item[0]):
            causal = torch.ones(key[0], key[0], dtype=torch.bool).tril() & to[:, None]
            self._real[key] = causal.expand(graph.layers, graph.heads, *causal.shape)
        self.edge_count = sum(int(real.sum()) for real in self._real.values())
        self.shape = (self.edge_count,)

    def mask(self) -> Tensor:
        """All of them."""
        return torch.ones(self.shape, dtype=torch.bool)

    def prune(self, kept: Tensor) -> Tensor:
        """The same: every message is added by itself."""
        return kept

    def flat(self, values: dict[Key, Tensor]) -> Tensor:
        """What is given as [L, H, S, S] for each (length, template), for the units [n]; 0 where it is not given."""
        parts = [
            values[key][real] if key in values else torch.zeros(int(real.sum())) for key, real in self._real.items()
        ]
        return torch.cat([part.float() for part in parts])

    def logits(self, group: Group, kept: Tensor) -> Tensor:
        """A plain forward with other messages put into it."""
        with torch.no_grad():
            return run_messages(self._anatomy, group.clean, group.corrupted, self.masks(group, kept))

    def masks(self, group: Group, kept: Tensor) -> Tensor:
        """A circuit for every prompt of a group, bool [L, B, H, S, P + S]."""
        given: dict[Key, Tensor] = {}
        for (key, real), mine in zip(self._real.items(), kept.split(self._counts()), strict=True):
            given[key] = torch.zeros(real.shape, dtype=torch.bool).masked_scatter(real, mine)
        length, to = group.prompts.length, group.clean.ids.shape[1]
        every = torch.ones(self._anatomy.graph.layers, self._anatomy.graph.heads, length, length, dtype=torch.bool)
        rows = [given.get((length, template), every) for template in group.prompts.template.tolist()]
        return torch.stack(rows, 1)[..., -to:, :].to(group.clean.ids.device)

    def gradients(self, group: Group, kept: Tensor, metric: Metric) -> Tensor:
        """By autograd."""
        masks = self.masks(group, kept)
        found = message_gradients(self._anatomy, group.clean, group.corrupted, masks, metric).cpu()
        length, to = group.prompts.length, group.clean.ids.shape[1]
        sums: dict[Key, Tensor] = {}
        for row, template in enumerate(group.prompts.template.tolist()):
            whole = torch.zeros(*found.shape[:1], *found.shape[2:3], length, length)
            whole[..., -to:, :] = found[:, row].float()
            sums[length, template] = sums.get((length, template), 0) + whole
        return self.flat(sums) / len(group.prompts)

    def size(self, groups: Sequence[Group], kept: Tensor) -> float:
        """Messages per prompt that a gate lets through in the clean or the corrupted run."""
        total = sum(int((open_messages(group) & self.masks(group, kept).cpu()).sum()) for group in groups)
        return total / sum(len(group.prompts) for group in groups)

    def _counts(self) -> list[int]:
        return [int(real.sum()) for real in self._real.values()]


def open_messages(group: Group) -> Tensor:
    """Messages that a gate lets through in either run, from the first differing token on, bool [L, B, H, S, P + S]."""
    clean, corrupted = cast(Tensor, group.clean.patterns), cast(Tensor, group.corrupted.patterns)
    found = ((clean != 0) | (corrupted != 0)).cpu()
    return found & may_differ(group.prompts)[None, :, None, -found.shape[3] :, None]


def may_differ(prompts: Prompts) -> Tensor:
    """The positions from the first differing token on, bool [B, length]."""
    return (prompts.clean != prompts.corrupted).cpu().cummax(1).values
