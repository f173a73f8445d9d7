"""Sealed checkpoints: any damage is noticed, the newest intact one is found, old ones are rotated out."""

from __future__ import annotations

import hashlib
import json
import os
import shutil

import pytest

from attnprune.training import checkpoints
from attnprune.training.checkpoints import SEAL, is_intact, last_good, rotate, seal, step_of
from tests.helpers.factory import left


def make(run, step, *, sealed=True):
    """A small checkpoint with a text, a binary and an empty file."""
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(f'{{"step": {step}}}')
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 20)
    (folder / "empty").touch()
    if sealed:
        seal(folder)
    return folder


def names(folders):
    return [folder.name for folder in folders]


# Sealing


def test_a_seal_lists_size_and_hash_of_every_file(tmp_path):
    folder = make(tmp_path, 1)
    raw = (folder / "model.safetensors").read_bytes()
    listing = json.loads((folder / SEAL).read_text())
    assert set(listing) == {"trainer_state.json", "model.safetensors", "empty"}
    assert listing["model.safetensors"] == {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    assert listing["empty"] == {"size": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    assert is_intact(folder)


def test_sealing_again_takes_the_files_as_they_are_now(tmp_path):
    folder = make(tmp_path, 1)
    (folder / "model.safetensors").write_bytes(b"new")
    assert not is_intact(folder)
    seal(folder)
    assert is_intact(folder)
    assert SEAL not in json.loads((folder / SEAL).read_text())


def test_a_sealed_checkpoint_survives_a_move(tmp_path):
    folder = make(tmp_path, 1)
    folder.rename(tmp_path / "elsewhere")
    assert is_intact(tmp_path / "elsewhere")


def test_a_checkpoint_whose_seal_was_never_written_is_not_intact(tmp_path, monkeypatch):
    folder = make(tmp_path, 1, sealed=False)
    monkeypatch.setattr(os, "replace", lambda *paths: 1 / 0)  # killed just before the seal gets its name
    with pytest.raises(ZeroDivisionError):
        seal(folder)
    assert not is_intact(folder)


def test_the_files_reach_the_disk_before_the_seal(tmp_path, monkeypatch):
    folder = make(tmp_path, 1, sealed=False)
    order = []
    monkeypatch.setattr(checkpoints, "fsync", lambda path: order.append(path.name))
    monkeypatch.setattr(checkpoints, "write_atomic", lambda path, text: order.append(path.name))
    seal(folder)
    assert order == ["empty", "model.safetensors", "trainer_state.json", SEAL]


# Damage


def flip(path, position):
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1
    path.write_bytes(raw)


DAMAGES = {
    "missing file": lambda folder: (folder / "model.safetensors").unlink(),
    "missing empty file": lambda folder: (folder / "empty").unlink(),
    "truncated": lambda folder: os.truncate(folder / "model.safetensors", 100),
    "truncated to nothing": lambda folder: os.truncate(folder / "trainer_state.json", 0),
    "longer": lambda folder: os.truncate(folder / "empty", 1),
    "flipped first byte": lambda folder: flip(folder / "model.safetensors", 0),
    "flipped middle byte": lambda folder: flip(folder / "model.safetensors", 2500),
    "flipped last byte": lambda folder: flip(folder / "trainer_state.json", -1),
    "missing seal": lambda folder: (folder / SEAL).unlink(),
    "missing folder": lambda folder: shutil.rmtree(folder),
    "folder instead of a file": lambda folder: ((folder / "empty").unlink(), (folder / "empty").mkdir()),
    "folder instead of the seal": lambda folder: ((folder / SEAL).unlink(), (folder / SEAL).mkdir()),
    "truncated seal": lambda folder: os.truncate(folder / SEAL, 40),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_not_intact(tmp_path, damage):
    folder = make(tmp_path, 1)
    damage(folder)
    assert not is_intact(folder)


@pytest.mark.parametrize(("key", "value"), [("size", 5119), ("sha256", "0" * 64)])
def test_both_size_and_hash_count(tmp_path, key, value):
    folder = make(tmp_path, 1)
    listing = json.loads((folder / SEAL).read_text())
    listing["model.safetensors"][key] = value
    (folder / SEAL).write_text(json.dumps(listing))
    assert not is_intact(folder)


@pytest.mark.parametrize("position", [0, 1, 30, 90, 200, -30, -2])
def test_a_flipped_byte_in_the_seal_is_never_a_crash(tmp_path, position):
    folder = make(tmp_path, 1)
    flip(folder / SEAL, position)
    assert is_intact(folder) in (False, True)


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b" ",
        b"garbage",
        b"\xff\xfe\x00",
        b"\x00" * 50,
        b"null",
        b"true",
        b"3",
        b'"text"',
        b"[]",
        b"{}",
        b'["model.safetensors"]',
        b'{"model.safetensors": null}',
        b'{"model.safetensors": []}',
        b'{"model.safetensors": "x"}',
        b'{"model.safetensors": {}}',
        b'{"model.safetensors": {"size": 5120}}',
        b'{"model.safetensors": {"size": "5120", "sha256": 3}}',
        b'{"model.safetensors": {"size": 5120, "sha256": null}}',
        b'{"missing": {"size": 0, "sha256": ""}}',
        b'{"": {"size": 0, "sha256": ""}}',
        b'{"a\\u0000": {"size": 0, "sha256": ""}}',
        b'{"\\ud800": {"size": 0, "sha256": ""}}',
        b'{"' + b"x" * 300 + b'": {"size": 0, "sha256": ""}}',
        b'{"a": ' + b"9" * 5000 + b"}",
        b"[" * 200_000,
    ],
    ids=lambda garbage: ascii(garbage)[2:40],
)
def test_a_seal_with_garbage_is_not_intact(tmp_path, garbage):
    folder = make(tmp_path, 1)
    (folder / SEAL).write_bytes(garbage)
    assert not is_intact(folder)
    assert last_good(tmp_path) == (None, [folder])


def test_an_empty_checkpoint_is_not_intact(tmp_path):
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    assert not is_intact(folder)
    seal(folder)
    assert not is_intact(folder)


# Finding the last good one


def test_checkpoints_are_ordered_by_step_not_by_name(tmp_path):
    for step in (9, 100, 20):
        make(tmp_path, step)
    found = checkpoints.checkpoints(tmp_path)
    assert names(found) == ["checkpoint-9", "checkpoint-20", "checkpoint-100"]
    assert [step_of(folder) for folder in found] == [9, 20, 100]


@pytest.mark.parametrize(
    "name", ["checkpoint-", "checkpoint-x", "checkpoint-1-old", "checkpoint-²", "tmp-checkpoint-3", "best"]
)
def test_other_names_are_no_checkpoints(tmp_path, name):
    make(tmp_path, 2)
    (tmp_path / name).mkdir()
    assert names(checkpoints.checkpoints(tmp_path)) == ["checkpoint-2"]


def test_the_newest_intact_checkpoint_is_found(tmp_path):
    folders = [make(tmp_path, step) for step in (5, 10, 15)]
    assert last_good(tmp_path) == (folders[-1], [])


def test_last_good_walks_down_and_lists_what_it_skipped(tmp_path):
    folders = [make(tmp_path, step) for step in (5, 10, 15, 20)]
    flip(folders[2] / "model.safetensors", 7)
    (folders[3] / SEAL).unlink()
    assert last_good(tmp_path) == (folders[1], [folders[3], folders[2]])


def test_damage_below_the_last_good_one_is_not_listed(tmp_path):
    folders = [make(tmp_path, step) for step in (5, 10)]
    (folders[0] / SEAL).unlink()
    assert last_good(tmp_path) == (folders[1], [])


def test_a_save_that_was_interrupted_is_skipped(tmp_path):
    good = make(tmp_path, 5)
    partial = make(tmp_path, 10, sealed=False)
    assert last_good(tmp_path) == (good, [partial])


def test_all_damaged_gives_none_and_all_of_them(tmp_path):
    folders = [make(tmp_path, step, sealed=False) for step in (5, 10)]
    assert last_good(tmp_path) == (None, folders[::-1])


def test_a_run_without_checkpoints_has_no_good_one(tmp_path):
    assert last_good(tmp_path) == (None, [])
    assert last_good(tmp_path / "missing") == (None, [])


def test_a_file_named_like_a_checkpoint_is_never_good(tmp_path):
    good = make(tmp_path, 5)
    (tmp_path / "checkpoint-9").write_text("text")
    assert last_good(tmp_path)[0] == good


# Rotation


@pytest.mark.parametrize(("keep", "expected"), [(1, [100]), (2, [20, 100]), (3, [9, 20, 100]), (10, [9, 20, 100])])
def test_rotate_keeps_the_newest(tmp_path, keep, expected):
    for step in (9, 100, 20):
        make(tmp_path, step)
    rotate(tmp_path, keep)
    assert names(checkpoints.checkpoints(tmp_path)) == [f"checkpoint-{step}" for step in expected]
    assert all(is_intact(folder) for folder in checkpoints.checkpoints(tmp_path))


def test_rotate_leaves_everything_else_alone(tmp_path):
    for step in (1, 2, 3):
        make(tmp_path, step)
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "run.toml").touch()
    rotate(tmp_path, 1)
    assert left(tmp_path) == ["checkpoint-3", "checkpoint-x", "run.toml"]


def test_rotate_of_an_empty_or_missing_run_does_nothing(tmp_path):
    rotate(tmp_path, 2)
    rotate(tmp_path / "missing", 2)
    assert left(tmp_path) == []
