"""Atomic writes leave the old text or the new; hashes."""

from __future__ import annotations

import hashlib
import os

import pytest

from attnprune import files
from attnprune.files import sha256_of, write_atomic
from tests.helpers.factory import left

# Atomic writes and hashes


def test_write_atomic_writes_utf8_and_leaves_no_other_file(tmp_path):
    file = tmp_path / "a.json"
    write_atomic(file, "ä\n")
    assert file.read_bytes() == "ä\n".encode()
    write_atomic(file, "shorter")
    assert file.read_text() == "shorter"
    assert left(tmp_path) == ["a.json"]


@pytest.mark.parametrize("broken", ["replace", "fsync"])
def test_a_write_that_is_cut_off_leaves_the_old_text(tmp_path, monkeypatch, broken):
    file = tmp_path / "a.json"
    write_atomic(file, "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, broken, lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_atomic(file, "new")
    assert file.read_text() == "old"
    write_atomic(file, "newer")
    assert file.read_text() == "newer"


def test_the_new_text_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    order = []
    replace = os.replace
    monkeypatch.setattr(files, "fsync", lambda path: order.append("folder" if path.is_dir() else "file"))
    monkeypatch.setattr(os, "replace", lambda *paths: (order.append("rename"), replace(*paths)))
    write_atomic(tmp_path / "a.json", "text")
    assert order == ["file", "rename", "folder"]


def test_an_error_while_writing_is_not_swallowed(tmp_path):
    with pytest.raises(OSError, match="missing"):
        write_atomic(tmp_path / "missing" / "a.json", "text")


@pytest.mark.parametrize("size", [0, 1, 3_000_000])
def test_sha256_of_a_file(tmp_path, size):
    file = tmp_path / "a"
    file.write_bytes(b"x" * size)
    assert sha256_of(file) == hashlib.sha256(b"x" * size).hexdigest()
