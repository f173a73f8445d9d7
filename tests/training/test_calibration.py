"""Initial biases from a head's own scores: the mass they keep, the families' variants of a score, and the limits."""

from __future__ import annotations

import pytest
import torch
import transformers

from attnprune.attention.interface import attach, gates_forced_open, gates_of
from attnprune.attention.reference import gated_attention_reference
from attnprune.training.calibration import BIAS_LIMIT, bias_for_mass
from tests.helpers.factory import spread


def kept_mass(model, ids, bias):
    """Per layer and head: mean over the queries of the probability that open gates keep, the model running dense."""
    patterns, kept = [], []
    hooks = [
        gate.register_forward_pre_hook(
            lambda gate, args, options: patterns.append((gate, args, options)), with_kwargs=True
        )
        for gate in gates_of(model)
    ]
    with torch.no_grad(), gates_forced_open(model):
        model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    for layer, (_, (query, key, value, visible), options) in enumerate(patterns):
        options = {name: options[name] for name in ("scaling", "softcap", "sinks")}
        wide = [x.double() for x in (query, key, value)]
        gated = gated_attention_reference(*wide, bias[layer].double(), visible, **options)[1]
        dense = gated_attention_reference(*wide, torch.full_like(bias[layer], 1e9).double(), visible, **options)[1]
        kept.append(gated.sum((0, 2, 3)) / dense.sum((0, 2, 3)))
    return torch.stack(kept)


def families():
    small = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    }  # fmt: skip
    return {
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**small)),
        "softcap": lambda: transformers.Gemma2ForCausalLM(
            transformers.Gemma2Config(**small, head_dim=8, attn_logit_softcapping=2.0, query_pre_attn_scalar=4)
        ),
        "sinks": lambda: transformers.GptOssForCausalLM(
            transformers.GptOssConfig(**small, head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=8)
        ),
    }


@pytest.mark.parametrize("family", list(families()))
@pytest.mark.parametrize("mass", [0.5, 0.9, 0.99])
def test_open_gates_keep_the_asked_mass_and_not_an_edge_more(family, mass, tokens):
    model = spread(families()[family]())
    ids = tokens(3, 24)
    attach(model)
    bias = bias_for_mass(model, ids, mass)
    kept = kept_mass(model, ids, bias)
    assert (kept >= mass - 1e-6).all()
    assert (kept <= mass + 0.03).all()  # one edge holds at most 1/72 of the mass of 72 queries


def test_biases_are_finite_and_bounded(tiny_llama, tokens):
    model = tiny_llama()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(1000)
    attach(model)
    bias = bias_for_mass(model, tokens(2, 16), 0.99)
    assert bias.shape == (3, 4)
    assert bias.abs().max() == BIAS_LIMIT


def test_the_model_is_left_as_it_was(tiny_llama, tokens):
    model, ids = tiny_llama(), tokens(2, 16)
    attach(model, 0.5)
    before = model(input_ids=ids).logits
    bias_for_mass(model, ids, 0.9)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert not any(gate._forward_pre_hooks or gate.forced_open for gate in gates_of(model))
