"""Atomic writes leave the old text or the new; hashes; torn logs; temporary folders; targets that can be written."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from attnprune import files
from attnprune.files import (
    append_line,
    check_new_folder,
    check_writable,
    reopen_lines,
    settle,
    sha256_of,
    temporary_folder,
    write_atomic,
)
from tests.helpers.factory import left, refused

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


def test_a_file_of_the_same_kind_of_name_is_left_alone(tmp_path):
    """An earlier release wrote through `.NAME.tmp-PID`, and deleted whatever had that name."""
    mine = tmp_path / f".a.json.tmp-{os.getpid()}"
    mine.write_text("mine")
    write_atomic(tmp_path / "a.json", "text")
    assert mine.read_text() == "mine"
    assert left(tmp_path) == [mine.name, "a.json"]


def test_a_name_of_the_longest_kind_can_be_written(tmp_path):
    write_atomic(tmp_path / ("a" * 255), "text")
    assert left(tmp_path) == ["a" * 255]


# Logs that a run appends to

LINES = b'{"step": 1}\n{"step": 2}\n'
TORN = [
    b'{"st', b'{"step": 3', b'{"step": 3}', b"\0" * 700, b'{"st' + b"\0" * 700, b"\0" * 9 + b"\n", b"\xff\xfe\n",
    b"5\n", b"\n", b'{"step": "3"}\n', b'{"loss": 1}\n', b"[" * 100_000 + b"\n", b'{"step": ' + b"9" * 5000 + b"}\n",
    b"old\nblocks\nof\nthe disk", b'{"st\0\0{"step": 3}\n',
]  # fmt: skip


def is_line(value):
    return isinstance(value, dict) and type(value.get("step")) is int


@pytest.mark.parametrize("tail", TORN, ids=lambda tail: repr(tail[:12]))
@pytest.mark.parametrize("before", [LINES, b""], ids=["after lines", "alone"])
def test_a_torn_tail_is_dropped_and_the_next_line_is_whole(tmp_path, before, tail):
    file = tmp_path / "log.jsonl"
    file.write_bytes(before + tail)
    values = [{"step": 1}, {"step": 2}][: before.count(b"\n")]
    assert reopen_lines(file, is_line) == values
    assert file.read_bytes() == before
    append_line(file, {"step": 9})
    assert reopen_lines(file, is_line) == [*values, {"step": 9}]
    assert left(tmp_path) == ["log.jsonl"]


def test_every_cut_of_a_log_is_read(tmp_path):
    file = tmp_path / "log.jsonl"
    for length in range(len(LINES) + 1):
        file.write_bytes(LINES[:length])
        assert reopen_lines(file, is_line) == [{"step": 1}, {"step": 2}][: LINES[:length].count(b"\n")]


def test_lines_that_are_not_kept_are_removed_and_an_intact_log_is_not_written(tmp_path):
    file = tmp_path / "log.jsonl"
    assert reopen_lines(file, is_line) == []
    assert left(tmp_path) == []
    file.write_bytes(LINES)
    before = file.stat().st_ino
    assert len(reopen_lines(file, is_line)) == 2
    assert file.stat().st_ino == before
    assert reopen_lines(file, is_line, keep=lambda line: line["step"] < 2) == [{"step": 1}]
    assert file.read_bytes() == b'{"step": 1}\n'


@pytest.mark.parametrize("damage", [b'{"st', b"\0\0\0", b"[]", b'{"step": null}', b"\xff"])
def test_a_damaged_line_before_an_intact_one_is_refused_by_its_number(tmp_path, damage):
    file = tmp_path / "log.jsonl"
    file.write_bytes(b'{"step": 1}\n' + damage + b'\n{"step": 2}\n')
    before = file.read_bytes()
    refused(lambda: reopen_lines(file, is_line), "log.jsonl: line 2 is damaged")
    assert file.read_bytes() == before


def test_a_log_that_is_no_file_is_refused(tmp_path, as_nobody):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        refused(lambda name=name: reopen_lines(tmp_path / name, is_line), "is not a file")
    place, switch = as_nobody
    (place / "log.jsonl").write_bytes(LINES)
    (place / "log.jsonl").chmod(0)
    switch()
    refused(lambda: reopen_lines(place / "log.jsonl", is_line), "permission denied")


# Temporary folders

ENDS = [ValueError, KeyboardInterrupt, SystemExit]


@pytest.mark.parametrize("end", ENDS)
def test_a_temporary_folder_is_new_and_goes_on_every_way_out(tmp_path, end):
    def use():
        with temporary_folder(tmp_path) as one, temporary_folder(tmp_path) as other:
            assert one != other
            assert one.stat().st_mode & 0o777 == 0o700
            (one / "deep" / "er").mkdir(parents=True)
            (one / "deep" / "file").write_text("x")
            raise end

    with pytest.raises(end):
        use()
    assert left(tmp_path) == []


def test_a_second_signal_does_not_keep_a_temporary_folder(tmp_path, monkeypatch):
    remove, calls = shutil.rmtree, []

    def interrupted(path, **options):
        calls.append(path)
        if len(calls) == 1:
            raise KeyboardInterrupt
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt), temporary_folder(tmp_path) as folder:
        (folder / "file").write_text("x")
    assert left(tmp_path) == []


def test_what_was_renamed_away_stays_and_has_the_usual_permissions(tmp_path):
    before = os.umask(0o027)
    try:
        with temporary_folder(tmp_path) as folder:
            (folder / "templates").mkdir(mode=0o700)
            (folder / "templates" / "a.jinja").touch(mode=0o600)
            settle(folder)
            folder.rename(tmp_path / "out")
    finally:
        os.umask(before)
    assert left(tmp_path) == ["out"]
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("out", "out/templates", "out/templates/a.jinja")]
    assert modes == [0o750, 0o750, 0o640]


# Targets


def test_a_new_folder_may_be_missing_or_empty(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    for name in ("new", "empty", "link/new", "./empty/", "empty/../new", str(tmp_path / "new")):
        check_new_folder(Path(name))


def test_a_place_that_no_folder_can_be_renamed_to_is_refused(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full" / "inner").mkdir(parents=True)
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("empty", target_is_directory=True)
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)
    cases = {
        "link": "is a link", "link/": "is a link", "dangling": "is a link", "loop": "is a link", "full": "is not empty",
        "file": "is not empty", "pipe": "is not empty", ".": "is not empty", "..": "is not empty", "/": "is not empty",
        "missing/new": "no such folder", "missing/../new": "no such folder", "file/new": "is not a folder",
        "dangling/new": "no such folder", "a" * 300: "file name too long: aaa",
    }  # fmt: skip
    for name, message in cases.items():
        refused(lambda name=name: check_new_folder(Path(name)), message)
    monkeypatch.chdir(tmp_path / "empty")
    for name in (".", "", "./", str(tmp_path / "empty"), "../empty"):
        refused(lambda name=name: check_new_folder(Path(name)), "is the current folder")
    assert left(tmp_path) == ["dangling", "empty", "file", "full", "link", "loop", "pipe"]


def test_a_mount_point_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a b").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "a b")
    refused(lambda: check_new_folder(tmp_path / "a b"), "is a mount point")


def test_a_folder_mounted_from_the_same_file_system_is_refused(tmp_path):
    program = (
        "import sys; from pathlib import Path; from attnprune.files import check_new_folder; "
        "from attnprune.errors import InputError\n"
        "try: check_new_folder(Path(sys.argv[1]))\n"
        "except InputError as error: print(error.message)"
    )
    (tmp_path / "a b").mkdir()
    (tmp_path / "from").mkdir()
    script = f'mount --bind "{tmp_path}/from" "{tmp_path}/a b" || exit 99; exec "$0" -c "$1" "{tmp_path}/a b"'
    done = subprocess.run(
        ["unshare", "--mount", "--map-root-user", "bash", "-c", script, sys.executable, program],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        pytest.skip("folders cannot be mounted here")
    assert done.stdout == f"{tmp_path}/a b: is a mount point\n"


def test_a_folder_that_is_not_ours_is_refused(as_nobody):
    place, switch = as_nobody
    (place / "closed").mkdir(mode=0o700)
    (place / "read only" / "empty").mkdir(parents=True)
    switch()
    for name, message in {"new": "not writable", "read only/empty": "not writable", "closed/new": "denied"}.items():
        refused(lambda name=name: check_new_folder(place / name), message)
    refused(lambda: check_writable(place), "not writable")
