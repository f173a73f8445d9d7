"""The micro-step: fast and plain are one function; nothing waits for the device; the graph's bookkeeping."""

from __future__ import annotations

import json
import re
import signal
import traceback
from collections import Counter

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from attnprune.attention.interface import SUPPORTED_FAMILIES, attach, gates_of
from attnprune.attention.spans import KnownMask, Spans
from attnprune.data.blocks import Blocks
from attnprune.errors import AttnPruneError, InputError, InterruptedRunError
from attnprune.runs.config import TrainConfig
from attnprune.runs.folder import read_resumed
from attnprune.training import graph, recipe, trainer
from attnprune.training.compiled import CompiledLayers, decoder_layers
from attnprune.training.scope import make_trainable
from attnprune.training.step import TERMS, MicroStep, settle_step, whole_logits
from tests.helpers.families import BIAS, WINDOW, build
from tests.helpers.recipes import _SignalAt, run_config

CONSTRAINTS = [
    {"kind": "density", "target_density": 0.3, "rate": 0.1},
    {"kind": "kl", "tolerance": 0.05},
    {"kind": "loss", "tolerance": 0.05},
    {"kind": "loss", "tolerance": 0.05, "paired": False},
]


def run(inputs, folder, **overrides):
    """(metrics lines, weights) of a run of 12 steps that is logged at every step."""
    states = []

    class Keep(trainer.TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            args.logging_steps = state.logging_steps = 1

        def on_train_end(self, args, state, control, model=None, **kwargs):
            states.append(trainer.trainable_state(model))

    recipe.sparsify(run_config(inputs, folder, **overrides), callbacks=[Keep()])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "multiplier" in line], states[0]


def both(inputs, folder, *, train, **overrides):
    made = []
    for way in ("plain", "fast"):
        settings = {"steps": 12, "eval_every": 12, "gate_learning_rate": 0.05, "step": way, **train}
        made.append(run(inputs, folder / way, train=settings, **overrides))
    return made


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=str)
@pytest.mark.parametrize("micro", [0, 2], ids=["whole", "accumulated"])
@pytest.mark.parametrize("scope", ["gates", "lora", "attn"])
def test_fast_and_plain_steps_are_the_same_run(inputs, tmp_path, scope, micro, constraint):
    train = {"scope": scope, "micro_batch_size": micro, "distill": 0.5}
    (plain, weights), (fast, others) = both(inputs, tmp_path, train=train, constraint=constraint)
    assert len(plain) == len(fast) == 12
    for before, after in zip(plain, fast, strict=True):
        assert set(before) == set(after)
        for term in (*TERMS, "gap", "violation", "multiplier"):
            scale = 1 / constraint.get("tolerance", 1) if term in ("violation", "multiplier") else 1  # gap / tolerance
            if term in before:
                assert after[term] == pytest.approx(before[term], rel=1e-5, abs=1e-5 * scale), term
    for name, weight in weights.items():
        assert torch.allclose(others[name], weight, rtol=1e-5, atol=1e-5), name


# One micro-step


def micro_steps(family, *ways, tokens=24, **overrides):
    """(config, parameters that train, steps) of a tiny model of a family with adapters."""
    model = build(family).eval()
    train = {"scope": "lora", "lora_rank": 4, **overrides.pop("train", {})}
    config = run_config(("x", "y"), "out", train=train, **overrides)
    blocks = Blocks(torch.randint(0, 97, (4, tokens), generator=torch.Generator().manual_seed(1)), None, "random")
    config.gate.initial_mass = 0.0
    recipe.attach_gates(model, config, blocks)
    for gate, bias in zip(gates_of(model), BIAS, strict=True):
        gate.bias.data.copy_(bias)
    model, base = make_trainable(model, config)
    for name, parameter in model.named_parameters():  # PEFT's B starts at 0, where the adapters do nothing
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(2))
    made = []
    for way in ways:
        config.train.step = way
        settle_step(model, config)
        made.append(MicroStep(model.train(), base, config))
    return [p for p in model.parameters() if p.requires_grad], made, blocks.input_ids


def inputs_of(ids, seed=None):
    return ids, ids.clone(), torch.tensor([0.3, 0.7]), seed


