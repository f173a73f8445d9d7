"""Steps from a time: the arithmetic, the deadline, and whole runs."""

from __future__ import annotations

import json
import time
import tomllib
from types import SimpleNamespace

import pytest
from transformers import TrainerControl

from attnprune.errors import InputError
from attnprune.runs.config import TrainConfig, build_config
from attnprune.runs.folder import read_resumed
from attnprune.training import plan, recipe
from attnprune.training.budget import ENDING, FEWEST_STEPS, MARGIN, Costs, steps_within
from attnprune.training.callbacks import Deadline
from tests.helpers.recipes import run_config

COSTS = Costs(step=2.0, evaluation=10.0, checkpoint=1.0, loading=5.0, start=3.0)
TOLERANCE = 5.0  # seconds: what a busy machine may add to the last evaluation and the export


def test_the_cost_of_a_run_by_hand():
    train = TrainConfig(eval_every=100, save_every=200)
    assert COSTS.ending == 5 + 10 * ENDING
    assert COSTS.whole(250, train) == 3 + 250 * 2 + 3 * 10 + 2 * 1 + COSTS.ending


@pytest.mark.parametrize("available", [100, 601.5, 3600, 86_400])
def test_the_most_steps_that_leave_the_margin(available):
    train = TrainConfig(eval_every=100, save_every=200)
    steps = steps_within(available, COSTS, train)
    assert COSTS.whole(steps, train) <= (1 - MARGIN) * available < COSTS.whole(steps + 1, train)


def test_too_little_time_is_refused_with_what_is_needed():
    train = TrainConfig(time="1m")
    needed = COSTS.whole(FEWEST_STEPS, train) / (1 - MARGIN)
    assert steps_within(needed + 1e-6, COSTS, train) == FEWEST_STEPS
    with pytest.raises(InputError, match=r"train\.time: 1m is too short here: 10 steps.* about 71 s, .* 60 s are left"):
        steps_within(60, COSTS, train)
    with pytest.raises(InputError, match=" 0 s are left"):
        steps_within(-5, COSTS, train)


# The deadline


class _Clock:
    now = 0.0

    def __call__(self):
        return self.now


def run_against(deadline, clock, steps, seconds, evaluate_at=()):
    """Steps of so many seconds each; returns the one at which the deadline ended the run, or None."""
    deadline.on_train_begin(None, SimpleNamespace(global_step=0), None)
    for step in range(1, steps + 1):
        control = TrainerControl()
        deadline.on_step_begin(None, None, control)
        clock.now += seconds
        deadline.on_step_end(None, SimpleNamespace(global_step=step), control)
        if control.should_training_stop:
            assert control.should_evaluate
            return step
        if step in evaluate_at:
            clock.now += 40
            deadline.on_evaluate(None, None, control)
    return None


def test_a_run_as_planned_is_left_alone():
    clock, steps = _Clock(), steps_within(1000, COSTS, TrainConfig())
    assert run_against(Deadline(1000, COSTS, clock), clock, steps, COSTS.step) is None


def test_slower_steps_end_early_enough():
    clock = _Clock()
    ended = run_against(Deadline(1000, COSTS, clock), clock, 10_000, 7.0)
    left = 1000 - 7 * ended
    assert COSTS.evaluation + COSTS.checkpoint + COSTS.ending < left < 2 * (7 + COSTS.evaluation + COSTS.ending)


def test_a_slower_evaluation_leaves_more_room():
    ends = []
    for evaluations in ((), (10,)):
        clock = _Clock()
        ends.append(run_against(Deadline(1000, COSTS, clock), clock, 10_000, 2.0, evaluations))
    assert ends[1] < ends[0] - (ENDING * 30 + 40) / 2


def test_a_first_step_that_tries_faster_ways_says_nothing_of_the_others():
    clock = _Clock()
    deadline = Deadline(1000, COSTS, clock)
    deadline.on_train_begin(None, SimpleNamespace(global_step=0), None)
    for step, seconds in ((1, 400), (2, COSTS.step)):
        control = TrainerControl()
        deadline.on_step_begin(None, None, control)
        clock.now += seconds
        deadline.on_step_end(None, SimpleNamespace(global_step=step), control)
        assert not control.should_training_stop
    assert deadline.costs.step == pytest.approx(COSTS.step)


# Whole runs


def timed(inputs, out, text):
    config = run_config(inputs, out).model_dump(exclude_none=True)
    del config["train"]["steps"]
    config["train"]["time"] = text
    return build_config(config)


def test_steps_follow_from_what_was_measured(inputs, tmp_path, monkeypatch):
    """A step of 2 s, an evaluation of 10 s, and so on: no clock is read."""
    monkeypatch.setattr(plan, "_costs", lambda *args: COSTS)
    monkeypatch.setattr(plan.time, "monotonic", lambda: 100.0)
    plans = []
    config = timed(inputs, tmp_path / "run", "1h")
    recipe.sparsify(config, on_plan=lambda made: bool(plans.append(made)), started=70.0)
    train = plans[0].config.train
    assert train.steps == steps_within(3600 - 30, COSTS, train)
    assert train.time is None
    assert any(f"time: {train.steps:,} steps in 60 min; 30 s are gone" in note for note in plans[0].notes)


def test_a_run_ends_in_its_time_and_records_its_steps(inputs, tmp_path):
    start = time.monotonic()
    sidecar = recipe.sparsify(timed(inputs, tmp_path / "run", "8s"))
    assert time.monotonic() - start < 8 + TOLERANCE
    stored = tomllib.loads((tmp_path / "run" / "run.toml").read_text())["train"]
    assert "time" not in stored
    assert FEWEST_STEPS <= sidecar.manifest.result.steps <= stored["steps"]


def test_a_run_that_drifts_ends_early_with_an_artefact(inputs, tmp_path, monkeypatch):
    clock, notes = _Clock(), []

    class Drifting(Deadline):
        def __init__(self, at, costs):
            super().__init__(7.0, Costs(0.0, 0.0, 0.0, 0.0), clock)

        def on_step_end(self, args, state, control, **kwargs):
            clock.now += 1.0
            super().on_step_end(args, state, control, **kwargs)

    monkeypatch.setattr(plan, "_costs", lambda *args: Costs(0.01, 0.1, 0.0, 0.1))
    monkeypatch.setattr(recipe, "Deadline", Drifting)
    sidecar = recipe.sparsify(timed(inputs, tmp_path / "run", "1m"), on_note=notes.append)
    lines = [json.loads(line) for line in (sidecar.path / "metrics.jsonl").read_text().splitlines()]
    ended = sidecar.manifest.result.steps
    assert 1 <= ended < 8
    assert [line["step"] for line in lines if "eval_density" in line][-1] == ended
    planned = tomllib.loads((sidecar.path / "run.toml").read_text())["train"]["steps"]
    assert f"ended at step {ended} of {planned:,}" in notes


def test_a_time_given_to_a_run_that_goes_on_is_refused(inputs, tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "run.toml").write_text(run_config(inputs, folder).to_toml())
    with pytest.raises(InputError, match=r"train\.time: '5m' differs"):
        read_resumed(folder, {"train": {"time": "5m"}})
