"""The GPU check runs whole on a CPU, loses nothing to a part that fails, and tells a wrong step from a right one."""

from __future__ import annotations

import json
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from attnprune.bench import step
from examples import gpu_check
from tests.examples.test_scripts import run
from tests.helpers.factory import save_text


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def check(monkeypatch, file, *arguments):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--tiny", "--out", str(file), *map(str, arguments)])
    return gpu_check.main()


def test_all_of_it_runs_on_a_cpu(tmp_path):
    texts = [save_text(tmp_path / name) for name in ("a.txt", "b.txt")]
    run("examples/gpu_check.py", *texts, "--tiny", "--out", tmp_path / "made.jsonl")
    made = lines(tmp_path / "made.jsonl")
    assert made[0]["versions"]["torch"] == torch.__version__
    assert made[-1] == {"part": "end", "name": "end", "at": made[-1]["at"], "failed": []}
    found = {(line["part"], line["name"]): line for line in made}
    assert found["same", "compiled"]["ok"]
    assert found["same", "compiled"]["weights_off"] > 0
    assert "no CUDA device" in found["same", "graph"]["could_not_run"]
    assert found["step 2", "fast"]["tokens_per_second"] > 0
    assert found["step 3", "compiled"]["status"] == "ok"
    assert found["sampling", "way"]["reason"] == ""
    for part in ("train", "prefill", "decode"):
        assert found[part, "chunked"]["error"] < 1e-3


def test_a_part_that_fails_loses_neither_its_lines_nor_the_others(tmp_path, monkeypatch, capsys):
    def broken(model, start, rows, seq_len):
        raise RuntimeError("no memory. Details")

    monkeypatch.setattr(gpu_check.drawing, "writer", broken)
    assert check(monkeypatch, tmp_path / "made.jsonl", "--part", "sampling", "--part", "decode") == 1
    made = lines(tmp_path / "made.jsonl")
    assert [(line["part"], line["name"]) for line in made] == [
        ("machine", "machine"), ("sampling", "way"), ("sampling", "failed"), ("decode", "sdpa-math"),
        ("decode", "chunked"), ("end", "end"),
    ]  # fmt: skip
    assert made[2]["why"] == "RuntimeError: no memory"
    assert made[-1]["failed"] == ["sampling: failed"]


def test_a_part_that_hangs_is_ended(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check.attention, "measure", lambda *arguments: time.sleep(60))
    begin = time.perf_counter()
    assert check(monkeypatch, tmp_path / "made.jsonl", "--part", "decode", "--part", "prefill", "--seconds", 1) == 1
    assert time.perf_counter() - begin < 20
    failed = [line["why"] for line in lines(tmp_path / "made.jsonl") if line["name"] == "failed"]
    assert len(failed) == 2
    assert "took longer" in failed[0]


@pytest.mark.parametrize(("mode", "wrong"), [("graph", True), ("graph", False), ("compiled", True)])
def test_a_step_that_does_something_else_is_not_ok(monkeypatch, mode, wrong):
    """Here every mode is the eager one; the wrong one has another learning rate."""
    given, own, seen = gpu_check.sizes(tiny=True), step.train, []

    def train(setting, asked, steps, callbacks, ids):
        if asked == mode and wrong:
            config = step.Setting.config
            with monkeypatch.context() as patch:
                patch.setattr(step.Setting, "config", lambda *arguments: faster(config(*arguments)))
                return own(setting, "fast", steps, callbacks, ids)
        return own(setting, "fast", steps, callbacks, ids)

    def faster(config):
        config.train.learning_rate *= 3
        return config

    monkeypatch.setattr(step, "train", train)
    gpu_check.same(given, [], lambda name, **facts: seen.append(SimpleNamespace(name=name, **facts)))
    assert [line.name for line in seen] == ["fast", "graph", "compiled"]
    assert {line.name: line.ok for line in seen} == {"fast": True, "graph": True, "compiled": True} | {mode: not wrong}


def test_texts_are_read_from_their_starts(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(name * 50)
    ids = gpu_check.bytes_of([tmp_path / "a", tmp_path / "b"], 4, 20)
    assert ids.tolist() == [[97] * 20] * 2 + [[98] * 20] * 2
    with pytest.raises(ValueError, match="shorter"):
        gpu_check.bytes_of([tmp_path / "a"], 4, 20)
