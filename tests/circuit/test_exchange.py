"""Circuits to and from EAP-IG's files: nothing is lost, nothing is run, what does not fit is refused in one line."""

from __future__ import annotations

import io
import json
import pickle

import pytest
import torch

from attnprune.circuit.exchange import graph_json, graph_pt, read_edges
from attnprune.circuit.model.graph import Graph
from tests.helpers.factory import refused

GRAPHS = [Graph(2, 3, 3), Graph(3, 4, 2), Graph(2, 2, 2, parallel=True)]
every_graph = pytest.mark.parametrize("graph", GRAPHS, ids=["own", "shared", "parallel"])


def some(graph):
    drawn = torch.rand(graph.shape, generator=torch.Generator().manual_seed(0))
    return (drawn < 0.5) & graph.mask(), drawn


def write(folder, kind, graph, kept, scores):
    file = folder / f"circuit.{kind}"
    if kind == "pt":
        file.write_bytes(graph_pt(graph, 8, kept, scores))
    else:
        file.write_text(json.dumps(graph_json(graph, 8, kept, scores)))
    return file


@every_graph
@pytest.mark.parametrize("kind", ["json", "pt"])
def test_what_is_written_is_read_again(tmp_path, graph, kind):
    kept, scores = some(graph)
    assert torch.equal(read_edges(write(tmp_path, kind, graph, kept, scores), graph), kept)


@every_graph
def test_both_files_say_the_same_in_the_order_of_the_package(graph):
    """Sources and destinations as EAP-IG numbers them: per layer queries, keys, values, then the MLP."""
    kept, scores = some(graph)
    data = torch.load(io.BytesIO(graph_pt(graph, 8, kept, scores)), weights_only=True)
    listed = graph_json(graph, 8, kept, scores)
    assert data["cfg"] == listed["cfg"]
    assert data["edges_in_graph"].shape == (len(data["src_nodes"]), len(data["dst_nodes"]))
    first = [f"a0.h{head}<{kind}>" for kind in "qkv" for head in range(graph.heads)]
    assert data["dst_nodes"][: len(first) + 1] == [*first, "m0"]
    for name, edge in listed["edges"].items():
        source, destination = name.split("->")
        place = data["src_nodes"].index(source), data["dst_nodes"].index(destination)
        assert data["edges_in_graph"][place] == edge["in_graph"]
        assert data["edges_scores"][place] == edge["score"]
    assert int(data["edges_in_graph"].sum()) == sum(edge["in_graph"] for edge in listed["edges"].values())
    assert data["nodes_in_graph"].tolist() == [listed["nodes"][name]["in_graph"] for name in data["src_nodes"]]


def test_an_edge_into_one_of_the_heads_that_share_a_key_is_one_into_the_key(tmp_path):
    graph = Graph(2, 4, 2)
    data = graph_json(graph, 8, graph.mask() & False, torch.zeros(graph.shape))
    data["edges"]["a0.h2->a1.h3<k>"]["in_graph"] = True
    (tmp_path / "c.json").write_text(json.dumps(data))
    found = read_edges(tmp_path / "c.json", graph)
    assert [graph.edge_name(*edge) for edge in found.nonzero().tolist()] == ["a0.h2->a1.kv1<k>"]


class Run:
    """What a pickle may hold: a call."""

    def __reduce__(self):
        return (print, ("run",))


def test_what_does_not_fit_is_refused(tmp_path, capsys):
    graph = Graph(2, 3, 3)
    good = graph_json(graph, 8, *some(graph))

    def saved(name, data):
        (tmp_path / name).write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
        return tmp_path / name

    stranger = {**good, "edges": {**good["edges"], "a9.h0->logits": {"score": 0.0, "in_graph": True}}}
    backwards = {**good, "edges": {"m1->a0.h0<q>": {"score": 0.0, "in_graph": True}}}
    scored = {**good, "edges": {"input->logits": {"score": 1.0}}}
    nothing = {**good, "edges": {"input->logits": {"score": 1.0, "in_graph": False}}}
    other = graph_pt(Graph(2, 4, 4), 8, *some(Graph(2, 4, 4)))
    tensors = torch.load(io.BytesIO(graph_pt(graph, 8, *some(graph))), weights_only=True)
    unreal, short = dict(tensors), dict(tensors)
    unreal["edges_in_graph"] = torch.ones_like(tensors["edges_in_graph"])
    short["edges_in_graph"] = tensors["edges_in_graph"][:3]

    def pt(data):
        file = io.BytesIO()
        torch.save(data, file)
        return file.getvalue()

    for name, data, message in [
        ("a.json", stranger, "'a9.h0->logits': no such edge in this model"),
        ("b.json", backwards, "'m1->a0.h0<q>': no such edge in this model"),
        ("c.json", scored, "does not say whether it is in_graph"),
        ("d.json", nothing, "no edge in it is in_graph"),
        ("e.json", b"{", "no JSON object with edges"),
        ("f.json", {**good, "cfg": None}, "n_layers is None, here 2"),
        ("g.pt", other, "a circuit of another model: n_heads is 4, here 3"),
        ("h.pt", b"nothing", "damaged, or holds more than tensors"),
        ("i.pt", pickle.dumps(Run()), "damaged, or holds more than tensors"),
        ("j.pt", pt({"edges": Run()}), "damaged, or holds more than tensors"),
        ("k.pt", pt(unreal), "holds an edge that this model does not have"),
        ("l.pt", pt(short), "edges_in_graph is (3, 21), here (9, 21)"),
        ("m.csv", b"", "a circuit is a .json or .pt file"),
        ("n.json", {**good, "edges": {"input->logits": {"score": "high", "in_graph": True}}}, "not a finite number"),
        ("o.pt", pt({**tensors, "edges_scores": tensors["edges_scores"][:3]}), "edges_scores are not real numbers"),
        ("p.pt", pt({**tensors, "edges_scores": torch.full_like(tensors["edges_scores"], torch.nan)}), "not finite"),
    ]:
        refused(lambda name=name, data=data: read_edges(saved(name, data), graph), message)
    assert "run" not in capsys.readouterr().out
    refused(lambda: read_edges(tmp_path / "none.json", graph), "none.json")
