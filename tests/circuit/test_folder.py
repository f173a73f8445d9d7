"""A search's folder: its record is read plain or compressed, a damaged or foreign one is refused in one line."""

import gzip
import json

import pytest

from attnprune.circuit import folder
from attnprune.circuit.folder import read_record
from attnprune.circuit.model.graph import Graph
from tests.helpers.factory import refused
from tests.helpers.pages import circuit_result, model_circuit


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


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("circuit.json", lambda raw: raw[:-20], "EOF while parsing"),
        ("circuit.json", lambda raw: b"", "EOF while parsing"),
        ("circuit.json", lambda raw: b"\xff" + raw, "not a record of attnprune-circuit-1"),
        ("circuit.json", lambda raw: raw.replace(b"circuit-1", b"circuit-2", 1), "schema_id: Input should be"),
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
