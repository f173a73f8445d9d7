"""The adapters that find a model's parts, or say what is missing."""

from __future__ import annotations

import pytest
import torch
from accelerate import dispatch_model
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig

from attnprune.attention.interface import gates_of
from attnprune.circuit.model.adapters import anatomy_of, graph_of, open_gates
from attnprune.errors import UnsupportedModelError
from tests.helpers.families import build, ids, logits_of


@pytest.mark.parametrize("family", ["granite", "phi3", "mixtral", "bloom"])
def test_a_family_without_an_adapter_is_refused_by_name(family):
    config = AutoConfig.for_model(family)
    with pytest.raises(UnsupportedModelError, match=f"{family}: no circuit adapter .which norms") as error:
        graph_of(config)
    assert "llama" in error.value.hint


def test_a_missing_part_is_named():
    model = build("llama")
    del model.model.layers[2].post_attention_layernorm
    with pytest.raises(UnsupportedModelError, match="llama: layer 2: no post_attention_layernorm"):
        anatomy_of(model)


def test_a_model_that_is_spread_is_refused(tmp_path):
    """Circuits add up what all layers wrote, and weights on the disk are not there to read."""
    model = build("llama")
    whole = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    layers = [f"model.layers.{layer}" for layer in range(model.config.num_hidden_layers)]
    places = dict.fromkeys(whole + layers, "cpu") | {"model.layers.0": "disk"}
    spread = dispatch_model(model, places, offload_dir=str(tmp_path), main_device="cpu", force_hooks=True)
    with pytest.raises(UnsupportedModelError, match="llama: is spread over cpu, meta") as error:
        anatomy_of(spread)
    assert "device_map" in error.value.hint


def test_an_adapter_that_is_not_merged_is_refused():
    """Its base weight alone is not what the model computes."""
    model = build("llama")
    get_peft_model(model, LoraConfig(r=2, target_modules=["v_proj"]))
    with pytest.raises(UnsupportedModelError, match=r"layer 0: v_proj is a peft.*Linear, not") as error:
        anatomy_of(model)
    assert "merge" in error.value.hint


def test_a_bias_under_a_norm_is_refused():
    model = build("olmo2")
    output = model.model.layers[1].self_attn.o_proj
    output.bias = nn.Parameter(torch.zeros(32))
    with pytest.raises(UnsupportedModelError, match="layer 1: o_proj has a bias under a norm"):
        anatomy_of(model)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_open_gates_change_nothing_and_are_removed(family):
    model, tokens = build(family), ids(2, 9)
    model.set_attn_implementation("eager")
    before = logits_of(model, tokens)
    with open_gates(model):
        assert anatomy_of(model).gated
        torch.testing.assert_close(logits_of(model, tokens), before, rtol=0, atol=1e-5)
    assert not gates_of(model)
    assert torch.equal(logits_of(model, tokens), before)
