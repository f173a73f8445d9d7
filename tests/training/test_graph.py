"""The graph's bookkeeping, compiled layers, and the trial that both must pass."""

from __future__ import annotations

import json
import re
import signal

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode

from attnprune.errors import AttnPruneError, InterruptedRunError
from attnprune.runs.config import TrainConfig
from attnprune.runs.folder import read_resumed
from attnprune.training import graph, loss, recipe, trainer
from attnprune.training.compiled import CompiledLayers, decoder_layers
from attnprune.training.step import TERMS
from tests.helpers.recipes import _SignalAt, run_config
from tests.helpers.steps import Operators, fake_inputs, inputs_of, micro_steps, run, smollm2_steps


def recomputed(function):
    """In place of a CUDA graph: every replay writes its result to the same tensor."""
    result = function()

    def replay():
        return result.copy_(function())

    return replay


def weights_after(step, trained, batches):
    """Weights after steps of two micro-batches each, with gradients dropped between steps as Trainer does."""
    before = [parameter.detach().clone() for parameter in trained]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    seen = []
    for batch in batches:
        for ids in batch:
            seen.append(step(*inputs_of(ids)))
        optimizer.step()
        optimizer.zero_grad()
    after = [parameter.detach().clone() for parameter in trained]
    for parameter, value in zip(trained, before, strict=True):
        parameter.data.copy_(value)
    return torch.stack(seen), after


def test_a_recorded_step_keeps_its_gradients_in_place():
    trained, [step], ids = micro_steps("llama", "fast")
    batches = [(ids, ids.flip(0)), (ids.flip(1), ids), (ids, ids)]
    expected, weights = weights_after(step, trained, batches)
    recorded = graph.RecordedStep(step, trained, inputs_of(ids), recomputed)
    assert all(parameter.grad is None for parameter in trained)
    addresses = [gradient.data_ptr() for gradient in recorded._gradients]
    found, others = weights_after(recorded, trained, batches)
    assert torch.equal(found, expected)
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))
    recorded(*inputs_of(ids))
    assert [parameter.grad.data_ptr() for parameter in trained] == addresses
    with pytest.raises(ValueError, match=r"recorded for \(4, 24\), not \(1, 24\)"):  # and not broadcast
        recorded(*inputs_of(ids[:1]))


def forgets(function):
    function()
    return lambda: torch.zeros(len(TERMS))


def waits(function):
    raise RuntimeError("operation not permitted when stream is capturing\nmore")


@pytest.mark.parametrize(
    ("record", "part"),
    [
        (forgets, f"stats {', '.join(['0'] * len(TERMS))}, not"),
        (waits, "RuntimeError: operation not permitted when stream is capturing"),
    ],
)
def test_a_graph_that_fails_or_differs_is_left_out_with_its_reason(record, part, caplog, monkeypatch):
    trained, [step], ids = micro_steps("llama", "fast", train={"compile": "off"})
    settings = TrainConfig(cuda_graph="on")
    with pytest.raises(AttnPruneError, match=re.escape(f"train.cuda_graph: {part}")):
        graph.fastest(step, trained, inputs_of(ids), settings, record)
    monkeypatch.setattr(graph, "_wants", lambda setting, *rest: setting == "auto")
    assert graph.fastest(step, trained, inputs_of(ids), TrainConfig(compile="off"), record) is step
    assert part in caplog.text
    chosen = graph.fastest(step, trained, inputs_of(ids), TrainConfig(compile="off"), recomputed)
    assert isinstance(chosen, graph.RecordedStep)
    assert all(parameter.grad is None for parameter in trained)


