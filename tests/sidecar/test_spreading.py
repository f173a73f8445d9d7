"""Sparse models that are spread over devices and the disk, or quantised, while they are loaded; the room it takes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from transformers import BitsAndBytesConfig

import attnprune
from attnprune.attention.interface import gates_of
from attnprune.measure import measure
from attnprune.sidecar import bases, loading
from attnprune.training import recipe
from attnprune.training.evaluation import held_out_split
from tests.helpers.command import ENVIRONMENT
from tests.helpers.command import attnprune as command
from tests.helpers.factory import refused, save_text, save_tiny_llama
from tests.helpers.recipes import run_config

DISK = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu",
        "model.rotary_emb": "cpu", "lm_head": "disk"}  # fmt: skip
PEAK = """
import sys, torch
from attnprune.sidecar import loading
from attnprune.training.machine import PeakMemory
loading.load(sys.argv[2])  # what is loaded once
memory = PeakMemory(torch.device("cpu"))
model = loading.load(sys.argv[1], verify=False).model
print(memory.peak() / sum(p.numel() * p.element_size() for p in model.parameters()))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spread")
    inputs = save_tiny_llama(folder / "model"), save_text(folder / "text.txt")
    made = {}
    for scope in ("lora", "full"):
        made[scope] = recipe.sparsify(run_config(inputs, folder / scope, train={"scope": scope, "steps": 4}))
    return made


@pytest.mark.parametrize("scope", ["lora", "full"])
def test_layers_on_the_disk_compute_the_same(runs, scope):
    """The probe is run as well. Weights on the disk are not in memory, and the gates are."""
    sidecar, ids = runs[scope], torch.arange(20)[None]
    plain, spread = loading.load(sidecar.path).model, loading.load(sidecar.path, device_map=DISK).model
    assert spread.model.layers[0].self_attn.q_proj.weight.is_meta
    assert [gate.bias.tolist() for gate in gates_of(spread)] == [bias.tolist() for bias in sidecar.biases()]
    with torch.no_grad():
        assert torch.equal(spread(ids).logits, plain(ids).logits)
    assert spread.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 24)


def test_an_evaluation_of_spread_models_is_that_of_models_in_memory(runs, tmp_path):
    path = runs["lora"].path
    assert attnprune.evaluate(path, device_map=DISK) == attnprune.evaluate(path)
    shown = command("eval", path, "--device-map", "auto", "--json", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["reproduced"]


def test_another_base_is_refused_when_it_is_spread(runs, tmp_path):
    other = save_tiny_llama(tmp_path / "other", seed=1)
    refused(lambda: loading.load(runs["lora"].path, str(other), device_map=DISK), "not the weights")
    refused(lambda: loading.load(runs["lora"].path, device_map="everywhere"), "is not one of auto")
    refused(lambda: loading.load(runs["lora"].path, device_map={"model.norm": "cpu"}), "device_map:")


@pytest.mark.parametrize("bits", [4, 8])
def test_a_sidecar_on_its_base_in_fewer_bits(runs, bits):
    """The identity checked is that of the base in full precision, and the adapter stays beside the rounded weights."""
    settings = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    sidecar = runs["lora"]
    model = attnprune.load(sidecar.path, device_map="auto", quantization_config=settings).model
    assert (
        type(model.model.layers[0].self_attn.q_proj.base_layer).__name__ == {4: "Linear4bit", 8: "Linear8bitLt"}[bits]
    )
    full = bases.load_base(str(sidecar.path.parent / "model"))
    held_out = held_out_split(sidecar, full)
    plain = measure(loading.load(sidecar.path).model, held_out)
    found = measure(model, held_out)
    assert found.loss != plain.loss
    assert found.loss == pytest.approx(plain.loss, abs=0.2)
    refused(
        lambda: loading.load(runs["full"].path, quantization_config=settings), "cannot be changed in a quantised base"
    )
    refused(
        lambda: loading.load(sidecar.path, quantization_config=settings, dtype=torch.bfloat16), "leave out device_map"
    )


def test_loading_takes_little_more_than_the_model(runs, tmp_path):
    """A sidecar is applied in at most 1.2 times the memory of the model, here 280 MB."""
    model = save_tiny_llama(
        tmp_path / "model", hidden_size=768, intermediate_size=2048, num_hidden_layers=10, num_attention_heads=12,
        num_key_value_heads=12, initializer_range=0.02,
    )  # fmt: skip
    text = save_text(tmp_path / "text.txt")
    sidecar = recipe.sparsify(run_config((model, text), tmp_path / "run", train={"scope": "lora", "steps": 1}))
    line = [sys.executable, "-c", PEAK, str(sidecar.path), str(runs["lora"].path)]
    done = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)
    if "None" in done.stderr:
        pytest.skip("this system does not tell a process's peak memory")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= 1.2
