"""The whole flow on tiny models: export equals what loads, scopes, resume, kill -9, signals, non-finite values."""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from transformers import TrainerCallback, TrainingArguments

import attnprune
from attnprune.data.sampling import sample
from attnprune.errors import AttnPruneError, InputError, InterruptedRunError
from attnprune.files import locked
from attnprune.runs.config import RunConfig, build_config, merge
from attnprune.runs.folder import CHECKPOINTS, read_resumed, without_local_paths
from attnprune.sidecar import bases, loading
from attnprune.sidecar.folder import open_sidecar
from attnprune.sidecar.merged import write_merged
from attnprune.training import checkpoints, recipe, trainer
from attnprune.training.evaluation import SELF_SEED, evaluate_model
from attnprune.training.resolve import load_base, resolve
from attnprune.training.start import start_from
from tests.factory import byte_tokenizer, save_text, save_tiny_llama
from tests.sidecars import save_sidecar

FORK = multiprocessing.get_context("fork")  # children start with torch imported, and can be killed


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return save_tiny_llama(folder / "model"), save_text(folder / "text.txt")


def run_config(inputs, out: Path, **overrides) -> RunConfig:
    model, text = inputs
    values = {
        "model": {"name": str(model), "device": "cpu"},
        "data": {"source": str(text), "seq_len": 16, "eval_tokens": 160},
        "constraint": {"kind": "kl", "tolerance": 0.5},
        "train": {"scope": "full", "steps": 12, "batch_size": 4, "eval_every": 4, "save_every": 4, "warmup_steps": 2},
        "output": {"folder": str(out)},
    }
    return build_config(merge(values, overrides))


@pytest.fixture(scope="module")
def uninterrupted(inputs, tmp_path_factory):
    return recipe.sparsify(run_config(inputs, tmp_path_factory.mktemp("whole") / "run"))


@pytest.mark.parametrize(("capability", "precision", "told"), [
    ("AVX2", "bf16", True), ("AVX2", "fp32", False), ("AVX512", "bf16", False),
])  # fmt: skip
def test_bf16_on_a_processor_without_it_is_told(inputs, tmp_path, monkeypatch, capability, precision, told):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    config = run_config(inputs, tmp_path / "run", train={"precision": precision})
    _, notes = resolve(config, load_base(config))
    assert any("no bf16 instructions" in note for note in notes) == told


def artefact(folder: Path) -> dict[str, bytes]:
    names = ("gates.safetensors", "delta.safetensors", "attnprune.json")
    return {name: (folder / name).read_bytes() for name in names}


def test_result_is_reproduced_by_loading_the_sidecar(uninterrupted, inputs):
    [report] = evaluate_model(str(uninterrupted.path), uninterrupted, [], base=str(inputs[0]))
    result = uninterrupted.manifest.result
    assert (report.loss, report.open_edges) == (result.loss, result.open_edges)
    assert (report.base_loss, report.kl, report.control_loss) == (result.base_loss, result.kl, result.control_loss)


def test_finished_run_leaves_a_sidecar_and_no_checkpoints(uninterrupted):
    names = {file.name for file in uninterrupted.path.iterdir()}
    assert names == {"attnprune.json", "gates.safetensors", "delta.safetensors", "run.toml", "metrics.jsonl"}


