"""Several processes of one run, over gloo: the bits of one process, one that talks, and an end for all of them."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from attnprune.attention.interface import attach, gates_of
from attnprune.data.blocks import Blocks
from attnprune.errors import AttnPruneError, InputError, InterruptedRunError
from attnprune.measure import measure
from attnprune.runs import processes
from attnprune.runs.folder import CHECKPOINTS, read_resumed
from attnprune.sidecar import bases
from attnprune.training import checkpoints, gradients, recipe, resolve
from tests.helpers.command import attnprune, listing
from tests.helpers.factory import refused, save_text
from tests.helpers.groups import in_group
from tests.helpers.recipes import _SignalAt, artefact, logged, run_config, sidecar_files
from tests.helpers.texts import prose

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])

LORA = {"scope": "lora", "lora_rank": 2}
DENSITY = {"kind": "density", "target_density": 0.3}


def share(inputs, out: Path, micro: int = 1, **changes):
    """A run of 12 steps whose 4 blocks are micro-batches of `micro`."""
    changes.setdefault("train", {})["micro_batch_size"] = micro
    return run_config(inputs, out, **changes)


def sparsify(config, **options) -> None:
    recipe.sparsify(config, **options)


@pytest.mark.parametrize(
    ("changes", "micro"),
    [
        ({"constraint": {"kind": "loss", "tolerance": 0.5}}, 2),
        ({"constraint": {"kind": "kl", "tolerance": 0.5}, "gate": {"estimator": "gumbel"}, "train": LORA}, 1),
        ({"constraint": DENSITY, "gate": {"estimator": "gumbel"}}, 1),
        ({"constraint": DENSITY, "train": {**LORA, "steps": 60}}, 2),  # more than an epoch, whose end is ragged
    ],
)
def test_two_processes_write_the_sidecar_of_one_byte_for_byte(inputs, tmp_path, changes, micro):
    (tmp_path / "run").mkdir()
    configs = [share(inputs, tmp_path / name, micro, **changes) for name in ("one", "two")]
    recipe.sparsify(configs[0])
    assert in_group(sparsify, configs[1]) == [0, 0]
    assert sidecar_files(tmp_path / "two") == sidecar_files(tmp_path / "one")
    assert len(sidecar_files(tmp_path / "one")) == 3
    for term in ("violation", "multiplier", "density", "grad_norm"):
        assert logged(tmp_path / "two", term) == logged(tmp_path / "one", term)


def test_unordered_sums_agree_with_one_process_to_rounding(inputs, tmp_path):
    quick = {"train": {"deterministic": False}}
    recipe.sparsify(share(inputs, tmp_path / "one", 1, **quick))
    assert in_group(sparsify, share(inputs, tmp_path / "two", 1, **quick)) == [0, 0]
    one, two = (json.loads((tmp_path / name / "attnprune.json").read_text())["result"] for name in ("one", "two"))
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
    assert two["open_edges"] == pytest.approx(one["open_edges"], rel=1e-2)


def _stopped_by(number: int, rank: int, config) -> None:
    callbacks: list[TrainerCallback] = [_SignalAt(5, number)] if processes.rank() == rank else []
    with pytest.raises(InterruptedRunError, match="checkpoint-6") as caught:
        recipe.sparsify(config, callbacks=callbacks)
    assert caught.value.everywhere
    assert caught.value.exit_code == 128 + number


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """What a run with micro-batches of one block gives."""
    out = tmp_path_factory.mktemp("one") / "run"
    recipe.sparsify(share(inputs, out))
    return artefact(out)


@pytest.mark.parametrize("processes_after", [1, 2])
def test_a_signal_to_one_process_stops_all_after_one_step_and_resume_is_exact(inputs, tmp_path, whole, processes_after):
    run = tmp_path / "run"
    assert in_group(_stopped_by, signal.SIGINT, 1, share(inputs, run)) == [0, 0]
    assert [folder.name for folder in checkpoints.checkpoints(run / CHECKPOINTS)][-1] == "checkpoint-6"
    assert {f"rng_state_{rank}.pth" for rank in (0, 1)} <= listing(run / CHECKPOINTS / "checkpoint-6").keys()
    resumed = read_resumed(run, {})
    if processes_after == 1:
        recipe.sparsify(resumed, resume=True)
    else:
        assert in_group(_resume, resumed) == [0, 0]
    assert artefact(run) == whole


def _resume(config) -> None:
    recipe.sparsify(config, resume=True)


def _killed(rank: int, config) -> None:
    callbacks: list[TrainerCallback] = [_SignalAt(6, signal.SIGKILL)] if processes.rank() == rank else []
    with pytest.raises(AttnPruneError, match="another process has ended or does not answer") as caught:
        recipe.sparsify(config, callbacks=callbacks)
    assert "checkpoint-4; continue with" in (caught.value.hint or "")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_others_with_one_line_and_resume_is_exact(inputs, tmp_path, whole, rank):
    run = tmp_path / "run"
    codes = in_group(_killed, rank, share(inputs, run))
    assert codes[rank] == -signal.SIGKILL
    assert codes[1 - rank] == 0  # it raised what was expected
    assert in_group(_resume, read_resumed(run, {})) == [0, 0]
    assert artefact(run) == whole


def _refused(config, *parts: str) -> None:
    with pytest.raises(AttnPruneError) as caught:
        recipe.sparsify(config)
    assert all(part in caught.value.message for part in parts), caught.value.message
    if processes.joined():
        assert caught.value.everywhere


def test_a_batch_that_does_not_divide_is_refused(inputs, tmp_path):
    for micro, batch in ((0, 5), (2, 6)):
        config = run_config(inputs, tmp_path / "run", train={"batch_size": batch, "micro_batch_size": micro})
        assert in_group(_refused, config, f"train.batch_size: {batch} is not a multiple of 2 processes") == [0, 0]
    assert not (tmp_path / "run").exists()


def _own_text(inputs, config, folder: Path) -> None:
    text = save_text(folder / f"text-{processes.rank()}.txt", 40 + processes.rank())
    _refused(config.model_copy(update={"data": config.data.model_copy(update={"source": str(text)})}), "different data")


def test_processes_that_read_different_text_are_refused(inputs, tmp_path):
    assert in_group(_own_text, inputs, share(inputs, tmp_path / "run"), tmp_path) == [0, 0]


def test_what_one_process_cannot_read_ends_all_of_them(inputs, tmp_path):
    assert in_group(_missing_in_the_second, share(inputs, tmp_path / "run"), tmp_path) == [0, 0]


def _missing_in_the_second(config, folder: Path) -> None:
    if processes.rank() == 1:
        config.data.source = str(folder / "nothing.txt")
    _refused(config, "nothing.txt")


def test_accelerates_own_sharding_is_refused(inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert in_group(_refused, share(inputs, tmp_path / "run"), "accelerate's FSDP is not used") == [0, 0]


def test_less_text_than_a_step_is_refused(inputs, tmp_path):
    (tmp_path / "short.txt").write_text(prose(700))
    changes = {"data": {"source": str(tmp_path / "short.txt")}, "train": {"batch_size": 64}}
    config = run_config(inputs, tmp_path / "run", **changes)
    assert in_group(_refused, config, "less than a step of 64") == [0, 0]


# --- sharded weights (FSDP2) ------------------------------------------------------------------------------------------


class _Looks(TrainerCallback):
    """What of a model is sharded, and in which type the gates run."""

    def on_train_begin(self, args, state, control, model, **kwargs):
        assert all(hasattr(parameter, "full_tensor") for parameter in model.parameters())
        gate = gates_of(model)[0]
        assert len(gate.bias.to_local()) == 2  # of 4 heads
        gate.register_forward_pre_hook(lambda gate, args: _whole_in_fp32(gate.bias))


def _whole_in_fp32(bias) -> None:
    assert not hasattr(bias, "full_tensor")
    assert (len(bias), bias.dtype) == (4, torch.float32)


def _sharded(config, **options) -> None:
    recipe.sparsify(config, callbacks=[_Looks()], **options)


def agree(folder: Path, other: Path) -> None:
    for term in ("lagrangian", "train_loss", "kl", "density", "multiplier", "grad_norm"):
        assert logged(folder, term) == pytest.approx(logged(other, term), abs=1e-5)
    one, two = (json.loads((run / "attnprune.json").read_text())["result"] for run in (folder, other))
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
    assert two["kl"] == pytest.approx(one["kl"], abs=1e-5)
    assert two["open_edges"] == pytest.approx(one["open_edges"], rel=1e-3)


@pytest.mark.parametrize("train", [{"scope": "full"}, {"scope": "attn", "gradient_checkpointing": True}, LORA])
def test_a_sharded_run_agrees_with_one_process_and_its_sidecar_verifies(inputs, tmp_path, train):
    changes = {"gate": {"estimator": "gumbel"}, "constraint": {"kind": "kl", "tolerance": 0.5}}
    for name, more in (("one", {"step": "plain"}), ("two", {"fsdp": "on"})):
        config = share(inputs, tmp_path / name, 1, **changes, train={**train, **more, "steps": 20})
        if name == "one":
            recipe.sparsify(config)
        else:
            assert in_group(_sharded, config) == [0, 0]
    agree(tmp_path / "one", tmp_path / "two")
    verified = attnprune("verify", tmp_path / "two", "--base", inputs[0], cwd=tmp_path)
    assert verified.returncode == 0, verified.stderr


def test_a_sharded_run_resumes_exactly(inputs, tmp_path):
    configs = [share(inputs, tmp_path / name, 1, train={"fsdp": "on"}) for name in ("whole", "stopped")]
    assert in_group(_sharded, configs[0]) == [0, 0]
    assert in_group(_stopped_by, signal.SIGTERM, 0, configs[1]) == [0, 0]
    assert in_group(_resume, read_resumed(tmp_path / "stopped", {})) == [0, 0]
    assert artefact(tmp_path / "stopped") == artefact(tmp_path / "whole")


def test_sharding_needs_several_processes(inputs, tmp_path):
    refused(lambda: recipe.sparsify(run_config(inputs, tmp_path / "run", train={"fsdp": "on"})), "train.fsdp")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("free", "expected"), [(10**9, "off"), (10**5, "on")])
def test_auto_shards_what_does_not_fit_into_one_process(inputs, monkeypatch, free, expected):
    base = bases.load_base(str(inputs[0]), device="cpu", dtype=torch.float32)
    monkeypatch.setattr(resolve, "free_memory", lambda device: free)
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = run_config(inputs, Path("run"))
    [note] = resolve.settle_sharding(config, base)
    assert config.train.fsdp == expected
    assert "weights and optimiser take" in note


# --- parts ------------------------------------------------------------------------------------------------------------


def _measured(model, blocks, reference, expected) -> None:
    processes.join("cpu")
    assert measure(model, blocks, reference=reference, batch_size=2, shared=True) == expected


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_a_shared_evaluation_is_the_one_of_one_process(gated_model, rows):
    model, blocks, reference = gated_model
    blocks = blocks.take(torch.arange(rows))
    expected = measure(model, blocks, reference=reference, batch_size=2)
    assert expected.open_edges
    assert in_group(_measured, model, blocks, reference, expected, size=3) == [0, 0, 0]


@pytest.fixture
def gated_model(inputs):
    base, dense = (bases.load_base(str(inputs[0]), device="cpu", dtype=torch.float32) for _ in range(2))
    attach(base.model, bias=-0.1)
    ids = torch.randint(3, 100, (8, 12), generator=torch.Generator().manual_seed(0))
    return base.model.eval(), Blocks(ids, ids, "some"), bases.dense(dense.model)


def _summed(in_order: bool) -> None:
    processes.join("cpu")
    rank = processes.rank()
    parameters = [torch.nn.Parameter(torch.zeros(3)) for _ in range(4)]
    shared = gradients.SharedGradients(parameters, in_order)
    for turn in range(2):
        for number, parameter in enumerate(parameters[: 2 + rank]):  # the third has a gradient in one process only
            own = torch.full((3,), float(10 * turn + rank + number))
            parameter.grad = own if parameter.grad is None else parameter.grad + own
        shared.add(last=turn == 1)
    sums = [None if p.grad is None else p.grad.tolist() for p in parameters]
    assert sums == [[22.0] * 3, [26.0] * 3, [16.0] * 3, None]


@pytest.mark.parametrize("in_order", [True, False])
def test_gradients_are_summed_over_turns_and_processes(in_order):
    assert in_group(_summed, in_order) == [0, 0]


def test_large_gradients_are_summed_in_several_buckets(monkeypatch):
    monkeypatch.setattr(gradients, "BUCKET", 4)
    assert in_group(_summed, True) == [0, 0]


def test_in_one_process_nothing_is_exchanged():
    assert processes.gather(1) == [1]
    assert processes.from_first("a") == "a"
    assert processes.add(torch.ones(2)).tolist() == [1, 1]
    assert not processes.joined()
    with pytest.raises(InputError), processes.together():
        raise InputError("x")
