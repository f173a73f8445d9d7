"""The plan: memory by formula and as measured, the micro-batch that follows, the precision, and what is recorded."""

from __future__ import annotations

import io
import json
import tomllib
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from attnprune.attention.interface import attach, gates_of
from attnprune.data.blocks import Blocks
from attnprune.errors import AttnPruneError
from attnprune.report.plan import plan_data, plan_table
from attnprune.runs import processes
from attnprune.runs.config import TrainConfig, build_config
from attnprune.training import plan, recipe, resolve
from attnprune.training.memory import Estimator, Shape, largest_divisor
from attnprune.training.plan import make_plan
from attnprune.training.scope import make_trainable
from tests.helpers.groups import in_group
from tests.helpers.recipes import run_config

GIB = 2**30
MEASURED_WITHIN = 2.0  # of the formulas; on small tensors, whose freed memory the C library keeps
SMOLLM2 = Shape(
    layers=30, width=576, mlp=1536, heads=9, query=576, key=192, vocabulary=49_152,
    weights=4 * 141_888_000, parameters=141_888_000, trainable=7_373_070,
)  # fmt: skip


def estimator(shape=SMOLLM2, **train):
    settings = TrainConfig(**{"scope": "lora"} | train)
    return Estimator(shape, settings, 512, on_cpu=False, bf16=True, compares=True, process=plan.CONTEXT)


def made(batch_size=16, tokens=128, vocabulary=4096, **train):
    """(model, reference, configuration, training text) of a small Llama on which a step takes megabytes."""
    torch.manual_seed(0)
    config = build_config({
        "model": {"device": "cpu"}, "data": {"seq_len": tokens},
        "train": {"scope": "full", "precision": "fp32", "batch_size": batch_size} | train,
    })  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=vocabulary, hidden_size=128, intermediate_size=352, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )).eval()  # fmt: skip
    attach(model, bias=4.0)
    model, reference = make_trainable(model, config)
    ids = torch.randint(0, vocabulary, (20, tokens))
    return model, reference, config, Blocks(ids, ids, "text")


def planned(model, reference, config, text, clock=None):
    return make_plan(model, reference, config, text, text.take(torch.arange(2)), [], clock)


# Memory


def test_a_gpu_takes_what_was_measured_on_one():
    """32 blocks of 512 tokens of SmolLM2-135M, adapters of rank 64: 29 GiB on an H200."""
    assert estimator().of(32).total == pytest.approx(29 * GIB, rel=0.1)
    assert 19 <= estimator().fits(24e9) <= 25
    assert 73 <= estimator().fits(80e9) <= 88


def test_what_fits_is_the_most_that_does():
    for available in (5e9, 24e9, 80e9):
        blocks = estimator().fits(available)
        assert estimator().of(blocks).total <= available < estimator().of(blocks + 1).total
    assert estimator().fits(1e9) == 0


def test_each_setting_moves_its_own_part():
    usual = estimator().of(16)
    copied, light = estimator(scope="full").of(16), estimator(optimizer="adamw8bit").of(16)
    assert (usual.copied, copied.copied) == (0, SMOLLM2.weights)
    assert usual.optimizer - light.optimizer == pytest.approx((6 - 8 / 256) * SMOLLM2.trainable, abs=8)
    assert estimator(gradient_checkpointing=True).of(16).activations < usual.activations / 5
    chunked = replace(estimator(), chunk=4096)
    assert chunked.of(16).logits == chunked.of(8).logits == usual.logits / 2
    assert replace(estimator(), compares=False).of(16).logits < usual.logits


