"""Heads put back into the corrupted run write what they wrote in the clean one, and nothing else is held."""

import pytest
import torch

from attnprune.circuit.model.effects import node_effects
from attnprune.circuit.model.restored import restored
from tests.helpers.pairs import PARTS, assert_close, dense_and_gated, metric


@pytest.mark.parametrize("family", PARTS)
@dense_and_gated
def test_heads_put_back_write_what_they_wrote(pair):
    """One head put back is a node effect; with every head put back the last stream has their clean outputs."""
    graph = pair.graph
    none = torch.zeros(graph.layers, graph.heads, dtype=torch.bool)
    assert_close(restored(*pair.runs, none), pair.corrupted.logits)
    same = restored(pair.anatomy, pair.corrupted, pair.corrupted, ~none)
    assert_close(same, pair.corrupted.logits)
    one = none.clone()
    one[1, 2] = True
    source = graph.head_sources(1).start + 2
    effect = node_effects(pair.anatomy, pair.corrupted, pair.clean, torch.tensor([source]), metric)[0]
    assert_close(metric(restored(*pair.runs, one)) - metric(pair.corrupted.logits), effect)
