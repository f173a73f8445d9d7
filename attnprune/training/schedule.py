"""The constraint of each step: it starts wide and narrows, so that the weights can follow."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from attnprune.runs.config import RunConfig
from attnprune.training.constraint import Constraint

AIM = 0.95  # of a density: held-out text came out up to 7 % denser than the training text that is controlled


def constraint_of(config: RunConfig) -> Constraint:
    """The constraint of a run: what its result is judged by."""
    c = config.constraint
    return Constraint(c.kind, c.target_density if c.kind == "density" else c.tolerance)


def marks_of(config: RunConfig) -> list[Constraint]:
    """The constraints whose best states a run keeps: the densities of its frontier, and last its own."""
    own = constraint_of(config)
    return [*(replace(own, limit=density) for density in config.constraint.frontier), own]


@dataclass(frozen=True)
class Schedule:
    """The constraint at each of `steps` steps.

    A density has one stretch of equal length for each of `marks`. In the first `fall` of a stretch the limit falls
    geometrically to its mark, and then it stays, so that the weights learn to do with that many edges.
    A tolerance is `start_factor` times wider at the first step and narrows until the pressure on the edges ends,
    `final_fraction` of the steps before the end: edges close early, and the weights learn for the rest of the run to do
    without them.
    """

    marks: tuple[Constraint, ...]
    steps: int
    fall: float
    start_factor: float
    final_fraction: float

    @classmethod
    def of(cls, config: RunConfig) -> Schedule:
        c, train = config.constraint, config.train
        return cls(tuple(marks_of(config)), train.steps, c.fall, c.start_factor, train.final_fraction)

    @property
    def pressure_steps(self) -> int:
        """Steps before the final phase, in which a tolerance alone counts."""
        return self.steps - int(self.steps * self.final_fraction)

    @property
    def settled(self) -> int:
        """The step from which on the limit is the one that was asked for."""
        if self.marks[-1].kind != "density":
            return self.pressure_steps
        return math.ceil(self.steps * (1 - (1 - self.fall) / len(self.marks)))

    def constraint(self, done: int, start_density: float = 0.0) -> Constraint:
        """The constraint of the step after `done` ones; a density falls from `start_density`."""
        own = self.marks[-1]
        if own.kind != "density":
            left = max(0.0, 1 - done / max(1, self.pressure_steps))
            return replace(own, limit=own.limit * (1 + (self.start_factor - 1) * left))
        length = self.steps / len(self.marks)
        number = min(len(self.marks) - 1, int(done / length))
        way = min(1.0, (done + 1 - number * length) / max(1.0, self.fall * length))
        aim = _aim(self.marks[number])
        start = max(aim, start_density if number == 0 else _aim(self.marks[number - 1]))
        return replace(own, limit=start ** (1 - way) * aim**way)

    def ends_stretch(self, done: int) -> bool:
        """Whether a stretch ends with step `done`: then its mark has had all the steps that it gets."""
        length = self.steps / len(self.marks)
        return int(done / length) > int((done - 1) / length)


def _aim(mark: Constraint) -> float:
    return mark.limit * AIM if mark.limit < 1 else mark.limit
