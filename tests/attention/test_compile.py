"""`torch.compile` of chunked attention: the numbers of eager mode, without a graph break."""

from __future__ import annotations

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from attnprune.attention import dispatch
from attnprune.attention.chunked import GateSettings
from attnprune.attention.interface import Gate, attach, gates_of
from tests.helpers.families import build, ids, load, merged


@pytest.fixture(autouse=True)
def _chunked(monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, "chunked")
    torch._dynamo.reset()


def compiled(call):
    return torch.compile(call, fullgraph=True, backend="aot_eager")


def visible_pairs(padded):
    """Causal pairs [2, 1, 9, 9]; padded: the second row begins with three hidden tokens."""
    visible = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    if padded:
        visible[1, :, :, :3] = False
    return visible


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("settings", "options"),
    [
        (GateSettings(slope_temperature=math.inf), {}),
        (GateSettings(2.0, 0.5), {"softcap": 2.0}),
        (GateSettings(noise_seed=7), {"sinks": torch.tensor([0.5, -1.0, 0.0, 2.0])}),
    ],
    ids=["plain", "softcap", "noise and sinks"],
)
def test_outputs_counts_and_gradients(settings, options, padded):
    heads = (2, 9, 4, 8)  # as a model's projections: transposed, so not contiguous
    query, key, value = (torch.randn(2, 9, n, 8).transpose(1, 2) for n in (4, 2, 2))
    tensors = [query, key, value, torch.linspace(-0.5, 0.5, 4), *options.values()]
    tensors = [t.requires_grad_() if isinstance(t, torch.Tensor) else t for t in tensors]
    learned = [t for t in tensors if isinstance(t, torch.Tensor)]
    weights = torch.randn(heads).transpose(1, 2)

    def attend(query, key, value, bias, *more):
        given = dict(zip(options, more, strict=True))
        visible = visible_pairs(padded)
        return dispatch.gated_attention(query, key, value, bias, visible, scaling=0.4, settings=settings, **given)[:4]

    with torch.no_grad():
        for found, expected in zip(compiled(attend)(*tensors), attend(*tensors), strict=True):
            assert torch.equal(found, expected)

    def gradients(call):
        output, penalty, *counts = call(*tensors)
        loss = (output * weights).sum() + 0.1 * penalty.square().sum()
        return [output, penalty, *counts, *torch.autograd.grad(loss, learned)]

    for found, expected in zip(gradients(compiled(attend)), gradients(attend), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("backend", ["chunked", "triton"])
def test_one_graph_for_all_layers_and_all_seeds(monkeypatch, backend):
    if backend == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("the kernels of this process are compiled for the GPU")
    monkeypatch.setenv(dispatch.VARIABLE, backend)
    gates = [Gate(2, layer=layer) for layer in range(3)]
    query, key, value = (torch.randn(1, n, 5, 16, requires_grad=True) for n in (2, 1, 1))
    visible = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    counter = CompileCounterWithBackend("aot_eager")

    def step(gate):
        output, _ = gate(query, key, value, visible, scaling=1.0)
        return output, output.sum() + gate.last.penalty.sum()

    def run(call, seed):
        found = []
        for gate in gates:
            gate.noise_seed = seed
            output, loss = call(gate)
            found += [output, *torch.autograd.grad(loss, (query, key, value, gate.bias))]
        return found

    graph = torch.compile(step, fullgraph=True, backend=counter)
    for seed in (3, 4_000_000_000, 2**40):
        expected = run(step, seed)
        assert not torch.equal(expected[0], expected[5])  # each layer draws its own noise
        assert all(map(torch.equal, run(graph, torch.tensor(seed)), expected))
    assert counter.frame_count == 1


def test_a_whole_model():
    model, tokens = build("gemma2"), ids(2, 13)  # windows and capped scores
    attach(model, -0.1)
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0

    def logits(tokens, mask):
        return model(input_ids=tokens, attention_mask=mask, use_cache=False).logits

    with torch.no_grad():
        expected = logits(tokens, mask)
        counts = [gate.last.open_edges for gate in gates_of(model)]
        assert torch.equal(compiled(logits)(tokens, mask), expected)
    for gate, count in zip(gates_of(model), counts, strict=True):
        assert torch.equal(gate.last.open_edges, count)
        assert gate.last.ran[0] == "chunked"


def test_a_merged_model_compiles_with_graph_breaks(tmp_path):
    """Its own code has no operators: `fullgraph=True` is not supported there, and fails instead of another answer."""
    model, tokens = build("llama"), ids(2, 13)
    attach(model, -0.1)
    merged(model).save_pretrained(tmp_path)
    portable = load(tmp_path, "llama")

    def logits(tokens):
        return portable(input_ids=tokens, use_cache=False).logits

    with torch.no_grad():
        assert torch.equal(torch.compile(logits, backend="aot_eager")(tokens), logits(tokens))
        torch._dynamo.reset()
        with pytest.raises(RuntimeError):
            compiled(logits)(tokens)
