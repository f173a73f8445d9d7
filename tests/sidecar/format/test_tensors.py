"""Safetensors files: every bad header refused in one line, good ones read, limits kept."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import pickle
import time

import numpy as np
import pytest
import torch

from attnprune.errors import InputError
from attnprune.sidecar import format
from tests.helpers.factory import refused
from tests.helpers.formats import DELTA, encode, entry, make, read_all, replace_file


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
