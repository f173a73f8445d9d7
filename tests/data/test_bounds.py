"""What a small file may unfold to: compressed files and parquet."""

from __future__ import annotations

import gzip
import itertools
import json
import random
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest

from attnprune.data import files
from attnprune.data.sources import documents
from tests.helpers.factory import refused
from tests.helpers.texts import COMPRESS, parquet_bytes, read

# Compressed files


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
