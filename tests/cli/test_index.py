"""`attnprune index` and `attnprune edges` as a person meets them: real subprocesses, exit codes, files, JSON."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers.command import ENVIRONMENT, attnprune, listing
from tests.helpers.factory import save_text, save_tiny_llama

BUILD = ("index", "demo", "--data", "task", "--tokens", "200")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a finished index of the bundled model."""
    folder = tmp_path_factory.mktemp("index")
    done = attnprune(*BUILD, "-o", "found", cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "stdout.txt").write_text(done.stdout)
    assert done.stderr.splitlines() == ["blocks"]
    return folder


def test_what_is_stored(place):
    """A dense model: 16 heads, 20 blocks, 55 pairs in each."""
    lines = (place / "stdout.txt").read_text().splitlines()
    assert lines[0] == "two-digit addition: 200 tokens in 20 blocks of 10"
    assert lines[1].startswith("17,600 open edges, 88 a token, ")
    assert lines[2] == "written to found; ask with: attnprune edges found --key '#'"
    asked = attnprune(*shlex.split(lines[2].partition("ask with: attnprune ")[2]), cwd=place)
    assert asked.returncode == 0, asked.stderr
    record = json.loads((place / "found" / "index.json").read_text())
    assert record["command"] == "attnprune index demo --data task --tokens 200 -o found"


def test_the_same_command_again_adds_nothing(place):
    before = listing(place / "found")
    done = attnprune(*BUILD, "-o", "found", "--json", cwd=place)
    assert json.loads(done.stdout)["count"] == 17_600
    assert listing(place / "found") == before


def test_tables(place):
    done = attnprune("edges", "found", "--head", "3.0", "--key", "#", "--top", "3", cwd=place, COLUMNS="80")
    assert done.returncode == 0, done.stderr
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    assert lines[0] == "demo on two-digit addition"
    assert lines[1].startswith("200 of 17,600 open edges (1.14 %), weight ")  # 20 blocks, 10 queries
    heads = [line.split() for line in lines if line.split()[1:3] == ["edges", "share"]]
    assert [words[0] for words in heads] == ["queries"]  # head and key are fixed
    assert lines[-1] == "«key» is read by ⟦query⟧; weight: P_ij A_ij"
    assert sum("«#»" in line for line in lines) == 3
    assert max(map(len, lines)) <= 80


def test_a_table_says_how_many_rows_it_leaves_out(place):
    cut = attnprune("edges", "found", "--key", "+", "--query", "=", cwd=place)  # of 16 heads
    assert [line.strip() for line in cut.stdout.splitlines() if " more" in line] == ["+6 more"]
    whole = attnprune("edges", "found", "--key", "+", "--query", "=", "--top", "16", cwd=place)
    assert " more" not in whole.stdout
    data = json.loads(attnprune("edges", "found", "--key", "+", "--json", cwd=place).stdout)
    assert data["more"] == {"heads": 6, "queries": 2}
    assert (len(data["heads"]), data["notes"]) == (10, [])


def test_json_has_the_rows(place):
    done = attnprune("edges", "found", "--kind", "previous", "--by", "weight", "--json", cwd=place)
    data = json.loads(done.stdout)
    assert set(data) >= {"heads", "keys", "queries", "contexts", "total", "passing"}
    assert data["passing"]["count"] == 16 * 20 * 9
    weights = [row["weight"] for row in data["heads"]]
    assert weights == sorted(weights, reverse=True)
    assert len(data["contexts"]) == 10
    assert all(row["key"] == row["query"] - 1 for row in data["contexts"])


def test_bad_input_is_one_line_and_leaves_nothing(place):
    (place / "full").mkdir()
    (place / "full" / "x").write_text("x")
    save_text(place / "text.txt")
    before = listing(place)
    cases = [
        (["index", "demo", "--data", "task"], "--out"),
        (["index", "demo", "--data", "task", "-o", "full"], "full: exists and is not empty"),
        (["index", "demo", "--data", "task", "--tokens", "100", "-o", "found"], "another number of tokens (200)"),
        (["index", "demo", "--data", "task", "--tokens", "5", "-o", "new"], "5 tokens: are fewer than a block of 10"),
        (["index", "nowhere/at/all", "--data", "text.txt", "-o", "new"], "nowhere/at/all: "),
        (["edges", "full"], "full: is no index of edges"),
        (["edges", "found", "--head", "3"], "--head 3: is not LAYER.HEAD"),
        (["edges", "found", "--head", "3.4"], "head 4: is not within 0 and 3"),
        (["edges", "found", "--key", "zebra"], "key 'zebra': is no token of this text"),
        (["edges", "found", "--kind", "near"], "kind near: is none of"),
        (["edges", "found", "--by", "size"], "--by size: is neither count nor weight"),
    ]
    for arguments, message in cases:
        done = attnprune(*arguments, cwd=place)
        assert done.returncode == 2, done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert message in done.stderr
        assert done.stdout == ""
    assert listing(place) == before


def test_text_cannot_drive_the_terminal(tmp_path):
    save_tiny_llama(tmp_path / "base")
    (tmp_path / "text.txt").write_text("\x1b[31m[bold]x[/bold][/]\x07\n" * 40)
    command = ("index", "base", "--data", "text.txt", "--tokens", "64", "--seq-len", "32", "-o", "i")
    made = attnprune(*command, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    shown = attnprune("edges", "i", "--top", "500", cwd=tmp_path, COLUMNS="200")
    assert shown.returncode == 0, shown.stderr
    assert not any(mark in shown.stdout for mark in "\x1b\x07")
    assert "\\x1b" in shown.stdout
    assert any(part in shown.stdout for part in ("[bold]", "[/bold]"))
    assert attnprune("edges", "i", "--key", "\x1b", cwd=tmp_path).returncode == 0


def test_a_build_ended_by_a_signal_goes_on(tmp_path):
    save_tiny_llama(tmp_path / "base")
    save_text(tmp_path / "text.txt", 400)
    command = ("index", "base", "--data", "text.txt", "--tokens", "12800", "--seq-len", "64")
    running = subprocess.Popen(
        [sys.executable, "-m", "attnprune", *command, "-o", "stopped"], cwd=tmp_path, env=ENVIRONMENT,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for _ in range(6000):
        if list((tmp_path / "stopped").glob("edges-*")) or running.poll() is not None:
            break
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 130, said
    assert said.splitlines()[-1] == "attnprune: interrupted"
    shown = attnprune("edges", "stopped", "--top", "1", cwd=tmp_path)
    assert " of 200 blocks so far" in shown.stdout
    for out in ("stopped", "whole"):
        assert attnprune(*command, "-o", out, cwd=tmp_path, timeout=300).returncode == 0
    stopped, whole = (listing(tmp_path / out) for out in ("stopped", "whole"))
    assert stopped.pop("index.json") != whole.pop("index.json")  # the command
    assert stopped == whole
