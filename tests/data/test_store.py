"""Tokens in files: the blocks of the same text in memory, made once, mapped rather than read."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from attnprune.data import store, texts
from attnprune.data.blocks import Blocks, StoredBlocks, mix, split
from attnprune.data.store import is_large, stored_blocks
from attnprune.data.texts import read_blocks
from attnprune.errors import AttnPruneError, InputError
from attnprune.training import recipe
from tests.helpers.factory import refused, save_text, save_tiny_llama
from tests.helpers.recipes import artefact, run_config
from tests.helpers.texts import EOS, byte_tokenizer, prose


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(prose(60_000))
    return file


def both(file, cache, tokens=10**9, tokenizer=None):
    arguments = (str(file), "text", tokenizer or byte_tokenizer(), 16, tokens)
    return stored_blocks(*arguments, cache), read_blocks(*arguments)


@pytest.mark.parametrize("tokens", [10**9, 2000])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_the_blocks_are_those_in_memory(text, tmp_path, tokens, adds_bos):
    stored, plain = both(text, tmp_path / "cache", tokens, byte_tokenizer(adds_bos))
    assert len(stored) == len(plain) > 100
    assert (stored.tokens, stored.seq_len, stored.name, stored.sources) == (
        plain.tokens, plain.seq_len, plain.name, plain.sources,
    )  # fmt: skip
    assert stored.fingerprint == plain.fingerprint
    rows = torch.tensor([7, 3, 3])
    assert torch.equal(stored.take(rows).input_ids, plain.take(rows).input_ids)
    assert stored[5]["labels"].dtype == torch.int64
    assert torch.equal(stored[5]["labels"], plain[5]["labels"])


def test_splits_and_mixtures_are_those_in_memory(text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(prose(30_000, seed=1))
    stored, plain = both(text, tmp_path / "cache")
    more, more_plain = both(other, tmp_path / "cache")
    written = Blocks(ids := torch.randint(0, 99, (40, 16)), ids, "self")
    mixed, wanted = mix([stored, written, more]), mix([plain, written, more_plain])
    assert isinstance(mixed, StoredBlocks)
    assert mixed.fingerprint == wanted.fingerprint
    for ours, theirs in zip(split(mixed, 320, 0), split(wanted, 320, 0), strict=True):
        assert ours.fingerprint == theirs.fingerprint
    assert isinstance(split(mixed, 320, 0)[0], StoredBlocks)


def test_a_second_run_maps_the_file_and_tokenizes_nothing(text, tmp_path, monkeypatch):
    first, _ = both(text, tmp_path / "cache")
    monkeypatch.setattr(store, "documents", None)
    second = stored_blocks(str(text), "text", byte_tokenizer(), 16, 10**9, tmp_path / "cache")
    assert second.fingerprint == first.fingerprint
    [file] = (tmp_path / "cache").glob("*.i32")
    assert str(file) in Path("/proc/self/maps").read_text()
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".i32", ".json"]


def test_another_text_tokenizer_or_number_is_another_file(text, tmp_path):
    cache = tmp_path / "cache"
    both(text, cache)
    both(text, cache, tokens=2000)
    both(text, cache, tokenizer=byte_tokenizer(adds_bos=True))
    text.write_text(prose(60_000, seed=2))
    stored, plain = both(text, cache)
    assert stored.fingerprint == plain.fingerprint
    assert len(list(cache.glob("*.i32"))) == 4


def test_a_damaged_file_is_made_again(text, tmp_path):
    stored, _ = both(text, tmp_path / "cache")
    wanted = stored.fingerprint
    for suffix, content in ((".i32", b"short"), (".json", b"{"), (".json", b"[]")):
        [file] = (tmp_path / "cache").glob(f"*{suffix}")
        file.write_bytes(content)
        assert both(text, tmp_path / "cache")[0].fingerprint == wanted


def test_what_fails_leaves_nothing_behind(tmp_path):
    (tmp_path / "short.txt").write_text("ab")
    refused(lambda: both(tmp_path / "short.txt", tmp_path / "cache"), "short.txt", "shorter than one block of 16")
    assert list((tmp_path / "cache").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file"):
        both(tmp_path / "short.txt", tmp_path / "file" / "cache")


def test_only_large_texts_are_stored(text, monkeypatch):
    assert not is_large(str(text), byte_tokenizer(), 10**9)
    assert not is_large("some/set", byte_tokenizer(), store.MANY - 1)
    assert is_large("some/set", byte_tokenizer(), store.MANY)
    monkeypatch.setattr(store, "LARGE", os.path.getsize(text))
    assert is_large(str(text), byte_tokenizer(), 1)


@pytest.fixture
def hub_set(tmp_path, monkeypatch):
    """A data set of three files as `datasets` streams it, which fails after a number of rows; with what was read."""
    import datasets

    texts = [{"text": prose(2000, seed=n) if n % 7 else ""} for n in range(60)]
    files = []
    for number in range(3):
        files.append(str(tmp_path / f"{number}.jsonl"))
        Path(files[-1]).write_text("".join(json.dumps(row) + "\n" for row in texts[number * 20 : number * 20 + 20]))
    whole = datasets.load_dataset("json", data_files=files, split="train", streaming=True)
    network = SimpleNamespace(fails_after=10**9, read=[], sha="a" * 40)

    class Stream:
        def __init__(self):
            self.rows = copy.deepcopy(whole)
            self.state_dict, self.load_state_dict = self.rows.state_dict, self.rows.load_state_dict

        def __iter__(self):
            for count, row in enumerate(self.rows):
                if count == network.fails_after:
                    raise OSError("connection lost")
                network.read.append(row["text"])
                yield row

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: Stream())
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *args: SimpleNamespace(sha=network.sha))
    monkeypatch.setattr(store, "_DOCUMENTS_AT_ONCE", 5)
    return network


def test_a_stream_from_the_hub_goes_on_where_it_was_interrupted(hub_set, tmp_path):
    """As often as the connection is lost: the same tokens and counts, and hardly a row is read twice."""
    arguments = ("some/set", "text", byte_tokenizer(), 16, 10**9)
    whole = stored_blocks(*arguments, tmp_path / "whole")
    once, hub_set.read, hub_set.fails_after = len(hub_set.read), [], 23
    cache = tmp_path / "cache"
    for _ in range(2):
        with pytest.raises(AttnPruneError, match="connection lost"):
            stored_blocks(*arguments, cache)
        assert sorted(file.suffix for file in cache.iterdir()) == [".part", ".position"]
    with next(cache.glob("*.part")).open("ab") as part:
        part.write(b"torn")  # what a kill leaves behind the last position
    hub_set.fails_after = 10**9
    stored = stored_blocks(*arguments, cache)
    assert (stored.fingerprint, stored.sources) == (whole.fingerprint, whole.sources)
    assert stored.sources[0].empty_rows == 9
    assert once == 60 < len(hub_set.read) < 60 + 2 * 10
    assert sorted(file.suffix for file in cache.iterdir()) == [".i32", ".json"]
    hub_set.read = []
    assert stored_blocks(*arguments, cache).fingerprint == whole.fingerprint
    assert hub_set.read == []


def test_no_more_is_read_of_a_stream_than_is_wanted_and_another_commit_is_another_file(hub_set, tmp_path):
    arguments = ("some/set", "text", byte_tokenizer(), 16, 16 * 300)
    first = stored_blocks(*arguments, tmp_path)
    assert len(first) == 300
    assert len(hub_set.read) <= 5
    hub_set.sha = "b" * 40
    stored_blocks(*arguments, tmp_path)
    assert len(list(tmp_path.glob("*.i32"))) == 2


def test_a_run_from_stored_text_is_the_run_from_memory(tmp_path, monkeypatch):
    inputs = save_tiny_llama(tmp_path / "model"), save_text(tmp_path / "text.txt")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    recipe.sparsify(run_config(inputs, tmp_path / "memory"))
    monkeypatch.setattr(store, "LARGE", 0)
    recipe.sparsify(run_config(inputs, tmp_path / "stored"))
    assert len(list((tmp_path / "cache").rglob("*.i32"))) == 1
    assert artefact(tmp_path / "stored") == artefact(tmp_path / "memory")


def test_a_token_beyond_the_vocabulary_is_named_by_its_block(text, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "LARGE", 0)
    monkeypatch.setattr("attnprune.data.blocks._ROWS_AT_ONCE", 50)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text.write_text(prose(20_000)[: 16 * 1000 - 1])  # its end-of-text token is the last of block 1,000
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=EOS))
    settings = run_config((tmp_path, text), tmp_path / "run")
    refused(lambda: texts.load_blocks(settings, model, byte_tokenizer(), "key"), "block 1000 of 1000")


def test_a_name_that_nothing_can_have_is_refused_before_the_hub_is_asked(tmp_path):
    for source in ("missing.txt", "#27+58=085"):
        refused(
            lambda s=source: stored_blocks(s, "text", byte_tokenizer(), 16, 10**7, tmp_path / "cache"), "no such file"
        )
    assert not (tmp_path / "cache").exists()
