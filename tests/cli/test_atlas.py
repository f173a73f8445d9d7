"""`attnprune atlas` as a person meets it: real subprocesses, exit codes, files, JSON."""

from __future__ import annotations

import json

import pytest

from attnprune.heads.result import Atlas
from tests.helpers.command import attnprune, listing
from tests.helpers.factory import save_text, save_tiny_llama

DEMO = ("atlas", "demo", "--data", "task", "--tokens", "200")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a finished atlas of the bundled model."""
    folder = tmp_path_factory.mktemp("atlas")
    done = attnprune(*DEMO, "-o", "found", cwd=folder, COLUMNS="80")
    assert done.returncode == 0, done.stderr
    (folder / "stdout.txt").write_text(done.stdout)
    (folder / "stderr.txt").write_text(done.stderr)
    return folder


def test_table_and_files(place):
    printed = (place / "stdout.txt").read_text().splitlines()
    assert max(len(line.rstrip()) for line in printed) <= 80
    assert printed[0] == "two-digit addition: 200 tokens in 20 blocks of 10"
    assert printed[-1] == "written to found"
    assert (place / "stderr.txt").read_text().splitlines() == ["dense: blocks", "dense: values"]
    assert {path.name for path in (place / "found").iterdir()} == {"atlas.json", "atlas.html"}
    result = Atlas.model_validate_json((place / "found" / "atlas.json").read_text())
    assert result.command == "attnprune atlas demo --data task --tokens 200 -o found"
    assert len(result.models[0].heads) == 16


def test_json_is_the_record(place):
    done = attnprune(*DEMO, "--json", cwd=place)
    record, printed = json.loads((place / "found" / "atlas.json").read_text()), json.loads(done.stdout)
    for part in (record, printed):
        for model in part["models"]:
            del model["seconds"]
        del part["seconds"], part["command"]
    assert printed == record
    assert done.returncode == 0


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path):
    save_tiny_llama(tmp_path / "base")
    save_text(tmp_path / "text.txt")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    before = listing(tmp_path)
    cases = [
        (["base", "--data", "empty.txt", "-o", "new"], "empty.txt: the file is empty"),
        (
            ["base", "--data", "text.txt", "--seq-len", "65", "-o", "new"],
            "65 tokens is more than the model's context of 64",
        ),
        (["base", "--data", "text.txt", "-o", "full"], "full: exists and is not empty"),
        (["nowhere/at/all", "--data", "text.txt", "-o", "new"], "nowhere/at/all: "),
        (["base", "-o", "new"], "--data"),
        (["base", "--data", "self", "-o", "new"], "data self: is text that a model writes"),
        (["demo", "--data", "#27+58=085", "-o", "new"], "#27+58=085: no such file, and no data set can have this"),
    ]
    for arguments, message in cases:
        done = attnprune("atlas", *arguments, cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert message in done.stderr
        assert done.stdout == ""
    assert listing(tmp_path) == before
