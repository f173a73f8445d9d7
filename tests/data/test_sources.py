"""Reading text: files of every kind, folders, patterns, and one rule for rows without text."""

from __future__ import annotations

import gzip
import itertools

import pyarrow
import pyarrow.parquet
import pytest

from attnprune.data import sources
from attnprune.data.blocks import pack
from attnprune.data.sources import documents
from tests.helpers.factory import refused
from tests.helpers.texts import COMPRESS, EOS, byte_tokenizer, read

# Reading files that are fine


@pytest.mark.parametrize("suffix", [".txt", ".md"])
def test_a_text_file_is_one_document(tmp_path, suffix):
    file = tmp_path / f"a{suffix}"
    file.write_bytes("Grüße\n\n日本\r\n".encode())
    assert read(file) == ["Grüße\n\n日本\n"]


def test_jsonl_gives_one_document_a_line_and_skips_blank_lines(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes('{"text": "ä\\n", "n": 1}\r\n\n   \n{"text": ""}\n{"text": "last line without newline"}'.encode())
    assert read(file) == ["ä\n", "last line without newline"]


def test_jsonl_of_another_field(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"body": "x"}\n')
    assert read(file, "body") == ["x"]


def test_parquet_gives_one_document_a_row(tmp_path):
    file = tmp_path / "a.parquet"
    table = pyarrow.table({"text": ["ä", "", "b"], "other": [1, 2, 3]})
    pyarrow.parquet.write_table(table, file)
    assert read(file) == ["ä", "b"]


@pytest.mark.parametrize("kind", [pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())])
def test_parquet_of_other_string_types_and_field_names(tmp_path, kind):
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": pyarrow.array(["x", "y"]).cast(kind)}), file)
    assert read(file, "body") == ["x", "y"]


# One rule for rows without text


def test_rows_that_are_null_or_blank_are_skipped_and_counted(source_of):
    texts = documents(source_of([None, "a", "", None, " \n\t", "b", None]))
    assert list(texts) == ["a", "b"]
    assert texts.empty == 5
    assert list(texts) == ["a", "b"]  # counted anew
    assert texts.empty == 5


@pytest.mark.parametrize("rows", [[None] * 3, ["", " ", "\n"], [None, ""]])
def test_rows_without_any_text_are_refused(source_of, rows):
    error = refused(lambda: list(documents(source_of(rows))), f"no text in field 'text' ({len(rows)} rows)")
    assert "--text-field" in error.hint


def test_endless_rows_without_text_are_refused(source_of, monkeypatch):
    monkeypatch.setattr(sources, "_MAX_EMPTY_ROWS", 20)
    rows = ["x"] + [None] * 20 + ["y"] + [""] * 21 + ["z"]
    source = source_of(rows)
    assert list(itertools.islice(documents(source), 2)) == ["x", "y"]
    refused(lambda: list(documents(source)), "20 rows without text")


def test_no_token_is_made_of_a_row_without_text(source_of):
    blocks = pack(documents(source_of([None, "ab", None, None, "cd", ""])), byte_tokenizer(), 2, 100, "name")
    assert blocks.input_ids.flatten().tolist().count(EOS) == 2


# Text as editors and systems write it


def test_a_byte_order_mark_and_line_ends_of_windows_are_no_text(tmp_path):
    for number, content in enumerate(
        [b"a\nb\n\nc", b"\xef\xbb\xbfa\r\nb\r\n\r\nc", b"a\rb\r\n\nc", b"\xef\xbb\xbfa\nb\n\nc"]
    ):
        file = tmp_path / f"{number}.txt"
        file.write_bytes(content)
        assert read(file) == ["a\nb\n\nc"]


