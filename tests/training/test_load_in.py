"""Runs whose base bitsandbytes holds in 4 or 8 bits: what they write, who can read it, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import attnprune
from attnprune.attention.interface import gates_of
from attnprune.measure import measure
from attnprune.sidecar import bases, loading
from attnprune.sidecar.identity import fingerprint
from attnprune.training import recipe
from attnprune.training.evaluation import held_out_split
from tests.helpers.command import ENVIRONMENT
from tests.helpers.command import attnprune as command
from tests.helpers.factory import refused, save_tiny_llama
from tests.helpers.recipes import run_config
from tests.helpers.sidecars import save_tiny_gpt2

WAYS = ("4bit", "8bit")
WITHOUT = "import sys; sys.modules['bitsandbytes'] = None; from attnprune.cli.app import main; main()"


def run(inputs, out, load_in, scope="lora", **model):
    train = {"scope": scope, "steps": 6, "lora_rank": 4, "learning_rate": 3e-3}
    sidecar = recipe.sparsify(run_config(inputs, out, model={"load_in": load_in, **model}, train=train))
    assert sidecar is not None
    return sidecar


@pytest.fixture(scope="module")
def runs(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    made = {way: run(inputs, folder / way, way) for way in WAYS}
    return made | {f"{way} kept": run(inputs, folder / f"{way}-kept", way, keep_quantised=True) for way in WAYS}


def with_doubled_query(model, place):
    """A copy of a model folder in which one matrix is twice as large, which leaves its 4-bit codes as they are."""
    loaded = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        loaded.model.layers[0].self_attn.q_proj.weight.mul_(2)
    loaded.save_pretrained(place)
    for file in model.glob("tokenizer*"):
        (place / file.name).write_bytes(file.read_bytes())
    return place


@pytest.mark.parametrize("way", WAYS)
def test_the_sidecar_is_for_the_base_in_full_precision(runs, inputs, way):
    """It verifies where there is no bitsandbytes, and says both numbers."""
    manifest = runs[way].manifest
    entry = bases.identity(bases.load_base(str(inputs[0])))
    assert manifest.base.model_dump() == {key: value for key, value in entry.items() if value is not None}
    assert manifest.requires == ["gate:threshold", "weights:lora"]
    told = (manifest.train.load_in, manifest.train.against)
    assert told == (way, "quantised")
    assert manifest.train.base_loss != manifest.result.base_loss
    line = [sys.executable, "-c", WITHOUT, "verify", str(runs[way].path)]
    done = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    shown = command("inspect", runs[way].path, cwd=inputs[0]).stdout
    assert f"as it trained, from the quantised base: KL {manifest.train.kl:.4f}" in shown


@pytest.mark.parametrize("way", WAYS)
def test_the_number_against_the_quantised_base_is_that_of_its_own_adapter_and_gates(runs, inputs, way):
    """Rebuilt from the written files: gates and adapter beside the quantised weights, compared with them alone."""
    sidecar = runs[way]
    dense, sparse = (bases.load_base(str(inputs[0]), quantise=way) for _ in range(2))
    loading.install(sparse.model, sidecar.biases(), sidecar.weights(), sidecar.manifest.weights)
    held_out = held_out_split(sidecar, bases.load_base(str(inputs[0])))
    found, told = measure(sparse.model, held_out, reference=bases.dense(dense.model)), sidecar.manifest.train
    assert (found.loss, found.base_loss, found.kl) == pytest.approx((told.loss, told.base_loss, told.kl), abs=1e-3)
    assert found.density == pytest.approx(told.density, abs=5e-3)


@pytest.mark.parametrize("way", WAYS)
def test_a_kept_base_is_quantised_again_in_a_new_process(runs, inputs, way):
    sidecar = runs[f"{way} kept"]
    manifest, result = sidecar.manifest, sidecar.manifest.result
    assert manifest.base.quantisation.bits == int(way[0])
    assert manifest.requires[-1] == "base:quantised"
    told = (manifest.train.load_in, manifest.train.against)
    assert told == (way, "full")
    found = json.loads(command("eval", sidecar.path, "--json", cwd=inputs[0]).stdout)
    assert found["reports"][0]["loss"] == pytest.approx(result.loss, abs=1e-6)
    assert found["reports"][0]["open_edges"] == result.open_edges
    assert found["reports"][0]["kl"] == pytest.approx(result.kl, abs=1e-6)
    assert command("verify", sidecar.path, cwd=inputs[0]).returncode == 0


def test_the_number_against_full_precision_is_what_it_says(runs, inputs):
    sidecar = runs["4bit kept"]
    full, (_, sparse) = bases.load_base(str(inputs[0])), (None, loading.load(sidecar.path).model)
    found = measure(sparse, held_out_split(sidecar, full), reference=bases.dense(full.model))
    assert found.kl == pytest.approx(sidecar.manifest.train.kl, abs=1e-6)
    assert found.base_loss == pytest.approx(sidecar.manifest.train.base_loss, abs=1e-6)


def test_a_kept_base_that_is_another_one_is_refused(runs, inputs, tmp_path):
    doubled = with_doubled_query(inputs[0], tmp_path / "doubled")
    for way in WAYS:
        refused(lambda way=way: loading.load(runs[f"{way} kept"].path, str(doubled)), "not the weights")
    sidecar = runs["4bit kept"]
    for other in (bases.load_base(str(inputs[0])), bases.load_base(str(inputs[0]), quantise="8bit")):
        refused(lambda other=other: loading.apply_sidecar(other.model, sidecar), "wrong base model", "to 4 bits")
    plain, quantised = runs["4bit"], bases.load_base(str(inputs[0]), quantise="4bit")
    refused(lambda: loading.apply_sidecar(quantised.model, plain), "in full precision")


def save_quantised(model, place, **options):
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    for name, value in options.items():
        setattr(settings, name, value)
    AutoModelForCausalLM.from_pretrained(model, quantization_config=settings, device_map="cpu").save_pretrained(place)
    for file in model.glob("tokenizer*"):
        (place / file.name).write_bytes(file.read_bytes())
    return place


def test_a_base_that_comes_quantised_is_known_by_codes_and_scales(inputs, tmp_path):
    """Also after a forward, which repacks them where the processor has bf16; their type is no matter."""
    base = save_quantised(inputs[0], tmp_path / "base")
    doubled = save_quantised(with_doubled_query(inputs[0], tmp_path / "plain"), tmp_path / "doubled")
    wide = save_quantised(inputs[0], tmp_path / "wide", bnb_4bit_quant_storage=torch.bfloat16)
    codes = [
        load_file(place / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"] for place in (base, doubled)
    ]
    assert torch.equal(*codes)
    loaded = bases.load_base(str(base))
    before = fingerprint(loaded.model)
    with torch.no_grad():
        loaded.model(input_ids=torch.arange(8)[None])
    assert bases.identity(loaded)["content"] == before.content == fingerprint(bases.load_base(str(base)).model).content
    assert fingerprint(bases.load_base(str(wide)).model) == before
    other = fingerprint(bases.load_base(str(doubled)).model)
    assert (other.structure == before.structure, other.content == before.content) == (True, False)
    sidecar = run((base, inputs[1]), tmp_path / "run", "full", scope="gates")
    assert sidecar.manifest.base.quantisation.stored
    assert sidecar.manifest.train is None
    assert command("verify", sidecar.path, cwd=tmp_path).returncode == 0
    refused(lambda: loading.load(sidecar.path, str(doubled)), "not the weights")
    refused(lambda: loading.load(sidecar.path, str(inputs[0])), "in full precision; the sidecar was made for")
    refused(lambda: bases.load_base(str(base), quantise="8bit"), "quantised already")


def test_a_forward_computes_the_same_every_time_and_in_training(inputs):
    """bitsandbytes would repack the weights in the first evaluation, and round their scales for good."""
    model = bases.load_base(str(save_tiny_llama(inputs[0].parent / "wide", hidden_size=64)), quantise="4bit").model
    ids = torch.arange(24)[None]
    with torch.no_grad():
        first, second, third = model(ids).logits, model(ids).logits, model.train()(ids).logits
    assert torch.equal(first, second)
    assert torch.equal(first, third)


@pytest.mark.parametrize("way", WAYS)
def test_merging_dequantises(runs, way, tmp_path):
    sidecar = runs[f"{way} kept"]
    done = command("apply", sidecar.path, "--merge", tmp_path / "merged", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    merged, sparse = attnprune.load(tmp_path / "merged").model, loading.load(sidecar.path).model
    assert command("verify", tmp_path / "merged", cwd=tmp_path).returncode == 0
    layer = merged.model.layers[1].self_attn.q_proj
    adapted = sparse.model.layers[1].self_attn.q_proj
    inputs = torch.randn(32, 32)
    with torch.no_grad():
        ours, theirs = layer(inputs), adapted(inputs)
    assert (ours - theirs).norm() < 0.02 * theirs.norm()
    assert [gate.bias.tolist() for gate in gates_of(merged)] == [bias.tolist() for bias in sidecar.biases()]


def test_adapters_on_a_family_whose_layers_are_transposed(inputs, tmp_path):
    """gpt2's adapters fit both its quantised layers and its plain ones."""
    model = save_tiny_gpt2(tmp_path / "gpt2")
    for keep in (False, True):
        sidecar = run((model, inputs[1]), tmp_path / f"run{keep}", "4bit", keep_quantised=keep)
        assert command("verify", sidecar.path, cwd=tmp_path).returncode == 0
        adapter = json.loads((sidecar.path / "adapter" / "adapter_config.json").read_text())
        assert adapter["fan_in_fan_out"]
        assert command("apply", sidecar.path, "--merge", tmp_path / f"merged{keep}", cwd=tmp_path).returncode == 0


