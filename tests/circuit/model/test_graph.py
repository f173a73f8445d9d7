"""The graph of a model: sizes, names and pruning."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, LlamaConfig

from attnprune.attention.interface import attach
from attnprune.circuit.model.adapters import graph_of
from attnprune.circuit.model.graph import Graph
from attnprune.errors import InputError
from tests.helpers.families import build, merged

GRAPHS = [Graph(1, 1, 1), Graph(3, 4, 4), Graph(3, 4, 2), Graph(5, 6, 1), Graph(4, 2, 2, parallel=True)]

SMALL = Graph(2, 2, 2)

GROUPED = Graph(2, 4, 2)


def kept_edges(graph, *names):
    mask = torch.zeros(graph.sources, graph.destinations, dtype=torch.bool)
    for name in names:
        mask[graph.edge(name)] = True
    return mask


def names_of(graph, mask):
    return {graph.edge_name(*edge) for edge in mask.nonzero().tolist()}


def test_edges_of_gpt2_small_by_its_config():
    graph = graph_of(AutoConfig.for_model("gpt2"))
    assert (graph.sources, graph.destinations, graph.edge_count) == (157, 445, 32_491)


def test_edges_of_smollm2_by_its_config():
    graph = graph_of(LlamaConfig(hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3))
    assert (graph.sources, graph.destinations, graph.edge_count) == (301, 481, 70_651)


def test_graph_of_a_merged_model_is_that_of_its_family():
    model = build("llama")
    attach(model, 0.2)
    assert graph_of(merged(model).config) == graph_of(model.config) == Graph(4, 4, 2)


@pytest.mark.parametrize("graph", GRAPHS, ids=str)
def test_formula_names_and_mask_agree(graph):
    mask = graph.mask()
    assert mask.shape == (len(graph.source_names), len(graph.destination_names)) == (graph.sources, graph.destinations)
    assert int(mask.sum()) == graph.edge_count
    assert len(set(graph.source_names)) == graph.sources
    assert len(set(graph.destination_names)) == graph.destinations
    for edge in mask.nonzero().tolist():
        assert graph.edge(graph.edge_name(*edge)) == tuple(edge)


@pytest.mark.parametrize("graph", GRAPHS, ids=str)
def test_a_destination_reads_what_was_written_before_it(graph):
    def time(name):
        """(layer, attention or MLP) of a node; the MLP of a parallel layer runs beside its heads."""
        if name in ("input", "logits"):
            return (-1, 0) if name == "input" else (graph.layers, 0)
        layer = int(name.split(".")[0][1:])
        return (layer, 0 if graph.parallel or name[0] == "a" else 1)

    expected = [[time(u) < time(v) for v in graph.destination_names] for u in graph.source_names]
    assert graph.mask().tolist() == expected


@pytest.mark.parametrize("graph", GRAPHS, ids=str)
def test_layers_of_sources_and_destinations(graph):
    layers = graph.layer_of_source(torch.arange(graph.sources)).tolist()
    assert layers[0] == 0
    assert layers[1:] == [int(name.split(".")[0][1:]) for name in graph.source_names[1:]]
    layers = graph.layer_of_destination(torch.arange(graph.destinations)).tolist()
    assert layers[-1] == graph.layers
    assert layers[:-1] == [int(name.split(".")[0][1:]) for name in graph.destination_names[:-1]]


def test_names_are_those_of_eap_ig():
    assert SMALL.source_names == ("input", "a0.h0", "a0.h1", "m0", "a1.h0", "a1.h1", "m1")
    assert SMALL.destination_names[7:] == (
        "a1.h0<q>", "a1.h1<q>", "a1.h0<k>", "a1.h1<k>", "a1.h0<v>", "a1.h1<v>", "m1", "logits",
    )  # fmt: skip
    assert SMALL.edge_name(2, 8) == "a0.h1->a1.h1<q>"


def test_shared_key_value_heads_have_names_of_their_own():
    readers = [name for name in GROUPED.destination_names if name.startswith("a1")]
    assert readers == [*(f"a1.h{i}<q>" for i in range(4)), "a1.kv0<k>", "a1.kv1<k>", "a1.kv0<v>", "a1.kv1<v>"]


@pytest.mark.parametrize("name", ["m1->m0", "m0->a0.h0<q>", "a0.h0->a0.h1<k>", "logits->input", "a0.h0", "", "a0.h0->"])
def test_an_edge_that_does_not_exist_is_refused(name):
    with pytest.raises(InputError, match="no such edge"):
        SMALL.edge(name)


def test_a_complete_path_is_not_pruned():
    path = kept_edges(SMALL, "input->a0.h0<v>", "a0.h0->a1.h1<k>", "a1.h1->m1", "m1->logits")
    assert torch.equal(SMALL.prune(path), path)


def test_dangling_parts_are_pruned():
    path = ["input->a0.h0<v>", "a0.h0->logits"]
    no_input = ["a0.h1->m0", "m0->logits"]
    no_output = ["input->a1.h0<q>", "a0.h0->a1.h0<k>", "a1.h0->m1"]
    assert names_of(SMALL, SMALL.prune(kept_edges(SMALL, *path, *no_input, *no_output))) == set(path)


def test_a_circuit_without_a_path_is_empty():
    assert not SMALL.prune(kept_edges(SMALL, "input->m0", "a0.h0->m0", "m1->logits")).any()
    assert not SMALL.prune(SMALL.mask() & False).any()
    assert torch.equal(SMALL.prune(SMALL.mask()), SMALL.mask())


def test_every_input_of_a_head_reaches_it():
    for kind in "qkv":
        path = kept_edges(SMALL, f"input->a0.h1<{kind}>", "a0.h1->logits")
        assert torch.equal(SMALL.prune(path), path)


def test_a_shared_key_serves_every_head_that_shares_it():
    for head, group in ((0, 0), (1, 0), (2, 1), (3, 1)):
        path = kept_edges(GROUPED, f"input->a0.kv{group}<k>", f"a0.h{head}->logits")
        assert torch.equal(GROUPED.prune(path), path)
        assert not GROUPED.prune(kept_edges(GROUPED, f"input->a0.kv{1 - group}<k>", f"a0.h{head}->logits")).any()


def test_pruning_removes_what_is_not_real_and_keeps_its_argument():
    everything = torch.ones(SMALL.sources, SMALL.destinations, dtype=torch.bool)
    assert torch.equal(SMALL.prune(everything), SMALL.mask())
    assert everything.all()


def test_touched_nodes():
    heads, mlps = SMALL.touched(kept_edges(SMALL, "input->a0.h1<v>", "a0.h1->m1", "m1->logits"))
    assert heads.tolist() == [[False, True], [False, False]]
    assert mlps.tolist() == [False, True]
