"""Interruptions: kill -9 at every write, signals, damaged checkpoints, other settings, non-finite values."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from attnprune.errors import AttnPruneError, InputError, InterruptedRunError
from attnprune.runs.config import RunConfig
from attnprune.runs.folder import CHECKPOINTS, read_resumed
from attnprune.training import checkpoints, recipe, trainer
from tests.helpers.factory import refused
from tests.helpers.recipes import _SignalAt, artefact, run_config

FORK = multiprocessing.get_context("fork")  # children start with torch imported, and can be killed


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


@pytest.fixture(scope="module")
def interrupted(inputs, tmp_path_factory):
    """A run that was stopped after step 6; continue a copy that `moved` makes."""
    run = tmp_path_factory.mktemp("interrupted") / "run"
    with pytest.raises(InterruptedRunError):
        recipe.sparsify(run_config(inputs, run), callbacks=[_SignalAt(5, signal.SIGTERM)])
    return run


def moved(run: Path, to: Path) -> Path:
    return shutil.copytree(run, to)


def test_resume_with_only_damaged_checkpoints_is_refused(inputs, tmp_path):
    config = run_config(inputs, tmp_path / "run")
    with pytest.raises(InterruptedRunError):
        recipe.sparsify(config, callbacks=[_SignalAt(2, signal.SIGTERM)])
    (tmp_path / "run" / CHECKPOINTS / "checkpoint-3" / "optimizer.pt").write_bytes(b"damaged")
    with pytest.raises(AttnPruneError, match="no intact checkpoint"):
        recipe.sparsify(config, resume=True)


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


@pytest.mark.parametrize("tail", [b'{"step": 6, "loss"', b"\0" * 700, b'{"step"' + b"\0" * 700 + b"\n"])
def test_a_torn_tail_of_the_metrics_is_dropped_and_resume_is_exact(interrupted, tmp_path, uninterrupted, tail):
    run = moved(interrupted, tmp_path / "run")
    before = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(before + tail)
    recipe.sparsify(read_resumed(run, {}), resume=True)
    assert artefact(run) == artefact(uninterrupted.path)
    assert (run / "metrics.jsonl").read_bytes().startswith(before)
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()][-1] == 12


def test_a_damaged_line_inside_the_metrics_is_refused_by_its_number(interrupted, tmp_path):
    run = moved(interrupted, tmp_path / "run")
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join([lines[0], b"{\n", *lines[1:]]))
    refused(lambda: recipe.sparsify(read_resumed(run, {}), resume=True), "metrics.jsonl: line 2 is damaged")


class _Evil:
    def __reduce__(self):
        return (Path.touch, (Path("unpickled"),))


def _pickled(file: Path) -> None:
    file.write_bytes(pickle.dumps(_Evil()))


def _zipped(file: Path) -> None:
    torch.save(_Evil(), file)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def _empty(file: Path) -> None:
    file.write_bytes(b"")


def _other(file: Path) -> None:
    torch.save({"param_groups": [], "state": {}}, file)


def _gone(file: Path) -> None:
    file.unlink()


def _text(**change):
    def apply(file: Path) -> None:
        file.write_text(json.dumps(json.loads(file.read_text()) | change))

    return apply


def _one_tensor_less(file: Path) -> None:
    tensors = load_file(file)
    tensors.pop(min(tensors))
    save_file(tensors, file)


PARTS = [
    *((name, damage) for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")
      for damage in (_pickled, _zipped, _cut, _empty, _gone)),
    ("optimizer.pt", _other), ("rng_state.pth", _other),
    *((name, damage) for name in ("model.safetensors", "best.safetensors") for damage in (_pickled, _one_tensor_less)),
    ("model.safetensors", _gone), ("trainer_state.json", _gone), ("trainer_state.json", _empty),
    *(("trainer_state.json", _text(**change)) for change in (
        {"global_step": 2}, {"global_step": "6"}, {"log_history": 1}, {"nothing": 1}, {"stateful_callbacks": {}},
        {"stateful_callbacks": {"DualState": {"args": {"nothing": 1}}}}, {"stateful_callbacks": None})),
]  # fmt: skip


@pytest.mark.parametrize(("name", "damage"), PARTS, ids=lambda value: getattr(value, "__name__", value))
def test_a_checkpoint_that_was_changed_and_sealed_again_is_one_line(interrupted, tmp_path, monkeypatch, name, damage):
    run = moved(interrupted, tmp_path / "run")
    checkpoint = run / CHECKPOINTS / "checkpoint-6"
    damage(checkpoint / name)
    checkpoints.seal(checkpoint)
    monkeypatch.chdir(tmp_path)
    error = refused(lambda: recipe.sparsify(read_resumed(run, {}), resume=True), str(checkpoint), "cannot be continued")
    assert "older one" in str(error.hint)
    assert not (tmp_path / "unpickled").exists()
    assert (checkpoint / checkpoints.SEAL).exists()


def test_a_folder_of_the_user_in_a_run_is_left_alone(interrupted, tmp_path):
    run = moved(interrupted, tmp_path / "run")
    (run / ".staging-mine").mkdir()
    (run / ".staging-mine" / "thesis.txt").write_text("mine")
    recipe.sparsify(read_resumed(run, {}), resume=True)
    assert (run / ".staging-mine" / "thesis.txt").read_text() == "mine"
    assert sorted(path.name for path in run.iterdir()) == [
        ".staging-mine", "attnprune.json", "delta.safetensors", "gates.safetensors", "metrics.jsonl", "run.toml"
    ]  # fmt: skip


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