def test_metrics_hold_the_constraint_numbers(uninterrupted):
    lines = [json.loads(line) for line in (uninterrupted.path / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if "eval_density" in line]
    assert [line["step"] for line in evaluations] == [4, 8, 12]
    assert all({"multiplier", "gap", "density", "violation"} <= set(line) for line in lines if "multiplier" in line)


@pytest.mark.parametrize(("scope", "kind"), [("gates", "none"), ("lora", "lora"), ("attn", "delta"), ("full", "delta")])
def test_every_scope_loads_back_and_moves_only_its_weights(inputs, tmp_path, scope, kind):
    sidecar = recipe.sparsify(run_config(inputs, tmp_path / "run", train={"scope": scope, "steps": 8}))
    assert sidecar.manifest.weights.kind == kind
    base = dict(bases.load_base(str(inputs[0])).model.named_parameters())
    sparse = attnprune.load(sidecar.path, base=str(inputs[0])).model
    moved = {n for n, p in sparse.named_parameters() if n in base and not torch.equal(p, base[n])}
    attention = {n for n in base if "self_attn" in n}
    assert moved == {"gates": set(), "lora": attention, "attn": attention, "full": set(base)}[scope]
    loading.verify_probe(sparse, sidecar.manifest)


STILL = {"learning_rate": 1e-30, "gate_learning_rate": 1e-30, "steps": 1}


@pytest.mark.parametrize("scope", ["gates", "lora", "attn", "full"])
def test_a_run_starts_from_the_gates_and_weights_of_a_sidecar(inputs, tmp_path, scope):
    first = recipe.sparsify(run_config(inputs, tmp_path / "first", train={"scope": scope, "steps": 8}))
    again = run_config(inputs, tmp_path / "again", model={"init": str(first.path)}, train={"scope": scope, **STILL})
    second = recipe.sparsify(again)
    assert (second.path / "run.toml").read_text().count(str(first.path)) == 1
    assert str(tmp_path) not in without_local_paths(again).to_toml()
    assert all((a == b).all() for a, b in zip(first.biases(), second.biases(), strict=True))
    before, after = first.weights(), second.weights()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    a, b = first.manifest.result, second.manifest.result
    assert (a.loss, a.base_loss, a.kl, a.open_edges) == (b.loss, b.base_loss, b.kl, b.open_edges)


def test_the_density_limit_falls_from_where_the_sidecar_left_it(uninterrupted, inputs, tmp_path):
    overrides = {
        "model": {"init": str(uninterrupted.path)},
        "constraint": {"kind": "density", "target_density": 0.1},
        "train": {**STILL, "steps": 100, "eval_every": 100, "save_every": 100},
    }
    recipe.sparsify(run_config(inputs, tmp_path / "run", **overrides))
    way, aim = trainer.DENSITY_WAY * 100, 0.1 * trainer.DENSITY_AIM
    pairs = zip(logged(tmp_path / "run", "violation"), logged(tmp_path / "run", "density"), strict=True)
    limits = [density / math.exp(violation) for violation, density in pairs]  # logged every tenth step
    shares = [min(1.0, step / way) for step in range(10, 101, 10)]
    start = (limits[0] / aim ** shares[0]) ** (1 / (1 - shares[0]))  # the density of the first batch
    assert start == pytest.approx(uninterrupted.manifest.result.density, rel=0.1)
    assert limits == pytest.approx([start ** (1 - share) * aim**share for share in shares], rel=1e-4)


def test_a_run_never_ends_worse_than_the_sidecar_it_started_from(uninterrupted, inputs, tmp_path):
    overrides = {"model": {"init": str(uninterrupted.path)}, "train": {"learning_rate": 1.0, "steps": 3}}
    assert uninterrupted.manifest.result.feasible
    ruined = recipe.sparsify(run_config(inputs, tmp_path / "run", **overrides))
    assert ruined.manifest.result.open_edges == uninterrupted.manifest.result.open_edges
    evaluations = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in evaluations if "eval_density" in line] == [0, 3]


