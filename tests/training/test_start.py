"""Starting from a finished run: its gates and weights, what must fit, and resuming."""

from __future__ import annotations

import json
import math
import shutil
import signal
from dataclasses import replace

import pytest
import torch

import attnprune
from attnprune.attention.interface import attach
from attnprune.errors import InputError, InterruptedRunError
from attnprune.runs.folder import CHECKPOINTS, read_resumed, without_local_paths
from attnprune.sidecar import bases
from attnprune.sidecar.merged import write_merged
from attnprune.training import recipe, schedule
from attnprune.training.start import start_from
from tests.helpers.factory import save_tiny_llama
from tests.helpers.recipes import _SignalAt, artefact, logged, run_config
from tests.helpers.sidecars import save_sidecar

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
    way, aim = 0.2 * 100, 0.1 * schedule.AIM
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
    attach(model)
    with pytest.raises(InputError, match="gates do not fit"):
        start_from(model, forged, config)


def test_weights_that_become_infinite_are_refused(inputs, tmp_path):
    sidecar = save_sidecar(tmp_path / "sidecar", inputs[0], kind="delta")
    model = bases.load_base(str(inputs[0])).model
    attach(model)
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
