"""The training kernels (in Triton's interpreter where there is no GPU) against the fp64 reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnprune.attention import ops
from attnprune.attention.dispatch import counted_pairs, gated_attention
from attnprune.attention.gates import logistic_noise, seed_tensor
from attnprune.attention.reference import gated_attention_reference, open_edges_reference
from attnprune.attention.spans import spans_of
from tests.helpers.attention import MASKS, visible_mask

training = pytest.importorskip("attnprune.attention.kernels.training")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEED = 4_000_000_000  # above 2^31: the sign bit of 32
BATCH, HEADS, LENGTH = 2, 4, 40


def leaves(heads=HEADS, kv_heads=2, length=LENGTH, width=16, seed=0):
    """fp64 (query, key, value, bias) and the gradients that come from above (of the output, of the penalty)."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=draw)

    inputs = [normal(BATCH, n, length, width) for n in (heads, kv_heads, kv_heads)]
    return [*inputs, torch.linspace(-0.6, 1.0, heads, dtype=torch.float64)], [
        normal(BATCH, heads, length, width), normal(heads)
    ]  # fmt: skip


def backpropagate(function, inputs, above, dtype):
    """Output, penalty and the gradients of the four inputs."""
    inputs = [x.to(DEVICE, dtype).requires_grad_() for x in inputs]
    output, penalty, *rest = function(*inputs)
    ((output * above[0].to(DEVICE, dtype)).sum() + (penalty * above[1].to(DEVICE, dtype)).sum()).backward()
    return [output, penalty, *[x.grad for x in inputs]], rest


def defined(inputs, above, visible, seed=None, temperature=1.0, slope_temperature=1.0):
    """What the definition says, with the noise that any implementation must draw."""
    batch, heads, length, width = inputs[0].shape
    noise = None
    if seed is not None:
        indices = (torch.arange(n) for n in (batch * heads, length, length))
        noise = logistic_noise(seed, *indices, torch.float64).view(batch, heads, length, length).to(DEVICE)
    counted = counted_pairs(visible.to(DEVICE))

    def function(query, key, value, bias):
        output, _, penalty = gated_attention_reference(
            query, key, value, bias, visible.to(DEVICE), scaling=width**-0.5, counted=counted, noise=noise,
            temperature=temperature, slope_temperature=slope_temperature,
        )  # fmt: skip
        is_open = open_edges_reference(query, key, bias, counted, width**-0.5)
        return output, penalty, is_open.sum((0, 2, 3))

    return backpropagate(function, inputs, above, torch.float64)


def kernels(
    inputs, above, visible, seed=None, temperature=1.0, slope_temperature=1.0, deterministic=True, dtype=torch.float32
):
    width = inputs[0].shape[-1]
    spans = spans_of(visible.to(DEVICE), counted_pairs(visible.to(DEVICE)))
    assert spans is not None
    call = (seed_tensor(seed, torch.device(DEVICE)), width**-0.5, temperature, slope_temperature, deterministic)

    def function(query, key, value, bias):
        output, _, penalty, open_edges = ops.gated_attention(query, key, value, bias.float(), *spans, *call)
        return output, penalty, open_edges

    return backpropagate(function, inputs, above, dtype)


def assert_close(made, expected, limit=1e-5):
    for got, want in zip(made, expected, strict=True):
        error = (got.double() - want).norm() / want.norm().clamp(min=1e-12)
        assert error <= limit, error.item()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("seed", [None, SEED])
def test_output_counts_and_gradients_are_the_definition_s(mask, seed):
    inputs, above = leaves()
    visible = visible_mask(mask, BATCH, LENGTH)
    made, (open_edges,) = kernels(inputs, above, visible, seed)
    expected, (open_expected,) = defined(inputs, above, visible, seed)
    assert_close(made, expected)
    assert open_edges.tolist() == open_expected.tolist()
    assert 0 < int(open_edges.sum()) < int(counted_pairs(visible).sum()) * HEADS


