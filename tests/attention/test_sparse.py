"""Gated attention at run time, where closed gates save work: equal to the definition, in every shape."""

from __future__ import annotations

import math

import pytest
import torch

from attnprune.attention import chunked, sparse
from attnprune.attention.chunked import GateSettings, gated_attention
from attnprune.attention.reference import gated_attention_reference, open_edges_reference
from attnprune.sidecar import modeling_attnprune
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


def run_time(leaves, visible, **options):
    with torch.no_grad():
        return gated_attention(*leaves[:4], visible, scaling=WIDTH**-0.5, **options)


both_ways = pytest.mark.parametrize("share", [-1.0, 1.0], ids=["matmul", "edges"])


@both_ways
@pytest.mark.parametrize(("rows", "elements"), [(3, 2**20), (64, 300), (64, 1)])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("bias", [-2.5, 0.0, math.inf])
def test_run_time_is_the_definition_by_both_ways(monkeypatch, share, rows, elements, mask, bias):
    monkeypatch.setattr(sparse, "GATHER_SHARE", share)
    monkeypatch.setattr(chunked, "CHUNK_ROWS", rows)
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", elements)
    query, key, value, _, sinks = inputs()
    gates = torch.full((HEADS,), bias, dtype=torch.float64)
    visible = visible_mask(mask)
    counted = visible & visible.diagonal(dim1=-2, dim2=-1)[..., None]
    seen = torch.zeros(HEADS, LENGTH, LENGTH, dtype=torch.int64)

    def on_chunk(rows, cols, is_open):
        assert is_open.dtype == torch.bool
        seen[:, rows, cols] += is_open.sum(0)

    for options in ({}, {"sinks": sinks, "softcap": 2.0}):
        seen.zero_()
        with torch.no_grad():
            made = gated_attention(
                query, key, value, gates, visible, scaling=0.5, counted=counted,
                settings=GateSettings(on_chunk=on_chunk), **options,
            )  # fmt: skip
            expected, _, _ = gated_attention_reference(query, key, value, gates, visible, scaling=0.5, **options)
            is_open = open_edges_reference(query, key, gates, counted, 0.5, options.get("softcap"))
        assert torch.allclose(made.output, expected, rtol=0, atol=1e-12)
        assert torch.equal((made.output == 0).all(-1), (expected == 0).all(-1))
        assert made.open_edges.tolist() == is_open.sum((0, 2, 3)).tolist()
        assert made.visible_edges.item() == counted.sum().item()
        assert torch.equal(seen, is_open.sum(0))
        assert not made.penalty.any()
        if bias == -2.5 and not options:
            assert 0 < int(is_open.any(-1).sum()) < is_open[..., 0].numel() / 2  # most rows are dead


@both_ways
def test_steps_with_a_cache_are_the_rows_of_the_whole(monkeypatch, share):
    monkeypatch.setattr(sparse, "GATHER_SHARE", share)
    leaves, visible = inputs(), visible_mask("left_pad")
    whole = run_time(leaves, visible)
    steps = [
        run_time([leaves[0][:, :, rows], *leaves[1:]], visible[:, :, rows])
        for rows in (slice(0, 5), *(slice(i, i + 1) for i in range(5, LENGTH)))
    ]
    assert_relative(torch.cat([step.output for step in steps], 2), whole.output, 1e-12)
    assert torch.equal(sum(step.open_edges for step in steps), whole.open_edges)


@both_ways
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_run_time_in_low_precision_and_with_strides(monkeypatch, share, dtype, tolerance):
    monkeypatch.setattr(sparse, "GATHER_SHARE", share)
    leaves, visible = inputs(dtype=dtype), visible_mask("packed")
    strided = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in leaves[:3]] + leaves[3:]
    made = run_time(strided, visible)
    truth, is_open = by_definition(*leaves[:4], visible)
    assert made.output.dtype == dtype
    assert_relative(made.output.double(), torch.from_numpy(truth), tolerance)
    assert made.open_edges.tolist() == is_open.sum((0, 2, 3)).tolist()
    assert torch.equal(run_time(leaves, visible).output, made.output)


