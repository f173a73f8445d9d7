"""Files that cannot be read: every way as one line."""

from __future__ import annotations

import contextlib
import json

import pyarrow
import pyarrow.parquet
import pytest

from attnprune.data import files
from attnprune.data.blocks import pack
from attnprune.data.sources import documents
from attnprune.errors import AttnPruneError, InputError
from tests.helpers.factory import refused
from tests.helpers.texts import byte_tokenizer, parquet_bytes, read

# Reading files that are not


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.jsonl", "a.parquet", "missing/a.txt"])
def test_a_missing_file_is_refused(tmp_path, name):
    refused(lambda: read(tmp_path / name), "no such file")


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.jsonl", "a.parquet"])
def test_an_empty_file_is_refused(tmp_path, name):
    (tmp_path / name).touch()
    refused(lambda: read(tmp_path / name), "empty")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_a_folder_is_refused(tmp_path, name):
    (tmp_path / name).mkdir()
    refused(lambda: read(tmp_path / name))


@pytest.mark.parametrize("name", ["a.csv", "a.gz", "a.txt.bz2", "a", "a.parquet.", "a.zst"])
def test_an_existing_file_with_another_suffix_is_refused(tmp_path, name):
    (tmp_path / name).write_text("text")
    refused(lambda: read(tmp_path / name), name, "not a .txt, .md, .jsonl or .parquet file")


@pytest.mark.parametrize("source", ["./nothing", "/nothing/here", "~/nothing", "../nothing"])
def test_a_path_is_never_taken_for_a_hub_data_set(source):
    refused(lambda: list(documents(source)))


@pytest.mark.parametrize("source", ["x" * 300, "x" * 300 + ".txt", "./" + "x" * 300])
def test_a_name_too_long_for_the_file_system_is_no_crash(source):
    with pytest.raises(AttnPruneError):
        list(documents(source))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"   \n\t\n\n", "only blank lines", id="blank"),
        pytest.param(b"one\ntwo\nthr\0ee\n", "line 3: binary data", id="nul"),
        pytest.param(b"\0" * 1000, "line 1: binary data", id="nul-first"),
        pytest.param(b"one\ntwo\xff\n", "line 2: not UTF-8", id="latin-1"),
        pytest.param("text\n".encode("utf-16"), "line 1: not UTF-8", id="utf-16"),
        pytest.param("日本".encode()[:-1], "line 1: not UTF-8", id="cut-character"),
        pytest.param(b"\x89PNG\r\n\x1a\n\0\0", "line 1: not UTF-8", id="png"),
    ],
)
def test_bad_text_is_refused_with_its_line(tmp_path, content, message):
    file = tmp_path / "a.txt"
    file.write_bytes(content)
    refused(lambda: read(file), message)


GOOD_LINE = b'{"text": "fine"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(GOOD_LINE + b"\n" + b'{"text": \n', "line 3: not valid JSON", id="truncated"),
        pytest.param(GOOD_LINE + b"plain text\n", "line 2: not valid JSON", id="not-json"),
        pytest.param(GOOD_LINE * 2 + b'{"text": "\xff"}\n', "line 3: not valid JSON", id="invalid-utf8"),
        pytest.param(GOOD_LINE + b"\0\0\0\0\n", "line 2: not valid JSON", id="nul"),
        pytest.param(GOOD_LINE + b"[" * 100_000 + b"\n", "line 2: not valid JSON", id="deep"),
        pytest.param(b'{"a": ' + b"9" * 5000 + b"}\n", "line 1: not valid JSON", id="long-number"),
        pytest.param('{"text": "x"}\n'.encode("utf-16"), "line 1", id="utf-16"),
        pytest.param(GOOD_LINE + b'{"body": "x"}\n', "line 2: no text field 'text'", id="no-field"),
        pytest.param(b'{"text": 5}\n', "line 1: field 'text': neither text nor chat", id="number"),
        pytest.param(b'{"text": null}\n' * 3, "no text in field 'text' (3 rows)", id="only-null"),
        pytest.param(b'{"text": ["x"]}\n', "line 1: field 'text': neither text nor chat", id="list-field"),
        pytest.param(b'["text"]\n', "line 1: no text field", id="list"),
        pytest.param(b'"text"\n', "line 1: no text field", id="string"),
        pytest.param(b'{"text": " \\n"}\n{"text": ""}\n', "no text in field", id="only-blank"),
        pytest.param(b"\n  \n", "is empty", id="blank-lines"),
    ],
)
def test_bad_jsonl_is_refused_with_its_line(tmp_path, content, message):
    file = tmp_path / "a.jsonl"
    file.write_bytes(content)
    refused(lambda: read(file), message)


def test_a_70_megabyte_line_is_refused(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(GOOD_LINE)
    with file.open("r+b") as out:
        out.truncate(70 << 20)  # sparse: the rest is one line of NULs
    refused(lambda: read(file), "line 2: longer than 64 MiB")


def test_a_line_up_to_the_limit_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_MAX_LINE_BYTES", 100)
    file = tmp_path / "a.jsonl"
    line = json.dumps({"text": "x" * 87}) + "\n"
    file.write_text(line)
    assert len(line) == 100
    assert read(file) == ["x" * 87]
    file.write_text(json.dumps({"text": "x" * 88}) + "\n")
    refused(lambda: read(file), "line 1: longer than")


def test_a_lone_surrogate_is_refused_or_replaced_but_never_a_crash(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "\\ud800 and some more text"}\n')
    with contextlib.suppress(InputError):
        assert len(pack(documents(str(file)), byte_tokenizer(), 4, 100, "a"))


def overwritten(start, stop, value=0xFF):
    raw = bytearray(parquet_bytes())
    raw[start:stop] = bytes([value]) * len(raw[start:stop])
    return bytes(raw)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"hello", id="text"),
        pytest.param(b"x" * 5000, id="no-magic"),
        pytest.param(parquet_bytes()[: len(parquet_bytes()) // 2], id="truncated"),
        pytest.param(b"PAR1" + bytes(8) + b"PAR1", id="empty-footer"),
        pytest.param(overwritten(-30, -8), id="damaged-footer"),
        pytest.param(overwritten(4, 60), id="damaged-page"),
    ],
)
def test_a_damaged_parquet_file_is_refused(tmp_path, content):
    file = tmp_path / "a.parquet"
    file.write_bytes(content)
    refused(lambda: read(file), str(file))


def test_parquet_without_the_column_is_refused(tmp_path):
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), file)
    error = refused(lambda: read(file), "no column 'text'")
    assert "--text-field" in error.hint


@pytest.mark.parametrize("column", [[1, 2], [["x"]], [{"a": "x"}], [b"bytes"]], ids=["int", "list", "struct", "bytes"])
def test_a_parquet_column_that_is_not_text_is_refused(tmp_path, column):
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), file)
    refused(lambda: read(file), "row 1: field 'text': neither text nor chat messages")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "closed/a.txt"])
def test_a_file_without_permission_is_refused(as_nobody, name):
    folder, switch = as_nobody
    (folder / "closed").mkdir()
    (folder / name).write_text("text")
    (folder / name).chmod(0)
    (folder / "closed").chmod(0)
    switch()
    refused(lambda: read(folder / name), str(folder / name))