def test_what_a_quantised_base_cannot_do(inputs, tmp_path, monkeypatch):
    for scope in ("full", "attn"):
        refused(lambda scope=scope: run(inputs, tmp_path / "run", "4bit", scope), f"{scope} trains whole weights")
    refused(lambda: run_config(inputs, tmp_path / "run", model={"keep_quantised": True}), "needs load_in")
    line = ["sparsify", inputs[0], "--data", inputs[1], "--load-in", "3bit", "--out", "run"]
    done = command(*line, cwd=tmp_path)
    assert (done.returncode, "model.load_in" in done.stderr) == (2, True)
    config = run_config(
        inputs, tmp_path / "run", model={"load_in": "4bit"}, data={"source": "self"}, train={"scope": "lora"}
    )
    refused(lambda: recipe.sparsify(config), "self would be written by the base in 4bit")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    refused(lambda: run(inputs, tmp_path / "run", "4bit"), "bitsandbytes is not installed")
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("*.toml"))


def test_no_code_is_fetched_from_the_hub(inputs, tmp_path):
    """bitsandbytes asks the package `kernels` for some while it is imported, if there is one."""
    (tmp_path / "kernels.py").write_text("def get_kernel(*args, **options):\n    open('asked', 'w').close()\n")
    line = [
        "sparsify",
        inputs[0],
        "--data",
        inputs[1],
        "--load-in",
        "4bit",
        "--scope",
        "lora",
        "--dry-run",
        "--out",
        "run",
    ]
    done = command(*line, cwd=tmp_path, PYTHONPATH=f"{tmp_path}:{ENVIRONMENT.get('PYTHONPATH', '')}")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "asked").exists()


@pytest.mark.parametrize("name", ["adamw8bit", "paged_adamw", "paged_adamw8bit"])
def test_bitsandbytes_optimisers_train(inputs, tmp_path, name):
    train = {"scope": "lora", "optimizer": name, "steps": 3}
    sidecar = recipe.sparsify(run_config(inputs, tmp_path / "run", train=train))
    assert sidecar is not None
    trained = sidecar.weights()
    assert any(bool(t.any()) for n, t in trained.items() if "lora_B" in n)
