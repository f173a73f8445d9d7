"""Chunked gated attention in training against the fp64 reference, and the reference against the definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from attnprune.attention import chunked
from attnprune.attention.chunked import GateSettings, gated_attention
from attnprune.attention.gates import logistic_noise
from attnprune.attention.reference import gated_attention_reference
from tests.helpers.attention import (
    BATCH,
    HEADS,
    LENGTH,
    MASKS,
    WIDTH,
    LargestTensor,
    assert_relative,
    by_definition,
    inputs,
    visible_mask,
)

SEED = 1234


def drawn_noise(query, keys, seed=SEED):
    batch, heads, queries, _ = query.shape
    drawn = logistic_noise(seed, torch.arange(batch * heads), torch.arange(queries), torch.arange(keys), torch.float64)
    return drawn.view(batch, heads, queries, keys)


def run(function, leaves, visible, use_sinks, **options):
    """(output, penalty, gradients) of a loss that weighs every output element and every head's penalty differently."""
    query, key, value, bias, sinks = leaves
    generator = torch.Generator().manual_seed(5)
    output, *rest = function(
        query, key, value, bias, visible, scaling=WIDTH**-0.5, sinks=sinks if use_sinks else None, **options
    )
    penalty = rest[1] if function is gated_attention_reference else rest[0]
    weights = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    loss = (output * weights).sum() + (penalty * torch.linspace(-1, 2, len(penalty), dtype=torch.float64)).sum()
    wanted = leaves if use_sinks else leaves[:-1]
    return output, penalty, torch.autograd.grad(loss, wanted)


@pytest.mark.parametrize("chunk", [1, 300, None])
@pytest.mark.parametrize("use_sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kv_heads", [HEADS, 2])
def test_equals_reference(monkeypatch, kv_heads, mask, noisy, softcap, use_sinks, chunk):
    if chunk is not None:
        monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", chunk)
    leaves, visible = inputs(kv_heads=kv_heads), visible_mask(mask)
    temperatures = {"temperature": 3.0, "slope_temperature": 0.5}
    gate_settings = GateSettings(**temperatures, noise_seed=SEED if noisy else None)
    actual = run(gated_attention, leaves, visible, use_sinks, softcap=softcap, settings=gate_settings)
    noise = drawn_noise(leaves[0], LENGTH) if noisy else None
    expected = run(gated_attention_reference, leaves, visible, use_sinks, softcap=softcap, noise=noise, **temperatures)
    assert_relative(actual[0], expected[0])
    assert_relative(actual[1], expected[1])
    for mine, truth in zip(actual[2], expected[2], strict=True):
        assert_relative(mine, truth)


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_result_does_not_depend_on_the_chunk_size(monkeypatch, mask, noisy):
    leaves, visible = inputs(), visible_mask(mask)
    gate_settings = GateSettings(noise_seed=SEED if noisy else None)
    results = []
    for chunk in (1, BATCH * HEADS * LENGTH * 2, BATCH * HEADS * LENGTH * 5, 2**20):
        monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", chunk)
        *_, gradients = run(gated_attention, leaves, visible, True, settings=gate_settings)
        result = gated_attention(*leaves[:4], visible, scaling=0.4, sinks=leaves[4], settings=gate_settings)
        results.append((result, gradients))
    (first, first_gradients), *others = results
    for result, gradients in others:
        assert torch.equal(result.open_edges, first.open_edges)
        assert torch.equal(result.visible_edges, first.visible_edges)
        assert_relative(result.output, first.output, 1e-13)
        assert_relative(result.penalty, first.penalty, 1e-13)
        for mine, truth in zip(gradients, first_gradients, strict=True):
            assert_relative(mine, truth, 1e-12)