def test_a_byte_order_mark_in_front_of_jsonl(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text": "x"}\r\n\xef\xbb\xbf\r\n{"text": "y\\r\\n"}\r\n')
    assert read(file) == ["x", "y\r\n"]  # what a row says is its own


@pytest.mark.parametrize("suffix", [".TXT", ".Md", ".JSONL", ".Parquet", ".TXT.GZ", ".JsonL.Xz", ".jsonl.ZST"])
def test_the_case_of_a_suffix_does_not_matter(tmp_path, suffix):
    plain = tmp_path / "plain"
    if suffix == ".Parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": ["hello"]}), plain)
    else:
        plain.write_text('{"text": "hello"}' if "json" in suffix.lower() else "hello")
    file = tmp_path / f"A{suffix}"
    file.write_bytes(COMPRESS.get(suffix.lower()[-4:].lstrip("lt"), bytes)(plain.read_bytes()))
    assert read(file) == ["hello"]


# Folders and patterns


@pytest.fixture
def shards(tmp_path):
    """Four files that can be read, and others."""
    folder = tmp_path / "shards"
    (folder / "deep").mkdir(parents=True)
    (folder / ".cache").mkdir()
    (folder / "b.jsonl").write_text('{"text": "b1"}\n{"text": null}\n{"text": "b2"}\n')
    (folder / "a.TXT").write_text("a")
    (folder / "deep" / "c.md.gz").write_bytes(gzip.compress(b"c"))
    (folder / "empty.txt").write_text(" \n")
    for name in ("README.md", "d.json", ".hidden.txt", ".cache/e.txt"):
        (folder / name).write_text("no")
    return folder


def test_a_folder_gives_all_its_files_by_name(shards):
    texts = documents(str(shards))
    assert list(texts) == ["a", "b1", "b2", "c"]
    assert texts.empty == 2
    assert read(f"{shards}/") == ["a", "b1", "b2", "c"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jsonl", ["b1", "b2"]),
        ("[ab].*", ["a", "b1", "b2"]),
        ("?.TXT", ["a"]),
        ("**/*.md.gz", ["c"]),
        ("deep/*", ["c"]),
    ],
)
def test_a_pattern_gives_the_files_that_match(shards, pattern, expected):
    assert read(shards / pattern) == expected


def test_a_pattern_of_nothing_or_of_other_files_is_refused(shards):
    refused(lambda: read(shards / "*.parquet"), "*.parquet: no such file")
    refused(lambda: read(shards / "x[12].txt"), "no such file")
    refused(lambda: read(shards / "d.*"), "d.json: not a .txt")
    (shards / "none").mkdir()
    refused(lambda: read(shards / "none"), "none: no file to read in this folder")


def test_a_damaged_file_in_a_folder_is_named(shards):
    (shards / "c.jsonl").write_text("{")
    refused(lambda: read(shards), str(shards / "c.jsonl"), "line 1")


def test_a_file_whose_name_is_a_pattern_is_itself(tmp_path):
    (tmp_path / "a[1].txt").write_text("one")
    assert read(tmp_path / "a[1].txt") == ["one"]


def test_names_and_absolute_names(shards, monkeypatch):
    monkeypatch.chdir(shards)
    assert [sources.source_name(name) for name in (str(shards), f"{shards}/*.jsonl", "a.TXT", "org/set:sub")] == [
        "shards", "*.jsonl", "a.TXT", "org/set:sub"
    ]  # fmt: skip
    assert [sources.absolute(name) for name in ("a.TXT", "*.jsonl", "org/set", "self")] == [
        str(shards / "a.TXT"), str(shards / "*.jsonl"), "org/set", "self"
    ]  # fmt: skip


def test_text_that_is_named_twice_is_refused(shards):
    sources.check_distinct([str(shards / "a.TXT"), str(shards / "b.jsonl"), "org/set", "org/other", "self"])
    for again in ([str(shards), str(shards / "a.TXT")], [str(shards / "*.jsonl"), f"{shards}/../shards/b.jsonl"]):
        refused(lambda again=again: sources.check_distinct(again), "named twice")
    refused(lambda: sources.check_distinct(["org/set", "org/set"]), "org/set: named twice")
