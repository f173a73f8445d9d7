"""The manifest: strict JSON, versions, features, types, ranges and file names, each refused by name."""

from __future__ import annotations

import json
import time

import pytest

from attnprune.sidecar import format
from attnprune.sidecar.folder import open_sidecar
from tests.helpers.factory import refused
from tests.helpers.formats import (
    GATES,
    MANIFEST,
    changed,
    good_manifest,
    read_all,
    store_manifest,
    stored_manifest,
)

# The manifest as JSON


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        pytest.param(b"", "not valid JSON", id="empty"),
        pytest.param(b" \n\t ", "not valid JSON", id="blank"),
        pytest.param(b'{\n"format": "attnprune",\n', "not valid JSON (line", id="truncated"),
        pytest.param(b'{"a": 1} x', "not valid JSON", id="trailing-text"),
        pytest.param(b"{'a': 1}", "not valid JSON", id="single-quotes"),
        pytest.param(b"[]", "expected an object", id="list"),
        pytest.param(b"null", "expected an object", id="null"),
        pytest.param(b'"text"', "expected an object", id="string"),
        pytest.param(b"7", "expected an object", id="number"),
        pytest.param(b"{}", "not an attnprune manifest", id="empty-object"),
        pytest.param(b'{"format": "other"}', "not an attnprune manifest", id="other-format"),
        pytest.param(b'{"a": NaN}', "bad number", id="nan"),
        pytest.param(b'{"a": Infinity}', "bad number", id="infinity"),
        pytest.param(b'{"a": -Infinity}', "bad number", id="minus-infinity"),
        pytest.param(b'{"a": 1e999}', "bad number", id="1e999"),
        pytest.param(b'{"a": -1e999}', "bad number", id="-1e999"),
        pytest.param(b'{"a": ' + b"9" * 5000 + b"}", "bad number", id="5000-digits"),
        pytest.param(b'{"a": 1, "b": 2, "a": 1}', "'a' given twice", id="duplicate-key"),
        pytest.param(b'{"a": {"b": 1, "b": 2}}', "'b' given twice", id="duplicate-nested-key"),
        pytest.param(b'{"a": 1, "\\u0061": 2}', "'a' given twice", id="duplicate-escaped-key"),
        pytest.param(b"[" * 100_000, "nested too deeply", id="deep-lists"),
        pytest.param(b'{"a":' * 100_000, "nested too deeply", id="deep-objects"),
        pytest.param(b"[" * 100_000 + b"]" * 100_000, "nested too deeply", id="deep-and-closed"),
        pytest.param(b'{"a": "' + b"x" * (2 << 20) + b'"}', "larger than 1 MiB", id="2-megabytes"),
        pytest.param(b"{}" + b" " * (1 << 20), "larger than 1 MiB", id="padded"),
        pytest.param('{"a": 1}'.encode("utf-16"), "not UTF-8", id="utf-16"),
        pytest.param('{"a": 1}'.encode("utf-16-le"), "", id="utf-16-le"),
        pytest.param(b'{"a": "\xff"}', "not UTF-8", id="invalid-utf8"),
        pytest.param(b'{"a": "\xed\xa0\x80"}', "not UTF-8", id="utf8-surrogate"),
        pytest.param(b'\xef\xbb\xbf{"a": 1}', "not valid JSON", id="byte-order-mark"),
        pytest.param(b'{"a": "\n"}', "not valid JSON", id="raw-newline"),
        pytest.param(bytes(100), "not valid JSON", id="nul"),
    ],
)
def test_a_manifest_that_is_not_strict_json_is_refused(folder, raw, message):
    (folder / MANIFEST).write_bytes(raw)
    refused(lambda: open_sidecar(folder), str(folder), message)


def test_a_duplicate_among_many_keys_is_refused_quickly():
    raw = ("{" + ",".join(f'"{i}":0' for i in range(20_000)) + ',"z":0,"z":0}').encode()
    start = time.process_time()
    refused(lambda: format.parse_json(raw, "name"), "'z' given twice")
    assert time.process_time() - start < 1.0


