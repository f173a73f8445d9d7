"""Options that would do nothing are refused, before anything is read: one line, exit code 2."""

from __future__ import annotations

import sys

import pytest

from attnprune.cli import app
from attnprune.cli.output import Output, out
from tests.helpers.paths import VECTORS

SIDECAR = str(VECTORS / "gpt2-gates")
IDLE = [
    ("inspect S --layer 1", "--layer: does nothing without --text"),
    ("inspect S --all --head 1", "--head, --all: do nothing without --text"),
    ("inspect S --save-mask m", "--save-mask: does nothing without --text"),
    ("inspect S --base x", "--base: does nothing without --text or --runtime"),
    ("inspect S --text a --limit 3", "--limit: does nothing without --all, --layer or --head"),
    ("inspect S --damage --text a", "--damage: shows a record; leave out --text"),
    ("inspect S --runtime --layer 1", "--runtime: runs no text; leave out --layer"),
    ("eval S --data x.txt --task-folder t --task-limit 3", "--task-folder, --task-limit: do nothing without --tasks"),
    ("eval S --tasks x --seq-len 3", "--seq-len: does nothing with --tasks"),
    ("eval S --damage --batch-size 3", "--batch-size: does nothing with --damage"),
    ("eval S --damage-heads 3", "--damage-heads: does nothing without --damage"),
    ("eval S --seq-len 8 --tokens 8", "--seq-len, --tokens: do nothing without --data"),
    ("eval S --damage --text-field x --tokens 8", "--text-field: does nothing without --data"),
    ("eval demo --data task --seq-len 5", "--seq-len: does nothing with --data task"),
    ("eval demo --data task --tokens 8", "--tokens: does nothing with --data task"),
    ("eval demo --data x.txt --allow-base-mismatch", "--allow-base-mismatch: does nothing for a model that is no"),
    ("eval S --device cpu --device-map auto", "--device: does nothing with --device-map"),
    ("trace demo --text #1+2= --base x", "--base: demo is a dense model itself"),
    ("atlas demo --data task --text-field x", "--text-field: does nothing with --data task"),
    ("index demo --data task --seq-len 5 -o i", "--seq-len: does nothing with --data task"),
    ("apply S --dtype float16", "--dtype: does nothing without --merge"),
    ("bench attention --layer 1 --base x", "--layer, --base: do nothing without --from"),
    ("bench attention --from S --data x.txt --heads 2 --noise", "--heads, --noise: do nothing with --from"),
    ("bench step --model demo --layers 2", "--layers: does nothing with --model"),
    ("bench step --scope attn --lora-rank 3", "--lora-rank: does nothing with --scope attn"),
    ("bench train demo --base x", "--base: demo is a dense model itself"),
    ("sparsify demo --scope attn --lora-rank 3", "--lora-rank: does nothing with --scope attn"),
    ("sparsify demo --scope gates --lr 1e-3", "--lr: does nothing with --scope gates"),
    ("sparsify demo --constraint kl --target-density 0.1", "--target-density: does nothing with --constraint kl"),
]


@pytest.mark.parametrize(("line", "message"), IDLE, ids=[line for line, _ in IDLE])
def test_an_option_that_would_do_nothing_is_refused(line, message, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["attnprune", *(SIDECAR if word == "S" else word for word in line.split())])
    monkeypatch.setattr(out, "__dict__", vars(Output()))
    assert app.run() == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"attnprune: {message}")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [["inspect"], ["eval", "--data", "x"], ["trace", "--text", "a"], ["diff", "x"]])
def test_an_empty_name_is_not_the_current_folder(command, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["attnprune", command[0], "", *command[1:]])
    monkeypatch.setattr(out, "__dict__", vars(Output()))
    assert app.run() == 2
    assert capsys.readouterr().err.splitlines()[-1] == "attnprune: the name of the model is empty"