@pytest.mark.parametrize(("softcap", "use_sinks"), [(None, False), (1.5, False), (None, True)])
@pytest.mark.parametrize("mask", MASKS)
def test_reference_and_counts_equal_the_definition(monkeypatch, mask, softcap, use_sinks):
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 300)
    leaves, visible = inputs(), visible_mask(mask)
    sinks = leaves[4] if use_sinks else None
    options = {"scaling": WIDTH**-0.5, "softcap": softcap, "sinks": sinks}
    truth, is_open = by_definition(*leaves[:4], visible, softcap, sinks.tolist() if use_sinks else None)
    output, pattern, _ = gated_attention_reference(*leaves[:4], visible, **options)
    result = gated_attention(*leaves[:4], visible, **options)
    assert_relative(output.detach(), torch.from_numpy(truth), 1e-12)
    assert_relative(result.output.detach(), torch.from_numpy(truth), 1e-12)
    assert np.array_equal((pattern != 0).numpy(), is_open)
    assert result.open_edges.tolist() == is_open.sum((0, 2, 3)).tolist()
    assert result.visible_edges.item() == visible.sum().item()
    assert 0 < is_open.sum() < HEADS * visible.sum()


def test_reference_gradient_has_the_straight_through_term():
    *leaves, _ = inputs()
    visible = visible_mask("causal")
    output, _, _ = gated_attention_reference(*leaves, visible, scaling=WIDTH**-0.5)
    (gradient,) = torch.autograd.grad(output.sum(), leaves[3])
    query, key, value, bias = (x.detach() for x in leaves)
    scores = query @ key.repeat_interleave(2, 1).transpose(-1, -2) * WIDTH**-0.5
    probabilities = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    soft = torch.sigmoid(scores + bias[:, None, None])
    expected = probabilities * soft * (1 - soft) * value.repeat_interleave(2, 1).sum(-1)[:, :, None]
    assert_relative(gradient, expected.sum((0, 2, 3)))


def test_penalty_gradient_equals_finite_differences():
    leaves, visible = inputs(), visible_mask("left_pad")
    gate_settings = GateSettings(temperature=2.0)

    def penalty(*tensors):
        return gated_attention(*tensors, leaves[2], leaves[3], visible, scaling=0.4, settings=gate_settings).penalty

    assert torch.autograd.gradcheck(penalty, (leaves[0], leaves[1]))


def test_noisy_gates_are_counted_with_the_run_time_rule():
    leaves, visible = inputs(), visible_mask("right_pad")
    noisy = gated_attention(*leaves[:4], visible, scaling=0.4, settings=GateSettings(noise_seed=SEED))
    silent = gated_attention(*leaves[:4], visible, scaling=0.4)
    assert torch.equal(noisy.open_edges, silent.open_edges)
    assert not torch.allclose(noisy.output, silent.output)


def test_only_counted_pairs_enter_counts_and_penalty():
    leaves, visible = inputs(), visible_mask("right_pad")
    counted = visible.clone()
    counted[-1, :, -4:] = False
    options = {"scaling": WIDTH**-0.5, "settings": GateSettings(temperature=2.0)}
    result = gated_attention(*leaves[:4], visible, counted=counted, **options)
    whole = gated_attention(*leaves[:4], visible, **options)
    _, is_open = by_definition(*leaves[:4], visible)
    scores = leaves[0] @ leaves[1].repeat_interleave(2, 1).transpose(-1, -2) * WIDTH**-0.5
    smooth = torch.sigmoid((scores + leaves[3][:, None, None]) / 2) * counted
    assert torch.equal(result.output, whole.output)
    assert result.open_edges.tolist() == (is_open & counted.numpy()).sum((0, 2, 3)).tolist()
    assert result.visible_edges.item() == counted.sum().item() < whole.visible_edges.item()
    assert_relative(result.penalty, smooth.sum((0, 2, 3)))
    wanted = torch.autograd.grad(smooth.sum(), leaves[:2] + leaves[3:4])
    for mine, truth in zip(torch.autograd.grad(result.penalty.sum(), leaves[:2] + leaves[3:4]), wanted, strict=True):
        assert_relative(mine, truth)


@pytest.mark.parametrize("noisy", [False, True])
def test_chunk_hook_sees_every_hard_gate_once(monkeypatch, noisy):
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 300)  # blocks of one sequence
    leaves, visible = inputs(), visible_mask("window")
    seen = torch.zeros(HEADS, LENGTH, LENGTH, dtype=torch.int64)

    def record(rows, cols, is_open):
        assert is_open.dtype == torch.bool
        seen[:, rows, cols] += is_open.sum(0)

    gate_settings = GateSettings(noise_seed=SEED if noisy else None, on_chunk=record)
    gated_attention(*leaves[:4], visible, scaling=WIDTH**-0.5, settings=gate_settings)
    assert np.array_equal(seen.numpy(), by_definition(*leaves[:4], visible)[1].astype(np.int64).sum(0))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("mask", ["causal", "left_pad"])
