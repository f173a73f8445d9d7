"""Reading text: files of every kind, Hub data sets, and every bad input as one line."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import lzma
import random
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest

from attnprune.data import files, sources
from attnprune.data.blocks import pack
from attnprune.data.sources import documents
from attnprune.errors import AttnPruneError, InputError
from tests.helpers.factory import refused
from tests.helpers.texts import EOS, byte_tokenizer


def read(path, *field):
    return list(documents(str(path), *field))


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


def written(folder, suffix, rows, field="text"):
    """A file of these rows; each is a document."""
    file = folder / f"rows{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({field: pyarrow.array(rows)}), file)
    else:
        file.write_text("".join(json.dumps({field: row}) + "\n" for row in rows))
    return file


def on_the_hub(monkeypatch, rows, field="text"):
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: iter([{field: row} for row in rows]))
    return "some/set"


@pytest.fixture(params=[".jsonl", ".parquet", "hub"])
def source_of(request, tmp_path, monkeypatch):
    """Rows as a source of each kind."""

    def make(rows, field="text"):
        if request.param == "hub":
            return on_the_hub(monkeypatch, rows, field)
        return str(written(tmp_path, request.param, rows, field))

    return make


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


# Compressed files


def zstd(data):
    return pyarrow.compress(data, codec="zstd", asbytes=True)


COMPRESS = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstd}
compressed = pytest.mark.parametrize("suffix", COMPRESS)


@compressed
def test_compressed_files_are_read_by_suffix(tmp_path, suffix):
    lines = [f"line {number} ä" for number in range(20_000)]
    (tmp_path / f"a.txt{suffix}").write_bytes(COMPRESS[suffix]("\n".join(lines).encode()))
    assert read(tmp_path / f"a.txt{suffix}") == ["\n".join(lines)]
    rows = "".join(json.dumps({"text": line}) + "\n" for line in lines).encode()
    half = rows.index(b"\n", len(rows) // 2) + 1
    # Parallel compressors write one frame after the other.
    (tmp_path / f"a.jsonl{suffix}").write_bytes(COMPRESS[suffix](rows[:half]) + COMPRESS[suffix](rows[half:]))
    assert read(tmp_path / f"a.jsonl{suffix}") == lines


@compressed
@pytest.mark.parametrize("kind", ["a.txt", "a.jsonl"])
def test_a_damaged_compressed_file_is_refused(tmp_path, suffix, kind):
    file = tmp_path / f"{kind}{suffix}"
    noise = random.Random(0).randbytes(3000).hex()  # does not become small
    good = COMPRESS[suffix](json.dumps({"text": noise}).encode())
    flipped = bytes(byte ^ 0xFF if index == len(good) // 2 else byte for index, byte in enumerate(good))
    for content in (b"plain text", b"\0" * 100, good[: len(good) // 2], good[:3], flipped):
        file.write_bytes(content)
        if content is flipped and suffix == ".zst":
            continue  # no checksum here: it may be other text
        refused(lambda: read(file), str(file))
    file.write_bytes(COMPRESS[suffix](b""))
    refused(lambda: read(file), "empty")
    file.write_bytes(b"")
    refused(lambda: read(file), "empty")
    file.unlink()
    refused(lambda: read(file), "no such file")


def test_compressed_parquet_is_refused(tmp_path):
    file = tmp_path / "a.parquet.gz"
    file.write_bytes(gzip.compress(parquet_bytes()))
    assert "unpack" in refused(lambda: read(file), str(file)).hint


@compressed
@pytest.mark.parametrize("filler", [b"a", b" ", b"\n", b"\0"])
@pytest.mark.parametrize("kind", ["a.txt", "a.jsonl"])
def test_what_a_compressed_file_unfolds_to_is_bounded(tmp_path, monkeypatch, suffix, filler, kind):
    monkeypatch.setattr(files, "_MAX_LINE_BYTES", 1 << 20)
    monkeypatch.setattr(files, "_MAX_BLANK_LINES", 1000)
    monkeypatch.setattr(files, "_MAX_UNFOLDED_BYTES", 2 << 20)
    file = tmp_path / f"{kind}{suffix}"
    file.write_bytes(COMPRESS[suffix](filler * (24 << 20)))
    tracemalloc.start()
    error = refused(lambda: read(file), str(file))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20  # 8 MiB of them are the window of xz
    assert any(
        part in error.message for part in ("more than", "longer than", "binary data", "blank lines", "not valid JSON")
    )


# Parquet that unfolds


def test_parquet_of_one_value_in_many_rows_is_read_row_by_row(tmp_path):
    """65,536 rows of a megabyte in a small file: equal values are kept once there, and were decoded together."""
    file = tmp_path / "a.parquet"
    value = pyarrow.array(["x" * (1 << 20)])
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 65_536, pyarrow.int32()), value)
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), file, compression="zstd")
    assert file.stat().st_size < 10_000
    before = pyarrow.default_memory_pool().max_memory()
    assert [len(text) for text in itertools.islice(documents(str(file)), 50)] == [1 << 20] * 50
    assert pyarrow.default_memory_pool().max_memory() - before < 200 << 20


@pytest.mark.parametrize(("rows", "length"), [(1, 4 << 20), (40, 1 << 18)])
def test_parquet_that_unfolds_to_far_more_is_refused(tmp_path, monkeypatch, rows, length):
    monkeypatch.setattr(files, "_MAX_LINE_BYTES", 1 << 20)
    file = tmp_path / "a.parquet"
    values = [chr(65 + index) * length for index in range(rows)]
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), file, compression="zstd", use_dictionary=False)
    assert file.stat().st_size < 100_000
    refused(lambda: read(file), "unfolds to more than text does")


def test_parquet_of_endless_messages_is_refused(tmp_path):
    file = tmp_path / "a.parquet"
    message = pyarrow.array([{"role": "user", "content": "x"}])
    many = message.take(pyarrow.array([0] * (2 << 20)))
    column = pyarrow.ListArray.from_arrays(pyarrow.array([0, len(many)], pyarrow.int32()), many)
    pyarrow.parquet.write_table(pyarrow.table({"messages": column}), file)
    refused(lambda: read(file), "unfolds to more than text does")


def test_a_long_text_that_repeats_itself_is_still_text(tmp_path):
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["ab " * (1 << 20)] * 3}), file, compression="zstd")
    assert [len(text) for text in read(file)] == [3 << 20] * 3


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


# Conversations

CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.tool_calls is defined %}TOOLS{% endif %}"
    "{% if m.role == 'judge' %}{{ raise_exception('no judges here\\nplease') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}\n{% endfor %}"
)


def chat_tokenizer(template=TEMPLATE):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("field", [None, "messages", "turns"])
def test_messages_become_text_by_the_chat_template(source_of, field):
    tokenizer, name = chat_tokenizer(), field or "messages"
    rows = [CHAT, None, [], [{"role": "user", "content": " "}], CHAT[1:]]
    texts = documents(source_of(rows, name), *([field] if field else []), tokenizer=tokenizer)
    expected = [tokenizer.apply_chat_template(row, tokenize=False) for row in (CHAT, CHAT[1:])]
    assert list(texts) == expected
    assert "TOOLS" not in expected[0]
    assert (texts.empty, texts.conversations) == (3, 2)


def test_the_tokens_of_a_conversation_are_those_of_the_template(source_of):
    tokenizer = chat_tokenizer()
    one = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=False)
    texts = documents(source_of([CHAT] * 3, "messages"), tokenizer=tokenizer)
    assert pack(texts, tokenizer, len(one), 10**6, "name").input_ids.tolist() == [one] * 3


def test_keys_that_only_other_messages_have_do_not_reach_the_template(tmp_path):
    rows = [[{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "tool_calls": "z"}]]
    file = written(tmp_path, ".parquet", rows, "messages")
    assert read_chat(file) == ["<s><user>x\nTOOLS<assistant>y\n"]


def read_chat(file, template=TEMPLATE):
    return list(documents(str(file), tokenizer=chat_tokenizer(template)))


def test_text_goes_before_messages(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"messages": CHAT, "text": "plain"}) + "\n" + json.dumps({"messages": CHAT[1:2]}))
    assert read_chat(file) == ["plain", "<s><user>Hi\n"]


def test_conversations_that_cannot_be_written_are_refused(tmp_path):
    file = written(tmp_path, ".jsonl", [CHAT, [{"role": "judge", "content": "x"}]], "messages")
    refused(lambda: read_chat(file), "line 2", "chat template refuses this conversation: no judges here")
    refused(lambda: read_chat(file, None), "line 1", "this model has no chat template")
    refused(lambda: read_chat(file, {"tool_use": "x"}), "line 1", "chat template refuses")
    for value in ([{"from": "human", "value": "x"}], [CHAT], {"role": "user"}, [{"role": None, "content": "x"}], 5):
        refused(
            lambda value=value: read_chat(written(tmp_path, ".jsonl", [value], "messages")),
            "line 1",
            "neither text nor",
        )


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


def parquet_bytes():
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["hello world"] * 3}), sink)
    return sink.getvalue().to_pybytes()


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


# Hub data sets


def test_a_hub_data_set_out_of_reach_fails_with_a_way_out():
    with pytest.raises(AttnPruneError) as caught:
        list(documents("no-such-organisation/no-such-set"))
    assert caught.value.exit_code == 1
    assert not isinstance(caught.value, InputError)
    assert caught.value.message.startswith("no-such-organisation/no-such-set: cannot read")
    assert len(caught.value.message.splitlines()) == 1
    assert "--data" in caught.value.hint


@pytest.mark.parametrize("error", [ConnectionError("no\nroute"), FileNotFoundError("x"), ValueError("bad"), OSError()])
@pytest.mark.parametrize("rows_before", [0, 2])
def test_any_hub_failure_is_one_error(monkeypatch, error, rows_before):
    def load_dataset(*args, **kwargs):
        if not rows_before:
            raise error
        return stream()

    def stream():
        yield from [{"text": "x"}] * rows_before
        raise error

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(AttnPruneError) as caught:
        list(documents("some/set"))
    assert caught.value.exit_code == 1
    assert len(caught.value.message.splitlines()) == 1


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("some/set", ("some/set", None, "train")),
        ("some/set:sub", ("some/set", "sub", "train")),
        ("some/set:sub:validation", ("some/set", "sub", "validation")),
        ("some/set::test", ("some/set", None, "test")),
    ],
)
def test_a_hub_source_names_set_configuration_and_split(monkeypatch, source, expected):
    seen = []

    def load_dataset(name, subset, *, split, streaming):
        seen.append((name, subset, split))
        assert streaming
        return iter([{"text": "x"}, {"text": "y"}])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert list(documents(source)) == ["x", "y"]
    assert seen == [expected]


def test_a_hub_data_set_without_the_field_is_refused_with_its_fields(monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: iter([{"body": "x", "id": 1}]))
    error = refused(lambda: list(documents("some/set")), "no text field 'text'")
    assert "body, id" in error.hint


@pytest.fixture
def real_set(tmp_path, monkeypatch):
    """Data sets that the real library reads, as if they were on the Hub: one with two configurations, one with none."""
    import datasets

    for name, header in {
        "two": "configs:\n"
        "- {config_name: de, data_files: [{split: train, path: de.jsonl}, {split: test, path: de.jsonl}]}\n"
        "- {config_name: en, data_files: [{split: train, path: en.jsonl}]}",
        "one": "configs:\n- {config_name: default, data_files: [{split: validation, path: de.jsonl}]}",
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        for language in ("de", "en"):
            (folder / f"{language}.jsonl").write_text(json.dumps({"text": language}) + "\n")
        (folder / "README.md").write_text(f"---\n{header}\n---\n")
    for function in ("load_dataset", "get_dataset_config_names", "get_dataset_split_names"):
        original = getattr(datasets, function)

        def there(name, *args, original=original, **kwargs):
            return original(str(tmp_path / name.partition("/")[2]), *args, **kwargs)

        monkeypatch.setattr(datasets, function, there)


@pytest.mark.parametrize(
    ("source", "message", "hint"),
    [
        ("org/two", "Config name is missing", "configurations: de, en; as in org/two:de"),
        ("org/two:fr", "'fr' not found", "configurations: de, en"),
        ("org/two:test", "'test' not found", "configurations: de, en"),
        ("org/two:en:test", "test", "splits: train; as in org/two:en:train"),
        ("org/two:de:dev", "dev", "splits: train, test"),
        ("org/one", "train", "splits: validation; as in org/one::validation"),
        ("org/two:de:train[:10%]", "slice", "no more of it is read than the run needs"),
        ("org/one:train[:10%]", "slice", "the split alone"),
    ],
)
def test_a_wrong_configuration_or_split_says_which_there_are(real_set, source, message, hint):
    assert hint in refused(lambda: list(documents(source)), source, message).hint


@pytest.mark.parametrize(
    ("source", "text"), [("org/two:en", "en"), ("org/two:de:test", "de"), ("org/one::validation", "de")]
)
def test_a_right_configuration_and_split_is_read(real_set, source, text):
    assert list(documents(source)) == [text]


def test_data_that_is_private_or_not_there_says_how_to_log_in(monkeypatch):
    from datasets.exceptions import DatasetNotFoundError

    def load_dataset(*args, **kwargs):
        raise DatasetNotFoundError("Dataset 'some/set' is a gated dataset on the Hub.\nVisit the page")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    error = refused(lambda: list(documents("some/set")), "is a gated dataset on the Hub.")
    assert "hf auth login" in error.hint


def test_the_first_line_of_any_other_failure_is_passed_on(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise RuntimeError("Dataset scripts are no longer supported\nmore")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(AttnPruneError, match=r"RuntimeError: Dataset scripts are no longer supported$"):
        list(documents("some/set"))