def test_a_sidecar_to_start_from_must_fit_the_run(uninterrupted, inputs, tmp_path):
    def starting(**overrides):
        return recipe.sparsify(run_config(inputs, tmp_path / "run", **overrides))

    lora = recipe.sparsify(run_config(inputs, tmp_path / "lora", train={"scope": "lora", "steps": 1}))
    full, adapters = {"init": str(uninterrupted.path)}, {"init": str(lora.path)}
    with pytest.raises(InputError, match="weights do not fit a run with scope lora"):
        starting(model=full, train={"scope": "lora"})
    with pytest.raises(InputError, match="weights do not fit a run with scope attn"):
        starting(model=full, train={"scope": "attn"})
    with pytest.raises(InputError, match=r"adapters of rank 16 \(alpha 32\) do not fit a run with scope lora"):
        starting(model=adapters, train={"scope": "lora", "lora_rank": 8})
    with pytest.raises(InputError, match=r"adapters of rank 16 .* do not fit a run with scope full"):
        starting(model=adapters)
    with pytest.raises(InputError, match="no such file or folder"):
        starting(model={"init": str(tmp_path / "none")})
    other = save_tiny_llama(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match=r"run: wrong base model") as caught:
        starting(model={"name": str(other), **full})
    assert caught.value.hint is None  # the option that loading has for this does not exist here
    with pytest.raises(InputError, match="made on a float32 base, not bfloat16"):
        starting(model={"dtype": "bfloat16", **adapters}, train={"scope": "lora"})
    loaded = attnprune.load(uninterrupted.path, base=str(inputs[0]))
    write_merged(*loaded, uninterrupted, tmp_path / "merged", same_dtype=True)
    with pytest.raises(InputError, match="is a merged model"):
        starting(model={"init": str(tmp_path / "merged")})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("heads", [[4], [4, 3], [1, 1]])
def test_gates_that_do_not_fit_are_refused(inputs, tmp_path, heads):
    good = save_sidecar(tmp_path / "sidecar", inputs[0])
    gate = good.manifest.gate.model_copy(update={"heads": heads})
    forged = replace(good, manifest=good.manifest.model_copy(update={"gate": gate}))
    config = run_config(inputs, tmp_path / "run", train={"scope": "gates"})
    model = bases.load_base(str(inputs[0])).model
    recipe.attach(model)
    with pytest.raises(InputError, match="gates do not fit"):
        start_from(model, forged, config)


def test_weights_that_become_infinite_are_refused(inputs, tmp_path):
    sidecar = save_sidecar(tmp_path / "sidecar", inputs[0], kind="delta")
    model = bases.load_base(str(inputs[0])).model
    recipe.attach(model)
    weights = {name: tensor.double() for name, tensor in sidecar.weights().items()}
    next(iter(weights.values()))[0, 0] = 1e300
    object.__setattr__(sidecar, "weights", lambda: weights)
    with pytest.raises(InputError, match="is not finite in"):
        start_from(model, sidecar, run_config(inputs, tmp_path / "run"))


def test_a_run_that_started_from_a_sidecar_resumes(inputs, tmp_path):
    first = save_sidecar(tmp_path / "first", inputs[0]).path
    overrides = {"model": {"init": str(first)}, "constraint": {"kind": "density", "target_density": 0.1}}
    whole = recipe.sparsify(run_config(inputs, tmp_path / "whole", **overrides))
    with pytest.raises(InterruptedRunError):
        recipe.sparsify(run_config(inputs, tmp_path / "cut", **overrides), callbacks=[_SignalAt(5, signal.SIGTERM)])
    first.rename(tmp_path / "moved")  # a checkpoint is all that a resumed run needs
    recipe.sparsify(read_resumed(tmp_path / "cut", {}), resume=True)
    assert artefact(tmp_path / "cut") == artefact(whole.path)


def test_a_run_without_a_checkpoint_resumes_from_the_same_sidecar_only(inputs, tmp_path):
    first = save_sidecar(tmp_path / "first", inputs[0])
    config = run_config(inputs, tmp_path / "run", model={"init": str(first.path)})
    with pytest.raises(InterruptedRunError):
        recipe.sparsify(config, callbacks=[_SignalAt(0, signal.SIGTERM)])
    shutil.rmtree(tmp_path / "run" / CHECKPOINTS / "checkpoint-1")
    shutil.rmtree(first.path)
    save_sidecar(tmp_path / "first", inputs[0], seed=1)
    with pytest.raises(InputError, match="the first sidecar differs from the run's"):
        recipe.sparsify(read_resumed(tmp_path / "run", {}), resume=True)


