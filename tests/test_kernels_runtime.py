"""The run-time kernels (in Triton's interpreter where there is no GPU) against the fp64 reference."""

import pytest
import torch

from attnprune.attention import ops
from attnprune.attention.dispatch import counted_pairs
from attnprune.attention.reference import gated_attention_reference, open_edges_reference
from attnprune.attention.spans import spans_of
from tests.test_chunked import MASKS, visible_mask

runtime = pytest.importorskip("attnprune.attention.kernels.runtime")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH, HEADS, LENGTH, SCALING = 2, 4, 45, 0.25


def tensors(heads=HEADS, kv_heads=2, queries=LENGTH, keys=LENGTH, width=16, bias=(-2.5, -1.0)):
    query = torch.randn(BATCH, heads, queries, width, device=DEVICE)
    key, value = torch.randn(2, BATCH, kv_heads, keys, width, device=DEVICE).unbind(0)
    return query, key, value, torch.linspace(*bias, heads, device=DEVICE)


def defined(query, key, value, bias, visible):
    """Output and open edges [H] by the definition."""
    wide = [x.double() for x in (query, key, value, bias)]
    output, _, _ = gated_attention_reference(*wide, visible, scaling=SCALING)
    is_open = open_edges_reference(*wide[:2], wide[3], counted_pairs(visible), SCALING)
    return output, is_open.sum((0, 2, 3))


def run_prefill(query, key, value, bias, visible):
    spans = spans_of(visible, counted_pairs(visible))
    assert spans is not None
    return ops.prefill(query, key, value, bias, spans.rows, SCALING)


def assert_defined(made, inputs, visible):
    output, open_edges = defined(*inputs, visible)
    assert (made[0].double() - output).abs().max() <= 1e-5
    assert made[1].tolist() == open_edges.tolist()
    assert int(open_edges.sum()) > 0


@pytest.mark.parametrize("mask", MASKS)
def test_prefill_is_the_definition(mask):
    inputs = tensors()
    visible = visible_mask(mask, BATCH, LENGTH).to(DEVICE)
    assert_defined(run_prefill(*inputs, visible), inputs, visible)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "queries", "keys", "width"),
    [(3, 1, 20, 20, 24), (4, 4, 7, 33, 16), (2, 1, 1, 17, 8), (2, 2, 16, 16, 16)],
)
def test_prefill_with_other_heads_widths_and_a_cache(heads, kv_heads, queries, keys, width):
    inputs = tensors(heads, kv_heads, queries, keys, width, bias=(-1.0, 0.5))
    visible = visible_mask("causal", BATCH, keys)[:, :, -queries:].to(DEVICE)
    assert_defined(run_prefill(*inputs, visible), inputs, visible)


@pytest.mark.parametrize("mask", MASKS)
def test_decode_is_the_definition_and_the_last_row_of_prefill(mask):
    inputs = tensors()
    visible = visible_mask(mask, BATCH, LENGTH).to(DEVICE)
    whole, _ = run_prefill(*inputs, visible)
    query, key, value, bias = inputs
    last = (query[:, :, -1:], key, value, bias)
    made = ops.decode(*last, visible[:, :, -1:], SCALING)
    output, open_edges = defined(*last, visible[:, :, -1:])
    assert (made[0].double() - output).abs().max() <= 1e-5
    assert (made[0] - whole[:, :, -1:]).abs().max() <= 1e-5
    assert made[1].tolist() == open_edges.tolist()


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(3, 1, 24), (4, 4, 16), (20, 1, 8)])
def test_decode_takes_any_mask_and_any_group(heads, kv_heads, width):
    inputs = tensors(heads, kv_heads, 1, LENGTH, width)
    visible = (torch.rand(BATCH, 1, 1, LENGTH, device=DEVICE) > 0.4).contiguous()
    visible[0, ..., 16:32] = False  # a whole tile
    assert_defined(ops.decode(*inputs, visible, SCALING), inputs, visible)
    shared = visible[:1].expand(BATCH, 1, 1, LENGTH)
    assert_defined(ops.decode(*inputs, shared, SCALING), inputs, shared)


