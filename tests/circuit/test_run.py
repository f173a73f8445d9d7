"""A search holds its folder: a second one in the same folder is refused before it loads anything."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest

from attnprune.circuit import run as circuit_run
from attnprune.circuit.folder import CACHE_FOLDER, SETTINGS_FILE
from attnprune.files import locked
from tests.helpers.factory import left, refused

SETTINGS = {
    "model": "demo", "task": "addition", "against": None, "base": None, "target": 0.9, "prompts": 9, "seed": 0,
    "quick": True, "mask_steps": None, "deletions": None, "controls": False, "batch_size": 32, "command": "attnprune",
}  # fmt: skip


@pytest.fixture
def unloaded(monkeypatch):
    def load(*rest):
        raise AssertionError("loaded first")

    monkeypatch.setattr(circuit_run, "by_name", load)


def search(folder, *, is_new=True, **settings):
    return circuit_run.run(folder, SETTINGS | settings, "cpu", is_new=is_new, watching=nullcontext(lambda *_: None))


@pytest.mark.parametrize("is_new", [True, False])
def test_a_folder_in_use_is_refused(unloaded, tmp_path, is_new):
    with locked(tmp_path / "found"):
        refused(lambda: search(tmp_path / "found", is_new=is_new), "found: in use by another run")
        (tmp_path / "link").symlink_to("found")
        refused(lambda: search(tmp_path / "link", is_new=is_new), "in use by another run")
    assert left(tmp_path) == ["link"]


def test_a_search_that_began_and_ended_meanwhile_is_not_overwritten(unloaded, tmp_path):
    file = tmp_path / "found" / CACHE_FOLDER / SETTINGS_FILE
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(SETTINGS | {"task": "theirs"}))
    error = refused(lambda: search(tmp_path / "found"), "found: is not empty")
    assert "--resume" in str(error.hint)
    assert json.loads(file.read_text())["task"] == "theirs"


def test_a_refused_search_leaves_no_folder(unloaded, tmp_path):
    refused(lambda: search(tmp_path / "deep" / "found", task="nonsense"), "nonsense: no such task")
    assert left(tmp_path) == []


def test_the_folder_is_held_for_the_whole_search(tmp_path, monkeypatch):
    def searching(folder, *rest, **options):
        monkeypatch.undo()
        refused(lambda: search(folder, is_new=False), "in use by another run")
        (folder / "circuit.json").touch()

    monkeypatch.setattr(circuit_run, "_run", searching)
    search(tmp_path / "found")
    with locked(tmp_path / "found"):
        assert left(tmp_path / "found") == ["circuit.json"]