def test_strict_json_still_reads_ordinary_json():
    raw = '{"a": [1, -2.5e3, "ä\\n", true, null], "b": {"a": {}}}'.encode()
    assert format.parse_json(raw, "name") == {"a": [1, -2500.0, "ä\n", True, None], "b": {"a": {}}}


# The manifest's version and features


@pytest.mark.parametrize("version", ["2.0", "2.5", "10.0", "2", "999.0"])
def test_a_newer_major_version_is_refused_with_the_way_to_upgrade(folder, version):
    store_manifest(folder, stored_manifest(folder) | {"format_version": version})
    error = refused(lambda: open_sidecar(folder), f"format {version} needs a newer attnprune")
    assert "pip install" in error.hint


@pytest.mark.parametrize(
    "version",
    ["0.1", "0", "-1", "-1.0", "1", "1.", ".1", "1.0.0", "1.0\n", " 1.0", "v1.0", "one", "", "²", "²0.1", "9" * 5000,
     "2.\n\x1b[31m", "1.123456", True, None, 1, 1.0, [1, 0], {"major": 1}],
    ids=lambda version: repr(version)[:12],
)  # fmt: skip
def test_a_bad_version_is_refused(folder, version):
    store_manifest(folder, stored_manifest(folder) | {"format_version": version})
    refused(lambda: open_sidecar(folder), str(folder))


def test_a_missing_version_is_refused(folder):
    values = stored_manifest(folder)
    del values["format_version"]
    store_manifest(folder, values)
    refused(lambda: open_sidecar(folder), "format_version")


@pytest.mark.parametrize("version", ["1.0", "1.1", "1.37"])
def test_a_newer_minor_version_is_read(folder, version):
    store_manifest(folder, stored_manifest(folder) | {"format_version": version})
    assert read_all(folder)[0].manifest.format_version == version


@pytest.mark.parametrize("feature", ["gate:quantum", "", "weights:LORA", "a\nb", "gate:threshold "])
def test_an_unknown_required_feature_is_refused_by_name(folder, feature):
    store_manifest(folder, stored_manifest(folder) | {"requires": ["gate:threshold", feature]})
    refused(lambda: open_sidecar(folder), repr(feature))


def test_unknown_optional_keys_are_kept(folder):
    values = stored_manifest(folder)
    values["future"] = {"a": [1, "zwei", {"b": None, "c": 1.5}]}
    values["gate"]["future"] = True
    values["files"][GATES]["future"] = "x"
    store_manifest(folder, values)
    manifest = read_all(folder)[0].manifest
    again = json.loads(manifest.to_json())
    assert again["gate"]["future"] is True
    assert again["files"][GATES]["future"] == "x"
    assert again["future"]["a"][:2] == [1, "zwei"]
    assert again["future"]["a"][2]["c"] == 1.5
    assert format.parse_manifest(manifest.to_json().encode()).to_json() == manifest.to_json()


# The manifest's keys


def leaves(values, path=()):
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield (*path, key), value
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


OPTIONAL = {("weights", "tensors"), ("base", "repo_id"), ("base", "revision"), ("result", "control_loss")}

PATHS = [path for path, _ in leaves(good_manifest())]


def delete(parent, key):
    del parent[key]


@pytest.mark.parametrize("path", [p for p in PATHS if p not in OPTIONAL], ids=".".join)
def test_a_missing_key_is_refused_by_name(path):
    values = changed(good_manifest(), path, delete)
    message = refused(lambda: format.parse_manifest(json.dumps(values).encode())).message
    assert ".".join(path) in message or path == ("format",)


FREE_TEXT = {"created_by", "base.repo_id", "base.revision", "base.model_type", "base.dtype", "result.data"}