@pytest.mark.parametrize(("softcap", "use_sinks"), [(None, False), (2.0, False), (None, True)])
@pytest.mark.parametrize("mask", ["causal", "left_pad", "packed"])
@pytest.mark.parametrize("bias", [-2.5, -1.0, 1.0])
def test_the_portable_code_computes_the_same_bits(bias, mask, softcap, use_sinks):
    leaves, visible = inputs(queries=150, keys=150, dtype=torch.float32), visible_mask(mask, length=150)
    gate = modeling_attnprune.Gate(HEADS)
    torch.nn.init.constant_(gate.bias, bias)
    options = {"softcap": softcap, "sinks": leaves[4] if use_sinks else None}
    ours = run_time([*leaves[:3], gate.bias], visible, **options).output
    with torch.no_grad():
        theirs, _ = gate(*leaves[:3], visible, WIDTH**-0.5, return_pattern=False, **options)
    with_gradient, _ = gate(*leaves[:3], visible, WIDTH**-0.5, return_pattern=False, **options)
    assert torch.equal(theirs, ours)
    assert torch.equal(with_gradient, ours)
    assert torch.autograd.grad(with_gradient.sum(), leaves[2])[0].isfinite().all()


@both_ways
@pytest.mark.parametrize("bias", [-2.5, 0.0])
def test_run_time_keeps_nan(monkeypatch, share, bias):
    """A row that sees a NaN is NaN, with or without an open edge, and no other is."""
    monkeypatch.setattr(sparse, "GATHER_SHARE", share)
    leaves, visible = inputs(), visible_mask("packed")
    with torch.no_grad():
        leaves[1][0, 0, 1] = float("nan")
        leaves[3].fill_(bias)
    sees = visible[0, 0, :, 1]
    output = run_time(leaves, visible).output
    assert output[0, :2, sees].isnan().all()
    assert output[0, :2, ~sees].isfinite().all()
    assert output[0, 2:].isfinite().all()
    assert output[1].isfinite().all()


@pytest.mark.parametrize("bias", [-40.0, float("-inf")])
def test_closed_gates_and_rows_that_see_nothing_are_zero_at_run_time(bias):
    leaves, visible = inputs(), visible_mask("left_pad")
    closed = [*leaves[:3], torch.full_like(leaves[3], bias)]
    assert torch.count_nonzero(run_time(closed, visible).output) == 0
    nothing = torch.zeros_like(visible)
    for gates in (leaves[3], torch.full_like(leaves[3], float("inf"))):
        made = run_time([*leaves[:3], gates], nothing)
        assert torch.count_nonzero(made.output) == 0
        assert made.open_edges.tolist() == [0] * HEADS


def test_few_open_edges_read_no_other_values(monkeypatch):
    """Values that no gate opens may hold anything, also NaN: they are not read."""
    leaves, visible = inputs(), visible_mask("causal")
    with torch.no_grad():
        leaves[3].fill_(-3.0)
    monkeypatch.setattr(sparse, "GATHER_SHARE", 0.0)
    assert run_time(leaves, visible).open_edges.sum() > 0
    monkeypatch.setattr(sparse, "GATHER_SHARE", 1.0)
    before = run_time(leaves, visible).output
    is_open = open_edges_reference(*leaves[:2], leaves[3], visible, WIDTH**-0.5)
    unread = ~is_open.any(2).view(BATCH, 2, HEADS // 2, LENGTH).any(2)
    assert 0 < unread.sum() < unread.numel()
    with torch.no_grad():
        leaves[2][unread] = float("nan")
    assert torch.equal(run_time(leaves, visible).output, before)


@pytest.mark.parametrize(("batch", "length"), [(1, 2048), (16, 512)])
@pytest.mark.parametrize(("train", "bias"), [(False, -2.0), (False, math.inf), (True, -2.0)])
def test_no_tensor_is_larger_than_a_block(batch, length, train, bias):
    """Masks apart. Also not the list of edges where all are open: then there is none."""
    query, key, value = (x.requires_grad_(train) for x in torch.randn(3, batch, 16, length, 4).unbind(0))
    visible = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    with torch.set_grad_enabled(train), LargestTensor() as largest:
        made = gated_attention(query, key, value, torch.full((16,), bias), visible, scaling=0.5)
        if train:
            made.output.sum().backward()
    assert made.open_edges.sum() > 0
    assert largest.numbers <= chunked.CHUNK_ELEMENTS <= batch * 16 * length**2 / 64
