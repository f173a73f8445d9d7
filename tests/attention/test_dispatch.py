"""Which backend runs, and that all of them say the same."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from attnprune.attention import dispatch
from attnprune.attention.chunked import GateSettings
from attnprune.attention.dispatch import choose, counted_pairs, gated_attention
from attnprune.attention.interface import attach, gates_of
from attnprune.errors import InputError, UnsupportedModelError
from tests.helpers.attention import MASKS, visible_mask

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def tensors(length=13, dtype=torch.float32):
    query = torch.randn(2, 4, length, 16, dtype=dtype)
    key, value = torch.randn(2, 2, 2, length, 16, dtype=dtype).unbind(0)
    return query, key, value, torch.linspace(-0.6, 1.0, 4)


@pytest.fixture
def environment(monkeypatch):
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    return monkeypatch


def test_a_cpu_gets_chunked_and_a_cuda_device_the_kernels(environment):
    assert choose(CPU, torch.float32, 64).backend == "chunked"
    assert "no CUDA device" in choose(CPU, torch.float32, 64).reason
    pytest.importorskip("triton")
    assert choose(CUDA, torch.bfloat16, 128).backend == "triton"


@pytest.mark.parametrize(
    ("dtype", "width", "options", "reason"),
    [
        (torch.float64, 64, {}, "float64"),
        (torch.bfloat16, 256, {}, "width 256"),
        (torch.bfloat16, 64, {"softcap": True}, "capped scores"),
        (torch.bfloat16, 64, {"sinks": True}, "attention sinks"),
        (torch.bfloat16, 64, {"statistics": True}, "statistics hook"),
    ],
)
def test_what_the_kernels_lack_runs_chunked_and_says_so(environment, dtype, width, options, reason):
    pytest.importorskip("triton")
    choice = choose(CUDA, dtype, width, **options)
    assert choice.backend == "chunked"
    assert reason in choice.reason
    environment.setenv(dispatch.VARIABLE, "triton")
    with pytest.raises(UnsupportedModelError, match=f"triton.*{reason}"):
        choose(CUDA, dtype, width, **options)


def test_without_triton_nothing_is_forced_onto_it(environment):
    environment.setattr(dispatch, "_HAS_TRITON", False)
    assert choose(CUDA, torch.float32, 64) == ("chunked", "triton is not installed")
    with pytest.raises(UnsupportedModelError, match="not installed"):
        choose(CUDA, torch.float32, 64, backend="triton")


def test_the_variable_forces_a_backend(environment):
    environment.setenv(dispatch.VARIABLE, "reference")
    assert choose(CPU, torch.float32, 64) == ("reference", "forced by ATTNPRUNE_BACKEND")
    environment.setenv(dispatch.VARIABLE, "cudnn")
    with pytest.raises(InputError, match="ATTNPRUNE_BACKEND: 'cudnn' is not one of"):
        choose(CPU, torch.float32, 64)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("noise_seed", [None, 7])
def test_reference_and_chunked_agree(environment, mask, noise_seed):
    query, key, value, bias = tensors()
    visible = visible_mask(mask)
    settings = GateSettings(temperature=2.0, slope_temperature=0.5, noise_seed=noise_seed)
    made = {
        backend: gated_attention(query, key, value, bias, visible, scaling=0.25, settings=settings, backend=backend)
        for backend in ("chunked", "reference")
    }
    one, other = made["chunked"], made["reference"]
    assert torch.allclose(one.output, other.output, atol=1e-6)
    assert torch.allclose(one.penalty, other.penalty, rtol=1e-5)
    assert one.open_edges.tolist() == other.open_edges.tolist()
    assert int(one.visible_edges) == int(other.visible_edges) == int(counted_pairs(visible).sum())
    assert one.ran == ("chunked", "asked for")
    assert other.ran == ("reference", "asked for")


@pytest.mark.parametrize(("queries", "mode"), [(13, "training"), (13, "run time"), (1, "run time")])
def test_the_kernels_agree_with_chunked_in_every_phase(environment, queries, mode):
    pytest.importorskip("triton")
    if not torch.cuda.is_available():
        environment.setenv("TRITON_INTERPRET", "1")
    query, key, value, bias = tensors()
    visible = visible_mask("left_pad")[:, :, -queries:]
    with torch.set_grad_enabled(mode == "training"):
        made = [
            gated_attention(query[:, :, -queries:], key, value, bias, visible, scaling=0.25, backend=backend)
            for backend in ("triton", "chunked")
        ]
    assert made[0].ran == ("triton", "asked for")
    assert torch.allclose(made[0].output, made[1].output, atol=1e-5)
    assert made[0].open_edges.sum(-1).tolist() == made[1].open_edges.sum(-1).tolist()
    assert int(made[0].visible_edges) == int(made[1].visible_edges)


def test_the_kernels_take_query_and_key_in_the_dtype_of_the_value(environment):
    """An fp32 model under autocast: its rotary embedding returns fp32, its value projection 16 bits."""
    pytest.importorskip("triton")
    if not torch.cuda.is_available():
        environment.setenv("TRITON_INTERPRET", "1")
    *inputs, bias = tensors()
    made = {}
    for backend in ("triton", "chunked"):
        query, key, value = (x.half().float().requires_grad_() for x in inputs)
        values = value.half() if backend == "triton" else value
        output = gated_attention(query, key, values, bias, visible_mask("causal"), scaling=0.25, backend=backend).output
        output.float().square().sum().backward()
        made[backend] = [output, query.grad, key.grad, value.grad]
    assert made["triton"][0].dtype == torch.float16
    assert [x.dtype for x in made["triton"][1:]] == [torch.float32] * 3
    for ours, expected in zip(*made.values(), strict=True):
        assert torch.allclose(ours.float(), expected, atol=1e-2)


def test_a_mask_that_is_no_interval_runs_chunked_unless_forced(environment):
    pytest.importorskip("triton")
    query, key, value, bias = tensors()
    visible = visible_mask("causal")
    visible[0, 0, 9, 4] = False
    with pytest.raises(UnsupportedModelError, match="not made of intervals"):
        gated_attention(query, key, value, bias, visible, scaling=0.25, backend="triton")
    environment.setattr(dispatch, "choose", lambda *_, **__: dispatch.Choice("triton", "as on a GPU"))
    made = gated_attention(query, key, value, bias, visible, scaling=0.25)
    assert made.ran == ("chunked", "the attention mask is not made of intervals")


def test_intervals_are_found_once_for_a_mask(environment):
    visible = visible_mask("packed")
    assert dispatch.spans_for(visible, 2) is dispatch.spans_for(visible, 2)
    shared = visible_mask("causal", batch=1)
    assert dispatch.spans_for(shared, 3).rows.shape == (3, 13, 3)
    assert dispatch.spans_for(shared, 5).rows.shape == (5, 13, 3)  # one mask for batches of several sizes
    before = dispatch.spans_for(shared, 5).rows.clone()
    shared[..., 4:, 0] = False  # a window, written into the same mask
    assert not torch.equal(dispatch.spans_for(shared, 5).rows, before)


@pytest.fixture
def model_on_kernels(environment):
    """A tiny model with gates whose attention runs the kernels, in the interpreter where there is no GPU."""
    pytest.importorskip("triton")
    environment.setenv(dispatch.VARIABLE, "triton")
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.3)).eval()
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    attach(model, bias=-0.2)
    return model


@pytest.mark.parametrize("mode", ["grad", "no_grad"])
def test_a_whole_model_compiles_without_a_graph_break(model_on_kernels, mode):
    model = model_on_kernels
    ids = torch.arange(24, device=model.device).view(2, 12)
    with torch.set_grad_enabled(mode == "grad"):
        expected = model(input_ids=ids, use_cache=False).logits
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda x: model(input_ids=x, use_cache=False).logits, fullgraph=True, backend="aot_eager"
        )
        assert torch.equal(compiled(ids), expected)
    assert gates_of(model)[0].last.ran[0] == "triton"
    assert 0 < int(gates_of(model)[0].last.open_edges.sum()) < 4 * 2 * 78


def test_generation_with_a_static_cache_and_by_the_other_backend(model_on_kernels, environment):
    model = model_on_kernels
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    options["attention_mask"][0, :3] = 0
    options = {k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    ids = torch.arange(24, device=model.device).view(2, 12)
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), expected)
    environment.setenv(dispatch.VARIABLE, "chunked")
    assert torch.equal(model.generate(ids, **options), expected)
