"""The sidecar format: a valid one opens, every damaged or hostile one is an InputError of one line, never a crash."""

import contextlib
import copy
import gc
import hashlib
import io
import json
import math
import os
import pickle
import random
import signal
import stat
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from attnprune.errors import InputError
from attnprune.files import sha256_of
from attnprune.sidecar import folder as folder_module
from attnprune.sidecar import format
from attnprune.sidecar.folder import file_entries, open_sidecar, publish, save_files
from attnprune.sidecar.identity import base_tensors, check_base, content_fingerprint, structure_fingerprint
from tests.factory import refused

HEADS = (2, 3)
MANIFEST, GATES, DELTA, ADAPTER = format.MANIFEST_FILE, format.GATES_FILE, format.DELTA_FILE, format.ADAPTER_FILE


def good_arrays():
    arrays = {"stats.offset_edges": np.array([0, 1, 8], dtype=np.int32)}
    for layer, heads in enumerate(HEADS):
        arrays[f"layers.{layer}.gate.bias"] = np.linspace(-4, 4, heads, dtype=np.float32)
        arrays[f"layers.{layer}.gate.closed"] = (np.arange(heads) == 1).astype(np.uint8)
        is_open = (np.arange(heads) != 1).astype(np.float32)
        arrays[f"layers.{layer}.stats.density"] = is_open * np.float32(0.25)
        arrays[f"layers.{layer}.stats.open_by_offset"] = np.outer(is_open, [0.25, 0.25]).astype(np.float32)
        arrays[f"layers.{layer}.stats.sink"] = is_open * np.float32(0.5)
    return arrays


def good_manifest(kind="none"):
    return {
        "format": "attnprune",
        "format_version": "1.0",
        "requires": ["gate:threshold"] + ([] if kind == "none" else [f"weights:{kind}"]),
        "created_by": "attnprune 0.1.0",
        "base": {
            "kind": "hub",
            "repo_id": "some/model",
            "revision": "0" * 40,
            "model_type": "llama",
            "dtype": "float32",
            "structure": "1" * 64,
            "content": "2" * 64,
        },
        "gate": {"logit": "score+bias", "threshold": 0, "heads": list(HEADS)},
        "weights": {"kind": kind, "tensors": 0 if kind == "none" else 2}
        | ({"rank": 2, "alpha": 4.0} if kind == "lora" else {}),
        "result": {
            "loss": 3.25,
            "base_loss": 3.2,
            "control_loss": 3.19,
            "kl": 0.04,
            "density": 0.01,
            "edges_per_query": 1.5,
            "open_edges": 10,
            "visible_edges": 1000,
            "exact_match": 0.5,
            "seq_len": 64,
            "tokens": 4096,
            "data": "some text",
            "data_sha256": "3" * 64,
            "steps": 100,
            "seed": 0,
            "constraint": "kl",
            "limit": 0.05,
            "feasible": True,
        },
        "probe": {"input_ids": [1, 2, 3], "loss": 3.3, "open_edges": 5, "tolerance": 0.001, "edge_tolerance": 0},
        "files": {},
    }


LORA_A, LORA_B = (f"base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.weight" for side in "AB")
ADAPTER_CONFIG = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


def good_weights(kind, dtype=torch.float32):
    if kind == "lora":
        return {LORA_A: torch.arange(6, dtype=dtype).reshape(2, 3), LORA_B: torch.ones(3, 2, dtype=dtype)}
    values = {"model.w": torch.arange(6, dtype=dtype).reshape(2, 3), "model.b": torch.ones(1, dtype=dtype)}
    return {} if kind == "none" else values


def make(folder, kind="none", weights=None):
    """A valid sidecar in `folder`, written by the package's own functions."""
    staging = folder.parent / f"staging-{folder.name}"
    weights = weights or good_weights(kind)
    save_files(staging, good_arrays(), weights, dict(ADAPTER_CONFIG) if kind == "lora" else None)
    values = good_manifest(kind) | {"files": file_entries(staging)}
    publish(staging, folder, format.Manifest.model_validate(values))
    return folder


@pytest.fixture
def folder(tmp_path):
    return make(tmp_path / "sidecar")


@pytest.fixture
def no_hang():
    """Fail instead of waiting for ever, for instance on a pipe."""

    def stop(number, frame):
        pytest.fail("still waiting after 5 s")  # no OSError, which would count as a refusal

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(5)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def read_all(folder):
    opened = open_sidecar(folder)
    return opened, opened.gates, opened.weights()