def test_density_first_mode_reaches_its_target(inputs, tmp_path):
    overrides = {"constraint": {"kind": "density", "target_density": 0.4, "rate": 0.1},
                 "train": {"steps": 120, "eval_every": 20, "save_every": 100, "gate_learning_rate": 0.1}}  # fmt: skip
    sidecar = recipe.sparsify(run_config(inputs, tmp_path / "run", **overrides))
    assert sidecar.manifest.result.feasible
    assert sidecar.manifest.result.density <= 0.4


def test_training_closes_edges_under_the_constraint(inputs, tmp_path):
    train = {"steps": 150, "eval_every": 25, "save_every": 150, "gate_learning_rate": 0.1}
    sidecar = recipe.sparsify(run_config(inputs, tmp_path / "run", train=train))
    result = sidecar.manifest.result
    assert result.feasible
    assert result.kl <= 0.5
    assert result.density < 0.5


def logged(folder: Path, key: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if "multiplier" in line]


def test_the_tolerance_narrows_to_its_value_over_the_run(inputs, tmp_path):
    overrides = {"constraint": {"start_factor": 5.0}, "train": {"steps": 20, "final_fraction": 0.5}}
    recipe.sparsify(run_config(inputs, tmp_path / "run", **overrides))
    pairs = zip(logged(tmp_path / "run", "violation"), logged(tmp_path / "run", "kl"), strict=True)
    limits = [kl / (violation + 1) for violation, kl in pairs]  # logged every second step
    expected = [0.5 * (1 + 4 * max(0.0, 1 - step / 10)) for step in range(1, 20, 2)]
    assert limits == pytest.approx(expected, rel=1e-4)


def test_a_density_limit_falls_geometrically_to_a_little_below_its_target(inputs, tmp_path):
    overrides = {"constraint": {"kind": "density", "target_density": 0.25}, "train": {"steps": 20}}
    recipe.sparsify(run_config(inputs, tmp_path / "run", **overrides))
    pairs = zip(logged(tmp_path / "run", "violation"), logged(tmp_path / "run", "density"), strict=True)
    limits = [density / math.exp(violation) for violation, density in pairs]
    aim = 0.25 * trainer.DENSITY_AIM
    assert limits == pytest.approx([math.sqrt(aim), *[aim] * 9], rel=1e-4)


@pytest.mark.parametrize(
    ("constraint", "distill", "runs"),
    [
        ({"kind": "density", "target_density": 0.5}, 0.0, False),
        ({"kind": "density", "target_density": 0.5}, 0.5, True),
        ({"kind": "loss", "paired": False}, 0.0, False),
        ({"kind": "loss"}, 0.0, True),
        ({"kind": "kl"}, 0.0, True),
    ],
)
def test_the_base_runs_in_training_only_where_it_is_needed(inputs, tmp_path, constraint, distill, runs):
    train = {"steps": 2, "distill": distill}
    sidecar = recipe.sparsify(run_config(inputs, tmp_path / "run", constraint=constraint, train=train))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    mean = sidecar.manifest.result.base_loss
    for line in (line for line in lines if "multiplier" in line):
        assert ("kl" in line) == runs
        assert (line["base_loss"] != pytest.approx(mean, abs=1e-5)) == runs
        assert line["gap"] == pytest.approx(line["train_loss"] - line["base_loss"], abs=1e-5)


def test_an_unpaired_constraint_compares_with_one_base_loss(inputs, tmp_path):
    overrides = {"constraint": {"kind": "loss", "paired": False}, "train": {"distill": 0.0}}
    sidecar = recipe.sparsify(run_config(inputs, tmp_path / "run", **overrides))
    [base_loss] = set(logged(tmp_path / "run", "base_loss"))
    assert base_loss == pytest.approx(sidecar.manifest.result.base_loss, abs=1e-5)