@pytest.mark.parametrize(
    ("heads", "kv_heads", "length", "width", "seed", "temperatures"),
    [
        (3, 1, 37, 24, None, (4.0, 1.0)), (4, 4, 33, 16, SEED, (4.0, 1.0)), (2, 1, 16, 8, None, (1.0, 1.0)),
        (1, 1, 1, 16, SEED, (1.0, 1.0)), (2, 1, 37, 16, None, (1.0, 0.5)), (2, 2, 33, 16, SEED, (1.0, 0.5)),
        (2, 1, 33, 16, None, (0.5, 0.5)), (2, 1, 33, 16, SEED, (0.5, 0.5)), (2, 1, 33, 16, SEED, (4.0, 2.0)),
        (2, 1, 33, 16, None, (2.0, 2.0)), (2, 1, 33, 16, None, (0.5, 1.0)), (2, 1, 33, 16, None, (1.0, 2.0)),
    ],
)  # fmt: skip
def test_head_counts_widths_and_temperatures(heads, kv_heads, length, width, seed, temperatures):
    inputs, above = leaves(heads, kv_heads, length, width)
    visible = visible_mask("causal", BATCH, length)
    made, _ = kernels(inputs, above, visible, seed, *temperatures)
    assert_close(made, defined(inputs, above, visible, seed, *temperatures)[0])


@pytest.mark.parametrize(("mask", "seed"), [("window", None), ("right_pad", SEED)])
def test_the_single_pass_is_the_same_gradient(mask, seed):
    inputs, above = leaves()
    visible = visible_mask(mask, BATCH, LENGTH)
    made, _ = kernels(inputs, above, visible, seed, deterministic=False)
    assert_close(made, defined(inputs, above, visible, seed)[0])