@pytest.mark.parametrize("family", sorted(SUPPORTED_FAMILIES))
def test_every_family_takes_the_fast_way_or_says_why_not(family):
    trained, [step], ids = micro_steps(family, "auto")
    obstacle = whole_logits(step.core)
    assert (step.head is None) == (obstacle is not None)
    if obstacle:
        assert family in {"gpt_oss"}, obstacle
        return
    trained, [plain, fast], ids = micro_steps(family, "plain", "fast")
    expected = graph.trace(plain, trained, inputs_of(ids))
    made = graph.trace(fast, trained, inputs_of(ids))
    assert made.stats.tolist() == pytest.approx(expected.stats.tolist(), rel=1e-5, abs=1e-5)
    assert made.differs(expected, 1e-4) is None
    assert sum(gradient.abs().sum() for gradient in made.gradients) > 0


def test_a_window_shorter_than_the_block_keeps_the_base_right():
    _, [plain, fast], ids = micro_steps("mistral", "plain", "fast", tokens=4 * WINDOW)
    stats = [step(*inputs_of(ids))[TERMS.index("base_loss")].item() for step in (plain, fast)]
    assert stats[0] == pytest.approx(stats[1], abs=1e-5)


def test_a_model_whose_logits_are_more_than_a_linear_layer_takes_the_plain_way():
    _, [step], _ = micro_steps("llama", "plain")
    forward = step.core.lm_head.forward
    step.core.lm_head.forward = lambda hidden: forward(hidden) ** 3
    assert whole_logits(step.core) == "its logits are more than an output layer's"


@pytest.mark.parametrize(
    ("train", "part"),
    [
        ({"step": "fast", "scope": "full"}, "train.step: fast is not possible: its output layer trains"),
        ({"cuda_graph": "on"}, "train.cuda_graph: there is no CUDA device"),
        ({"compile": "on", "step": "plain"}, "train.compile: needs the fast step"),
        ({"compile": "on", "gradient_checkpointing": True}, "train.compile: needs the fast step, and no"),
    ],
)
def test_what_cannot_be_had_is_refused_before_the_run(inputs, tmp_path, train, part):
    with pytest.raises(InputError, match=part):
        recipe.sparsify(run_config(inputs, tmp_path / "run", train={"scope": "lora", **train}))
    assert not (tmp_path / "run").exists()


def test_a_run_of_an_older_release_goes_on_with_its_step(inputs, tmp_path):
    config = run_config(inputs, tmp_path / "run", train={"scope": "lora", "steps": 8, "save_every": 4})
    with pytest.raises(InterruptedRunError):
        recipe.sparsify(config, callbacks=[_SignalAt(4, signal.SIGTERM)])
    file = tmp_path / "run" / "run.toml"
    assert 'step = "fast"' in file.read_text()
    assert read_resumed(tmp_path / "run", {}).train.step == "fast"
    file.write_text("".join(line for line in file.read_text().splitlines(True) if not line.startswith("step = ")))
    assert read_resumed(tmp_path / "run", {}).train.step == "plain"


# Waits