@pytest.mark.parametrize(("penalty", "distill"), [("log", 1.0), ("log", 0.0), ("log", 0.25), ("mean", 1.0)])
def test_the_lagrangian_weighs_edges_against_damage(inputs, tmp_path, penalty, distill):
    overrides = {
        "gate": {"penalty": penalty},
        "constraint": {"kind": "loss", "tolerance": 0.2, "start_factor": 1.0},
        "train": {"steps": 10, "distill": distill, "final_fraction": 0.0},
    }
    recipe.sparsify(run_config(inputs, tmp_path / "run", **overrides))
    first = {
        key: logged(tmp_path / "run", key)[0]
        for key in ("lagrangian", "penalty", "kl", "gap", "multiplier", "train_loss", "base_loss")
    }
    edges = math.log(first["penalty"]) if penalty == "log" else first["penalty"]
    damage = distill * first["kl"] + (1 - distill) * (first["train_loss"] - first["base_loss"])
    weight = first["multiplier"] / 0.2
    assert first["lagrangian"] == pytest.approx((edges + weight * damage) / (1 + weight), abs=1e-5)


def test_gates_start_with_the_asked_share_of_the_softmax_mass(inputs, tmp_path):
    """One step that moves nothing: the smaller share starts sparser."""
    density = {}
    for mass in (0.5, 0.9):
        overrides = {
            "gate": {"initial_mass": mass},
            "train": {"scope": "gates", "steps": 1, "gate_learning_rate": 1e-9},
        }
        sidecar = recipe.sparsify(run_config(inputs, tmp_path / f"run-{mass}", **overrides))
        density[mass] = sidecar.manifest.result.density
    assert 0 < density[0.5] < density[0.9] < 1


def test_eval_on_text_that_the_base_writes(uninterrupted, inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    [report] = evaluate_model(str(uninterrupted.path), uninterrupted, ["self"], base=str(inputs[0]), tokens=64)
    assert (report.data, report.seq_len) == ("self", 16)
    assert report.kl > 0


def test_text_to_measure_on_is_not_that_of_a_runs_seed(inputs):
    base = bases.load_base(str(inputs[0]))
    seeds = (0, 1, 2**32 - 1, SELF_SEED)
    drawn = [sample(base.model, base.tokenizer, 4, 16, seed) for seed in seeds]
    assert all(not torch.equal(one, other) for one, other in itertools.combinations(drawn, 2))


def test_gumbel_and_gradient_accumulation_run(inputs, tmp_path):
    overrides = {"gate": {"estimator": "gumbel"}, "train": {"micro_batch_size": 2, "steps": 4}}
    assert recipe.sparsify(run_config(inputs, tmp_path / "run", **overrides)) is not None


def test_activation_checkpointing_goes_by_the_name_that_transformers_knows(monkeypatch):
    asked = trainer._checkpointing(True)
    assert set(asked) <= set(TrainingArguments.__dataclass_fields__)
    monkeypatch.setattr(TrainingArguments, "__dataclass_fields__", {"gradient_checkpointing": None})  # up to 5.17
    assert trainer._checkpointing(True) == {
        "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}
    }  # fmt: skip
    assert not trainer._checkpointing(False)["gradient_checkpointing"]


def test_8bit_adam_runs_on_cpu(inputs, tmp_path):
    assert recipe.sparsify(run_config(inputs, tmp_path / "run", train={"optimizer": "adamw8bit", "steps": 4}))


def test_plan_can_stop_the_run_and_leaves_nothing(inputs, tmp_path):
    plans = []
    assert recipe.sparsify(run_config(inputs, tmp_path / "run"), on_plan=lambda plan: bool(plans.append(plan))) is None
    assert not (tmp_path / "run").exists()
    assert plans[0].trainable == plans[0].total
    assert plans[0].seconds_per_1000_steps > 0


DROPOUTS = {
    "gpt2": transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=257),
    "gpt_bigcode": transformers.GPTBigCodeConfig(n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=257),
    "opt": transformers.OPTConfig(
        hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=64, vocab_size=257, dropout=0.3, attention_dropout=0.3, layerdrop=0.3,
    ),
    "starcoder2": transformers.Starcoder2Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, vocab_size=257, residual_dropout=0.3, embedding_dropout=0.3, attention_dropout=0.3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", DROPOUTS)
def test_training_without_change_has_no_gap_whatever_the_dropout(family, inputs, tmp_path):
    """With every gate wide open and nothing moving, the paired KL of a training step is 0: no hidden noise."""
    model = transformers.AutoModelForCausalLM.from_config(DROPOUTS[family])
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    overrides = {
        "gate": {"initial_mass": 0.0, "bias_init": 90.0},
        "train": {"scope": "gates", "steps": 2, "gate_learning_rate": 1e-9},
    }
    recipe.sparsify(run_config((tmp_path / "model", inputs[1]), tmp_path / "run", **overrides))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [abs(line["gap"]) < 1e-6 for line in lines if "gap" in line] == [True, True]


def test_16_bit_weights_that_would_train_are_refused(inputs, tmp_path):
    with pytest.raises(InputError, match="would round away"):
        recipe.sparsify(run_config(inputs, tmp_path / "run", model={"dtype": "bfloat16"}))
    assert not (tmp_path / "run").exists()


def test_bf16_base_with_lora_loads_back(inputs, tmp_path):
    overrides = {"model": {"dtype": "bfloat16"}, "train": {"scope": "lora", "steps": 4, "precision": "bf16"}}
    sidecar = recipe.sparsify(run_config(inputs, tmp_path / "run", **overrides))
    model = attnprune.load(sidecar.path, base=str(inputs[0])).model
    assert model.dtype == torch.bfloat16


def test_bf16_training_computes_in_bf16_and_keeps_fp32_weights(inputs, tmp_path):
    losses = {}
    for precision in ("fp32", "bf16"):
        out = tmp_path / precision
        sidecar = recipe.sparsify(run_config(inputs, out, train={"steps": 2, "precision": precision}))
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses[precision] = [line["train_loss"] for line in lines if "train_loss" in line]
        model = attnprune.load(sidecar.path, base=str(inputs[0])).model
        assert model.dtype == torch.float32
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=1e-2)
    assert losses["bf16"] != losses["fp32"]