def test_two_runs_agree_bit_for_bit():
    inputs, above = leaves()
    visible = visible_mask("packed", BATCH, LENGTH)
    first, second = (kernels(inputs, above, visible, SEED)[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_strided_inputs_of_a_fused_projection():
    inputs, above = leaves()
    visible = visible_mask("causal", BATCH, LENGTH)
    expected, _ = kernels(inputs, above, visible)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs[:3]]
    assert_close(kernels([*strided, inputs[3]], above, visible)[0], expected, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs(dtype):
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter has no bfloat16 matmul")
    inputs, above = leaves()
    inputs = [x.to(dtype).double() for x in inputs]  # so that no gate flips by rounding the inputs
    visible = visible_mask("causal", BATCH, LENGTH)
    made, (open_edges,) = kernels(inputs, above, visible, dtype=dtype)
    expected, (open_expected,) = defined(inputs, above, visible)
    assert made[0].dtype == dtype
    assert_close(made, expected, 2e-2 if dtype == torch.bfloat16 else 2e-3)
    assert open_edges.tolist() == open_expected.tolist()


@pytest.mark.parametrize("bias", [40.0, float("inf"), -40.0])
def test_all_gates_open_is_softmax_attention_and_all_closed_is_nothing(bias):
    inputs, above = leaves()
    inputs[3] = torch.full((HEADS,), bias, dtype=torch.float64)
    visible = visible_mask("left_pad", BATCH, LENGTH)
    made, (open_edges,) = kernels(inputs, above, visible)
    if bias < 0:
        assert int(open_edges.sum()) == 0
        assert not made[0].any()
        assert not made[4].any()  # dV
        return
    query, key, value = (x.to(DEVICE) for x in inputs[:3])
    dense = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=visible.to(DEVICE), enable_gqa=True
    )
    assert_close(made[:1], [dense.nan_to_num()])
    assert open_edges.tolist() == [int(visible.sum())] * HEADS


@settings(max_examples=4, deadline=None)
@given(length=st.integers(2, 45), cut=st.integers(1, 40), mask=st.sampled_from(MASKS[:3]))
def test_future_tokens_change_nothing(length, cut, mask):
    cut = min(cut, length - 1)
    inputs, above = leaves(2, 1, length, seed=length)
    visible = visible_mask(mask, BATCH, length) if length > 4 else visible_mask("causal", BATCH, length)
    before = kernels(inputs, above, visible, SEED)[0][0]
    for x in inputs[:3]:
        x[:, :, cut:] = 3.0
    assert torch.equal(kernels(inputs, above, visible, SEED)[0][0][:, :, :cut], before[:, :, :cut])


def test_grouped_heads_are_repeated_heads():
    inputs, above = leaves(4, 2)
    visible = visible_mask("causal", BATCH, LENGTH)
    grouped, _ = kernels(inputs, above, visible)
    repeated, _ = kernels([inputs[0], *(x.repeat_interleave(2, 1) for x in inputs[1:3]), inputs[3]], above, visible)
    pairs = [x.view(BATCH, 2, 2, LENGTH, 16).sum(2) for x in repeated[3:5]]
    assert_close([*repeated[:3], *pairs, repeated[5]], [x.double() for x in grouped], 1e-6)


@pytest.mark.parametrize("side", ["left_pad", "right_pad"])
def test_padding_changes_nothing_for_the_real_tokens(side):
    inputs, above = leaves()
    visible = visible_mask(side, BATCH, LENGTH)
    real = slice(4, None) if side == "left_pad" else slice(None, -4)
    padded, _ = kernels(inputs, above, visible)
    alone = [x[-1:, :, real].repeat(BATCH, 1, 1, 1) for x in inputs[:3]]
    bare, _ = kernels([*alone, inputs[3]], [above[0][:, :, real], above[1]], visible_mask("causal", BATCH, LENGTH - 4))
    assert_close([padded[0][-1:, :, real]], [bare[0][-1:].double()], 1e-6)


def test_noise_does_not_depend_on_the_tiles(monkeypatch):
    inputs, above = leaves()
    visible = visible_mask("causal", BATCH, LENGTH)
    expected, _ = kernels(inputs, above, visible, SEED)
    monkeypatch.setattr(training, "tile_for", lambda *_: training.Tile(16, 32))
    made, _ = kernels(inputs, above, visible, SEED)
    assert_close(made, expected, 1e-6)


@pytest.mark.parametrize("seed", [None, SEED])
def test_operator_passes_pytorch_s_own_checks(seed):
    inputs, _ = leaves(2, 1, 20)
    spans = spans_of(visible_mask("causal", BATCH, 20).to(DEVICE))
    assert spans is not None
    inputs = [x.to(DEVICE, torch.float32).requires_grad_() for x in inputs]
    noise_seed = seed_tensor(seed, torch.device(DEVICE))
    torch.library.opcheck(ops.gated_attention, (*inputs, *spans, noise_seed, 0.25, 1.0, 0.5, True))


def test_checkpointing_can_keep_the_attention():
    """A policy that saves our operator's results recomputes the rest and not the attention."""
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    inputs, above = leaves(2, 1, 20)
    calls = []
    forward = training.forward
    visible = visible_mask("causal", BATCH, 20).to(DEVICE)

    def counting(*args):
        calls.append(1)
        return forward(*args)

    def policy(context, operator, *args, **kwargs):
        keep = operator == torch.ops.attnprune.gated_attention.default
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    query, key, value, bias = (x.to(DEVICE, torch.float32).requires_grad_() for x in inputs)
    options = {"use_reentrant": False, "context_fn": lambda: create_selective_checkpoint_contexts(policy)}

    def attend(query):
        return gated_attention(query * 2, key, value, bias, visible, scaling=0.25, backend="triton").output

    training.forward = counting
    try:
        (checkpoint(attend, query, **options) * above[0].to(DEVICE)).sum().backward()
    finally:
        training.forward = forward
    kept = query.grad.clone()
    query.grad = None
    (attend(query) * above[0].to(DEVICE)).sum().backward()
    assert len(calls) == 1
    assert torch.equal(kept, query.grad)


@pytest.mark.parametrize("mode", ["grad", "no_grad"])
def test_compiles_without_a_graph_break(mode):
    inputs, _ = leaves(2, 1, 20)
    visible = visible_mask("causal", BATCH, 20).to(DEVICE)
    inputs = [x.to(DEVICE, torch.float32).requires_grad_(mode == "grad") for x in inputs]

    def attend(query, key, value, bias, visible):
        made = gated_attention(query * 2, key, value, bias, visible, scaling=0.25, backend="triton")
        return made.output + 1, made.penalty, made.open_edges

    with torch.set_grad_enabled(mode == "grad"):
        expected = attend(*inputs, visible)
        made = torch.compile(attend, fullgraph=True, backend="aot_eager")(*inputs, visible)
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))


def test_spans_of_masks_that_are_no_intervals():
    visible = visible_mask("causal")
    visible[0, 0, 5, 2] = False
    assert spans_of(visible) is None
    visible = visible_mask("causal")
    visible[0, 0, 6] = False  # a row is missing in the middle: the columns are no intervals
    assert spans_of(visible) is None
    counted = visible_mask("causal")
    counted[0, 0, 7, 3] = False  # counts only a part of a row
    assert spans_of(visible_mask("causal"), counted) is None
