"""What happens beside the steps of a run: the multiplier's state, seals, signals, metrics.jsonl."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from attnprune.files import append_line, reopen_lines
from attnprune.runs import processes
from attnprune.training import checkpoints
from attnprune.training.budget import MARGIN, Costs
from attnprune.training.constraint import Multiplier
from attnprune.training.schedule import Schedule


class DualState(TrainerCallback, ExportableState):
    """What a run knows besides the model; saved in `trainer_state.json` and restored on resume.

    The multiplier, the best evaluation so far (and that for each larger density of a frontier), the density at which
    the falling limit starts (None: that of the first batch, once it is known), and the faster ways to run a step that
    the run took (`compile`, `cuda_graph`), which a resumed run takes as well.

    The multiplier moves in `on_step_end`, after the optimiser step, so that gradient accumulation and a save at a step
    boundary see one update per step. Restoring replaces this object: look it up, never keep a reference.
    """

    def __init__(
        self,
        multiplier: dict[str, Any],
        best: dict[str, Any] | None = None,
        start_density: float | None = 1.0,
        ways: dict[str, str] | None = None,
        frontier: dict[str, dict[str, Any]] | None = None,
    ):
        self.multiplier = Multiplier(**multiplier)
        self.best = best
        self.start_density = start_density
        self.ways = ways or {}
        self.frontier = frontier or {}
        self.violation = 0.0  # of the step that runs, over all its micro-batches

    def state(self) -> dict[str, Any]:
        args = {"multiplier": self.multiplier.state(), "best": self.best, "start_density": self.start_density}
        return {"args": {**args, "ways": self.ways, "frontier": self.frontier}, "attributes": {}}

    def best_of(self, density: str | None) -> dict[str, Any] | None:
        """The best evaluation for a density of the frontier; None: for the run's own constraint."""
        return self.best if density is None else self.frontier.get(density)

    def keep(self, density: str | None, found: dict[str, Any]) -> None:
        """Make an evaluation the best one."""
        if density is None:
            self.best = found
        else:
            self.frontier[density] = found

    def on_step_end(self, args, state, control, **kwargs):
        self.multiplier.step(self.violation)


class Seal(TrainerCallback):
    """Seals each checkpoint after it was written, then deletes the ones before the last two."""

    def on_save(self, args, state, control, **kwargs):
        processes.wait()  # each of them has written its own random state
        if state.is_world_process_zero:
            checkpoints.seal(Path(str(args.output_dir)) / f"{checkpoints.PREFIX}{state.global_step}")
            checkpoints.rotate(Path(str(args.output_dir)), keep=2)


class EndOfStretch(TrainerCallback):
    """Evaluates where the density limit is about to leave one mark of a frontier for the next."""

    def __init__(self, schedule: Schedule):
        self.schedule = schedule

    def on_step_end(self, args, state, control, **kwargs):
        if self.schedule.ends_stretch(state.global_step):
            control.should_evaluate = True


class BeforeOptimizer(TrainerCallback):
    """Calls `look` with the norm of all gradients (a scalar on the device) before each optimiser step."""

    def __init__(self, look: Callable[[Tensor], None]):
        self.look = look

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.look(torch.nn.utils.get_total_norm([p.grad for p in kwargs["model"].parameters() if p.grad is not None]))


class StopOnSignal(TrainerCallback):
    """SIGINT and SIGTERM finish the current step, save and stop; a second signal ends the process at once.

    Signals reach the processes of a run in different steps, and all of them stop after the same one.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if self.received is not None:
            raise SystemExit(128 + number)
        self.received = number

    def on_step_end(self, args, state, control, **kwargs):
        found = [number for number in processes.gather(self.received) if number is not None]
        if found:
            self.received = found[0]
            control.should_save = True
            control.should_training_stop = True


class Deadline(TrainerCallback):
    """Ends a run with a time budget while there is still time to evaluate, export and publish.

    The last step and the last evaluation, as long as they took here, say how much time has to be left; `costs` says it
    until then. The first step counts for nothing: it tries faster ways to run. `at` is in the seconds of `clock`.
    """

    def __init__(self, at: float, costs: Costs, clock: Callable[[], float] = time.monotonic):
        self.at, self.costs, self.clock = at, costs, clock
        self._since, self._first = 0.0, 0

    def on_train_begin(self, args, state, control, **kwargs):
        self._since, self._first = self.clock(), state.global_step + 1

    def on_step_begin(self, args, state, control, **kwargs):
        self._since = self.clock()

    def on_step_end(self, args, state, control, **kwargs):
        now = self.clock()
        if state.global_step != self._first:
            self.costs = replace(self.costs, step=now - self._since)
        costs = self.costs
        self._since = now
        left = costs.step + costs.checkpoint + costs.evaluation + costs.ending
        if processes.from_first(now + (1 + MARGIN) * left > self.at):
            control.should_evaluate = True
            control.should_training_stop = True

    def on_evaluate(self, args, state, control, **kwargs):
        self.costs = replace(self.costs, evaluation=self.clock() - self._since)


class MetricsFile(TrainerCallback):
    """Appends every log and evaluation as one JSON line to metrics.jsonl; a resumed run first drops later lines."""

    def __init__(self, file: Path):
        self.file = file

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            reopen_lines(self.file, _has_step, keep=lambda line: line["step"] <= state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs and ("multiplier" in logs or "eval_density" in logs):
            append_line(self.file, {"step": state.global_step, **logs})


def _has_step(line: Any) -> bool:
    return isinstance(line, dict) and type(line.get("step")) is int