class Operators(TorchDispatchMode):
    """Counts the operators of a block."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.found[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


DRAWS = {"rand", "randn", "randint", "bernoulli_", "uniform_", "normal_", "exponential_", "random_"}


def smollm2_steps(monkeypatch, *ways, **gate):
    """Micro-steps of a model with SmolLM2's layers, heads and vocabulary, narrower, and the settings of the kernels.

    Under FakeTensorMode nothing is computed, and whatever would have to look at a number raises.
    """
    sizes = {"hidden_size": 72, "intermediate_size": 96, "num_hidden_layers": 30, "num_attention_heads": 9}
    heads = {"num_key_value_heads": 3, "max_position_embeddings": 2048, "tie_word_embeddings": True}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=49152, **sizes, **heads))
    attach(model)
    train = {"scope": "lora", "lora_rank": 8, "precision": "bf16"}
    config = run_config(("x", "y"), "out", train=train, gate=gate)
    model, base = make_trainable(model, config)
    steps = []
    for way in ways:
        config.train.step = way
        steps.append(MicroStep(model.train(), base, config))
    monkeypatch.setenv("ATTNPRUNE_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # a CPU will do: their results are known by shape
    return steps


def fake_inputs(step, batch=32, length=512, seed=None):
    ids = torch.zeros(batch, length, dtype=torch.int64)
    rows, columns = (torch.zeros(batch, length, n, dtype=torch.int32) for n in (3, 2))
    mask = KnownMask(Spans(rows, columns), torch.zeros((), dtype=torch.int64), is_causal=True)
    step._masks[ids.shape] = [mask] * 30  # found once for a shape of batch, by looking
    return ids, ids.clone(), torch.zeros(2), seed


def test_the_fast_step_never_waits_for_the_device_and_draws_nothing(monkeypatch):
    [fast] = smollm2_steps(monkeypatch, "fast")
    with FakeTensorMode(allow_non_fake_inputs=True), Operators() as operators:
        stats = fast(*fake_inputs(fast))
    assert stats.shape == (len(TERMS),)
    assert operators.found["gated_attention"] == operators.found["gated_attention_backward"] == 30
    assert not DRAWS & set(operators.found)


def test_the_plain_step_waits(monkeypatch):
    """The check of the test above: what looks at a number does raise."""
    [plain] = smollm2_steps(monkeypatch, "plain")
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(DataDependentOutputException):
        plain(*fake_inputs(plain))


def test_a_step_reads_the_device_twice_at_most(inputs, tmp_path):
    """Stats and gradient norm in one transfer; Trainer reads its loss where it logs."""
    reads, steps = [], []

    def only_here(place):
        """On CUDA the kernels cut no blocks, and fused AdamW keeps its counters on the device."""
        return "attention/chunked" in place or "torch/optim" in place

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._local_scalar_dense.default and steps:
                here = any(only_here(frame.filename) for frame in traceback.extract_stack())
                reads.extend([] if here else [steps[-1]])
            return function(*args, **(kwargs or {}))

    class Watch(trainer.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            steps.append(state.global_step)

        def on_step_end(self, args, state, control, **kwargs):
            steps.clear()

    original, seen = trainer.SparsifyTrainer._look, []

    def look(self, norm):
        seen.append(self.state.global_step)
        original(self, norm)

    with pytest.MonkeyPatch.context() as patch, Reads():
        patch.setattr(trainer.SparsifyTrainer, "_look", look)
        recipe.sparsify(run_config(inputs, tmp_path / "run", train={"scope": "lora"}), callbacks=[Watch()])
    assert seen == list(range(12))
    assert max(Counter(reads).values(), default=0) <= 2


# The graph's bookkeeping, with a replay that computes again, and compiled layers


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


def test_a_recorded_step_keeps_its_gradients_in_place_and_takes_other_shapes():
    trained, [step], ids = micro_steps("llama", "fast")
    batches = [(ids, ids.flip(0)), (ids.flip(1), ids[:2]), (ids[:3], ids)]  # the end of an epoch is shorter
    expected, weights = weights_after(step, trained, batches)
    recorded = graph.RecordedStep(step, trained, inputs_of(ids), recomputed)
    assert all(parameter.grad is None for parameter in trained)
    addresses = [gradient.data_ptr() for gradient in recorded._gradients]
    found, others = weights_after(recorded, trained, batches)
    assert torch.equal(found, expected)
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))
    recorded(*inputs_of(ids))
    assert [parameter.grad.data_ptr() for parameter in trained] == addresses


def forgets(function):
    function()
    return lambda: torch.zeros(len(TERMS))


def waits(function):
    raise RuntimeError("operation not permitted when stream is capturing\nmore")


@pytest.mark.parametrize(
    ("record", "part"),
    [
        (forgets, "stats 0, 0, 0, 0, 0, 0, not"),
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


def test_a_run_with_compiled_layers_is_the_same_run(inputs, tmp_path):
    train = {"scope": "lora", "steps": 12, "eval_every": 12, "step": "fast"}
    plain, weights = run(inputs, tmp_path / "eager", train=train)
    fast, others = run(inputs, tmp_path / "compiled", train={**train, "compile": "on"})
    for before, after in zip(plain, fast, strict=True):
        for term in ("lagrangian", "kl", "density", "multiplier"):
            assert after[term] == pytest.approx(before[term], rel=1e-4, abs=1e-4), term
    for name, weight in weights.items():
        assert torch.allclose(others[name], weight, rtol=1e-4, atol=1e-4), name
