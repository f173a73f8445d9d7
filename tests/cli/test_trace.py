"""`attnprune trace` as a person meets it: real subprocesses, exit codes, files, JSON."""

from __future__ import annotations

import json

import pytest

from attnprune.tracing.result import Trace
from tests.helpers.command import attnprune, listing
from tests.helpers.factory import save_tiny_llama

DEMO = ("trace", "demo", "--text", "#27+58=")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a finished trace of the bundled model."""
    folder = tmp_path_factory.mktemp("trace")
    done = attnprune(*DEMO, "--explain", "1", "-o", "found", cwd=folder, COLUMNS="80")
    assert done.returncode == 0, done.stderr
    (folder / "stdout.txt").write_text(done.stdout)
    return folder


def test_table_and_files(place):
    printed = (place / "stdout.txt").read_text()
    assert max(map(len, printed.splitlines()[1:-2])) <= 80
    assert "What the messages keep" in printed
    assert printed.splitlines()[-1] == "written to found"
    assert "Why they are open" in printed
    assert {path.name for path in (place / "found").iterdir()} == {"trace.json", "trace.html", "trace.png"}
    result = Trace.model_validate_json((place / "found" / "trace.json").read_text())
    assert [token.text for token in result.tokens] == list("#27+58=")
    assert result.command == "attnprune trace demo --text '#27+58=' --explain 1 -o found"
    assert f"score {result.models[0].messages[0].opened.score:.2f}" in printed
    assert f"{result.models[0].kept.share:.3f}" in printed
    assert (place / "found" / "trace.png").read_bytes().startswith(b"\x89PNG")


def test_json_is_the_record(place):
    done = attnprune(*DEMO, "--explain", "1", "--json", cwd=place)
    record = json.loads((place / "found" / "trace.json").read_text())
    printed = json.loads(done.stdout)
    for part in (record, printed):
        for model in part["models"]:
            del model["seconds"]
        del part["seconds"], part["command"]
    assert printed == record
    assert done.returncode == 0


def test_a_second_trace_does_not_overwrite(place):
    before = listing(place / "found")
    done = attnprune(*DEMO, "-o", "found", cwd=place)
    assert done.returncode == 2
    assert done.stderr == "attnprune: found: exists and is not empty\n"
    assert listing(place / "found") == before


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path):
    save_tiny_llama(tmp_path / "base")
    before = listing(tmp_path)
    cases = [
        (["demo", "--text", ""], "--text: is empty"),
        (["demo", "--text", "#27+58=", "--token", "7"], "token 7: the text has 7 tokens, 0 to 6"),
        (["demo", "--text", "#27+58=", "--target", "1.5"], "--target 1.5: is not above 0 and up to 1"),
        (["demo", "--text", "#27+58=", "--against", "12"], "is 2 tokens: '1' '2', not one"),
        (["demo", "--text", "#27+58=", "--against", "x"], "against 'x': the tokenizer does not know 'x'"),
        (["demo", "--text", "hello"], "text: the tokenizer does not know 'h', 'e', 'l', 'o'"),
        (["demo", "--text", "\udcff#1"], "text: is not UTF-8 text"),
        (["base", "--text", "x" * 65], "text: 65 tokens are more than the 64 that can be traced"),
        (["nowhere/at/all", "--text", "x"], "nowhere/at/all: "),
    ]
    for arguments, message in cases:
        done = attnprune("trace", *arguments, "-o", "new", cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert message in done.stderr
        assert done.stdout == ""
    assert listing(tmp_path) == before