def test_prefill_does_not_use_values_of_closed_tiles_or_dead_rows():
    """NaN in every value row that no gate opens, whole tiles of them, must not be seen."""
    query, key, value, bias = tensors(heads=1, kv_heads=1, bias=(-4.0, -4.0))
    visible = visible_mask("causal", BATCH, LENGTH).to(DEVICE)
    is_open = open_edges_reference(query, key, bias, visible, SCALING)
    tile = runtime.PREFILL_TILE[1]
    for b in range(BATCH):
        for start in range(0, LENGTH, tile):
            if not is_open[b, :, :, start : start + tile].any():
                value[b, :, start : start + tile] = float("nan")
    query[:, :, 20] = 0.0  # a dead row: its scores are 0, below minus the bias
    assert value.isnan().any()
    output, _ = run_prefill(query, key, value, bias, visible)
    assert output.isfinite().all()
    assert not output[:, :, 20].any()
    assert is_open.any()


def test_decode_reads_only_open_value_rows():
    query, key, value, bias = tensors(queries=1, bias=(-1.0, -0.5))
    visible = torch.ones(BATCH, 1, 1, LENGTH, dtype=torch.bool, device=DEVICE)
    is_open = open_edges_reference(query, key, bias, visible, SCALING)[:, :, 0]
    wanted = is_open.view(BATCH, 2, 2, LENGTH).any(2)  # by some head of the group
    output, _ = defined(query, key, value, bias, visible)
    value[~wanted] = float("nan")
    made, _ = ops.decode(query, key, value, bias, visible, SCALING)
    assert wanted.any()
    assert not wanted.all()
    assert (made.double() - output).abs().max() <= 1e-5


@pytest.mark.parametrize("bias", [float("inf"), 40.0, -40.0])
def test_all_open_is_softmax_attention_and_all_closed_is_nothing(bias):
    query, key, value, _ = tensors()
    gates = torch.full((HEADS,), bias, device=DEVICE)
    visible = visible_mask("left_pad", BATCH, LENGTH).to(DEVICE)
    output, open_edges = run_prefill(query, key, value, gates, visible)
    last, last_open = ops.decode(query[:, :, -1:], key, value, gates, visible[:, :, -1:], SCALING)
    if bias < 0:
        assert not output.any()
        assert not last.any()
        assert open_edges.tolist() == last_open.tolist() == [0] * HEADS
        return
    dense = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=visible, enable_gqa=True, scale=SCALING
    ).nan_to_num()
    assert torch.allclose(output, dense, atol=1e-5)
    assert torch.allclose(last, dense[:, :, -1:], atol=1e-5)
    assert open_edges.tolist() == [int(visible.sum())] * HEADS


def test_strided_inputs_and_repeated_runs_agree_bit_for_bit():
    query, key, value, bias = tensors()
    visible = visible_mask("packed", BATCH, LENGTH).to(DEVICE)
    expected = run_prefill(query, key, value, bias, visible)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value)]
    made = run_prefill(*strided, bias, visible)
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))
    one, other = (ops.decode(query[:, :, -1:], key, value, bias, visible[:, :, -1:], SCALING) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_static_cache_longer_than_its_content():
    """The rest of the buffer is hidden and may hold anything."""
    query, key, value, bias = tensors(queries=1, keys=LENGTH)
    visible = torch.ones(BATCH, 1, 1, LENGTH, dtype=torch.bool, device=DEVICE)
    expected = ops.decode(query, key, value, bias, visible, SCALING)
    longer = [torch.cat([x, x.new_full((BATCH, 2, 40, 16), float("nan"))], 2) for x in (key, value)]
    visible = torch.nn.functional.pad(visible, (0, 40))
    made = ops.decode(query, *longer, bias, visible, SCALING)
    assert torch.allclose(made[0], expected[0], atol=1e-6)
    assert made[1].tolist() == expected[1].tolist()


@pytest.mark.parametrize("operator", ["prefill", "decode"])
def test_operators_pass_pytorch_s_own_checks(operator):
    query, key, value, bias = tensors(queries=1, keys=20)
    visible = visible_mask("causal", BATCH, 20)[:, :, -1:].to(DEVICE)
    mask = visible if operator == "decode" else spans_of(visible).rows
    torch.library.opcheck(getattr(ops, operator), (query, key, value, bias, mask, SCALING))


def test_parts_cover_all_keys_whatever_their_number():
    for programs, keys in [(1, 1), (1, 16), (8, 4097), (264, 100), (1000, 100_000), (3, 777)]:
        per_split = runtime._keys_per_split(programs, keys)
        assert per_split % runtime.DECODE_KEYS == 0
        assert per_split * -(-keys // per_split) >= keys
        assert -(-keys // per_split) <= 64
