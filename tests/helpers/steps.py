"""Micro-steps of tiny models, and of SmolLM2's shape where nothing is computed."""

from __future__ import annotations

import json
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from attnprune.attention.interface import attach, gates_of
from attnprune.attention.spans import KnownMask, Spans
from attnprune.data.blocks import Blocks
from attnprune.training import recipe, trainer
from attnprune.training.scope import attach_gates, make_trainable
from attnprune.training.step import MicroStep, settle_step
from tests.helpers.families import BIAS, build
from tests.helpers.recipes import run_config


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


def micro_steps(family, *ways, tokens=24, **overrides):
    """(config, parameters that train, steps) of a tiny model of a family with adapters."""
    model = build(family).eval()
    train = {"scope": "lora", "lora_rank": 4, **overrides.pop("train", {})}
    config = run_config(("x", "y"), "out", train=train, **overrides)
    blocks = Blocks(torch.randint(0, 97, (4, tokens), generator=torch.Generator().manual_seed(1)), None, "random")
    config.gate.initial_mass = 0.0
    attach_gates(model, config)
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


class Operators(TorchDispatchMode):
    """Counts the operators of a block; with `kernels` those alone that are more than another view of a tensor."""

    def __init__(self, kernels=False):
        super().__init__()
        self.kernels, self.found = kernels, Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        is_view = any(r.alias_info and not r.alias_info.is_write for r in function._schema.returns)
        if not (self.kernels and (is_view or function.namespace == "prim")):
            self.found[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


DRAWS = {"rand", "randn", "randint", "bernoulli_", "uniform_", "normal_", "exponential_", "random_"}


def smollm2_steps(monkeypatch, *ways, layers=30, gate=None, **sizes):
    """Micro-steps of a model with SmolLM2's layers, heads and vocabulary, but narrower, on the kernels.

    Under FakeTensorMode nothing is computed, and whatever would have to look at a number raises.
    """
    sizes = {"vocab_size": 49152, "hidden_size": 72, "intermediate_size": 96, "num_hidden_layers": layers, **sizes}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    monkeypatch.setenv("ATTNPRUNE_BACKEND", "auto")
    model = LlamaForCausalLM(LlamaConfig(max_position_embeddings=2048, **sizes, **heads))
    attach(model)
    train = {"scope": "lora", "lora_rank": 64, "precision": "bf16"}
    config = run_config(("x", "y"), "out", train=train, gate=gate or {})
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
    step._masks[ids.shape] = [mask] * len(step.gates)  # found once for a shape of batch, by looking
    return ids, ids.clone(), torch.zeros(2), seed