def test_low_precision_inputs(mask, dtype, tolerance):
    leaves, visible = inputs(dtype=dtype), visible_mask(mask)
    actual = run(gated_attention, leaves, visible, True)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    expected = run(gated_attention_reference, wide, visible, True)
    assert actual[0].dtype == dtype
    assert actual[1].dtype == torch.float32
    assert_relative(actual[0].double(), expected[0], tolerance)
    assert_relative(actual[1].double(), expected[1], 1e-5)
    for leaf, mine, truth in zip(leaves, actual[2], expected[2], strict=True):
        assert mine.dtype == leaf.dtype
        assert_relative(mine.double(), truth, tolerance)


def test_strided_views_and_a_broadcast_mask():
    leaves = inputs()
    views = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in leaves[:3]] + leaves[3:]
    visible = visible_mask("causal", batch=1)
    actual = run(gated_attention, views, visible, True)
    expected = run(gated_attention, leaves, visible.repeat(BATCH, 1, 1, 1), True)
    assert_relative(actual[0], expected[0], 1e-13)
    for mine, truth in zip(actual[2], expected[2], strict=True):
        assert_relative(mine, truth, 1e-12)


def test_value_width_may_differ():
    query, key, _, bias, _ = inputs()
    value = torch.randn(BATCH, 2, LENGTH, 5, dtype=torch.float64, requires_grad=True)
    visible = visible_mask("causal")
    actual = gated_attention(query, key, value, bias, visible, scaling=0.4).output
    expected = gated_attention_reference(query, key, value, bias, visible, scaling=0.4)[0]
    assert_relative(actual, expected)
    wanted = torch.autograd.grad(expected.square().sum(), (query, key, value, bias))
    for mine, truth in zip(torch.autograd.grad(actual.square().sum(), (query, key, value, bias)), wanted, strict=True):
        assert_relative(mine, truth)


@pytest.mark.parametrize("noisy", [False, True])
def test_memory_is_bounded_by_the_chunk(monkeypatch, noisy):
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 2**18)
    length = 2048
    leaves = inputs(batch=1, heads=2, queries=length, keys=length, width=16, dtype=torch.float32)
    visible = visible_mask("causal", 1, length)
    with LargestTensor() as largest:
        result = gated_attention(
            *leaves[:4], visible, scaling=0.25, settings=GateSettings(noise_seed=SEED if noisy else None)
        )
        (result.output.sum() + result.penalty.sum()).backward()
    assert leaves[0].grad.isfinite().all()
    assert 2**16 < largest.numbers <= 2**18  # 32 times below H * T * T
    assert largest.masks <= length * length  # the mask itself, never one per head


def test_future_tokens_do_not_change_earlier_rows(monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 300)
    leaves, visible = inputs(), visible_mask("causal")
    before = gated_attention(*leaves[:4], visible, scaling=0.4, settings=GateSettings(noise_seed=SEED)).output
    with torch.no_grad():
        for x in leaves[:3]:
            x[:, :, 9:] += torch.randn_like(x[:, :, 9:])
    after = gated_attention(*leaves[:4], visible, scaling=0.4, settings=GateSettings(noise_seed=SEED)).output
    assert torch.equal(before[:, :, :9], after[:, :, :9])
    assert not torch.allclose(before[:, :, 9:], after[:, :, 9:])


def test_hidden_keys_may_hold_anything():
    leaves, visible = inputs(), visible_mask("left_pad")
    before = run(gated_attention, leaves, visible, True)
    with torch.no_grad():
        leaves[1][-1, :, :4] = 1e4
        leaves[2][-1, :, :4] = -1e4
    after = run(gated_attention, leaves, visible, True)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[2][3], after[2][3])


@pytest.mark.parametrize("bias", [-40.0, -1e4, float("-inf")])
def test_closed_gates_give_exact_zeros(bias):
    leaves, visible = inputs(), visible_mask("left_pad")
    with torch.no_grad():
        leaves[3].fill_(bias)
    output, _, gradients = run(gated_attention, leaves, visible, False)
    assert torch.count_nonzero(output) == 0
    assert all(gradient.isfinite().all() for gradient in gradients)
    result = gated_attention(*leaves[:4], visible, scaling=0.4)
    assert result.open_edges.tolist() == [0] * HEADS