def stored_manifest(folder):
    return json.loads((folder / MANIFEST).read_text())


def store_manifest(folder, values):
    (folder / MANIFEST).write_text(json.dumps(values))


def replace_file(folder, name, raw):
    """Put other bytes into a listed file and bring the manifest's size and hash in line, as an attacker would."""
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(raw)
    values = stored_manifest(folder)
    values["files"][name] = {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    store_manifest(folder, values)


def encode(header, data=b"", length=None):
    """A safetensors file from a header (object or raw bytes) and its data."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def decode(raw):
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def gates_bytes(arrays):
    """The same file from arrays, written by hand so that it can hold what the library refuses to write."""
    names = {
        "float32": "F32",
        "float64": "F64",
        "float16": "F16",
        "int32": "I32",
        "int64": "I64",
        "uint8": "U8",
        "bool": "BOOL",
    }
    header, data = {}, b""
    for name, array in arrays.items():
        raw = array.tobytes()
        entry = {"dtype": names[array.dtype.name], "shape": list(array.shape)}
        header[name] = entry | {"data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    return encode(header, data)


# A valid sidecar


def test_a_sidecar_is_read_as_it_was_written(folder):
    opened, gates, weights = read_all(folder)
    assert weights == {}
    assert set(gates) == set(good_arrays())
    for name, array in good_arrays().items():
        assert gates[name].dtype == array.dtype
        assert np.array_equal(gates[name], array)
    assert [bias.tolist() for bias in opened.biases()] == [[-4, 4], [-4, 0, 4]]
    assert [density.tolist() for density in opened.density] == [[0.25, 0], [0.25, 0, 0.25]]
    values = good_manifest()
    values["files"] = stored_manifest(folder)["files"]
    assert opened.manifest.model_dump(exclude_none=True) == values | {"weights": {"kind": "none", "tensors": 0}}


def test_the_manifest_is_canonical_and_lists_every_file(folder):
    text = (folder / MANIFEST).read_text()
    assert text == json.dumps(json.loads(text), sort_keys=True, indent=2) + "\n"
    assert open_sidecar(folder).manifest.to_json() == text
    assert {path.name for path in folder.iterdir()} == {MANIFEST, GATES}
    raw = (folder / GATES).read_bytes()
    assert stored_manifest(folder)["files"] == {GATES: {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}}


def test_publishing_leaves_no_staging_folder(folder):
    assert {path.name for path in folder.parent.iterdir()} == {folder.name}


def test_a_publication_killed_before_the_manifest_is_no_sidecar(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_module, "write_atomic", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make(tmp_path / "sidecar")
    refused(lambda: open_sidecar(tmp_path / "sidecar"), f"no {MANIFEST}")


@pytest.mark.parametrize("kind", ["delta", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_read_as_they_were_written(tmp_path, kind, dtype):
    weights = good_weights(kind, dtype)
    folder = make(tmp_path / "sidecar", kind, weights)
    read = read_all(folder)[2]
    assert set(read) == set(weights)
    for name, tensor in weights.items():
        assert read[name].dtype == dtype
        assert torch.equal(read[name], tensor)
    listed = {MANIFEST, GATES} | ({DELTA} if kind == "delta" else {ADAPTER, format.ADAPTER_CONFIG_FILE})
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == listed


@pytest.mark.parametrize("kind", ["delta", "lora"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_weight_is_refused(tmp_path, kind, bad):
    weights = good_weights(kind)
    name = next(iter(weights))
    weights[name][0, 0] = bad
    folder = make(tmp_path / "sidecar", kind, weights)
    refused(lambda: read_all(folder), name, "non-finite")


@pytest.mark.parametrize("kind", ["delta", "lora"])
def test_weights_the_manifest_does_not_list_are_refused(folder, kind):
    store_manifest(folder, stored_manifest(folder) | {"weights": {"kind": kind}})
    refused(lambda: read_all(folder), "not listed")


# The folder


def test_a_missing_folder_is_refused(tmp_path):
    refused(lambda: open_sidecar(tmp_path / "missing"), "no such file or folder")


def test_a_file_instead_of_a_folder_is_refused(folder):
    refused(lambda: open_sidecar(folder / GATES), "not a sidecar folder")


def test_a_folder_without_manifest_is_refused(tmp_path):
    error = refused(lambda: open_sidecar(tmp_path), f"no {MANIFEST}")
    assert error.hint is None


def test_an_unfinished_run_is_refused_with_the_way_to_finish_it(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    assert f"--resume {tmp_path}" in refused(lambda: open_sidecar(tmp_path)).hint


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", ""])
def test_an_impossible_path_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    refused(lambda: open_sidecar(name))


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


def changed(values, path, change):
    """A copy of `values` where `change(parent, key)` was applied at `path`."""
    values = copy.deepcopy(values)
    parent = values
    for key in path[:-1]:
        parent = parent[key]
    change(parent, path[-1])
    return values


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


# Listed files on the disk


@pytest.mark.parametrize("position", [0, 8, 30, -1])
def test_one_flipped_byte_is_noticed(folder, position):
    raw = bytearray((folder / GATES).read_bytes())
    raw[position] ^= 1
    (folder / GATES).write_bytes(raw)
    refused(lambda: read_all(folder), GATES, "is damaged")


@pytest.mark.parametrize("change", [lambda raw: raw[:-1], lambda raw: raw + b"\0", lambda raw: b""])
def test_another_size_is_noticed(folder, change):
    (folder / GATES).write_bytes(change((folder / GATES).read_bytes()))
    refused(lambda: read_all(folder), GATES, "is damaged")


@pytest.mark.parametrize("key", ["size", "sha256"])
def test_both_size_and_hash_count(folder, key):
    values = stored_manifest(folder)
    values["files"][GATES][key] = {"size": 1, "sha256": "0" * 64}[key]
    store_manifest(folder, values)
    refused(lambda: read_all(folder), GATES, "is damaged")


def test_a_listed_file_that_is_missing_is_refused(folder):
    (folder / GATES).unlink()
    refused(lambda: read_all(folder), GATES, "is missing")


def test_a_file_that_is_not_listed_is_refused(folder):
    store_manifest(folder, stored_manifest(folder) | {"files": {}})
    refused(lambda: read_all(folder), GATES, "not listed")


@pytest.mark.parametrize("name", [GATES, MANIFEST])
@pytest.mark.parametrize("absolute", [True, False])
def test_a_link_out_of_the_folder_is_refused(folder, name, absolute):
    outside = folder.parent / "outside"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside if absolute else "../outside")
    refused(lambda: read_all(folder), name, "link leaves the folder")


def test_a_folder_link_out_of_the_folder_is_refused(tmp_path):
    folder = make(tmp_path / "sidecar", "lora")
    (folder / "adapter").rename(tmp_path / "outside")
    (folder / "adapter").symlink_to(tmp_path / "outside")
    refused(lambda: read_all(folder), "link leaves the folder")


def test_a_link_to_a_sibling_with_the_same_prefix_is_refused(folder):
    sibling = folder.with_name(folder.name + "-evil")
    sibling.mkdir()
    (folder / GATES).rename(sibling / GATES)
    (folder / GATES).symlink_to(sibling / GATES)
    refused(lambda: read_all(folder), "link leaves the folder")


def test_links_within_the_folder_and_to_the_folder_are_followed(folder, tmp_path):
    (folder / GATES).rename(folder / "blob")
    (folder / GATES).symlink_to("blob")
    (tmp_path / "link").symlink_to(folder)
    assert len(read_all(tmp_path / "link")[1]) == len(good_arrays())


@pytest.mark.parametrize("name", [GATES, MANIFEST])
def test_a_loop_of_links_is_refused(folder, name):
    (folder / name).unlink()
    (folder / name).symlink_to("other")
    (folder / "other").symlink_to(name)
    refused(lambda: read_all(folder), name)


@pytest.mark.parametrize("name", [GATES, MANIFEST])
@pytest.mark.parametrize("special", ["pipe", "folder", "socket"])
@pytest.mark.usefixtures("no_hang")
def test_a_file_that_is_not_regular_is_refused_at_once(folder, name, special):
    (folder / name).unlink()
    if special == "pipe":
        os.mkfifo(folder / name)
    elif special == "folder":
        (folder / name).mkdir()
    else:
        os.mknod(folder / name, stat.S_IFSOCK | 0o600)
    refused(lambda: read_all(folder), name)


@pytest.mark.parametrize("closed", ["sidecar/gates.safetensors", "sidecar/attnprune.json", "sidecar", "."])
def test_a_file_without_permission_is_refused(as_nobody, closed):
    public, switch = as_nobody
    folder = make(public / "sidecar")
    for path in (folder, folder / GATES, folder / MANIFEST):
        path.chmod(0o755)
    (public / closed).chmod(0)
    switch()
    refused(lambda: read_all(folder), "permission denied")


def hub_cache(root, kind="none"):
    """A sidecar as huggingface_hub caches it: models--x/snapshots/SHA/FILE -> ../../blobs/HASH."""
    repository = root / "models--some--sidecar"
    snapshot = make(root / "plain", kind)
    target = repository / "snapshots" / ("a" * 40)
    blobs = repository / "blobs"
    blobs.mkdir(parents=True)
    for file in [path for path in snapshot.rglob("*") if path.is_file()]:
        name = file.relative_to(snapshot)
        blob = blobs / sha256_of(file)
        file.rename(blob)
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).symlink_to(Path(*[".."] * (len(name.parts) + 1), "blobs", blob.name))
    return target


@pytest.mark.parametrize("kind", ["none", "delta", "lora"])
def test_a_hub_cache_is_read_through_its_links(tmp_path, kind):
    snapshot = hub_cache(tmp_path, kind)
    assert (snapshot / MANIFEST).is_symlink()
    _, gates, weights = read_all(snapshot)
    assert len(gates) == len(good_arrays())
    assert bool(weights) == (kind != "none")


@pytest.mark.parametrize("place", ["models--some--sidecar/secret", "models--other--model/blobs/secret", "secret"])
def test_a_hub_cache_link_to_anywhere_else_is_refused(tmp_path, place):
    snapshot = hub_cache(tmp_path)
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).write_bytes((snapshot / GATES).read_bytes())
    (snapshot / GATES).unlink()
    (snapshot / GATES).symlink_to(tmp_path / place)
    refused(lambda: read_all(snapshot), "link leaves the folder")


# Headers of safetensors files


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def one(data=b"0000", **options):
    return encode({"a": entry(**options)}, data)


def two(first, second, size=8):
    return encode({"a": entry(offsets=first), "b": entry(offsets=second)}, bytes(size))


def torch_file():
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(3)}, buffer)
    return buffer.getvalue()


class Harmless:
    """Pickled, it calls a function on load."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


HEADERS = {
    "0 bytes": b"",
    "7 bytes": bytes(7),
    "length only": bytes(8),
    "length 2 only": (2).to_bytes(8, "little"),
    "length 0": encode(b"", bytes(20), length=0),
    "length 2^63": encode(b"{}", length=2**63),
    "length 2^64-1": encode(b"{}", length=2**64 - 1),
    "length above the file": encode(b"{}", length=3),
    "length 100 MB": encode({"a": entry()}, b"0000", length=100 << 20),
    "length too short": encode({"a": entry()}, b"0000", length=20),
    "text": b"This is no tensor file at all.",
    "not JSON": encode(b"not JSON at all", b"0000"),
    "list": encode([entry()], b"0000"),
    "null": encode(b"null"),
    "number": encode(b"12"),
    "string": encode(b'"{}"'),
    "not UTF-8": encode(b'{"\xff\xfe": 1}'),
    "UTF-16": encode('{"a": 1}'.encode("utf-16")),
    "NaN": encode(b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 4]}}', b"0000"),
    "deep": encode(b"[" * 100_000),
    "5000 digits": encode(b'{"a": ' + b"9" * 5000 + b"}"),
    "same name, same span": encode(
        b'{"a":' + json.dumps(entry()).encode() + b',"a":' + json.dumps(entry()).encode() + b"}", b"0000"
    ),
    "overlap": two((0, 4), (2, 6)),
    "same span": two((0, 4), (0, 4), size=4),
    "hole": two((0, 4), (8, 12), size=12),
    "gap before the first": one(bytes(8), offsets=(4, 8)),
    "past the end": one(b"000", offsets=(0, 4)),
    "far past the end": one(offsets=(2**62, 2**62 + 4)),
    "reversed": one(offsets=(4, 0)),
    "negative offset": one(offsets=(-4, 0)),
    "float offset": one(offsets=(0, 4.0)),
    "bool offset": one(offsets=(False, 4)),
    "one offset": one(offsets=(4,)),
    "three offsets": one(offsets=(0, 4, 4)),
    "text offset": one(offsets=("0", "4")),
    "size differs from the shape": one(shape=(2,)),
    "size differs from the type": one(dtype="F64"),
    "trailing byte": one(b"00000"),
    "polyglot": one() + b"PK\x05\x06" + bytes(18),
    "no tensors but data": encode({}, b"0000"),
    "zero dimension": one(b"", shape=(0,), offsets=(0, 0)),
    "zero with 2^62": one(b"", shape=(0, 2**62), offsets=(0, 0)),
    "negative dimension": one(shape=(-1,)),
    "two negative dimensions": one(shape=(-1, -1)),
    "float dimension": one(shape=(1.0,)),
    "bool dimension": one(shape=(True,)),
    "text dimension": one(shape=("1",)),
    "nested dimension": one(shape=([1],)),
    "overflowing shape": one(shape=(2**32, 2**32)),
    "huge dimension": one(shape=(10**30,)),
    "rank 5": one(shape=(1,) * 5),
    "rank 10,000": one(shape=(1,) * 10_000),
    "shape is no list": encode({"a": entry() | {"shape": 1}}, b"0000"),
    "shape is an object": encode({"a": entry() | {"shape": {"0": 1}}}, b"0000"),
    "offsets are no list": encode({"a": entry() | {"data_offsets": 4}}, b"0000"),
    "entry is no object": encode({"a": [0, 4]}, b"0000"),
    "entry is null": encode({"a": None}, b"0000"),
    "missing key": encode({"a": {"dtype": "F32", "shape": [1]}}, b"0000"),
    "extra key": encode({"a": entry() | {"x": 1}}, b"0000"),
    "dtype F8": one(b"0", dtype="F8_E4M3", offsets=(0, 1)),
    "dtype BOOL": one(b"\2", dtype="BOOL", offsets=(0, 1)),
    "dtype lower case": one(dtype="f32"),
    "dtype null": one(dtype=None),
    "dtype number": one(dtype=4),
    "dtype list": one(dtype=["F32"]),
    "dtype object": one(dtype={"F32": 4}),
    "name empty": encode({"": entry()}, b"0000"),
    "name dots": encode({"..": entry()}, b"0000"),
    "name path": encode({"../../etc/passwd": entry()}, b"0000"),
    "name slash": encode({"a/b": entry()}, b"0000"),
    "name NUL": encode({"a\0": entry()}, b"0000"),
    "name escape": encode({"\x1b[31m": entry()}, b"0000"),
    "name newline": encode({"a\nb": entry()}, b"0000"),
    "name trailing newline": encode({"a\n": entry()}, b"0000"),
    "name 10 kB": encode({"a" * 10_000: entry()}, b"0000"),
    "name not ASCII": encode({"ä": entry()}, b"0000"),
    "name surrogate": encode(b'{"\\ud800":' + json.dumps(entry()).encode() + b"}", b"0000"),
    "metadata list": encode({"__metadata__": ["x"], "a": entry()}, b"0000"),
    "metadata null": encode({"__metadata__": None, "a": entry()}, b"0000"),
    "metadata number": encode({"__metadata__": {"x": 1}, "a": entry()}, b"0000"),
    "metadata nested": encode({"__metadata__": {"x": {"y": "z"}}, "a": entry()}, b"0000"),
    "metadata 9 MB": encode({"__metadata__": {"x": "y" * (9 << 20)}, "a": entry()}, b"0000"),
    "pickle": pickle.dumps(Harmless()),
    "long pickle": pickle.dumps([Harmless()] * 1000),
    "torch file": torch_file(),
    "numpy file": b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }" + bytes(100),
    "zip file": b"PK\x03\x04" + bytes(200),
    "gguf file": b"GGUF" + bytes(200),
}


