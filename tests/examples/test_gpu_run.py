"""The GPU run, on a toy and a CPU: starts from a sidecar, keeps its frontier, measures every sidecar on every text."""

from __future__ import annotations

import json

import pytest

from attnprune.sidecar.folder import open_sidecar
from attnprune.training import recipe
from tests.examples.test_scripts import run, words
from tests.helpers.factory import save_text, save_tiny_llama
from tests.helpers.recipes import run_config

OPTIONS = (
    "--frontier", "90,70", "--seq-len", 32, "--lengths", 32, 16, "--tokens-per-step", 64, "--eval-tokens", 128,
    "--eval-every", 10, "--lora-rank", 2, "--device", "cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """(base, text, sidecar of the attention's adapters to start from)."""
    folder = tmp_path_factory.mktemp("start")
    model, text = save_tiny_llama(folder / "model", max_position_embeddings=64), save_text(folder / "text.txt")
    train = {"scope": "lora", "lora_rank": 2, "steps": 2}
    sidecar = recipe.sparsify(run_config((model, text), folder / "start", train=train))
    return model, text, sidecar.path


def test_it_trains_measures_and_writes_each_line(start, tmp_path):
    model, text, init = start
    (tmp_path / "kept.txt").write_text("\n".join(words(80, n) for n in range(20)))
    out = tmp_path / "out"
    arguments = ("--data", text, "--evaluate", tmp_path / "kept.txt", "--init", init, "--out", out, "--time", "60s")
    run("examples/gpu_run.py", model, *arguments, *OPTIONS)
    first, trained, *measured = [json.loads(line) for line in (out / "measured.jsonl").read_text().splitlines()]
    assert first["command"][0] == str(model)
    sidecar = open_sidecar(out / "run")
    assert trained["trained"] == sidecar.manifest.result.steps > 0
    assert "lora:all-linear" in sidecar.manifest.requires
    assert [(line["sidecar"], line["seq_len"]) for line in measured if line["text"].endswith("kept.txt")] == [
        (".", 32), (".", 16), ("frontier/90", 32), ("frontier/90", 16),
    ]  # fmt: skip
    for line in measured:
        assert line["kl"] >= 0
        assert line["control_loss"] > 0


def test_a_text_is_not_for_both(start, tmp_path):
    model, text, init = start
    arguments = (model, "--data", text, "--evaluate", text, "--init", init, "--out", tmp_path / "out")
    with pytest.raises(AssertionError, match="is not one to measure on"):
        run("examples/gpu_run.py", *arguments, *OPTIONS)
