"""A search's folder: its record is read plain or compressed, a damaged or foreign one is refused in one line."""

import gzip
import json
import math
from pathlib import Path

import pytest
import torch

from attnprune.circuit import folder
from attnprune.circuit.folder import read_record
from attnprune.circuit.model.graph import Graph
from attnprune.circuit.result import FIRST_NOTE, CircuitResult, is_reached, not_shown
from attnprune.circuit.search.splits import faithfulness_bounds
from attnprune.report.circuit_page import render_page
from attnprune.report.circuits import summary
from tests.helpers.factory import refused
from tests.helpers.pages import Outline, circuit_result, model_circuit


@pytest.fixture
def result():
    return circuit_result(model_circuit(Graph(2, 2, 2), 20))


def test_a_record_is_read_plain_and_compressed(result, tmp_path):
    raw = result.model_dump_json(indent=1).encode()
    (tmp_path / "circuit.json.gz").write_bytes(gzip.compress(raw))
    assert read_record(tmp_path) == result
    other = result.model_copy(update={"command": "attnprune circuit other"})
    (tmp_path / "circuit.json").write_text(other.model_dump_json())
    assert read_record(tmp_path) == other  # the search's own file comes first


def first_version(result):
    """The same record as the first version of the format had it."""
    data = json.loads(result.model_dump_json())
    data["schema_id"] = "attnprune-circuit-1"
    del data["task"]["chance"], data["method"]["margin"], data["method"]["bounds"]
    for model in data["models"]:
        assert model["reached"]
        for key in ("lower", "upper", "each"):
            del model["test"][key]
    return data


def test_a_record_of_the_first_version_is_read_and_shows_no_target_reached(tmp_path):
    graph = Graph(2, 2, 2)
    data = first_version(circuit_result(model_circuit(graph, 20), model_circuit(graph, 9, "base", "dense", seed=1)))
    data["compare"]["reasons"].append("base: its circuit misses the target on test prompts")
    (tmp_path / "circuit.json").write_text(json.dumps(data))
    found = read_record(tmp_path)
    assert [model.reached for model in found.models] == [False, False]
    assert [model.test.lower for model in found.models] == [None, None]
    assert found.compare.reasons == [
        "the losses differ by 0.3 nats",
        *(not_shown(model.name) for model in found.models),
    ]
    assert found.notes == ["a note", FIRST_NOTE]
    (tmp_path / "circuit.json").write_text(found.model_dump_json())
    assert read_record(tmp_path) == found
    text = " ".join(Outline(render_page(found)).text)
    assert "target 0.9 not shown with 128 prompts" in text
    assert "chance not recorded" in text


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_numbers_of_a_broken_model_that_are_not_finite_are_read_back(result, tmp_path, broken):
    data = result.model_dump()
    model = data["models"][0]
    model["curves"][0]["points"][0]["faithfulness"] = model["edges"][0]["score"] = broken
    model["attribution"]["gap"] = model["controls"]["complement"] = model["test"]["kl"] = broken
    for name in ("random", "random_weights", "shuffled_gates"):
        control = model["controls"][name]
        control |= {key: broken for key, value in control.items() if type(value) is float and key != "accuracy"}
    odd = CircuitResult.model_validate(data)
    (tmp_path / "circuit.json").write_text(odd.model_dump_json())
    assert read_record(tmp_path) == odd
    assert odd.models[0].controls.random_weights.clean is None
    assert "not finite" in render_page(odd)
    summary(odd)


def test_committed_records_say_what_their_prompts_show():
    folders = sorted(Path("examples/results/circuits").iterdir())
    half = [f"smollm2-half-{task}" for task in ("greater-than", "induction", "ioi", "sva")]
    assert [folder.name for folder in folders] == ["addition", *half, "smollm2-induction", "smollm2-sva"]
    for found in map(read_record, folders):
        # Years of different decades have different numbers of larger and smaller two-digit ends.
        assert found.task.chance == (pytest.approx(0.47743, abs=1e-5) if found.task.name == "greater-than" else 0.5)
        for model in found.models:
            metrics = torch.tensor(model.test.each).unbind(1)
            assert len(metrics[0]) == found.task.test
            bounds = faithfulness_bounds(*metrics, found.task.seed)
            assert bounds == pytest.approx((model.test.lower, model.test.upper), abs=1e-5)
            assert model.reached == is_reached(found.method.band, model.validation_faithfulness, model.test)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("circuit.json", lambda raw: raw[:-20], "EOF while parsing"),
        ("circuit.json", lambda raw: b"", "EOF while parsing"),
        ("circuit.json", lambda raw: b"\xff" + raw, "not a record of attnprune-circuit-2"),
        ("circuit.json", lambda raw: raw.replace(b"circuit-2", b"circuit-3", 1), "schema_id: Input should be"),
        ("circuit.json", lambda raw: raw.replace(b'"faithfulness"', b'"faith"', 1), "faith"),
        ("circuit.json", lambda raw: b"[]", "should be an object"),
        ("circuit.json.gz", lambda raw: raw, "damaged: Not a gzipped file"),
        ("circuit.json.gz", lambda raw: gzip.compress(raw)[:-30], "damaged: Compressed file ended"),
        ("circuit.json.gz", lambda raw: gzip.compress(raw)[:40] + b"\0" * 60, "damaged: "),
    ],
)
def test_a_damaged_record_is_refused(result, tmp_path, name, change, message):
    (tmp_path / name).write_bytes(change(result.model_dump_json().encode()))
    refused(lambda: read_record(tmp_path), str(tmp_path / name), message)


def test_a_record_that_unpacks_to_too_much_is_refused(result, tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "MAX_RECORD_BYTES", 1 << 20)
    (tmp_path / "circuit.json.gz").write_bytes(gzip.compress(bytes(2 << 20)))
    refused(lambda: read_record(tmp_path), "larger than 1 MiB")


def test_a_record_without_a_model_is_refused(result, tmp_path):
    (tmp_path / "circuit.json").write_text(result.model_copy(update={"models": []}).model_dump_json())
    refused(lambda: read_record(tmp_path), "no models")


def test_a_folder_that_may_not_be_searched_is_refused(as_nobody):
    place, switch = as_nobody
    (place / "closed" / "inner").mkdir(parents=True)
    (place / "closed").chmod(0)
    switch()
    refused(lambda: read_record(place / "closed"), "permission denied")
    refused(lambda: read_record(place / "closed" / "inner"), "permission denied")


def test_a_folder_without_a_record_is_refused(tmp_path):
    refused(lambda: read_record(tmp_path), "holds no circuit.json and no circuit.json.gz")
    refused(lambda: read_record(tmp_path / "nowhere"), "no such folder")
    (tmp_path / "file").write_text(json.dumps({}))
    refused(lambda: read_record(tmp_path / "file"), "is not a folder")
    (tmp_path / "circuit.json").mkdir()
    refused(lambda: read_record(tmp_path), "holds no circuit.json")