@pytest.mark.parametrize("raw", HEADERS.values(), ids=HEADERS)
def test_a_bad_safetensors_file_is_refused(raw):
    message = refused(lambda: format.read_arrays(raw, "name")).message
    assert message.startswith("name")
    assert len(message) < 300


@pytest.mark.parametrize("raw", HEADERS.values(), ids=HEADERS)
def test_a_bad_delta_is_refused_before_any_library_reads_it(tmp_path, raw):
    folder = make(tmp_path / "sidecar", "delta")
    replace_file(folder, DELTA, raw)
    refused(lambda: read_all(folder), DELTA)


@pytest.mark.parametrize("metadata", [{}, {"__metadata__": {}}, {"__metadata__": {"format": "pt", "ä": ""}}])
@pytest.mark.parametrize("padding", [0, 1, 7])
def test_a_good_safetensors_file_is_read(metadata, padding):
    header = {**metadata, "b": entry("U8", (), (4, 5)), "a.b-c_9": entry("F32", (1, 1, 1, 1), (0, 4))}
    raw = encode(json.dumps(header).encode() + b" " * padding, np.float32(1.5).tobytes() + b"\7")
    arrays = format.read_arrays(raw, "name")
    assert {name: (array.dtype.str, array.shape) for name, array in arrays.items()} == {
        "a.b-c_9": ("<f4", (1, 1, 1, 1)),
        "b": ("|u1", ()),
    }
    assert arrays["a.b-c_9"].item() == 1.5
    assert arrays["b"].item() == 7