@pytest.mark.parametrize("scope", ["gates", "lora", "full"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_measured_step_is_near_the_estimate(scope, precision):
    model, reference, config, text = made(scope=scope, precision=precision)
    steps = plan._Steps(model, reference, config, text)
    steps.measured(1)
    formula, _ = plan._before(model, config, text.seq_len, steps.device)
    _, peak = steps.measured(16)
    if peak is None:
        pytest.skip("this system does not tell a process's peak memory")
    estimated = formula.of(16).step + 4 * formula.shape.trainable
    assert estimated / MEASURED_WITHIN < peak < estimated * MEASURED_WITHIN


@pytest.mark.parametrize(("passes", "counted"), [([3.0, 2.4], 2.4), ([8.0], 8.0)])
def test_a_first_pass_counts_only_where_a_second_takes_long(monkeypatch, passes, counted):
    model, reference, config, text = made()
    left = [*passes]
    monkeypatch.setattr(plan._Steps, "_run", lambda self, blocks: left.pop(0))
    assert plan._Steps(model, reference, config, text).measured(1)[0] == counted
    assert not left


def test_a_measured_step_corrects_what_grows_and_nothing_else():
    before = estimator()
    after = before.corrected(4, 2 * (before.of(4).step + 4 * SMOLLM2.trainable))
    assert after.of(8).step == pytest.approx(2 * before.of(8).step)
    assert after.of(8).total - after.of(8).step == before.of(8).total - before.of(8).step
    on_cpu = replace(before, on_cpu=True)
    assert on_cpu.corrected(4, 1.0).correction == 1  # resident memory can say too little


# The micro-batch


@pytest.mark.parametrize(("count", "limit", "expected"), [
    (16, 16, 16), (16, 15, 8), (16, 100, 16), (16, 0, 1), (12, 5, 4), (7, 6, 1), (1, 1, 1),
])  # fmt: skip
def test_the_largest_divisor(count, limit, expected):
    assert largest_divisor(count, limit) == expected


@pytest.mark.parametrize(("batch", "tokens", "expected"), [(8, 16, 8), (16, 512, 4), (16, 2048, 1), (6, 512, 3)])
def test_a_processor_takes_no_more_than_makes_it_faster(batch, tokens, expected):
    assert planned(*made(batch, tokens, 64, scope="gates")).config.train.micro_batch_size == expected


def test_the_micro_batch_fits_into_the_memory_that_is_free(monkeypatch):
    inputs = made()
    monkeypatch.setattr(plan, "held_memory", lambda device: 10**9)
    monkeypatch.setattr(plan, "peak_bytes", lambda run, device: run())  # nothing to correct
    formula, _ = plan._before(inputs[0], inputs[2], 128, torch.device("cpu"))
    room = formula.of(7).total - 10**9
    monkeypatch.setattr(plan, "free_memory", lambda device: round(room / plan.SHARE["cpu"]))
    made_plan = planned(*inputs)
    assert made_plan.config.train.micro_batch_size == 4  # of 16: seven fit, and seven is no divisor
    assert made_plan.memory.total <= made_plan.limit_bytes < formula.of(8).total
    assert inputs[2].train.micro_batch_size == "auto"  # the caller's configuration is its own


def test_memory_for_not_even_one_block_is_refused_before_it_is_allocated(monkeypatch):
    inputs = made()
    monkeypatch.setattr(plan, "free_memory", lambda device: 1000)
    monkeypatch.setattr(plan._Steps, "measured", lambda self, blocks: pytest.fail("allocates"))
    with pytest.raises(AttnPruneError, match="memory: a step of one block needs about"):
        planned(*inputs)


def test_an_explicit_micro_batch_that_does_not_fit_is_told(monkeypatch):
    monkeypatch.setattr(plan, "free_memory", lambda device: 1000)
    told = planned(*made(micro_batch_size=8))
    assert told.config.train.micro_batch_size == 8
    assert any(note.startswith("warning: 8 blocks at once: about") for note in told.notes)


def test_zero_means_all_at_once(monkeypatch):
    sizes = []
    monkeypatch.setattr(plan._Steps, "measured", lambda self, blocks: (sizes.append(blocks) or 0.1, None))
    assert planned(*made(8, micro_batch_size=0)).seconds_per_1000_steps == pytest.approx(100 + 1000 * plan.OVERHEAD)
    assert sizes == [1, 8]


def test_the_plan_shows_what_memory_is_for_and_how_blocks_are_cut(monkeypatch):
    monkeypatch.setattr(plan._Steps, "measured", lambda self, blocks: (3.0, None))
    shown = planned(*made(16, 512, vocabulary=256, gradient_checkpointing=True))
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(plan_table(replace(shown, limit_bytes=8 * 10**9, fits={24: 12, 48: 34, 80: 1056})))
    text = console.export_text()
    assert "8,192 tokens, fp32: 16 blocks of 512, 4 at once" in text
    assert "of 8 GB that can be had: " in text
    assert "on a GPU, blocks at once: 12 in 24 GB, 34 in 48 GB, 1,056 in 80 GB" in text
    assert "13 h 20 min per 1,000 steps" in text  # four micro-batches of four times 3 s, and 10 ms
    data = json.loads(json.dumps(plan_data(shown)))
    assert sum(data["memory"].values()) == pytest.approx(data["memory_bytes"])
    assert set(data["fits"]) == {"24", "48", "80"}


def test_a_plan_leaves_no_trace():
    model, reference, config, text = made(scope="full", gradient_checkpointing=True)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    planned(model, reference, config, text)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not model.training
    assert not model.is_gradient_checkpointing
    assert all(gate.last is None for gate in gates_of(model))


def test_a_run_records_what_was_chosen(inputs, tmp_path):
    with pytest.raises(StopIteration):  # before the first step
        recipe.sparsify(run_config(inputs, tmp_path / "run"), callbacks=[_Stops()])
    stored = tomllib.loads((tmp_path / "run" / "run.toml").read_text())["train"]
    assert (stored["micro_batch_size"], stored["precision"]) == (4, "fp32")


class _Stops(recipe.TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        raise StopIteration


# Precision


@pytest.mark.parametrize(("flags", "capability", "gain", "precision"), [
    ({"amx_bf16"}, "AVX512", 3.0, "bf16"), ({"avx512_bf16"}, "AVX512", 1.1, "fp32"),
    ({"avx512_bf16"}, "AVX2", 3.0, "fp32"), (set(), "AVX512", 3.0, "fp32"),
])  # fmt: skip
def test_a_processor_computes_in_bf16_where_it_is_faster(monkeypatch, flags, capability, gain, precision):
    shapes = []
    monkeypatch.setattr(resolve, "bfloat16_flags", lambda: flags)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(resolve, "bfloat16_gain", lambda *shape: shapes.append(shape) or gain)
    chosen, why = resolve._precision(made()[0], resolve.SMALL_MODEL, "cpu")
    assert chosen == precision
    assert "bf16" in why
    assert set(shapes) <= {(resolve.DEFAULT_SEQ_LEN, 128, 352), (resolve.DEFAULT_SEQ_LEN, 352, 128)}


def test_small_models_stay_in_fp32_without_a_race(monkeypatch):
    monkeypatch.setattr(resolve, "bfloat16_gain", lambda *shape: pytest.fail("timed"))
    assert resolve._precision(made()[0], resolve.SMALL_MODEL - 1, "cpu") == ("fp32", "")


def test_on_cuda_it_is_bf16():
    assert resolve._precision(made()[0], 1, "cuda") == ("bf16", "")


# Several processes


def _planned_where_the_first_is_fast(parts) -> None:
    processes.join("cpu")
    runs = []

    def run(self, blocks):
        runs.append(blocks)
        return 100.0 if processes.rank() else 0.001

    plan._Steps._run = run
    found = planned(*parts)
    seen = processes.gather((runs, found.config.train.micro_batch_size, found.seconds_per_1000_steps))
    assert seen[0] == seen[1]
    assert len(runs) > 2  # quick steps are measured again, and all at once


@pytest.mark.allow_hosts(["127.0.0.1"])
def test_all_processes_plan_by_what_the_first_measured():
    """A sharded model runs in all of them or in none: one that ran once more would wait for ever."""
    assert in_group(_planned_where_the_first_is_fast, made()) == [0, 0]
