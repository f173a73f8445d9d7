"""The published procedure: planted heads first, put back together, and edges counted by hand."""

from __future__ import annotations

import pytest
import torch

from attnprune.circuit.model.adapters import anatomy_of
from attnprune.circuit.model.graph import Graph
from attnprune.circuit.planted import plant
from attnprune.circuit.published import edges_among, published
from attnprune.circuit.search.cache import Cache
from attnprune.circuit.search.splits import Settings, pattern_visible
from attnprune.circuit.search.subject import Subject
from tests.helpers.circuits import planted_task, silent


def test_edges_among_heads_by_hand():
    graph = Graph(3, 4, 2)
    heads = torch.zeros(3, 4, dtype=torch.bool)
    heads[0, 0] = heads[1, 1] = heads[2, 2] = heads[2, 3] = True
    # a0.h0 -> q, k, v of a1.h1: 3; a0.h0 and a1.h1 -> q of two heads, and k, v of the one group they share: 2 * 4
    assert edges_among(graph, heads) == 3 + 8
    assert edges_among(graph, heads & False) == 0


def counted(planted):
    anatomy = anatomy_of(planted.model)
    subject = Subject(anatomy, planted_task(planted, 8), "model", Settings(), silent, Cache())
    with pattern_visible(anatomy):
        return anatomy, published(subject)


@pytest.mark.parametrize("gated", [False, True], ids=["dense", "gated"])
def test_planted_heads_bring_the_metric_back(gated):
    planted = plant("llama", gated=gated, nodes=5, seed=1)
    anatomy, found = counted(planted)
    heads, _ = anatomy.graph.touched(planted.edges)
    assert set(found.names) <= {f"a{layer}.h{head}" for layer, head in heads.nonzero().tolist()}
    assert found.heads == len(found.names)
    assert found.recovered >= 0.9
    assert found.token_edges == found.heads * 21  # all of 6 positions are open in the clean run


def test_what_goes_past_all_heads_is_not_reached():
    _, found = counted(plant("llama", nodes=5, seed=0))  # an MLP reads the tokens and writes for the logits
    assert found.heads is None
    assert found.recovered < 0.9
    assert len(found.names) == 12