@pytest.mark.parametrize("dtype", ["BF16"])
def test_arrays_numpy_cannot_hold_are_refused(dtype):
    refused(lambda: format.read_arrays(one(b"00", dtype=dtype, offsets=(0, 2)), "name"), dtype)
    assert format.parse_safetensors(one(b"00", dtype=dtype, offsets=(0, 2)), "name")


@pytest.mark.parametrize(
    "header",
    [
        pytest.param(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-0,4]}}', id="minus-zero"),
        pytest.param(
            b'{"__metadata__":{"x":"\\ud800"},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', id="surrogate"
        ),
        pytest.param(b' \n{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', id="leading-space"),
    ],
)
def test_a_header_is_not_read_by_us_and_refused_by_the_library(tmp_path, header):
    folder = make(tmp_path / "sidecar", "delta")
    replace_file(folder, DELTA, encode(header, np.float32(1).tobytes()))
    with contextlib.suppress(InputError):  # either is fine, the library's own exception is not
        assert read_all(folder)[2]["a"].tolist() == [1.0]


def many_tensors(count):
    header = {f"a{i}": entry("U8", (1,), (i, i + 1)) for i in range(count)}
    return encode(header, bytes(count))


@pytest.mark.parametrize("count", [30_000, 200_000])
def test_too_many_tensors_are_refused_quickly(count):
    raw = many_tensors(count)
    gc.freeze()  # else the collections that a parse sets off walk through what earlier tests have left
    start = time.process_time()
    refused(lambda: format.parse_safetensors(raw, "name"))
    taken = time.process_time() - start
    gc.unfreeze()
    assert taken < 1.0


