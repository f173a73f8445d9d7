"""Adapters on all linear layers: trained, exported, loaded, refused by readers that do not know them."""

from __future__ import annotations

import pytest
import torch

from attnprune.errors import InputError
from attnprune.runs.config import build_config
from attnprune.sidecar import loading
from attnprune.sidecar.folder import open_sidecar
from attnprune.sidecar.format import manifest as manifest_module
from attnprune.training import recipe
from attnprune.training.optimizer import make_optimizer
from attnprune.training.scope import attach_gates, make_trainable
from tests.helpers.families import build
from tests.helpers.recipes import run_config
from tests.helpers.sidecars import save_tiny_gpt2

LINEAR = {
    "llama": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
              "mlp.up_proj", "mlp.down_proj"},
    "gpt2": {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"},
}  # fmt: skip
TRAIN = {"scope": "lora", "lora_rank": 4, "lora_targets": "all", "learning_rate": 1e-2}


def changed(sidecar):
    """Names of the modules with adapters, without their layer's."""
    names = {name.rsplit(".lora_", 1)[0] for name in sidecar.weights()}
    return {".".join(name.split(".")[-2:]) for name in names}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_linear_layer_is_trained_and_comes_back(family, inputs, tmp_path):
    model, text = inputs
    model = save_tiny_gpt2(tmp_path / "gpt2") if family == "gpt2" else model
    sidecar = recipe.sparsify(run_config((model, text), tmp_path / "run", train=TRAIN))
    assert "lora:all-linear" in sidecar.manifest.requires
    assert changed(sidecar) == LINEAR[family]
    ups = [tensor.abs().sum() for name, tensor in sidecar.weights().items() if "lora_B" in name]
    assert min(ups) > 0  # each has learned
    loaded, _ = loading.load(sidecar.path, str(model))  # runs the probe
    assert loaded is not None


def test_a_reader_that_does_not_know_them_says_so_in_one_line(inputs, tmp_path, monkeypatch):
    sidecar = recipe.sparsify(run_config(inputs, tmp_path / "run", train={**TRAIN, "steps": 1}))
    monkeypatch.setattr(manifest_module, "FEATURES", manifest_module.FEATURES - {"lora:all-linear"})
    with pytest.raises(InputError, match="needs 'lora:all-linear', which this version does not know"):
        open_sidecar(sidecar.path)


def test_attention_alone_needs_nothing_new(inputs, tmp_path):
    train = {**TRAIN, "lora_targets": "attention", "steps": 1}
    sidecar = recipe.sparsify(run_config(inputs, tmp_path / "run", train=train))
    assert sidecar.manifest.requires == ["gate:threshold", "weights:lora"]
    assert changed(sidecar) == {name for name in LINEAR["llama"] if "self_attn" in name}


def test_more_adapters_may_start_from_the_attention_s(inputs, tmp_path):
    few = recipe.sparsify(run_config(inputs, tmp_path / "few", train={**TRAIN, "lora_targets": "attention"}))
    model = {"init": str(few.path)}
    still = {**TRAIN, "learning_rate": 1e-12, "gate_learning_rate": 1e-12, "steps": 1}
    more = recipe.sparsify(run_config(inputs, tmp_path / "more", train=still, model=model))
    assert more.manifest.result.loss == pytest.approx(few.manifest.result.loss, abs=1e-6)
    less = {"train": {**TRAIN, "lora_targets": "attention"}, "model": {"init": str(more.path)}}
    with pytest.raises(InputError, match="on all linear layers do not fit") as refused:
        recipe.sparsify(run_config(inputs, tmp_path / "back", **less))
    assert refused.value.hint == "--scope lora --lora-rank 4 --lora-targets all"


@pytest.mark.parametrize("scope", ["full", "lora"])
def test_the_rest_has_its_own_rate(scope):
    train = {"scope": scope, "lora_targets": "all", "learning_rate": 1e-3, "weight_decay": 0.1}
    config = build_config({"train": {**train, "rest_learning_rate": 1e-4}})
    model = build("llama")
    attach_gates(model, config)
    model, _ = make_trainable(model, config)
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {
        names[id(p)]: (group["lr"], group["weight_decay"])
        for group in make_optimizer(model, config.train, "cpu").param_groups
        for p in group["params"]
    }
    assert rates.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, found in rates.items():
        decay = 0.1 if dict(model.named_parameters())[name].ndim > 1 else 0.0
        if "gate.bias" in name or (name.endswith("bias") and "gate" in name):
            assert found == (config.train.gate_learning_rate, 0.0)
        else:
            assert found == (1e-3 if "self_attn" in name else 1e-4, decay), name
    assert isinstance(make_optimizer(model, config.train, "cpu"), torch.optim.AdamW)
