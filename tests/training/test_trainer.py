"""What the trainer optimises: limits over the run, the Lagrangian, when the base runs, dtypes."""

from __future__ import annotations

import json
import math

import pytest
import torch
import transformers
from transformers import TrainingArguments

import attnprune
from attnprune.errors import InputError
from attnprune.training import recipe, schedule, trainer
from tests.helpers.factory import byte_tokenizer
from tests.helpers.recipes import logged, run_config


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
    aim = 0.25 * schedule.AIM
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
