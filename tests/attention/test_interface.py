"""Gated models run as defined: independent edge counts, padding, caches, patterns, checkpointing, masks.

Long because every test runs the same small model.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from attnprune.attention import interface
from attnprune.attention.interface import attach, detach, gates_forced_open, gates_of
from attnprune.data.blocks import Blocks
from attnprune.errors import UnsupportedModelError
from attnprune.measure import measure
from tests.helpers.gated import logits_of


def counts(gates):
    """(open edges, visible edges of one head), summed over layers."""
    return sum(int(g.last.open_edges.sum()) for g in gates), sum(int(g.last.visible_edges) for g in gates)


@pytest.fixture
def record(monkeypatch):
    """Start recording the calls of the gated attention: a growing list of (query, key, bias, visible, scaling)."""

    def start():
        recorded, real = [], interface.gated_attention

        def recording(query, key, value, bias, visible, **options):
            shape = (query.shape[0], 1, query.shape[2], key.shape[2])
            recorded.append((query, key, bias, visible.expand(shape), options["scaling"]))
            return real(query, key, value, bias, visible, **options)

        monkeypatch.setattr(interface, "gated_attention", recording)
        return recorded

    return start


def scores_of(call):
    """Scores [B, H, Q, K] of a recorded call in numpy fp64."""
    query, key, _, _, scaling = call
    query, key = query.detach().double().numpy(), key.detach().double().numpy()
    return scaling * np.einsum("bhid,bhjd->bhij", query, np.repeat(key, query.shape[1] // key.shape[1], axis=1))


def count_by_definition(call):
    """(open gates [B, H, Q, K], visible pairs [B, Q, K]); a pair is visible if both of its tokens are real."""
    _, _, bias, visible, _ = call
    visible = visible[:, 0].numpy()
    real = np.einsum("bii->bi", visible)
    visible = visible & real[:, :, None] & real[:, None, :]
    logits = scores_of(call) + bias.detach().double().numpy()[None, :, None, None]
    return (logits > 0) & visible[:, None], visible


def test_measured_density_equals_the_definition(attached, tokens, record):
    model, gates = attached()
    calls = record()
    ids = tokens(5, 24)
    report = measure(model, Blocks(ids, ids.clone(), "random"), batch_size=2)
    assert len(calls) == 3 * 3
    open_edges = sum(int(count_by_definition(call)[0].sum()) for call in calls)
    visible_edges = sum(4 * int(count_by_definition(call)[1].sum()) for call in calls)
    assert report.open_edges == open_edges
    assert report.visible_edges == visible_edges == 5 * 3 * 4 * 24 * 25 // 2
    assert report.density == pytest.approx(open_edges / visible_edges, rel=1e-12)
    assert report.edges_per_query == pytest.approx(open_edges / (5 * 24 * 3 * 4), rel=1e-12)
    assert 0.2 < report.density < 0.9
    for layer, gate in enumerate(gates):
        by_head = sum(count_by_definition(call)[0].sum((0, 2, 3)) for call in calls[layer::3])
        assert report.heads[layer] == pytest.approx((by_head / (5 * 24 * 25 // 2)).tolist(), rel=1e-6)
        assert torch.equal(gate.bias, calls[layer][2])


def test_density_in_training_with_noise_counts_the_run_time_rule(attached, tokens, record):
    model, gates = attached()
    calls = record()
    model.train()
    ids = tokens(2, 12)
    for gate in gates:
        gate.noise_seed = 3
    noisy = model(ids, use_cache=False).logits
    for call, gate in zip(calls, gates, strict=True):
        assert gate.last.open_edges.tolist() == count_by_definition(call)[0].sum((0, 2, 3)).tolist()
    for gate in gates:
        gate.noise_seed = 4
    assert not torch.allclose(model(ids, use_cache=False).logits, noisy)


def test_noise_is_drawn_only_in_training_and_differs_by_layer(attached, tokens):
    model, gates = attached()
    ids = tokens(2, 12)
    quiet = logits_of(model, ids)
    for gate in gates:
        gate.noise_seed = 3
    assert torch.equal(logits_of(model, ids), quiet)
    model.train()
    noisy = logits_of(model, ids)
    assert torch.equal(logits_of(model, ids), noisy)
    assert not torch.allclose(noisy, quiet)
    gates[0].layer = 17
    assert not torch.allclose(logits_of(model, ids), noisy)


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_counts_equal_the_definition_under_padding(attached, tokens, record, side):
    model, gates = attached()
    calls = record()
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.int64)
    if side != "none":
        mask[1, :5] = 0
        mask = mask if side == "left" else mask.flip(1)
    logits_of(model, ids, attention_mask=mask)
    real = mask.sum(1)
    for call, gate in zip(calls, gates, strict=True):
        is_open, visible = count_by_definition(call)
        assert gate.last.open_edges.tolist() == is_open.sum((0, 2, 3)).tolist()
        assert gate.last.visible_edges.item() == visible.sum() == (real * (real + 1) // 2).sum()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_equals_single_rows(attached, tokens, side):
    model, gates = attached()
    lengths, width = [12, 7, 1], 12
    rows = [tokens(1, length) for length in lengths]
    batch, mask = torch.zeros(3, width, dtype=torch.int64), torch.zeros(3, width, dtype=torch.int64)
    spans = [slice(width - n, width) if side == "left" else slice(0, n) for n in lengths]
    for i, (row, span) in enumerate(zip(rows, spans, strict=True)):
        batch[i, span], mask[i, span] = row[0], 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    together = logits_of(model, batch, attention_mask=mask, position_ids=positions)
    batched, visible = [gate.last.open_edges for gate in gates], [gate.last.visible_edges for gate in gates]
    alone_open, alone_visible = [torch.zeros(4, dtype=torch.int64) for _ in gates], [0, 0, 0]
    for i, (row, span) in enumerate(zip(rows, spans, strict=True)):
        torch.testing.assert_close(together[i : i + 1, span], logits_of(model, row), rtol=0, atol=1e-5)
        for layer, gate in enumerate(gates):
            alone_open[layer] += gate.last.open_edges
            alone_visible[layer] += int(gate.last.visible_edges)
    assert all(torch.equal(a, b) for a, b in zip(batched, alone_open, strict=True))
    assert [int(v) for v in visible] == alone_visible
    assert together.isfinite().all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_penalty_of_a_padded_batch_is_the_sum_of_its_rows(attached, tokens, side):
    model, gates = attached()
    long, short = tokens(1, 10), tokens(1, 6)
    padding = torch.zeros(1, 4, dtype=torch.int64)
    padded = torch.cat([padding, short] if side == "left" else [short, padding], 1)
    mask = torch.cat([torch.ones_like(long), (padded > 0).long()])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    model(torch.cat([long, padded]), attention_mask=mask, position_ids=positions, use_cache=False)
    together = [gate.last.penalty for gate in gates]
    model(long, use_cache=False)
    alone = [gate.last.penalty for gate in gates]
    model(short, use_cache=False)
    for whole, first, gate in zip(together, alone, gates, strict=True):
        torch.testing.assert_close(whole, first + gate.last.penalty, rtol=1e-5, atol=0)


def test_counts_with_a_cache_add_up_to_the_uncached_ones(attached, tokens):
    model, gates = attached()
    ids = tokens(2, 9)
    logits_of(model, ids)
    whole = counts(gates)
    with torch.no_grad():
        out, total = model(ids[:, :6], use_cache=True), counts(gates)
        for i in range(6, 9):
            out = model(ids[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
            total = tuple(a + b for a, b in zip(total, counts(gates), strict=True))
    assert total == whole


def test_returned_pattern_is_the_gated_one(attached, tokens, record):
    model, gates = attached()
    calls = record()
    ids = tokens(2, 11)
    model.eval()
    with torch.no_grad():
        out = model(ids, use_cache=False, output_attentions=True)
    assert torch.equal(out.logits, logits_of(model, ids))
    assert len(out.attentions) == 3
    for pattern, gate, call in zip(out.attentions, gates, calls, strict=False):
        assert (pattern != 0).sum((0, 2, 3)).tolist() == gate.last.open_edges.tolist()
        is_open, visible = count_by_definition(call)
        exponents = np.exp(scores_of(call)) * visible[:, None]
        expected = exponents / exponents.sum(-1, keepdims=True) * is_open
        np.testing.assert_allclose(pattern.numpy(), expected, rtol=0, atol=1e-6)
    with torch.no_grad():
        assert model(ids, use_cache=False).attentions is None


def test_last_counts_are_of_the_last_forward(attached, tokens):
    model, gates = attached()
    logits_of(model, tokens(1, 30))
    logits_of(model, tokens(1, 4))
    assert [int(gate.last.visible_edges) for gate in gates] == [10] * 3


@pytest.mark.parametrize("noisy", [False, True])
def test_future_tokens_do_not_change_past_logits(attached, tokens, noisy):
    model, gates = attached()
    model.train(noisy)
    for gate in gates:
        gate.noise_seed = 5
    ids = tokens(2, 14)
    changed = ids.clone()
    changed[:, 8:] = ids[:, 8:] % 96 + 1
    before, after = logits_of(model, ids), logits_of(model, changed)
    assert torch.equal(before[:, :8], after[:, :8])
    assert not torch.allclose(before[:, 8:], after[:, 8:])


def test_no_mask_and_a_full_mask_are_the_same(attached, tokens):
    model, _ = attached()
    ids = tokens(2, 14)
    assert torch.equal(logits_of(model, ids), logits_of(model, ids, attention_mask=torch.ones_like(ids)))


def loss_with_penalty(model, gates, ids):
    loss = model(ids, labels=ids, use_cache=False).loss
    return loss + 0.01 * sum(gate.last.penalty.sum() for gate in gates)


@pytest.mark.parametrize("noisy", [False, True])
def test_gradient_checkpointing_changes_no_gradient(attached, tokens, noisy):
    model, gates = attached()
    model.train()
    for gate in gates:
        gate.noise_seed = 9 if noisy else None
        gate.temperature = 3.0
    ids = tokens(2, 10)
    loss_with_penalty(model, gates, ids).backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss_with_penalty(model, gates, ids).backward()
    assert all(torch.count_nonzero(gate.bias.grad) == 4 for gate in gates)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name], rtol=1e-6, atol=1e-8, msg=name)


def test_gates_and_weights_get_gradients_from_the_penalty_alone(attached, tokens):
    model, gates = attached()
    model(tokens(2, 10), use_cache=False)
    sum(gate.last.penalty.sum() for gate in gates).backward()
    assert all((gate.bias.grad > 0).all() for gate in gates)
    assert torch.count_nonzero(model.model.layers[0].self_attn.q_proj.weight.grad) > 0


def test_autocast_bf16(attached, tokens):
    model, gates = attached()
    ids = tokens(2, 10)
    exact = logits_of(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_with_penalty(model, gates, ids)
        rough = logits_of(model, ids)
    loss.backward()
    assert all(gate.bias.grad.isfinite().all() and gate.bias.grad.dtype == torch.float32 for gate in gates)
    assert (rough.float() - exact).abs().mean() < 0.1 * exact.abs().mean()


def own_masks(length):
    """A causal mask with a hole, as bool and as the float mask of transformers."""
    visible = torch.ones(length, length, dtype=torch.bool).tril()[None, None].repeat(2, 1, 1, 1)
    visible[1, 0, 5:, 2] = False
    return visible, torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)


def test_own_masks_bool_and_float_are_equal(attached, tokens):
    model, _ = attached()
    ids = tokens(2, 9)
    visible, additive = own_masks(9)
    by_bool, by_float = (logits_of(model, ids, attention_mask=mask) for mask in (visible, additive))
    plain = logits_of(model, ids)
    assert torch.equal(by_bool, by_float)
    assert torch.equal(by_bool[0], plain[0])
    assert not torch.allclose(by_bool[1, 5:], plain[1, 5:])


@pytest.mark.parametrize("lowest", [float("-inf"), -1e9, -1e4])
def test_own_float_mask_equals_eager(attached, tokens, lowest):
    model, _ = attached()
    ids = tokens(2, 9)
    visible, _ = own_masks(9)
    mask = torch.zeros(visible.shape).masked_fill(~visible, lowest)
    with gates_forced_open(model):
        ours = logits_of(model, ids, attention_mask=mask)
    detach(model)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(ours, logits_of(model, ids, attention_mask=mask), rtol=0, atol=1e-5)


def test_additive_bias_masks_are_refused(attached, tokens):
    model, _ = attached()
    distance = torch.arange(9)[:, None] - torch.arange(9)
    slope = (-0.5 * distance).masked_fill(distance < 0, torch.finfo(torch.float32).min).expand(2, 1, 9, 9)
    with pytest.raises(UnsupportedModelError, match="float of 0"):
        model(tokens(2, 9), attention_mask=slope)


def test_forced_open_gates_equal_eager_and_the_state_is_restored(attached, tokens):
    model, gates = attached()
    ids = tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    before = logits_of(model, ids, attention_mask=mask)
    gates[1].forced_open = True
    with gates_forced_open(model):
        dense = logits_of(model, ids, attention_mask=mask)
        assert counts(gates)[0] == 4 * counts(gates)[1]
    assert [gate.forced_open for gate in gates] == [False, True, False]
    gates[1].forced_open = False
    assert torch.equal(logits_of(model, ids, attention_mask=mask), before)
    detach(model)
    model.set_attn_implementation("eager")
    eager = logits_of(model, ids, attention_mask=mask)
    torch.testing.assert_close(dense[mask.bool()], eager[mask.bool()], rtol=0, atol=1e-5)


def test_forced_open_state_is_restored_after_an_error(attached):
    model, gates = attached()
    with pytest.raises(ZeroDivisionError), gates_forced_open(model):
        raise ZeroDivisionError
    assert not any(gate.forced_open for gate in gates)


def test_closed_gates_pass_nothing(attached, tokens):
    model, gates = attached()
    with torch.no_grad():
        for gate in gates:
            gate.bias.fill_(-1e4)
    ids = tokens(1, 9)
    out = logits_of(model, ids)
    assert counts(gates)[0] == 0
    assert out.isfinite().all()
    same_last_token = tokens(1, 9)
    same_last_token[:, -1] = ids[:, -1]
    assert torch.equal(logits_of(model, same_last_token)[:, -1], out[:, -1])


def test_state_dict_holds_one_bias_per_layer(attached):
    model, gates = attached()
    keys = [key for key in model.state_dict() if "attnprune" in key]
    assert keys == [f"model.layers.{i}.self_attn.attnprune_gate.bias" for i in range(3)]
    assert gates_of(model) == gates


def test_gpt2_options_that_change_the_scale(tokens):
    for option in ({"scale_attn_by_inverse_layer_idx": True}, {"reorder_and_upcast_attn": True}):
        config = GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=3, n_head=4, **option)
        model, ids = GPT2LMHeadModel(config).eval(), tokens(2, 9)
        with torch.no_grad():
            for block in model.transformer.h:
                block.attn.c_attn.weight.normal_(0, 32**-0.5)
        gates = attach(model, 0.2)
        logits_of(model, ids)
        assert 0.2 < counts(gates)[0] / (4 * counts(gates)[1]) < 0.95
        with gates_forced_open(model):
            dense = logits_of(model, ids)
        detach(model)
        model.set_attn_implementation("eager")
        torch.testing.assert_close(dense, logits_of(model, ids), rtol=0, atol=1e-5)
