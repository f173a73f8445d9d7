"""What an extra brings and is not installed: one line with the command that installs it, exit code 2, everywhere."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import pytest

from attnprune.heads.store import duckdb
from attnprune.report.frontier import draw_frontier
from attnprune.sidecar import bases, loading
from attnprune.training import harness, scope
from tests.helpers.factory import refused

# extra -> (modules that are not there, what needs them)
CALLS = {
    "lora": ("peft", lambda: scope._add_lora(None, None)),
    "lora, loaded": ("peft", lambda: loading._add_lora(None, {}, None)),
    "plots": ("matplotlib.figure", lambda: draw_frontier([], Path())),
    "index": ("duckdb", duckdb),
    "eval": ("lm_eval.tasks", lambda: harness.evaluate_tasks("model", None, ["x"])),
    "gguf": ("gguf", lambda: bases.load_base("model.gguf")),
}
NOT_A_PACKAGE_TO_MISS = {"docs", "dev", "lens"}  # lens: tests/api/test_lens_missing.py


@pytest.mark.parametrize("name", CALLS)
def test_a_missing_extra_is_bad_input(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.gguf").touch()
    module, call = CALLS[name]
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(bases, "find_spec", lambda package: None)
    error = refused(call, " is not installed")
    assert error.hint == f'pip install "attnprune[{name.partition(",")[0]}]"'


def test_every_extra_is_tried():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    extras = set(project["optional-dependencies"]) - NOT_A_PACKAGE_TO_MISS
    assert {name.partition(",")[0] for name in CALLS} == extras