def test_as_many_tensors_as_promised_are_read():
    assert len(format.parse_safetensors(many_tensors(format.MAX_TENSORS), "name")) == format.MAX_TENSORS
    refused(lambda: format.parse_safetensors(many_tensors(format.MAX_TENSORS + 1), "name"), "too many tensors")


# The values of the gates


def with_value(name, value, index=0):
    def change(arrays):
        arrays[name].flat[index] = value

    return change


def with_array(name, array):
    def change(arrays):
        arrays[name] = array

    return change


def without(name):
    def change(arrays):
        del arrays[name]

    return change


BIAS = "layers.1.gate.bias"
GATE_CASES = {
    "bias NaN": (with_value(BIAS, math.nan, 2), BIAS),
    "bias infinite": (with_value(BIAS, math.inf), BIAS),
    "bias minus infinite": (with_value(BIAS, -math.inf), BIAS),
    "bias 1e5": (with_value(BIAS, 1e5), BIAS),
    "bias -1e5": (with_value(BIAS, -1e5), BIAS),
    "bias one head short": (with_array(BIAS, np.zeros(2, np.float32)), BIAS),
    "bias of one head": (with_array(BIAS, np.zeros(1, np.float32)), BIAS),
    "bias as a column": (with_array(BIAS, np.zeros((3, 1), np.float32)), BIAS),
    "bias scalar": (with_array(BIAS, np.float32(0).reshape(())), BIAS),
    "bias F64": (with_array(BIAS, np.zeros(3)), BIAS),
    "bias F16": (with_array(BIAS, np.zeros(3, np.float16)), BIAS),
    "bias I64": (with_array(BIAS, np.zeros(3, np.int64)), BIAS),
    "bias BOOL": (with_array(BIAS, np.zeros(3, bool)), BIAS),
    "bias missing": (without(BIAS), f"{BIAS} is missing"),
    "closed missing": (without("layers.0.gate.closed"), "layers.0.gate.closed is missing"),
    "closed 2": (with_value("layers.0.gate.closed", 2), "layers.0.gate.closed"),
    "closed F32": (with_array("layers.0.gate.closed", np.zeros(2, np.float32)), "layers.0.gate.closed"),
    "density 1.5": (with_value("layers.1.stats.density", 1.5), "layers.1.stats.density"),
    "density -0.1": (with_value("layers.1.stats.density", -0.1), "layers.1.stats.density"),
    "density NaN": (with_value("layers.1.stats.density", math.nan), "layers.1.stats.density"),
    "sink 2": (with_value("layers.1.stats.sink", 2), "layers.1.stats.sink"),
    "sink missing": (without("layers.1.stats.sink"), "layers.1.stats.sink is missing"),
    "offsets NaN": (with_value("layers.0.stats.open_by_offset", math.nan), "open_by_offset"),
    "offsets -1": (with_value("layers.0.stats.open_by_offset", -1), "open_by_offset"),
    "offsets of another width": (
        with_array("layers.0.stats.open_by_offset", np.zeros((2, 3), np.float32)),
        "open_by_offset",
    ),
    "edges missing": (without("stats.offset_edges"), "stats.offset_edges is missing"),
    "edges scalar": (with_array("stats.offset_edges", np.int32(3).reshape(())), "stats.offset_edges"),
    "edges in two dimensions": (with_array("stats.offset_edges", np.zeros((3, 2), np.int32)), "stats.offset_edges"),
    "edges F32": (with_array("stats.offset_edges", np.zeros(3, np.float32)), "stats.offset_edges"),
    "extra tensor": (with_array("extra", np.zeros(1, np.float32)), "extra is unexpected"),
    "extra layer": (with_array("layers.2.gate.bias", np.zeros(2, np.float32)), "layers.2.gate.bias is unexpected"),
    "layer 999": (with_array("layers.999.gate.bias", np.zeros(2, np.float32)), "layers.999.gate.bias is unexpected"),
    "layers.01": (with_array("layers.01.gate.bias", np.zeros(2, np.float32)), "layers.01.gate.bias is unexpected"),
}


