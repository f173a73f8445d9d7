"""The micro-step: fast and plain are one function; nothing waits for the device; the graph's bookkeeping."""

from __future__ import annotations

import signal
import traceback
from collections import Counter

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel

from attnprune.attention.interface import SUPPORTED_FAMILIES
from attnprune.errors import InputError, InterruptedRunError
from attnprune.runs.folder import read_resumed
from attnprune.training import graph, recipe, trainer
from attnprune.training.step import TERMS, MicroStep, whole_logits
from tests.helpers.families import WINDOW, build
from tests.helpers.recipes import _SignalAt, run_config
from tests.helpers.steps import DRAWS, Operators, fake_inputs, inputs_of, micro_steps, run, smollm2_steps

CONSTRAINTS = [
    {"kind": "density", "target_density": 0.3, "rate": 0.1},
    {"kind": "kl", "tolerance": 0.05},
    {"kind": "loss", "tolerance": 0.05},
    {"kind": "loss", "tolerance": 0.05, "paired": False},
]


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


@pytest.mark.parametrize("scope", ["gates", "lora", "attn"])
def test_the_base_beside_a_trained_model_is_the_untouched_model(scope):
    trained, [step], ids = micro_steps("llama", "fast", train={"scope": scope})
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.1)
        wanted = build("llama").eval()(ids, use_cache=False).logits
        assert not torch.allclose(step.core(ids, use_cache=False).logits, wanted, atol=1e-3)
        assert torch.allclose(step.base(ids), wanted, atol=1e-5)
        sparse = step.core(ids, use_cache=False).logits
        assert not torch.allclose(sparse, wanted, atol=1e-3)  # and the adapters are on again


@pytest.mark.parametrize("way", ["fast", "plain"])
def test_every_step_sees_whole_batches(inputs, tmp_path, monkeypatch, way):
    """Compiled layers and a recorded step are made for one shape, and processes share whole batches only."""
    shapes, real = [], MicroStep._run

    def seen(self, model, ids):
        shapes.append(len(ids))
        return real(self, model, ids)

    monkeypatch.setattr(MicroStep, "_run", seen)
    train = {"scope": "lora", "step": way, "steps": 40, "batch_size": 11, "micro_batch_size": 0, "eval_every": 40}
    recipe.sparsify(run_config(inputs, tmp_path / "run", train=train, data={"train_tokens": 16 * 30}))
    assert set(shapes[-40:]) == {11}  # before them: the plan's


def test_a_context_shorter_than_the_check_of_the_output_layer():
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 97}
    model = GPT2LMHeadModel(GPT2Config(n_positions=6, **sizes)).eval().requires_grad_(False)
    assert whole_logits(model) is None
