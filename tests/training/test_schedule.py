"""The constraint of each step: one mark, several, and a tolerance."""

from __future__ import annotations

import pytest

from attnprune.errors import InputError
from attnprune.runs.config import build_config
from attnprune.training.schedule import AIM, Schedule, marks_of


def config_of(steps=100, fall=0.2, **constraint):
    return build_config({"constraint": {"kind": "density", "fall": fall, **constraint}, "train": {"steps": steps}})


def limits(schedule, start=1.0):
    return [schedule.constraint(done, start).limit for done in range(schedule.steps)]


def test_each_stretch_falls_to_its_mark_and_stays_there():
    schedule = Schedule.of(config_of(target_density=0.01, frontier=[0.1, 0.03]))
    found = limits(schedule)
    assert found == sorted(found, reverse=True)
    for number, mark in enumerate((0.1, 0.03, 0.01)):
        stretch = found[round(100 * number / 3) + 7 : round(100 * (number + 1) / 3) - 1]  # behind the fall
        assert stretch == pytest.approx([AIM * mark] * len(stretch))
    halfway = AIM * (0.1 * 0.03) ** 0.5  # geometric: half of the fall is the mean of the logarithms
    assert any(limit == pytest.approx(halfway, rel=0.1) for limit in found[33:41])


def test_the_ends_of_the_stretches_are_where_the_marks_have_had_all_their_steps():
    schedule = Schedule.of(config_of(steps=10, target_density=0.01, frontier=[0.1, 0.03, 0.02]))
    assert [done for done in range(1, 11) if schedule.ends_stretch(done)] == [3, 5, 8, 10]


def test_a_start_below_a_mark_lets_edges_open_again():
    schedule = Schedule.of(config_of(target_density=0.05, frontier=[0.5]))
    assert limits(schedule, start=0.001)[:50] == pytest.approx([AIM * 0.5] * 50)


def test_without_a_frontier_there_is_one_stretch():
    found = limits(Schedule.of(config_of(target_density=0.25)), start=0.5)
    assert found[20:] == pytest.approx([AIM * 0.25] * 80)
    assert found[9] == pytest.approx((0.5 * AIM * 0.25) ** 0.5)


def test_every_density_is_a_mark_and_the_last_one_is_the_run():
    marks = marks_of(config_of(target_density=0.01, frontier=[0.05]))
    assert [(mark.kind, mark.limit) for mark in marks] == [("density", 0.05), ("density", 0.01)]


@pytest.mark.parametrize(
    ("constraint", "part"),
    [
        ({"frontier": [0.05, 0.05]}, "the densities have to fall"),
        ({"frontier": [0.005]}, "the densities have to fall"),
        ({"frontier": [1.5]}, "less than or equal to 1"),
        ({"frontier": [0.05], "kind": "kl"}, "frontier needs kind density"),
    ],
)
def test_a_frontier_that_makes_no_sense_is_refused(constraint, part):
    with pytest.raises(InputError, match=part):
        config_of(**{"target_density": 0.01, **constraint})
