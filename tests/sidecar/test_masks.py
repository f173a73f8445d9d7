"""Explicit masks: packed as the specification says, equal to the gates of the model, read strictly, written whole."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save

from attnprune.errors import AttnPruneError
from attnprune.sidecar import loading, masks
from tests.helpers.command import attnprune, listing
from tests.helpers.factory import refused, save_tiny_llama
from tests.helpers.sidecars import save_sidecar

TEXT = "The gate opens."
METADATA = {"format": "attnprune-mask", "format_version": "1.0"}


def random_mask(layers=2, heads=3, length=11, seed=0):
    """bool [layers, heads, query, key], causal."""
    draws = np.random.default_rng(seed).random((layers, heads, length, length)) < 0.4
    return draws & np.tril(np.ones((length, length), bool))


def file_bytes(is_open=None, ids=None, metadata=METADATA, **tensors):
    is_open = random_mask() if is_open is None else is_open
    ids = np.arange(is_open.shape[-1], dtype=np.int32) if ids is None else ids
    return save({"mask": masks.pack(is_open), "input_ids": ids} | tensors, metadata=metadata)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 64, 65])
def test_a_mask_is_read_as_it_was_written(tmp_path, length):
    is_open = random_mask(length=length)
    masks.save(tmp_path / "m.safetensors", masks.pack(is_open), range(length))
    mask = masks.read(tmp_path / "m.safetensors")
    assert mask.input_ids.tolist() == list(range(length))
    assert mask.packed.shape == (2, 3, length, -(-length // 8))
    assert all(np.array_equal(mask.layer(i), is_open[i]) for i in range(2))
    assert [file.name for file in tmp_path.iterdir()] == ["m.safetensors"]


def test_the_bits_are_where_the_specification_says(tmp_path):
    is_open = np.zeros((1, 1, 10, 10), bool)
    is_open[0, 0, 9, [0, 3, 8]] = True
    masks.save(tmp_path / "m", masks.pack(is_open), [5] * 10)
    with safe_open(tmp_path / "m", "numpy") as file:
        assert file.metadata() == METADATA
        assert file.get_tensor("mask")[0, 0, 9].tolist() == [0b0000_1001, 0b0000_0001]
        assert file.get_tensor("input_ids").dtype == np.int32


def with_bit(query, key):
    """A mask of 11 tokens (5 padding bits) with one bit set, wherever it is."""
    packed = np.zeros((2, 3, 11, 2), np.uint8)
    packed[1, 2, query, key // 8] = 1 << key % 8
    return packed


@pytest.mark.parametrize(("query", "key"), [(0, 0), (7, 7), (8, 8), (10, 0), (10, 10)])
def test_every_visible_bit_may_be_set(query, key):
    mask = masks.parse(file_bytes(mask=with_bit(query, key)), "m")
    assert np.argwhere(mask.layer(1)).tolist() == [[2, query, key]]


@pytest.mark.parametrize(("query", "key"), [(0, 1), (6, 7), (7, 8), (0, 10), (9, 10), (10, 11), (10, 15), (0, 15)])
def test_a_bit_after_its_query_or_in_the_padding_is_refused(query, key):
    refused(lambda: masks.parse(file_bytes(mask=with_bit(query, key)), "m"), "m: mask of layer 1")


def test_the_last_query_of_a_long_text_is_checked():
    packed = np.zeros((1, 1, 1030, 129), np.uint8)
    packed[0, 0, 1028, 1029 // 8] = 1 << 1029 % 8
    refused(
        lambda: masks.parse(save({"mask": packed, "input_ids": np.zeros(1030, np.int32)}, METADATA), "m"), "layer 0"
    )


IDS = np.arange(11, dtype=np.int32)
BAD = {
    "another format": (file_bytes(metadata={"format": "attnprune", "format_version": "1.0"}), "not an attnprune mask"),
    "no metadata": (file_bytes(metadata=None), "not an attnprune mask"),
    "no version": (file_bytes(metadata={"format": "attnprune-mask"}), "mask format"),
    "a newer version": (file_bytes(metadata=METADATA | {"format_version": "2.0"}), "mask format 2.0"),
    "a negative id": (file_bytes(ids=IDS - 1), "input_ids"),
    "64-bit ids": (file_bytes(ids=IDS.astype(np.int64)), "input_ids"),
    "ids in two dimensions": (file_bytes(ids=IDS[None]), "input_ids"),
    "an id too few": (file_bytes(ids=IDS[:-1]), "T = 10"),
    "a signed mask": (file_bytes(mask=np.zeros((2, 3, 11, 2), np.int32)), "mask is not U8"),
    "three dimensions": (file_bytes(mask=np.zeros((3, 11, 2), np.uint8)), "mask is not U8"),
    "too wide": (file_bytes(mask=np.zeros((2, 3, 11, 3), np.uint8)), "mask is not U8"),
    "not packed": (file_bytes(mask=np.zeros((2, 3, 11, 11), np.uint8)), "mask is not U8"),
    "another tensor": (file_bytes(other=IDS), "other is unexpected"),
    "no ids": (save({"mask": masks.pack(random_mask())}, METADATA), "input_ids is missing"),
    "no mask": (save({"input_ids": IDS}, METADATA), "mask is missing"),
    "cut short": (file_bytes()[:-1], "truncated"),
    "more data": (file_bytes() + b"\0", "after the last tensor"),
    "empty": (b"", "too short"),
    "a huge header": (b"\xff" * 8 + b"{}" * 8, "header too large"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused(tmp_path, name):
    raw, message = BAD[name]
    (tmp_path / "m").write_bytes(raw)
    refused(lambda: masks.read(tmp_path / "m"), str(tmp_path / "m"), message)


def test_a_newer_minor_version_and_other_metadata_are_read():
    raw = file_bytes(metadata={"format": "attnprune-mask", "format_version": "1.7", "text": "The gate"})
    assert np.array_equal(masks.parse(raw, "m").layer(0), random_mask()[0])


def test_a_file_that_is_not_there_or_not_a_file_is_refused(tmp_path):
    refused(lambda: masks.read(tmp_path / "nowhere"), "is missing")
    refused(lambda: masks.read(tmp_path), "not a regular file")


def test_nothing_is_overwritten_and_nothing_bad_is_written(tmp_path):
    packed = masks.pack(random_mask())
    (tmp_path / "taken").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "elsewhere")
    before = listing(tmp_path)
    for name in ("taken", "dangling"):
        refused(lambda name=name: masks.save(tmp_path / name, packed, range(11)), "is not overwritten")
    refused(lambda: masks.save(tmp_path / "no" / "m", packed, range(11)), "no such folder")
    refused(lambda: masks.save(tmp_path / ("m" * 300), packed, range(11)), "too long")
    refused(lambda: masks.save(tmp_path / "m", packed, range(10)), "mask is not U8")
    assert listing(tmp_path) == before


def test_a_folder_that_may_not_be_written_is_refused(as_nobody):
    folder, switch = as_nobody
    switch()
    refused(lambda: masks.save(folder / "m", masks.pack(random_mask()), range(11)), "permission denied")


def test_a_failing_write_leaves_nothing(tmp_path, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("attnprune.files.fsync", full)
    with pytest.raises(AttnPruneError, match="no space left") as caught:
        masks.save(tmp_path / "m", masks.pack(random_mask()), range(11))
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masks")
    save_tiny_llama(folder / "base")
    save_sidecar(folder / "sparse", folder / "base", "lora")
    return folder


def test_inspect_saves_the_gates_of_a_text(place):
    saved = attnprune("inspect", "sparse", "--base", "base", "--text", TEXT, "--layer", 1, "--head", 2,
                      "--save-mask", "mask.safetensors", "--json", cwd=place)  # fmt: skip
    assert saved.returncode == 0, saved.stderr
    assert "mask.safetensors" in saved.stderr
    mask = masks.read(place / "mask.safetensors")
    model, tokenizer = loading.load(place / "sparse", str(place / "base"))
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    assert mask.input_ids.tolist() == ids[0].tolist()
    attentions = model(input_ids=ids, use_cache=False, output_attentions=True).attentions
    assert mask.packed.shape == (2, 4, ids.shape[1], 2)
    for layer, pattern in enumerate(attentions):  # a gated pattern is zero exactly where an edge is closed
        is_open = pattern[0].detach().numpy() > 0
        assert 0 < is_open.sum() < is_open.shape[0] * ids.shape[1] * (ids.shape[1] + 1) // 2
        assert np.array_equal(mask.layer(layer), is_open)
    shown = json.loads(saved.stdout)["edges"]
    assert sorted((e["query"], e["key"]) for e in shown) == [tuple(e) for e in np.argwhere(mask.layer(1)[2]).tolist()]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--save-mask", "new"], "--save-mask: does nothing without --text"),
        (["--save-mask", "base/config.json", "--text", "a"], "is not overwritten"),
        (["--save-mask", "nowhere/new", "--text", "a"], "no such folder"),
    ],
)
def test_inspect_refuses_before_it_loads_a_model(place, options, message):
    before = listing(place)
    done = attnprune("inspect", "sparse", *options, cwd=place)
    lines = done.stderr.strip().splitlines()
    assert (done.returncode, len(lines), done.stdout) == (2, 1, "")
    assert lines[0].startswith("attnprune: ")
    assert message in lines[0]
    assert listing(place) == before
