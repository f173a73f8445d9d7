"""From a wall-clock time to a number of steps: `--time 10m`.

What n steps cost: the steps, an evaluation each `eval_every` and at the end, a checkpoint each `save_every` and at the
end, and the ending: the base is loaded again, and the artefact measured, which takes about as long as two evaluations.
Steps are chosen so that this fills 90 % of the time that is left after loading and planning (MARGIN): a step's time may
drift. Should it drift further, `Deadline` (in `callbacks`) evaluates and ends the training early. Nothing is chosen
anew on the way, because rates and limits follow from the number of steps. A resumed run does its remaining steps
without a clock.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from attnprune.errors import InputError
from attnprune.runs.config import TrainConfig
from attnprune.units import duration

MARGIN = 0.1
FEWEST_STEPS = 10  # fewer are no training
ENDING = 2.5  # evaluations that export takes: statistics (one model), and the artefact with base and open gates (three)
DISK = 200e6  # bytes per second that a checkpoint is written with
_MOST_STEPS = 10**8


@dataclass(frozen=True)
class Costs:
    """Seconds: of an optimiser step, an evaluation, a checkpoint, loading the base, and finding the first biases.

    `sidecars`: how many are exported, one for each density of a frontier.
    """

    step: float
    evaluation: float
    checkpoint: float
    loading: float
    start: float = 0.0
    sidecars: int = 1

    @property
    def ending(self) -> float:
        """Seconds from the last evaluation to the last finished sidecar."""
        return self.loading + self.sidecars * ENDING * self.evaluation

    def whole(self, steps: int, train: TrainConfig) -> float:
        """Seconds from the plan to the sidecar."""
        evaluations, checkpoints = -(-steps // train.eval_every), -(-steps // train.save_every)
        evaluations += self.sidecars - 1  # where one density is left for the next
        parts = steps * self.step + evaluations * self.evaluation + checkpoints * self.checkpoint
        return self.start + parts + self.ending


def steps_within(seconds: float, costs: Costs, train: TrainConfig) -> int:
    """The most steps whose run is over in `seconds`, less the margin.

    Raises:
        InputError: not even FEWEST_STEPS.
    """
    usable = (1 - MARGIN) * seconds
    steps = bisect_right(range(1, _MOST_STEPS), usable, key=lambda n: costs.whole(n, train))
    if steps < FEWEST_STEPS:
        least = costs.whole(FEWEST_STEPS, train) / (1 - MARGIN)
        raise InputError(
            f"train.time: {train.time} is too short here: {FEWEST_STEPS} steps, their evaluation and the export take "
            f"about {duration(least)}, and after loading {duration(max(0.0, seconds))} are left",
            hint="give more --time, a smaller --eval-tokens or a smaller --batch-size",
        )
    return steps
