"""The run-time kernels (in Triton's interpreter where there is no GPU) against the fp64 reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnprune.attention.reference import gated_attention_reference, open_edges_reference
from attnprune.attention.spans import spans_of
from tests.helpers.attention import MASKS, visible_mask

pytest.importorskip("triton")
from attnprune.attention.kernels import decode as decoding
from attnprune.attention.kernels import prefill as prefilling
from attnprune.attention.kernels.decode import decode
from attnprune.attention.kernels.prefill import prefill

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH, HEADS, LENGTH, SCALING = 2, 4, 45, 0.25
NAN, INF = float("nan"), float("inf")


def tensors(heads=HEADS, kv_heads=2, queries=LENGTH, keys=LENGTH, width=16, bias=(-2.5, -1.0), seed=0):
    draw = torch.Generator().manual_seed(seed)
    shapes = [(BATCH, heads, queries, width), *[(BATCH, kv_heads, keys, width)] * 2]
    query, key, value = (torch.randn(*shape, generator=draw).to(DEVICE) for shape in shapes)
    return query, key, value, torch.linspace(*bias, heads, device=DEVICE)


def with_open_head(inputs):
    """The same with the last head forced open."""
    inputs[3][-1] = INF
    return inputs


def defined(query, key, value, bias, visible, counted=None):
    """Output and open edges [B, H, Q] by the definition."""
    wide = [x.double() for x in (query, key, value, bias)]
    output, _, _ = gated_attention_reference(*wide, visible, scaling=SCALING)
    counted = visible if counted is None else counted
    return output, open_edges_reference(*wide[:2], wide[3], counted, SCALING).sum(-1)


def prefilled(query, key, value, bias, visible, counted=None):
    spans = spans_of(visible, counted)
    assert spans is not None
    return prefill(query, key, value, bias, spans.rows, scaling=SCALING)


def assert_defined(made, expected, limit=1e-5):
    (output, open_edges), (output_expected, open_expected) = made, expected
    assert (output.double() - output_expected).abs().max() <= limit
    assert open_edges.dtype == torch.int32
    assert open_edges.tolist() == open_expected.tolist()


@pytest.fixture(params=[True, False], ids=["branches", "no branches"])
def branches(request, monkeypatch):
    """Whether prefill leaves out closed tiles."""
    monkeypatch.setattr(prefilling, "tile_for", lambda *_: prefilling.Tile(16, 16, 4, 2, branches=request.param))
    return request.param


@pytest.mark.parametrize("mask", MASKS)
def test_prefill_is_the_definition(mask, branches):
    inputs = tensors()
    visible = visible_mask(mask, BATCH, LENGTH).to(DEVICE)
    assert_defined(prefilled(*inputs, visible), defined(*inputs, visible))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "queries", "keys", "width"),
    [(3, 1, 20, 20, 24), (4, 4, 7, 33, 16), (2, 1, 1, 17, 8), (2, 2, 16, 16, 16), (2, 1, 18, 40, 80)],
)
def test_prefill_with_other_heads_widths_and_a_cache(heads, kv_heads, queries, keys, width):
    inputs = tensors(heads, kv_heads, queries, keys, width, bias=(-1.0, 0.5))
    visible = visible_mask("causal", BATCH, keys)[:, :, -queries:].to(DEVICE)
    assert_defined(prefilled(*inputs, visible), defined(*inputs, visible), 2e-5 if width == 80 else 1e-5)


def test_rows_that_do_not_count_are_computed_and_not_counted():
    inputs = tensors()
    visible = visible_mask("causal", BATCH, LENGTH).to(DEVICE)
    counted = visible.clone()
    counted[1, :, 30:] = False
    made = prefilled(*inputs, visible, counted)
    assert_defined(made, defined(*inputs, visible, counted))
    assert made[0][1, :, 30:].any()


@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_prefill_takes_any_interval_in_each_row(data):
    """Also empty ones that are not (0, 0); no mask of a model needs as much."""
    queries, keys = data.draw(st.integers(1, 36)), data.draw(st.integers(1, 50))
    ends = st.lists(st.integers(0, keys), min_size=BATCH * queries, max_size=BATCH * queries)
    first, last = (torch.tensor(data.draw(ends)).view(BATCH, queries) for _ in range(2))
    rows = torch.stack([first, last, torch.ones_like(first)], -1).int().to(DEVICE)
    j = torch.arange(keys)
    visible = ((j >= first[..., None]) & (j < last[..., None]))[:, None].to(DEVICE)
    inputs = with_open_head(tensors(2, 1, queries, keys, seed=queries))
    made = prefill(*inputs, rows, scaling=SCALING)
    assert_defined(made, defined(*inputs, visible))
    assert not made[0].transpose(1, 2)[last <= first].any()


@pytest.mark.parametrize("mask", MASKS)
def test_decode_is_the_definition_and_each_row_of_prefill(mask):
    query, key, value, bias = tensors()
    visible = visible_mask(mask, BATCH, LENGTH).to(DEVICE)
    whole, whole_open = prefilled(query, key, value, bias, visible)
    for row in (0, 17, LENGTH - 1):
        step = (query[:, :, row : row + 1], key, value, bias)
        made = decode(*step, visible[:, :, row : row + 1], scaling=SCALING)
        assert_defined(made, defined(*step, visible[:, :, row : row + 1]))
        assert (made[0] - whole[:, :, row : row + 1]).abs().max() <= 1e-5
        assert made[1].tolist() == whole_open[:, :, row : row + 1].tolist()


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(3, 1, 24), (4, 4, 16), (20, 1, 8), (2, 2, 96)])
def test_decode_takes_any_mask_and_any_group(heads, kv_heads, width):
    inputs = tensors(heads, kv_heads, 1, LENGTH, width)
    visible = torch.rand(BATCH, 1, 1, LENGTH, generator=torch.Generator().manual_seed(1)).to(DEVICE) > 0.4
    visible[0, ..., 16:32] = False  # a whole tile
    assert_defined(decode(*inputs, visible, scaling=SCALING), defined(*inputs, visible))
    shared = visible[1:]  # one mask for all sequences
    assert_defined(decode(*inputs, shared, scaling=SCALING), defined(*inputs, shared))
    visible[1] = False  # a sequence that sees nothing
    made = decode(*inputs, visible, scaling=SCALING)
    assert_defined(made, defined(*inputs, visible))
    assert not made[0][1].any()


@pytest.mark.parametrize("programs", [1, 5, 1000])
def test_decode_does_not_depend_on_the_number_of_splits(monkeypatch, programs):
    inputs = tensors(queries=1, keys=80)
    visible = torch.ones(BATCH, 1, 1, 80, dtype=torch.bool, device=DEVICE)
    visible[1, ..., 20:] = False  # most tiles hold nothing
    monkeypatch.setattr(decoding, "PROGRAMS", programs)
    assert_defined(decode(*inputs, visible, scaling=SCALING), defined(*inputs, visible))


def test_splits_fill_the_gpu_without_idle_programs():
    assert decoding.splits_for(groups=1, key_tiles=3) == 3
    assert decoding.splits_for(groups=1, key_tiles=10_000) == decoding.MOST_SPLITS
    assert decoding.splits_for(groups=10_000, key_tiles=10_000) == 1
    assert decoding.splits_for(groups=300, key_tiles=100) * 300 >= decoding.PROGRAMS


def test_prefill_does_not_read_values_of_closed_tiles():
    query, key, value, bias = tensors(heads=1, kv_heads=1, keys=LENGTH, bias=(-3.0, -3.0))
    visible = visible_mask("causal", BATCH, LENGTH).to(DEVICE)
    expected, open_expected = defined(query, key, value, bias, visible)
    is_open = open_edges_reference(query, key, bias, visible, SCALING)
    tile = prefilling.tile_for(16, torch.float32).keys
    closed = [
        (b, start)
        for b in range(BATCH)
        for start in range(0, LENGTH, tile)
        if not is_open[b, ..., start : start + tile].any()
    ]
    for b, start in closed:
        value[b, :, start : start + tile] = NAN
    assert len(closed) >= 2
    assert is_open.any()
    assert_defined(prefilled(query, key, value, bias, visible), (expected, open_expected))


def test_only_live_rows_are_computed(branches):
    """NaN in all values reaches every row with an open edge and no other, not even in the same block of rows."""
    query, key, value, bias = tensors()
    visible = visible_mask("causal", BATCH, LENGTH).to(DEVICE)
    output, open_edges = prefilled(query, key, torch.full_like(value, NAN), bias, visible)
    live = open_edges > 0
    assert output[live].isnan().all()
    assert not output[~live].any()
    assert 0.1 < live.double().mean() < 0.9


def test_a_tile_is_skipped_by_the_rows_for_which_it_is_closed():
    """Whatever is open in it for others."""
    tile = prefilling.tile_for(16, torch.float32)
    query = torch.zeros(1, 1, 2 * tile.queries, 16, device=DEVICE)
    key, value = torch.zeros(2, 1, 1, 2 * tile.keys, 16, device=DEVICE).unbind(0)
    query[:, :, : tile.queries, 0] = query[:, :, tile.queries :, 1] = 8.0
    key[:, :, :, 0] = key[:, :, : tile.keys, 1] = 1.0  # the second tile of keys matches the first block of rows only
    value[:, :, : tile.keys], value[:, :, tile.keys :] = 1.0, NAN
    visible = torch.ones(1, 1, 2 * tile.queries, 2 * tile.keys, dtype=torch.bool, device=DEVICE)
    output, open_edges = prefilled(query, key, value, torch.tensor([-1.0], device=DEVICE), visible)
    assert output[:, :, : tile.queries].isnan().all()
    share = 1 / (1 + torch.tensor(-2.0).exp())  # of the keys with score 2 among those with score 0
    assert torch.allclose(output[:, :, tile.queries :], share.to(DEVICE))
    assert open_edges[0, 0].tolist() == [2 * tile.keys] * tile.queries + [tile.keys] * tile.queries


def test_decode_reads_only_open_value_rows():
    query, key, value, bias = tensors(queries=1, bias=(-1.0, -0.5))
    visible = torch.ones(BATCH, 1, 1, LENGTH, dtype=torch.bool, device=DEVICE)
    expected = defined(query, key, value, bias, visible)
    is_open = open_edges_reference(query, key, bias, visible, SCALING)[:, :, 0]
    wanted = is_open.view(BATCH, 2, 2, LENGTH).any(2)  # by some head of the group
    value[~wanted] = NAN
    assert 0 < wanted.sum() < wanted.numel() / 2
    assert_defined(decode(query, key, value, bias, visible, scaling=SCALING), expected)


@pytest.mark.parametrize("queries", [1, 20])
def test_what_nobody_sees_may_hold_anything(queries, branches):
    """The rest of a static cache, and the padding on the left."""
    inputs = with_open_head(tensors(queries=queries))
    visible = visible_mask("causal", BATCH, LENGTH)[:, :, -queries:].to(DEVICE)
    visible[..., :9] = False
    visible[..., 40:] = False
    expected = defined(*inputs, visible)
    for x in inputs[1:3]:
        x[:, :, :9] = x[:, :, 40:] = NAN
    assert_defined(prefilled(*inputs, visible), expected)
    if queries == 1:
        assert_defined(decode(*inputs, visible, scaling=SCALING), expected)


@pytest.mark.parametrize("bias", [INF, 40.0, -40.0])
def test_all_open_is_softmax_attention_and_all_closed_is_nothing(bias, branches):
    query, key, value, _ = tensors()
    gates = torch.full((HEADS,), bias, device=DEVICE)
    visible = visible_mask("left_pad", BATCH, LENGTH).to(DEVICE)
    output, open_edges = prefilled(query, key, value, gates, visible)
    last, last_open = decode(query[:, :, -1:], key, value, gates, visible[:, :, -1:], scaling=SCALING)
    if bias < 0:
        assert not any(x.any() for x in (output, open_edges, last, last_open))
        return
    dense = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=visible, enable_gqa=True, scale=SCALING
    ).nan_to_num()
    assert torch.allclose(output, dense, atol=1e-5)
    assert torch.allclose(last, dense[:, :, -1:], atol=1e-5)
    assert torch.equal(open_edges, visible.sum(-1).int().expand_as(open_edges))
    assert torch.equal(last_open, open_edges[..., -1:])


@pytest.mark.filterwarnings("ignore:All-NaN")
def test_a_broken_query_does_not_pass_for_a_closed_row(branches):
    query, key, value, bias = tensors(bias=(-2.0, -40.0))
    visible = visible_mask("left_pad", BATCH, LENGTH).to(DEVICE)
    before, _ = prefilled(query, key, value, bias, visible)
    broken = [2, 5, 20]  # in the second sequence the first of them sees nothing, and the next only two keys
    query[1, :, broken, 3] = NAN
    output, _ = prefilled(query, key, value, bias, visible)
    assert output[1, :, [5, 20]].isnan().all()
    for row in broken:
        step, _ = decode(query[:, :, row : row + 1], key, value, bias, visible[:, :, row : row + 1], scaling=SCALING)
        assert torch.equal(step.isnan(), output[:, :, row : row + 1].isnan())
    output[1, :, [5, 20]] = before[1, :, [5, 20]]
    # Broken rows are live, so others move within the tile, and some processors' matmul rounds by position.
    assert torch.equal(output == 0, before == 0)
    assert torch.allclose(output, before, rtol=0, atol=1e-6)


def test_strided_inputs_and_repeated_runs_agree_bit_for_bit():
    query, key, value, bias = tensors()
    visible = visible_mask("packed", BATCH, LENGTH).to(DEVICE)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value)]
    cache = [torch.stack([x, torch.full_like(x, NAN)], 3).flatten(3)[..., :16] for x in strided]  # rows with gaps
    expected = prefilled(query, key, value, bias, visible)
    for q, k, v in (strided, cache, (query, key, value)):
        made = prefilled(q, k, v, bias, visible)
        assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))
    expected = decode(query[:, :, -1:], key, value, bias, visible[:, :, -1:], scaling=SCALING)
    for q, k, v in (strided, cache, (query, key, value)):
        made = decode(q[:, :, -1:], k, v, bias, visible[:, :, -1:], scaling=SCALING)
        assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))


def test_fp16_inputs():
    query, key, value = (x.half() for x in tensors()[:3])
    bias = tensors()[3]
    visible = visible_mask("causal", BATCH, LENGTH).to(DEVICE)
    made = prefilled(query, key, value, bias, visible)
    assert made[0].dtype == torch.float16
    assert_defined(made, defined(query, key, value, bias, visible), 2e-3)
    step = (query[:, :, -1:], key, value, bias)
    made = decode(*step, visible[:, :, -1:], scaling=SCALING)
    assert made[0].dtype == torch.float16
    assert_defined(made, defined(*step, visible[:, :, -1:]), 2e-3)


@pytest.mark.parametrize(("queries", "block"), [(1, 16), (45, 16), (64, 16), (45, 1024)])
def test_live_rows_are_listed_in_their_order(queries, block):
    draw = torch.Generator().manual_seed(queries)
    live = torch.rand(3, 2, queries, generator=draw) < torch.tensor([0.0, 0.3, 1.0])[:, None, None]
    largest = torch.where(live, torch.randn(live.shape, generator=draw), -INF).to(DEVICE)
    order, count = torch.full_like(largest, -1, dtype=torch.int32), largest.new_empty(3, 2, dtype=torch.int32)
    prefilling.compact_kernel[(6,)](largest, order, count, queries, BLOCK=block)
    for marks, listed, found in zip(live.flatten(0, 1), order.flatten(0, 1), count.flatten(), strict=True):
        assert listed[:found].tolist() == marks.nonzero().flatten().tolist()
        assert (listed[found:] == -1).all()