@pytest.mark.parametrize(("change", "message"), GATE_CASES.values(), ids=GATE_CASES)
def test_bad_gates_are_refused_by_name(folder, change, message):
    arrays = good_arrays()
    change(arrays)
    replace_file(folder, GATES, gates_bytes(arrays))
    refused(lambda: read_all(folder), GATES, message)


@pytest.mark.parametrize("heads", [[2], [2, 3, 4], [3, 2], [2, 2], [1024, 1024]])
def test_gates_of_another_shape_than_the_manifest_says_are_refused(folder, heads):
    values = stored_manifest(folder)
    values["gate"]["heads"] = heads
    store_manifest(folder, values)
    refused(lambda: read_all(folder), GATES)


def test_extreme_but_valid_gates_are_read(folder):
    arrays = good_arrays()
    arrays[BIAS][:] = [1e4, -1e4, 0]
    replace_file(folder, GATES, gates_bytes(arrays))
    assert read_all(folder)[0].biases()[1].tolist() == [1e4, -1e4, 0]


# Fuzzing: success or InputError, nothing else


def fuzz(folder, cases, seed, mutate):
    """Let `mutate(generator, case)` change the folder again and again; only success and InputError are fine."""
    generator, opened, failures = random.Random(seed), 0, {}
    for case in range(cases):
        mutate(generator, case)
        start = time.process_time()
        try:
            read_all(folder)
            opened += 1
        except InputError as error:
            if error.exit_code != 2 or len(error.message.splitlines()) != 1:
                failures["message"] = (case, error.message[:200])
        except Exception as error:
            failures[type(error).__name__] = (case, str(error)[:200])
        if time.process_time() - start > 2:
            failures["slow"] = case
    assert not failures
    assert 0 < opened < cases