def wrong_values():
    """(path, value of a type that does not belong there), for every key."""
    for path, value in leaves(good_manifest()):
        name = ".".join(path)
        yield path, {"x": "y"}
        if name != "requires":
            yield path, ["x"]
        if name not in FREE_TEXT:
            yield path, "\n\x1b"
        if not isinstance(value, float) or name == "result.density":
            yield path, -1.5
        if path not in OPTIONAL:
            yield path, None


@pytest.mark.parametrize(
    ("path", "wrong"), wrong_values(), ids=lambda v: ".".join(v) if isinstance(v, tuple) else repr(v)
)
def test_a_value_of_the_wrong_type_is_refused_by_name(path, wrong):
    def change(parent, key):
        parent[key] = wrong

    values = changed(good_manifest(), path, change)
    message = refused(lambda: format.parse_manifest(json.dumps(values).encode())).message
    assert ".".join(path) in message or path == ("format",)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("base.kind", "cloud"),
        ("base.structure", "0" * 63),
        ("base.structure", "G" * 64),
        ("base.content", "0" * 64 + "\n"),
        ("gate.logit", "score"),
        ("gate.threshold", 1),
        ("gate.threshold", "0"),
        ("gate.heads", []),
        ("gate.heads", [0]),
        ("gate.heads", [-2]),
        ("gate.heads", [1025]),
        ("gate.heads", [2.0]),
        ("gate.heads", [True]),
        ("gate.heads", [2] * 1025),
        ("weights.kind", "dense"),
        ("weights.rank", 100_000),
        ("weights.rank", 0),
        ("weights.tensors", -1),
        ("result.density", 1.5),
        ("result.density", -0.1),
        ("result.loss", "3.2"),
        ("result.loss", True),
        ("result.loss", 10**400),
        ("result.open_edges", -1),
        ("result.open_edges", 1.0),
        ("result.constraint", "entropy"),
        ("result.feasible", 1),
        ("result.feasible", "yes"),
        ("probe.input_ids", [1]),
        ("probe.input_ids", [1] * 65),
        ("probe.input_ids", [1, -1]),
        ("probe.input_ids", [1, 2.0]),
        ("requires", "gate:threshold"),
        ("requires", [1]),
        ("files", []),
        ("files", {GATES: "x"}),
        ("files", {GATES: {"size": -1, "sha256": "0" * 64}}),
        ("files", {GATES: {"size": 1}}),
        ("files", {GATES: {"size": "1", "sha256": "0" * 64}}),
        ("files", {GATES: {"size": 1, "sha256": "A" * 64}}),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_value_out_of_range_is_refused_by_name(path, value):
    def change(parent, key):
        parent[key] = value

    values = changed(good_manifest(), path.split("."), change)
    refused(lambda: format.parse_manifest(json.dumps(values).encode()), path)


ENTRY = {"size": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../gates.safetensors", "a/../../b", "a/..", "/etc/passwd", "//x", "./x", "a//b", "a/",
     "a\\b", "..\\x", "\\\\host\\share", "C:\\x", "C:x", "~/x", "~", "a\0b", "a\nb", "a\n", "a\x1b[31m", " ", "a b",
     "ä", "x" * 300, "a:b", "$HOME", "%2e%2e/x"],
    ids=lambda name: ascii(name)[:20],
)  # fmt: skip
@pytest.mark.parametrize("entry", [ENTRY, 1], ids=["entry", "number"])
def test_a_bad_file_name_is_refused_in_one_line(name, entry):
    values = good_manifest() | {"files": {name: entry}}
    refused(lambda: format.parse_manifest(json.dumps(values).encode()))


@pytest.mark.parametrize("name", ["gates.safetensors", "adapter/adapter_model.safetensors", "a-b_c.1"])
def test_an_ordinary_file_name_is_read(name):
    values = good_manifest() | {"files": {name: ENTRY}}
    assert list(format.parse_manifest(json.dumps(values).encode()).files) == [name]
