"""Submissions to MIB: what is written has its layout and gives the circuit again; theirs are read as they mean them."""

from __future__ import annotations

import io
import json

import pytest
import torch

from attnprune.circuit.exchange import graph_json, graph_pt, ungrouped
from attnprune.circuit.mib import IMPORTANCES, SHARES, areas, folder_name, importances, read_submission
from attnprune.circuit.model.graph import Graph
from tests.helpers.factory import refused

OWN, SHARED = Graph(4, 8, 8), Graph(4, 8, 2)
both = pytest.mark.parametrize("graph", [OWN, SHARED], ids=["own", "shared"])


def some(graph, seed=0):
    drawn = torch.randn(graph.shape, generator=torch.Generator().manual_seed(seed))
    return (drawn > 1) & graph.mask(), drawn


@pytest.mark.parametrize(
    ("task", "model", "name"),
    [
        ("ioi", "gpt2", "ioi_gpt2"),
        ("ioi:abc", "Qwen/Qwen2.5-0.5B", "ioi-abc_qwen2.5"),
        ("some/arc_easy.parquet", "meta-llama/Llama-3.1-8B", "arc-easy_llama3"),
        ("mcqa.json", "google/gemma-2-2b", "mcqa_gemma2"),
        ("sva", "runs/SmolLM2-135M.Q4_1.gguf", "sva_smollm2-135m.q4_1"),
    ],
)
def test_a_folder_is_called_by_task_and_model(task, model, name):
    assert folder_name(task, model) == name


@both
def test_importances_rank_the_circuit_first_and_the_others_by_score(graph):
    kept, scores = some(graph)
    data = torch.load(io.BytesIO(importances(graph, 8, kept, scores)), weights_only=True)
    assert not data["edges_in_graph"].any()
    found, inside, real = data["edges_scores"], ungrouped(graph, kept), ungrouped(graph, graph.mask())
    order = found.masked_fill(~real, -1.0).flatten().argsort(descending=True)
    assert set(order[: int(inside.sum())].tolist()) == set(inside.flatten().nonzero()[:, 0].tolist())
    size = ungrouped(graph, scores.abs())
    for part in (inside, real & ~inside):
        assert torch.equal(found[part].argsort(stable=True), size[part].argsort(stable=True))
    assert not found[~real].any()


@both
@pytest.mark.parametrize("kind", ["pt", "json"])
@pytest.mark.parametrize("marked", [False, True], ids=["no edge in graph", "every edge in graph"])
def test_importances_are_circuits_of_the_benchmark_s_sizes(tmp_path, graph, kind, marked):
    _, scores = some(graph)
    file = tmp_path / "ioi_gpt2" / f"importances.{kind}"
    file.parent.mkdir()
    kept = graph.mask() if marked else torch.zeros(graph.shape, dtype=torch.bool)
    if kind == "pt":
        file.write_bytes(graph_pt(graph, 8, kept, scores))
    else:
        file.write_text(json.dumps(graph_json(graph, 8, kept, scores)))
    found = read_submission(file.parent, graph)
    assert [name for name, _ in found] == ["0.1 %", "0.2 %", "0.5 %", "1 %", "2 %", "5 %", "10 %", "20 %", "50 %"]
    assert [(a.name, a.kept.tolist()) for a in found] == [
        (b.name, b.kept.tolist()) for b in read_submission(file, graph)
    ]
    real = int(ungrouped(graph, graph.mask()).sum())
    for (_, circuit), share in zip(found, SHARES, strict=True):
        assert not (circuit & ~graph.mask()).any()
        outside = scores.abs()[graph.mask() & ~circuit]
        if circuit.any():
            assert scores.abs()[circuit].min() >= outside.max()  # whatever the sign
        if graph is OWN:
            assert int(circuit.sum()) == int(share * real)


def test_areas_are_those_of_a_line_and_count_what_lies_above_1():
    """The faithfulness that is the share of the edges, from 0.001 to 1, and twice what remains above 1."""
    assert areas(list(SHARES)) == pytest.approx(((1 - 0.001**2) / 2, (1 - 0.001) ** 2 / 2))
    cpr, cmd = areas([2 - share for share in SHARES])
    assert (cpr, cmd) == pytest.approx((2 * 0.999 - (1 - 0.001**2) / 2, (1 - 0.001) ** 2 / 2))


def test_a_folder_of_circuits_is_each_of_them(tmp_path):
    made = {f"{name}.pt": some(OWN, seed)[0] for seed, name in enumerate("abc")}
    for name, kept in made.items():
        (tmp_path / name).write_bytes(graph_pt(OWN, 8, kept, torch.zeros(OWN.shape)))
    (tmp_path / "README.md").write_text("other files are not read")
    found = read_submission(tmp_path, OWN)
    assert [name for name, _ in found] == sorted(made)
    assert all(torch.equal(circuit, made[name]) for name, circuit in found)
    (one,) = read_submission(tmp_path / "a.pt", OWN)
    assert torch.equal(one.kept, made["a.pt"])


def test_what_is_written_is_read_again(tmp_path):
    kept, scores = some(OWN)
    (tmp_path / IMPORTANCES).write_bytes(importances(OWN, 8, kept, scores))
    found = dict(read_submission(tmp_path, OWN))
    whole, half = int(kept.sum()), found["50 %"]
    assert int(half.sum()) > whole
    assert not (kept & ~half).any()
    assert not (found["5 %"] & ~kept).any()


def test_what_does_not_fit_is_refused(tmp_path):
    refused(lambda: read_submission(tmp_path, OWN), "holds no .json and no .pt file")
    (tmp_path / "a.pt").write_bytes(graph_pt(OWN, 8, *some(OWN)))
    refused(lambda: read_submission(tmp_path, Graph(4, 4, 4)), "a.pt: a circuit of another model: n_heads is 8, here 4")
    nothing = torch.zeros(OWN.shape, dtype=torch.bool)
    (tmp_path / "b.pt").write_bytes(graph_pt(OWN, 8, nothing, torch.zeros(OWN.shape)))
    refused(lambda: read_submission(tmp_path, OWN), "b.pt: no edge in it is in_graph")  # one of several
    refused(lambda: read_submission(tmp_path / "none.pt", OWN), "none.pt")