# --- interruption -----------------------------------------------------------------------------------------------------


def in_child(target, *args) -> int:
    """Run in a forked process; its exit code (negative: killed by that signal)."""
    child = FORK.Process(target=target, args=args)
    child.start()
    child.join(120)
    assert child.exitcode is not None, "the child hangs"
    return child.exitcode


def _train_and_die(config: RunConfig, die_at: int, counter) -> None:
    """Train, and SIGKILL this process at file write number `die_at` of the saves (0: never; count them)."""
    writes = 0

    def about_to_write(path, atomic=False) -> None:
        nonlocal writes
        if f"{CHECKPOINTS}{os.sep}{checkpoints.PREFIX}" not in os.fspath(path):
            return
        writes += 1
        counter.value = writes
        if writes == die_at:
            if not atomic:
                Path(path).write_bytes(b"half a file")
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event, args):
        if event == "open" and isinstance(args[0], (str, os.PathLike)) and isinstance(args[1], str) and "w" in args[1]:
            about_to_write(args[0])
        elif event == "os.rename":
            about_to_write(args[1], atomic=True)

    from attnprune.training import trainer

    original = trainer.save_file

    def save_file(tensors, path, *rest):  # written by Rust, so no audit event
        about_to_write(path)
        original(tensors, path, *rest)

    trainer.save_file = save_file
    torch_save = torch.save

    def save(obj, path, *rest, **kwargs):  # written by C++, likewise
        about_to_write(path)
        torch_save(obj, path, *rest, **kwargs)

    torch.save = save
    sys.addaudithook(audit)
    recipe.sparsify(config)


def _resume(config: RunConfig) -> None:
    recipe.sparsify(config, resume=True)


def _count_writes(inputs, folder: Path) -> int:
    counter = FORK.Value("i", 0)
    assert in_child(_train_and_die, run_config(inputs, folder), 0, counter) == 0
    return counter.value


