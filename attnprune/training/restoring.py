"""Continuing from a checkpoint: whatever is not as this trainer wrote it ends in one line.

A seal says that the files are those of the save, not that nobody wrote other ones and sealed them again. Nothing here
or in transformers unpickles objects: torch reads with `weights_only=True`, and what it refuses is told as such.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import Trainer, TrainerState

from attnprune.errors import AttnPruneError, InputError, first_line_with_type
from attnprune.training.sharding import assign, load_whole_state, whole_state

MODEL_FILE, STATE_FILE = "model.safetensors", "trainer_state.json"
_OPTIMIZER_FILES = ("optimizer.pt", "scheduler.pt")
# transformers goes on without them, on another path.
_WANTED = (MODEL_FILE, STATE_FILE, *_OPTIMIZER_FILES)


def best_file(density: str | None) -> str:
    """Name of the file with the best state for the run's own constraint, or for a density of its frontier."""
    return "best.safetensors" if density is None else f"best-{density}.safetensors"


@contextmanager
def reading(checkpoint: str | Path | None) -> Iterator[None]:
    """Turn whatever a checkpoint's content raises into one line.

    Raises:
        InputError: it cannot be continued from.
    """
    try:
        yield
    except (AttnPruneError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # files that somebody else made raise anything
        why = first_line_with_type(error)
        if isinstance(error, pickle.UnpicklingError):
            why = "holds pickled objects or damaged tensors, which are not read"
        raise _cannot_continue(checkpoint, why) from error


def check_contents(checkpoint: Path, trains: Mapping[str, Tensor], callbacks: set[str], best: list[str]) -> None:
    """Refuse a checkpoint that is not one of this run, before it is read.

    Args:
        trains: the tensors that the run trains, by name.
        callbacks: class names of the callbacks whose state the run needs.
        best: names of the files with best states, which may be there.

    Raises:
        InputError: a file or a state is missing, or tensors have other names or shapes.
    """
    with reading(checkpoint):
        for name in _WANTED:
            if not (checkpoint / name).is_file():
                raise _cannot_continue(checkpoint, f"{name} is missing")
        if not any(checkpoint.glob("rng_state*.pth")):
            raise _cannot_continue(checkpoint, "rng_state.pth is missing")
        state = TrainerState(**json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8")))
        for key, kind in (("global_step", int), ("log_history", list), ("stateful_callbacks", dict)):
            if not isinstance(getattr(state, key), kind):
                raise _cannot_continue(checkpoint, f"{STATE_FILE}: {key} is no {kind.__name__}")
        if checkpoint.name != f"checkpoint-{state.global_step}":
            raise _cannot_continue(checkpoint, f"{STATE_FILE} is of step {state.global_step}")
        missing = callbacks - set(state.stateful_callbacks or ())
        if missing:
            raise _cannot_continue(checkpoint, f"{STATE_FILE} holds no {min(missing)}")
        for name in (MODEL_FILE, *best):
            if name == MODEL_FILE or (checkpoint / name).exists():
                _check_tensors(checkpoint, name, trains)


def _unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """The optimiser below accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _check_tensors(checkpoint: Path, name: str, trains: Mapping[str, Tensor]) -> None:
    with safe_open(checkpoint / name, "pt") as file:
        shapes = {key: list(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    if shapes != {key: list(tensor.shape) for key, tensor in trains.items()}:
        raise _cannot_continue(checkpoint, f"{name} does not hold what this run trains")


def _cannot_continue(checkpoint: str | Path | None, why: str) -> InputError:
    return InputError(
        f"{checkpoint}: cannot be continued from: {why}", hint="delete this folder to continue from an older one"
    )


class StrictResume(Trainer):
    """transformers' Trainer whose resuming ends in one line where a checkpoint is not as it was written."""

    sharded: bool  # whether the model's parameters are, see `sharding`

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with reading(resume_from_checkpoint):
            if not self.sharded:
                super()._load_from_checkpoint(resume_from_checkpoint, model)
                return
            trains: Any = model or self.model
            parameters = dict(trains.named_parameters())
            for name, tensor in load_file(Path(resume_from_checkpoint) / MODEL_FILE).items():
                assign(parameters[name], tensor)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with reading(checkpoint):
            if not self.sharded or checkpoint is None:
                super()._load_optimizer_and_scheduler(checkpoint)
                return
            optimizer, scheduler = (
                torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True) for name in _OPTIMIZER_FILES
            )
            load_whole_state(_unwrapped(self.optimizer), optimizer)
            rates: Any = self.lr_scheduler
            rates.load_state_dict(scheduler)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        rates: Any = self.lr_scheduler
        states = (whole_state(_unwrapped(self.optimizer)), rates.state_dict())
        if self.args.should_save:
            for name, state in zip(_OPTIMIZER_FILES, states, strict=True):
                torch.save(state, Path(output_dir) / name)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_callback_state(self) -> None:
        with reading(f"{self.args.output_dir}/checkpoint-{self.state.global_step}"):
            super()._load_callback_state()