def test_rows_without_an_open_edge_are_exact_zeros_and_others_are_not():
    leaves, visible = inputs(), visible_mask("causal")
    output = gated_attention(*leaves[:4], visible, scaling=WIDTH**-0.5).output
    empty = torch.from_numpy(~by_definition(*leaves[:4], visible)[1].any(-1))
    assert 0 < empty.sum() < empty.numel()
    assert torch.equal((output == 0).all(-1), empty)


def test_rows_that_see_nothing_are_zero_without_nan():
    leaves = inputs()
    nothing = torch.zeros(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool)
    for use_sinks in (False, True):
        output, penalty, gradients = run(gated_attention, leaves, nothing, use_sinks)
        assert torch.count_nonzero(output) == 0
        assert torch.count_nonzero(penalty) == 0
        assert all(torch.count_nonzero(gradient) == 0 for gradient in gradients)


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("mask", ["causal", "window", "packed", "right_pad"])
def test_forced_open_gates_are_softmax_attention(mask, noisy):
    leaves, visible = inputs(), visible_mask(mask)
    forced = torch.full_like(leaves[3], float("inf"))
    gate_settings = GateSettings(noise_seed=SEED if noisy else None)
    result = gated_attention(*leaves[:3], forced, visible, scaling=0.4, settings=gate_settings)
    dense = functional.scaled_dot_product_attention(*leaves[:3], attn_mask=visible, scale=0.4, enable_gqa=True)
    assert_relative(result.output, dense)
    assert result.open_edges.tolist() == [visible.sum().item()] * HEADS
    weights = torch.randn_like(dense)
    wanted = torch.autograd.grad((dense * weights).sum(), leaves[:3])
    for mine, truth in zip(torch.autograd.grad((result.output * weights).sum(), leaves[:3]), wanted, strict=True):
        assert_relative(mine, truth)


def test_large_scores_do_not_overflow():
    leaves, visible = inputs(dtype=torch.float32), visible_mask("causal")
    with torch.no_grad():
        leaves[0] *= 1e3
    output, penalty, gradients = run(gated_attention, leaves, visible, True)
    assert all(x.isfinite().all() for x in (output, penalty, *gradients))


def test_autocast_leaves_the_arithmetic_alone():
    leaves, visible = inputs(dtype=torch.float32), visible_mask("causal")
    plain = gated_attention(*leaves[:4], visible, scaling=0.4)
    with torch.autocast("cpu", torch.bfloat16):
        cast = gated_attention(*leaves[:4], visible, scaling=0.4)
    assert torch.equal(plain.output, cast.output)
    assert torch.equal(plain.penalty, cast.penalty)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    queries=st.integers(1, 9),
    keys=st.integers(1, 9),
    width=st.integers(1, 5),
    chunk=st.sampled_from([1, 7, 40, 2**20]),
    seed=st.integers(0, 2**32 - 1),
    noisy=st.booleans(),
    share=st.sampled_from([0.0, 0.2, 0.7, 1.0]),
)
def test_any_shape_and_any_mask(batch, kv_heads, groups, queries, keys, width, chunk, seed, noisy, share):
    torch.manual_seed(seed)
    leaves = inputs(batch, kv_heads * groups, kv_heads, queries, keys, width)
    visible = torch.rand(batch, 1, queries, keys) < share
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "CHUNK_ELEMENTS", chunk)
        actual = run(gated_attention, leaves, visible, True, settings=GateSettings(noise_seed=seed if noisy else None))
        counts = gated_attention(*leaves[:4], visible, scaling=width**-0.5)
    noise = drawn_noise(leaves[0], keys, seed) if noisy else None
    expected = run(gated_attention_reference, leaves, visible, True, noise=noise)
    for mine, truth in zip((*actual[:2], *actual[2]), (*expected[:2], *expected[2]), strict=True):
        assert_relative(mine, truth, 1e-9)
    assert counts.open_edges.tolist() == by_definition(*leaves[:4], visible)[1].sum((0, 2, 3)).tolist()
