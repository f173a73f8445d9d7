"""The table of a record says what the record says, on every level and of every control."""

from __future__ import annotations

import json

import pytest

from attnprune.circuit.given import GivenCircuit
from attnprune.circuit.model.graph import Graph
from attnprune.errors import InputError
from examples.circuit_table import more_prompts, table
from tests.helpers.pages import circuit_result, model_circuit

GRAPH = Graph(4, 4, 4)
CONTROLS = {
    "nonsense": {
        "edges": None, "best": 30, "train": 0.3, "validation": 0.1, "test": -0.001, "lower": -0.1, "upper": 0.2,
        "clear": True,
    },
    "stress": {
        "trials": [
            {"ablation": "mean", "share": 1.0, "draws": 1, "faithfulness": 0.28, "low": 0.28, "high": 0.28},
            {"ablation": "zero", "share": 0.5, "draws": 3, "faithfulness": 0.9, "low": 0.8, "high": 0.95},
        ],
        "worst": 0.28, "holds": False,
    },
}  # fmt: skip


def level(name, seed, size, *, reached=True):
    return {
        "level": name, "seed": seed, "size": size, "whole": 479.0, "ranked": size, "validation_faithfulness": 0.91,
        "faithfulness": {"value": 0.876, "low": 0.8, "high": 0.95}, "lower": 0.81, "upper": 0.94, "reached": reached,
    }  # fmt: skip


def model(kind, sizes, *, reached):
    made = model_circuit(GRAPH, 40, f"some/{kind}", kind, seed=int(kind == "dense"))
    made["levels"] = [level("edges", seed, size, reached=reached) for seed, size in enumerate(sizes)]
    made["levels"] += [level("messages", 0, 4.25)]
    made["controls"] |= CONTROLS
    made["published"] = {"heads": 7, "recovered": 0.9, "edges": 48, "token_edges": 7.328, "names": []}
    return made


def rows(*models, more=(None, None)):
    result = circuit_result(*models)
    if result.compare:
        ratio = {"level": "edges", "searches": 2, "value": 2.018, "low": 1.63, "high": 2.54}
        filled = {**result.compare.model_dump(), "levels": [ratio], "published": None, "jaccard": 0.33}
        result = type(result).model_validate({**result.model_dump(), "compare": filled})
    lines = table(result, list(more)).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({len(line) for line in cells}) == 1
    return {line[0]: line[1:] for line in cells}


def test_two_models_stand_side_by_side():
    found = rows(model("sparse", [89.0, 107.0], reached=False), model("dense", [209.0, 206.0], reached=True))
    assert found[""] == ["sparse", "dense", "dense / sparse"]
    assert found["edges, search 1"] == ["89 of 479 at 0.88, not shown", "209 of 479 at 0.88", "2.02x (1.63 to 2.54)"]
    assert found["edges, search 2"] == ["107 of 479 at 0.88, not shown", "206 of 479 at 0.88", ""]
    assert found["messages per prompt"][0] == "4.2 of 479 at 0.88"
    assert found["faithfulness, 128 test prompts (bounds)"][0] == "0.910 (0.87 to 0.95)"
    assert found["nonsense answers"][0] == "no circuit; at best 0.00"
    assert found["worst other ablation"][0] == "0.28, 100 % mean"
    assert found["published: open attention edges"] == ["7.3", "7.3", ""]
    assert found["edges shared (Jaccard)"][2] == "0.33"


def test_more_prompts_and_one_model():
    test = {"faithfulness": {"value": 0.93, "low": 0.9, "high": 0.96}, "lower": 0.9, "upper": 0.955}
    test |= {"metric": 1.0, "accuracy": 0.9, "kl": 0.1, "quartiles": [0.8, 0.9, 1.0]}
    given = GivenCircuit.model_validate(
        {
            "model": "m", "task": "ioi", "fingerprint": "3f", "file": "f", "ablation": "corrupt", "of": 479,
            "prompts": 512, "accuracy": 0.9, "given": 89, "edges": 89, "test": test, "heads": 3, "mlps": 2,
            "random": {"draws": 1, "faithfulness": 0.0, "low": 0.0, "high": 0.0}, "complement": 0.0,
            "stress": CONTROLS["stress"],
        }
    )  # fmt: skip
    found = rows(model("sparse", [89.0], reached=False), model("dense", [209.0], reached=True), more=(given, None))
    assert found["the same, 512 test prompts"] == ["0.930 (0.90 to 0.95)", "", ""]
    assert found["edges"][0] == "89 of 479 at 0.88, not shown"
    found = rows(model("sparse", [], reached=False), model("dense", [209.0], reached=True), more=(given, None))
    assert found["edges"][:2] == ["", "209 of 479 at 0.88"]
    alone = rows(model("dense", [209.0], reached=True), more=(None,))
    assert alone[""] == ["dense"]
    assert "edges shared (Jaccard)" not in alone


def test_a_record_of_the_first_version():
    sparse = model_circuit(GRAPH, 40, "some/sparse", "sparse", seed=0)
    found = rows(sparse, model_circuit(GRAPH, 40, "some/dense", "dense", seed=1))
    assert found["edges"] == [f"{sparse['counts']['edges']} of 479", found["edges"][1], "4.10x"]
    assert found["their messages per prompt"][:2] == ["81.5 of 412", ""]


def test_what_was_not_measured_is_empty():
    sparse, dense = model("sparse", [89.0], reached=False), model("dense", [209.0], reached=True)
    for made in (sparse, dense):
        made["controls"] = {**made["controls"], "nonsense": {**CONTROLS["nonsense"], "test": None}}
        trials = [{**trial, "faithfulness": None} for trial in CONTROLS["stress"]["trials"]]
        made["controls"]["stress"] = {"trials": trials, "worst": None, "holds": False}
        made["curves"] = []
    found = rows(sparse, dense)
    assert found["nonsense answers"][0] == "no circuit; at best none"
    assert "worst other ablation" not in found
    assert found["edges by EAP-IG alone"] == ["none", "none", ""]


def test_another_circuit_on_more_prompts_is_refused(tmp_path):
    result = circuit_result(model_circuit(GRAPH, 40))
    given = {"model": "m", "task": "ioi", "fingerprint": "3f", "file": "f", "ablation": "corrupt", "of": 479}
    given |= {"prompts": 512, "accuracy": 0.9, "given": 3, "edges": 3, "heads": 3, "mlps": 2, "complement": 0.0}
    given |= {"test": result.models[0].test.model_dump(), "stress": CONTROLS["stress"]}
    given |= {"random": {"draws": 1, "faithfulness": 0.0, "low": 0.0, "high": 0.0}}
    assert more_prompts(tmp_path, result) == [None]
    (tmp_path / "more-1.json").write_text(json.dumps(given))
    with pytest.raises(InputError, match="not the circuit of some/model for ioi"):
        more_prompts(tmp_path, result)