def test_resume_after_kill_at_every_file_write_gives_the_same_result(inputs, tmp_path, uninterrupted):
    writes = _count_writes(inputs, tmp_path / "count")
    assert writes >= 3 * 7  # three saves of model, best, optimizer, scheduler, random state, trainer state, seal
    expected = artefact(uninterrupted.path)
    per_save = writes // 3
    for die_at in range(1, 2 * per_save + 1):  # every write of the first and the second save
        out = tmp_path / f"killed-{die_at}"
        config = run_config(inputs, out)
        assert in_child(_train_and_die, config, die_at, FORK.Value("i", 0)) == -signal.SIGKILL
        assert in_child(_resume, config) == 0
        assert artefact(out) == expected, f"killed at write {die_at}"
        shutil.rmtree(out)


def test_resume_with_only_damaged_checkpoints_is_refused(inputs, tmp_path):
    config = run_config(inputs, tmp_path / "run")
    with pytest.raises(InterruptedRunError):
        recipe.sparsify(config, callbacks=[_SignalAt(2, signal.SIGTERM)])
    (tmp_path / "run" / CHECKPOINTS / "checkpoint-3" / "optimizer.pt").write_bytes(b"damaged")
    with pytest.raises(AttnPruneError, match="no intact checkpoint"):
        recipe.sparsify(config, resume=True)


class _SignalAt(TrainerCallback):
    def __init__(self, step, number):
        self.step, self.number = step, number

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_saves_and_resume_is_exact(inputs, tmp_path, uninterrupted, number, code):
    config = run_config(inputs, tmp_path / "run")
    before = signal.getsignal(number)
    with pytest.raises(InterruptedRunError) as caught:
        recipe.sparsify(config, callbacks=[_SignalAt(5, number)])
    assert caught.value.exit_code == code
    assert "checkpoint-6" in caught.value.message
    assert "--resume" in (caught.value.hint or "")
    assert signal.getsignal(number) is before
    recipe.sparsify(read_resumed(tmp_path / "run", {}), resume=True)
    assert artefact(tmp_path / "run") == artefact(uninterrupted.path)
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


def test_resume_with_other_settings_or_data_is_refused(inputs, tmp_path):
    config = run_config(inputs, tmp_path / "run")
    with pytest.raises(InterruptedRunError):
        recipe.sparsify(config, callbacks=[_SignalAt(5, signal.SIGTERM)])
    with pytest.raises(InputError, match=r"train\.seed: 7 differs"):
        read_resumed(tmp_path / "run", {"train": {"seed": 7}})
    text = inputs[1].read_text()
    inputs[1].write_text(text.replace("gate", "door"))
    try:
        with pytest.raises(InputError, match="data differs"):
            recipe.sparsify(config, resume=True)
    finally:
        inputs[1].write_text(text)


class _Poison(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 6:
            with torch.no_grad():
                next(kwargs["model"].parameters()).fill_(float("nan"))


def test_non_finite_loss_stops_and_keeps_the_last_good_checkpoint(inputs, tmp_path):
    with pytest.raises(AttnPruneError, match=r"non-finite .* at step 7") as caught:
        recipe.sparsify(run_config(inputs, tmp_path / "run"), callbacks=[_Poison()])
    assert caught.value.exit_code == 1
    assert "checkpoint-4" in (caught.value.hint or "")


def test_output_folder_in_use_is_refused(inputs, tmp_path):
    with locked(tmp_path / "run"), pytest.raises(InputError, match="in use by another run"):
        recipe.sparsify(run_config(inputs, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_other_base_is_refused(uninterrupted, tmp_path):
    other = save_tiny_llama(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match="not the weights"):
        attnprune.load(uninterrupted.path, base=str(other))
    wider = save_tiny_llama(tmp_path / "wider", num_attention_heads=8)
    with pytest.raises(InputError, match="wrong base"):
        attnprune.load(uninterrupted.path, base=str(wider))
    assert attnprune.load(uninterrupted.path, base=str(other), allow_base_mismatch=True)


def test_unnamed_local_base_asks_for_base(uninterrupted):
    with pytest.raises(InputError, match="name it"):
        attnprune.load(open_sidecar(uninterrupted.path).path)
