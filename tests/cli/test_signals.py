"""A signal ends a command as Ctrl-C does: one line, its exit code, and nothing half-made is left behind."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time

import pytest

from attnprune.api import commands
from attnprune.circuit import run as circuit_run
from attnprune.cli import app
from attnprune.publish import push
from attnprune.sidecar import merged
from tests.helpers.factory import left, save_tiny_llama
from tests.helpers.paths import VECTORS
from tests.helpers.sidecars import save_sidecar

SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
every_signal = pytest.mark.parametrize(("number", "code"), SIGNALS, ids=lambda value: getattr(value, "name", value))


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """The command line in this process, with a folder of its own for temporary files: (exit code, last line)."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["attnprune", *map(str, arguments)])
        before = [signal.getsignal(number) for number, _ in SIGNALS]
        code = app.run()
        assert [signal.getsignal(number) for number, _ in SIGNALS] == before
        return code, (capsys.readouterr().err.splitlines() or [""])[-1]

    return call


def _send(number):
    os.kill(os.getpid(), number)
    time.sleep(5)  # the handler runs before this ends
    raise AssertionError("no signal")


@every_signal
def test_a_signal_during_push_merged_leaves_nothing_in_the_temporary_folder(run, tmp_path, monkeypatch, number, code):
    def half_merged(folder, target, *rest):
        target.mkdir()
        (target / "model.safetensors").write_bytes(b"x" * 1000)
        return target

    seen = []

    def sending(source, *rest, **options):
        seen.extend(path.name for path in (tmp_path / "tmp").rglob("model.safetensors"))
        _send(number)

    monkeypatch.setattr(commands, "_merged", half_merged)
    monkeypatch.setattr(push, "push", sending)
    assert run("push", VECTORS / "first-release", "tester/x", "--merged") == (code, "attnprune: interrupted")
    assert seen == ["model.safetensors"]
    assert left(tmp_path / "tmp") == []


@every_signal
def test_a_signal_during_a_merge_leaves_nothing_beside_its_target(run, tmp_path, monkeypatch, number, code):
    def save(model, tokenizer, staging):
        (staging / "model.safetensors").write_bytes(b"x" * 1000)
        _send(number)

    monkeypatch.setattr(merged, "_save", save)
    assert run("apply", VECTORS / "first-release", "--merge", "out") == (code, "attnprune: interrupted")
    assert left(tmp_path) == ["tmp"]


@every_signal
def test_a_signal_during_a_search_says_how_to_go_on(run, tmp_path, monkeypatch, number, code):
    def search(folder, *rest, **options):
        (folder / "cache").mkdir()
        (folder / "cache" / "settings.json").write_text("{}")
        _send(number)

    monkeypatch.setattr(circuit_run, "_run", search)
    line = "attnprune: interrupted (continue with: attnprune circuit --resume found)"
    assert run("circuit", "demo", "--task", "addition", "--out", "found") == (code, line)


def test_an_ignored_signal_stays_ignored(run, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        monkeypatch.setattr(commands, "_merged", lambda *rest: os.kill(os.getpid(), signal.SIGHUP) or "nowhere")
        code, line = run("push", "nowhere", "tester/x", "--merged")
        assert (code, line) == (2, "attnprune: nowhere: no such folder")
    finally:
        signal.signal(signal.SIGHUP, before)


# Places for a merged model


@pytest.fixture
def unloaded(run, monkeypatch):
    """`apply SIDECAR --merge OUT`, which must refuse before it loads anything."""
    from attnprune.sidecar import loading

    def load(*rest, **options):
        raise AssertionError("loaded first")

    monkeypatch.setattr(loading, "load", load)
    return lambda target, *more: run("apply", VECTORS / "first-release", "--merge", target, *more)


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_a_place_that_cannot_be_merged_to_is_refused_before_the_work(unloaded, tmp_path, monkeypatch, more):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty", target_is_directory=True)
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "file").touch()
    cases = {
        "link": "link: is a link", "gone": "gone: is a link", "tmp/..": "exists and is not empty",
        "file": "exists and is not empty", "file/out": "file: is not a folder", "x" * 300: "file name too long",
        "no/such/out": "no/such: no such folder", "/proc/out": "/proc: not writable",
    }  # fmt: skip
    for target, message in cases.items():
        code, line = unloaded(target, *more)
        assert code == 2
        assert message in line
    monkeypatch.chdir(tmp_path / "empty")
    assert unloaded(".", *more)[1].startswith("attnprune: .: is the current folder")
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    monkeypatch.chdir(tmp_path)
    assert unloaded("empty", *more)[1].startswith("attnprune: empty: is a mount point")
    assert left(tmp_path) == ["empty", "file", "gone", "link", "tmp"]
    assert left(tmp_path / "empty") == []


def test_a_merge_deletes_no_folder_of_the_user(run, tmp_path):
    save_sidecar(tmp_path / "sidecar", save_tiny_llama(tmp_path / "base"))
    (tmp_path / "out").mkdir()
    for name in (".out.tmp", ".attnprune-out"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("mine")
    assert run("apply", "base", "sidecar", "--merge", "out")[0] == 0
    assert left(tmp_path) == [".attnprune-out", ".out.tmp", "base", "out", "sidecar", "tmp"]
    assert (tmp_path / ".out.tmp" / "thesis.txt").read_text() == "mine"
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask():
    os.umask(umask := os.umask(0))
    return umask


def test_a_target_that_was_filled_meanwhile_is_kept(run, tmp_path, monkeypatch):
    def save(model, tokenizer, staging):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").touch()
        original(model, tokenizer, staging)

    save_sidecar(tmp_path / "sidecar", save_tiny_llama(tmp_path / "base"))
    original = merged._save
    monkeypatch.setattr(merged, "_save", save)
    assert run("apply", "base", "sidecar", "--merge", "out") == (
        1, "attnprune: out: cannot write: directory not empty"
    )  # fmt: skip
    assert left(tmp_path / "out") == ["theirs"]
    assert left(tmp_path) == ["base", "out", "sidecar", "tmp"]


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), OSError(5, "Input/output error")])
def test_a_full_disk_during_a_merge_is_one_line(run, tmp_path, monkeypatch, fault):
    def save(model, tokenizer, staging):
        raise fault

    monkeypatch.setattr(merged, "_save", save)
    code, line = run("apply", VECTORS / "first-release", "--merge", "out")
    assert (code, line) == (1, f"attnprune: out: cannot write: {fault.strerror.lower()}")
    assert left(tmp_path) == ["tmp"]
