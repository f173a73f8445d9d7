"""Closing messages is closing gates, gradients add up, and a value moves what it writes."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from attnprune.attention.interface import attach, detach, gates_of
from attnprune.circuit.model.activations import collect
from attnprune.circuit.model.adapters import anatomy_of, open_gates
from attnprune.tracing.messages import Messages
from attnprune.tracing.moved import norm_scale, shifts, written_by
from tests.helpers.families import BIAS, build, ids, logits_of

FAMILIES = ("llama", "gpt2", "gemma2", "olmo", "olmo2", "qwen3", "gpt_neox")
both_kinds = pytest.mark.parametrize("gated", [False, True], ids=["dense", "gated"])


def messages_of(model, length=9):
    return Messages(anatomy_of(model), ids(1, length))


@pytest.fixture
def model(request, family, gated):
    built = build(family)
    if gated:
        attach(built, BIAS)
    with nullcontext() if gated else open_gates(built):
        yield built


@both_kinds
@pytest.mark.parametrize("family", FAMILIES)
def test_all_messages_are_the_full_run(model):
    messages = messages_of(model)
    every = torch.arange(len(messages))
    expected = logits_of(model, messages.ids)[0, -1]
    assert (messages.run([every])[0] - expected).abs().max() < 1e-5 * expected.abs().max()
    assert messages.kl([every]).item() < 1e-9


@pytest.mark.parametrize("family", FAMILIES)
def test_closed_heads_are_heads_without_an_open_gate(family):
    """All messages of some heads closed, against a model whose gates close them: the very same function."""
    model = build(family)
    gates = attach(model, 50.0)  # all open
    messages = messages_of(model)
    heads = torch.rand(BIAS.shape, generator=torch.Generator().manual_seed(3)) < 0.5
    kept = heads[messages.candidates[:, 0], messages.candidates[:, 1]].nonzero()[:, 0]
    found = messages.run([kept])[0]
    assert messages.kl([kept]).item() > 1e-4
    with torch.no_grad():
        for gate, on in zip(gates, heads, strict=True):
            gate.bias[~on] = -1e9
    expected = logits_of(model, messages.ids)[0, -1]
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_no_message_is_a_model_with_every_gate_closed():
    model = build("llama")
    with open_gates(model):
        messages = messages_of(model)
        found = messages.run([torch.arange(0)])[0]
    attach(model, -1e9)
    assert torch.allclose(found.float(), logits_of(model, messages.ids)[0, -1], atol=1e-5)
    detach(model)


def test_a_closed_message_takes_its_value_away_and_renormalises_nothing():
    """By hand in the last layer: the attention output lacks P_ij v_j and nothing else."""
    model = build("llama")
    with open_gates(model):
        messages = messages_of(model)
        layer, _, query, _ = messages.candidates[-3].tolist()
        assert layer == len(messages.weights) - 1
        chosen = torch.tensor([len(messages) - 3])
        block = messages.anatomy.blocks[layer]
        lost = written_by(messages, chosen)[0]
        handle = block.output.register_forward_hook(lambda _, args, y: y - torch.nn.functional.pad(
            lost[None, None], (0, 0, query, y.shape[1] - query - 1)))  # fmt: skip
        expected = logits_of(model, messages.ids)[0, -1]
        handle.remove()
        without = torch.tensor([i for i in range(len(messages)) if i != int(chosen)])
        assert torch.allclose(messages.run([without])[0].float(), expected, atol=1e-5)


def test_candidates_are_open_and_can_reach_the_prediction():
    model = build("llama")
    attach(model, BIAS)
    messages = messages_of(model)
    pattern = torch.stack(model(messages.ids, output_attentions=True).attentions)[:, 0]
    sent = (pattern != 0).clone()
    assert 0 < sent.sum() < sent.numel() // 2
    sent[-1, :, :-1] = False
    assert torch.equal(messages.candidates, sent.nonzero())


@pytest.mark.parametrize("gated", [False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradients_add_up_to_what_the_set_does(model):
    messages = messages_of(model)
    chosen = torch.arange(0, len(messages), 3)
    points = [(i + 0.5) / 400 for i in range(400)]
    total = messages.slopes(chosen, points).sum().item()
    kl = messages.kl([torch.arange(0), chosen]).tolist()
    assert total == pytest.approx(kl[0] - kl[1], rel=0.02)
    assert all(parameter.grad is None for parameter in model.parameters())


@both_kinds
@pytest.mark.parametrize("family", FAMILIES)
def test_messages_add_up_to_what_their_heads_write(model):
    messages = messages_of(model)
    outputs = collect(messages.anatomy, messages.ids).outputs
    for layer, head, query in [(0, 1, 4), (2, 3, 8), (3, 0, 8)]:
        rows = messages.candidates[:, :3] == torch.tensor([layer, head, query])
        written = written_by(messages, rows.all(1).nonzero()[:, 0]).sum(0)
        expected = outputs[messages.anatomy.graph.head_sources(layer).start + head, 0, query]
        assert torch.allclose(written, expected, atol=1e-4 * outputs.abs().max().item())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_final_norm_is_its_scale_and_a_bias(family):
    norm = anatomy_of(build(family)).final_norm
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
        stream = 5 * torch.randn(7, 32) + 2
        scale, centred = norm_scale(norm, stream)
        linear = (stream - centred * stream.mean(-1, keepdim=True)) * scale
        assert centred == ("Layer" in type(norm).__name__)
        assert torch.allclose(linear + norm(torch.zeros(32)), norm(stream), atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_shifts_of_all_parts_add_up_to_the_logits(family):
    """Layers after the last attention do not exist: its messages, and all else that the stream holds."""
    model = build(family)
    with open_gates(model):
        messages = messages_of(model)
        last = (messages.candidates[:, 0] == 3).nonzero()[:, 0]
        moved = shifts(messages, last).sum(0)
        written = written_by(messages, last).sum(0)
        anatomy = messages.anatomy
        stream = messages.stream[-1:]
        scale, centred = norm_scale(anatomy.final_norm, stream)
        centre = (lambda x: x - x.mean(-1, keepdim=True)) if centred else (lambda x: x)
        rest = model.get_output_embeddings()(centre(stream - written) * scale + anatomy.final_norm(torch.zeros(32)))[0]
        expected = messages.logits.float() - messages.logits.float().mean()
        assert torch.allclose(moved + rest - rest.mean(), expected, atol=1e-3)


def test_gates_are_as_they_were():
    model = build("llama")
    gates = attach(model, BIAS)
    before = logits_of(model, ids(1, 9))
    messages = messages_of(model)
    messages.slopes(torch.arange(len(messages)), [0.5])
    assert torch.equal(logits_of(model, ids(1, 9)), before)
    assert all(gate.bias.requires_grad for gate in gates)
    assert gates_of(model) == gates