def damage(raw, generator):
    """Bit flips, a cut, an insertion or a repeated stretch."""
    raw = bytearray(raw)
    kind = generator.randrange(5)
    if kind <= 1:
        for _ in range(generator.choice([1, 1, 2, 8])):
            raw[generator.randrange(len(raw))] ^= 1 << generator.randrange(8)
    elif kind == 2:
        del raw[generator.randrange(len(raw)) :]
    elif kind == 3:
        at = generator.randrange(len(raw))
        raw[at:at] = generator.randbytes(generator.randint(1, 9))
    else:
        at, length = generator.randrange(len(raw)), generator.randint(1, 40)
        raw[at : at + length] = raw[at : at + length] * 2
    return bytes(raw)


STRANGE = [
    None, True, False, 0, -1, 1, 2, 2**31, 2**63, 10**400, 0.0, -0.0, 1.5, 1e308, "", "x", "\0", "a\nb", "\x1b[31m",
    "\ud800", "²", "1.0", "../x", "F32", "9" * 5000, [], [0], [[]], {}, {"x": 1}, {"\n": None}, [None] * 50,
]  # fmt: skip


def places(value, path=()):
    """Paths of everything inside nested dictionaries and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def swap(values, generator):
    """Replace, delete, add or rename something somewhere."""

    def change(parent, key):
        kind = generator.randrange(6)
        if kind == 0:
            del parent[key]
        elif kind == 1 and isinstance(parent, dict):
            parent[str(generator.choice(STRANGE))] = parent.pop(key)
        elif kind == 2 and isinstance(parent, dict):
            parent[str(generator.choice(STRANGE))] = copy.deepcopy(generator.choice(STRANGE))
        else:
            parent[key] = copy.deepcopy(generator.choice(STRANGE))

    return changed(values, generator.choice(list(places(values))), change)


def test_fuzzed_manifests_open_or_are_refused(folder):
    good = (folder / MANIFEST).read_bytes()
    fuzz(folder, 150, 20251205, lambda generator, _: (folder / MANIFEST).write_bytes(damage(good, generator)))


def test_manifests_with_swapped_values_open_or_are_refused(folder):
    good = stored_manifest(folder)
    fuzz(folder, 250, 20251206, lambda generator, _: store_manifest(folder, swap(good, generator)))


def test_no_mutated_hashed_byte_is_accepted(folder):
    generator = random.Random(20251207)
    good = (folder / GATES).read_bytes()
    for _ in range(100):
        bad = damage(good, generator)
        if bad != good:
            (folder / GATES).write_bytes(bad)
            refused(lambda: read_all(folder), "is damaged")


@pytest.mark.parametrize("name", [GATES, DELTA])
def test_fuzzed_tensor_files_with_a_matching_hash_are_read_or_refused(tmp_path, name):
    folder = make(tmp_path / "sidecar", "delta")
    good = (folder / name).read_bytes()
    header, data = decode(good)

    def mutate(generator, case):
        bad = damage(good, generator) if case % 3 == 0 else encode(swap(header, generator), data)
        replace_file(folder, name, bad)

    fuzz(folder, 300, 20251208, mutate)


# The base model's fingerprints


class Base(torch.nn.Module):
    def __init__(self, width=4):
        super().__init__()
        torch.manual_seed(0)
        self.inner = torch.nn.Linear(width, 3)
        self.register_parameter("attnprune_gate_bias", torch.nn.Parameter(torch.zeros(2)))


def manifest_for(model):
    values = good_manifest()
    tensors = base_tensors(model)
    values["base"]["structure"] = structure_fingerprint(tensors)
    values["base"]["content"] = content_fingerprint(tensors)
    return format.Manifest.model_validate(values)


def test_the_base_itself_passes_whatever_its_gates_are():
    manifest, model = manifest_for(Base()), Base()
    torch.nn.init.ones_(model.attnprune_gate_bias)
    check_base(manifest, model)


def test_another_structure_is_refused_always():
    manifest = manifest_for(Base())
    refused(lambda: check_base(manifest, Base(width=5)), "some/model", "2 layers", "2 heads")
    refused(lambda: check_base(manifest, Base(width=5), True), "wrong base model")
    refused(lambda: check_base(manifest, Base().double(), True), "wrong base model")


def test_other_weights_are_refused_unless_allowed():
    manifest, model = manifest_for(Base()), Base()
    with torch.no_grad():
        model.inner.weight[0, 0] += 1e-3
    error = refused(lambda: check_base(manifest, model), "not the weights")
    assert "--allow-base-mismatch" in error.hint
    check_base(manifest, model, allow_mismatch=True)


def test_fingerprints_do_not_depend_on_the_order_or_layout_of_the_tensors():
    first = {"a": torch.arange(1000.0).reshape(10, 100), "b": torch.ones(3)}
    second = {"b": torch.ones(3), "a": torch.arange(1000.0).reshape(10, 100).t().contiguous().t()}
    assert structure_fingerprint(first) == structure_fingerprint(second)
    assert content_fingerprint(first) == content_fingerprint(second)
    renamed = {"c": first["a"], "b": first["b"]}
    assert structure_fingerprint(renamed) != structure_fingerprint(first)
    assert content_fingerprint(renamed) != content_fingerprint(first)