@pytest.fixture
def counted_compilations(monkeypatch):
    """Dynamo alone, without a compiler behind it, and its count of compiled graphs."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: real(function, backend=counter, **options))
    yield counter
    torch._dynamo.reset()


@pytest.mark.parametrize("estimator", ["threshold", "gumbel"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mistral"])
def test_layers_compile_once_and_stay_compiled(counted_compilations, family, estimator):
    trained, [step, compiled], ids = micro_steps(family, "fast", "fast", gate={"estimator": estimator})
    compiled.layers = CompiledLayers(compiled.core)
    counts = []
    for number in range(10):
        seed = torch.tensor(1000 + number) if estimator == "gumbel" else None
        given = (ids.roll(number, 1), ids.roll(number, 1), torch.tensor([0.1 * number, 1.0]), seed)
        made = graph.trace(compiled, trained, given)
        assert made.differs(graph.trace(step, trained, given), 1e-3) is None
        counts.append(counted_compilations.frame_count)
    assert counts[0] > 0
    assert counts[1:] == counts[:1] * 9
    assert counts[0] <= 8  # by kind of layer, for the sparse model and its base; not one per layer
    assert all("forward" not in vars(layer) for layer in decoder_layers(compiled.core))


def test_a_resumed_run_takes_the_ways_that_it_took(inputs, tmp_path):
    train = {"scope": "lora", "steps": 8, "save_every": 4, "step": "fast", "compile": "on"}
    with pytest.raises(InterruptedRunError):
        recipe.sparsify(run_config(inputs, tmp_path / "run", train=train), callbacks=[_SignalAt(4, signal.SIGTERM)])
    [state] = (tmp_path / "run").rglob("checkpoint-5/trainer_state.json")
    saved = json.loads(state.read_text())["stateful_callbacks"]["DualState"]["args"]["ways"]
    assert saved == {"compile": "on", "cuda_graph": "off"}
    seen, real = [], trainer.fastest

    def asked(step, trained, given, settings):
        seen.append((settings.compile, settings.cuda_graph))
        return real(step, trained, given, settings)

    config = read_resumed(tmp_path / "run", {})
    config.train.compile = "auto"  # as in a run that found out for itself
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "fastest", asked)
        recipe.sparsify(config, resume=True)
    assert seen == [("on", "off")]


def test_a_run_with_compiled_layers_is_the_same_run(inputs, tmp_path):
    train = {"scope": "lora", "steps": 12, "eval_every": 12, "step": "fast"}
    plain, weights = run(inputs, tmp_path / "eager", train=train)
    fast, others = run(inputs, tmp_path / "compiled", train={**train, "compile": "on"})
    for before, after in zip(plain, fast, strict=True):
        for term in ("lagrangian", "kl", "density", "multiplier"):
            assert after[term] == pytest.approx(before[term], rel=1e-4, abs=1e-4), term
    for name, weight in weights.items():
        assert torch.allclose(others[name], weight, rtol=1e-4, atol=1e-4), name


# Kernels


def stand_ins(monkeypatch):
    """Results of the right shapes in place of the kernels, which a CPU does not have."""
    from attnprune.attention.kernels import training

    def forward(query, key, value, bias, spans, call):
        batch, heads, queries, width = query.shape
        lse = query.new_zeros(batch, heads, queries, dtype=torch.float32)
        output = query.new_zeros(batch, queries, heads, width).transpose(1, 2)
        return training.Forward(output, lse, lse, lse.int())

    def backward(query, key, value, bias, *others):
        return tuple(torch.zeros_like(tensor) for tensor in (query, key, value, bias))

    monkeypatch.setattr(training, "forward", forward)
    monkeypatch.setattr(training, "backward", backward)


def launches(code):
    """Kernels that a compiled graph's code starts: fused ones, matrix products, our operators and the base's SDPA."""
    lines = [line for line in code[code.index("def call(") :].splitlines() if not line.strip().startswith("#")]
    return sum(bool(re.search(r"cpp_fused\w*\(|extern_kernels\.\w+\(|torch\.ops\.\w+\.\w+", line)) for line in lines)


INSIDE = {"gated_attention": 3, "gated_attention_backward": 5}  # what one of our operators starts on CUDA
LAYERS = 30


def test_a_step_of_smollm2_has_half_the_kernels_that_it_had(monkeypatch):
    """7,563 before; the compiler's code for a CPU is counted, and a GPU's is fused at least as much."""
    torch._dynamo.reset()
    stand_ins(monkeypatch)
    [step] = smollm2_steps(monkeypatch, "fast", layers=3, hidden_size=576, intermediate_size=1536, vocab_size=512)
    step.layers = CompiledLayers(step.core)
    given = fake_inputs(step, batch=2, length=32)
    _, codes = run_and_get_code(lambda: step(*given))
    forward, backward, base = (
        max(launches(code) for code in codes if kind(code))
        for kind in (
            lambda code: "attnprune.gated_attention." in code,
            lambda code: "gated_attention_backward" in code,
            lambda code: "scaled_dot_product" in code,
        )
    )
    layer = forward + backward + base + sum(INSIDE.values()) - len(INSIDE)
    assert 60 < layer < 120
    monkeypatch.setitem(loss.CHUNK_LOGITS, "cpu", loss.CHUNK_LOGITS["cuda"])
    eager = []
    for layers in (1, 2):
        [plain] = smollm2_steps(monkeypatch, "fast", layers=layers)
        with FakeTensorMode(allow_non_fake_inputs=True), Operators(kernels=True) as operators:
            plain(*fake_inputs(plain))
        eager.append(operators.found.total())
    around = 2 * eager[0] - eager[1]
    assert LAYERS * layer + around + 100 <= 3800  # 100: clipping, the gradients' norm, fused AdamW
