"""attach and detach on a small Llama: guards, dtypes, refusals, the self check."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from attnprune.attention import interface
from attnprune.attention.interface import attach, detach, gates_of
from attnprune.errors import InputError, SelfCheckError, UnsupportedModelError
from tests.helpers.gated import BIAS, logits_of


def snapshot(model):
    names = [name for name, _ in model.named_modules()]
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    return names, hooks, sorted(model.state_dict()), model.config._attn_implementation, model.training


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_detach_restores_the_model_bit_for_bit(tiny_llama, tokens, implementation):
    model, ids = tiny_llama(), tokens(2, 11)
    model.set_attn_implementation(implementation)
    model.train()
    before, state = logits_of(model, ids), snapshot(model)
    attach(model, 0.1)
    assert len(gates_of(model)) == 3
    assert model.training
    assert not torch.allclose(logits_of(model, ids), before)
    detach(model)
    assert snapshot(model) == state
    assert torch.equal(logits_of(model, ids), before)


def test_attach_works_again_after_detach(attached, tokens):
    model, _ = attached()
    ids = tokens(1, 9)
    first = logits_of(model, ids)
    detach(model)
    attach(model, BIAS)
    assert torch.equal(logits_of(model, ids), first)


def test_attach_sets_one_bias_per_layer_and_head(attached):
    _, gates = attached()
    assert [gate.layer for gate in gates] == [0, 1, 2]
    assert torch.equal(torch.stack([gate.bias.detach() for gate in gates]), BIAS)
    assert all(gate.bias.dtype == torch.float32 and gate.bias.requires_grad for gate in gates)


def test_attach_does_not_draw_random_numbers_or_leave_gradients(tiny_llama):
    model, state = tiny_llama(), torch.get_rng_state()
    attach(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_attaching_twice_is_refused(attached, tokens):
    model, gates = attached()
    ids = tokens(1, 7)
    before = logits_of(model, ids)
    with pytest.raises(UnsupportedModelError, match="already has gates"):
        attach(model)
    assert gates_of(model) == gates
    assert torch.equal(logits_of(model, ids), before)


NAN = float("nan")

WRONG_BIASES = [torch.zeros(3, 5), torch.zeros(2, 4), torch.zeros(9, 4), torch.zeros(3), NAN, torch.full((3, 4), NAN)]


@pytest.mark.parametrize("bias", WRONG_BIASES, ids=str)
def test_bias_of_a_wrong_shape_or_value_is_refused_and_leaves_the_model_unchanged(tiny_llama, bias):
    model = tiny_llama()
    state = snapshot(model)
    with pytest.raises(InputError, match="bias"):
        attach(model, bias)
    assert snapshot(model) == state


def test_switching_the_implementation_raises_at_the_next_forward(attached, tokens):
    model, _ = attached()
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="switched to 'sdpa'"):
        model(tokens(1, 5))
    model.set_attn_implementation("attnprune")
    logits_of(model, tokens(1, 5))


def test_writing_the_implementation_into_the_config_raises_at_the_next_forward(attached, tokens):
    model, _ = attached()
    model.config._attn_implementation = "eager"
    with pytest.raises(RuntimeError, match="switched to 'eager'"):
        model(tokens(1, 5))
    detach(model)
    logits_of(model, tokens(1, 5))


def test_the_name_without_gates_is_refused(tiny_llama, tokens):
    model = tiny_llama(attn_implementation="attnprune")
    with pytest.raises(UnsupportedModelError, match="without gates"):
        model(tokens(1, 5))


@pytest.mark.parametrize("cast", ["bfloat16", "half", "to_bfloat16", "to_float16"])
def test_gate_bias_stays_fp32_when_the_model_is_cast(attached, tokens, cast):
    model, gates = attached()
    exact = [gate.bias.detach().clone() for gate in gates]
    method, _, dtype = cast.rpartition("_")
    model = model.to(getattr(torch, dtype)) if method else getattr(model, cast)()
    assert model.model.layers[0].self_attn.q_proj.weight.dtype in (torch.bfloat16, torch.float16)
    assert all(gate.bias.dtype == torch.float32 for gate in gates)
    assert all(torch.equal(gate.bias, before) for gate, before in zip(gates, exact, strict=True))
    assert any(not torch.equal(before, before.to(model.dtype).float()) for before in exact)
    assert logits_of(model, tokens(2, 9)).isfinite().all()


def test_model_dtype_is_that_of_the_weights_when_gates_are_fp32(attached):
    model, _ = attached()
    assert model.to(torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_attach_to_a_cast_model(tiny_llama, tokens, dtype):
    model = tiny_llama().to(dtype)
    gates = attach(model, BIAS)
    assert logits_of(model, tokens(2, 9)).dtype == dtype
    assert all(gate.bias.dtype == torch.float32 for gate in gates)


@pytest.mark.parametrize("after", ["nothing", "inference", "training"])
def test_deepcopy(attached, tokens, after):
    model, gates = attached()
    ids = tokens(2, 9)
    if after == "inference":
        logits_of(model, ids)
    if after == "training":
        model(ids, labels=ids).loss.backward()
    twin = copy.deepcopy(model)
    expected = logits_of(model, ids)
    assert torch.equal(logits_of(twin, ids), expected)
    with torch.no_grad():
        gates[0].bias.fill_(-40)
    assert torch.equal(logits_of(twin, ids), expected)
    twin.config._attn_implementation = "sdpa"
    with pytest.raises(RuntimeError, match="switched"):
        twin(ids)
    detach(twin)
    assert not gates_of(twin)
    assert len(gates_of(model)) == 3
    logits_of(twin, ids)
    assert not torch.equal(logits_of(model, ids), expected)


def test_dropout_that_is_set_after_attaching_is_refused(attached, tokens):
    model, _ = attached()
    ids = tokens(1, 6)
    model.model.layers[1].self_attn.attention_dropout = 0.1
    logits_of(model, ids)
    model.train()
    with pytest.raises(UnsupportedModelError, match="dropout"):
        model(ids)


@pytest.mark.parametrize("refused", ["cache", "position_bias"])
def test_paged_caches_and_position_biases_are_refused(attached, refused):
    model, _ = attached()
    query, key = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8)
    visible = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    module = model.model.layers[0].self_attn
    interface.attnprune_attention(module, query, key, key, visible, **{refused: None})
    with pytest.raises(UnsupportedModelError, match=refused):
        interface.attnprune_attention(module, query, key, key, visible, **{refused: object()})


def test_a_missing_mask_is_refused(attached):
    model, _ = attached()
    query, key = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8)
    with pytest.raises(UnsupportedModelError, match="no mask"):
        interface.attnprune_attention(model.model.layers[0].self_attn, query, key, key, None)


@pytest.mark.parametrize("option", [{"is_encoder_decoder": True}, {"is_causal": False}])
def test_models_that_are_not_causal_decoders_are_refused(tiny_llama, option):
    model = tiny_llama()
    for name, value in option.items():
        setattr(model.config, name, value)
    with pytest.raises(UnsupportedModelError, match="only causal decoders"):
        attach(model)
    assert not gates_of(model)


def test_a_sparsified_model_type_is_refused(tiny_llama):
    model = tiny_llama()
    model.config.model_type = "attnprune_llama"
    with pytest.raises(UnsupportedModelError, match="already sparsified"):
        attach(model)


def test_a_model_whose_own_logits_are_not_finite_is_bad_input(tiny_llama):
    model = tiny_llama()
    model.model.layers[0].mlp.down_proj.weight.data.fill_(3e38)  # finite numbers, as a reader of files checks them
    state = snapshot(model)
    with pytest.raises(InputError, match="llama: the model's own logits are not finite"):
        attach(model)
    assert snapshot(model) == state


def test_a_model_that_never_calls_us_is_refused_and_left_unchanged(monkeypatch, tokens):
    config = AutoConfig.for_model("bloom", vocab_size=97, hidden_size=32, n_layer=2, n_head=4)
    model = AutoModelForCausalLM.from_config(config).eval()
    monkeypatch.setattr(interface, "SUPPORTED_FAMILIES", frozenset({"bloom"}))
    ids, state = tokens(2, 9), snapshot(model)
    before = logits_of(model, ids)
    with pytest.raises((SelfCheckError, UnsupportedModelError)):
        attach(model)
    assert snapshot(model) == state
    assert torch.equal(logits_of(model, ids), before)


@pytest.mark.parametrize("fault", ["scale", "acausal", "raises"])
def test_wrong_attention_fails_the_self_check_and_leaves_the_model_unchanged(monkeypatch, tiny_llama, tokens, fault):
    model, ids, real = tiny_llama(), tokens(2, 9), interface.gated_attention
    state, before = snapshot(model), logits_of(model, ids)

    def faulty(query, key, value, bias, visible, **options):
        if fault == "raises":
            raise ZeroDivisionError
        if fault == "scale":
            options["scaling"] *= 1.01
        else:
            visible = torch.ones_like(visible)
        return real(query, key, value, bias, visible, **options)

    monkeypatch.setattr(interface, "gated_attention", faulty)
    with pytest.raises(ZeroDivisionError if fault == "raises" else SelfCheckError):
        attach(model)
    assert snapshot(model) == state
    assert torch.equal(logits_of(model, ids), before)


@pytest.mark.parametrize("scale", [1, 100])
def test_the_self_check_allows_for_the_size_of_the_logits(tiny_llama, scale):
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight *= scale
    assert len(attach(model)) == 3
