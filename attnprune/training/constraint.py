"""The constraint and its multiplier: plain numbers in, plain numbers out, no model and no torch.

The training loss is the Lagrangian of "minimise `objective` subject to `violation <= 0`". The multiplier follows the
observed violation either multiplicatively (GECO, Rezende & Viola, arXiv 1810.00597) or as a PI controller
(nuPI, Sohrabi et al., arXiv 2406.04558).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from attnprune.units import percent


@dataclass
class Multiplier:
    """The Lagrange multiplier and the state of its controller.

    Attributes:
        value: the multiplier, kept within [minimum, maximum].
        update: "geco" multiplies its level by `exp(rate * e)` and answers with `level * exp(gain * e)`; "pi" adds
            `rate * violation` plus `gain` times the change of `e`; `e` is the smoothed violation.
        rate: step size per update (geco: nats of log-multiplier per unit of violation; pi: integral gain).
        gain: proportional gain: how strongly the present violation shows, before the level has followed.
        smoothing: decay of the exponential moving average, in [0, 1); 0 means no smoothing.
        clip: one observation counts at most this much, so that a single bad batch cannot own the average.
        average: the smoothed violation (None before the first update).
        level: the integrated part of the multiplier (geco; None before the first update).
    """

    value: float = 1.0
    update: Literal["geco", "pi"] = "geco"
    rate: float = 0.05
    gain: float = 0.0
    smoothing: float = 0.9
    minimum: float = 1e-4
    maximum: float = 1e4
    clip: float = 1.0
    average: float | None = None
    level: float | None = None

    def step(self, violation: float) -> float:
        """Update with one observed violation (positive: constraint broken) and return the new multiplier.

        Raises:
            FloatingPointError: the violation is not finite; the state is unchanged.
        """
        if not math.isfinite(violation):
            raise FloatingPointError(f"violation is {violation}")
        violation = max(-self.clip, min(self.clip, violation))
        previous = self.average
        # Unlike Adam's there is no start-up bias to correct: the average starts at the first observation.
        self.average = violation if previous is None else self.smoothing * previous + (1 - self.smoothing) * violation
        if self.update == "geco":
            level = self.value if self.level is None else self.level
            self.level = self._bounded(level * math.exp(self.rate * self.average))
            new = self.level * math.exp(self.gain * self.average)
        else:
            change = 0.0 if previous is None else self.average - previous
            new = self.value + self.rate * violation + self.gain * change
        self.value = self._bounded(new)
        return self.value

    def _bounded(self, value: float) -> float:
        return max(self.minimum, min(self.maximum, value))

    def state(self) -> dict[str, Any]:
        """JSON-ready state; `Multiplier(**state)` restores it."""
        return asdict(self)


def lagrangian_weights(multiplier: float) -> tuple[float, float]:
    """Weights of objective and violation in `(objective + multiplier * violation) / (1 + multiplier)`, whose gradient
    keeps one scale for any multiplier."""
    return 1 / (1 + multiplier), multiplier / (1 + multiplier)


@dataclass(frozen=True)
class Constraint:
    """What must hold on held-out text.

    Attributes:
        kind: "loss": loss - base loss <= limit; "kl": KL(base || sparse) <= limit (both nats per token);
            "density": density <= limit, with the loss as objective (density-first mode).
        limit: tolerance in nats, or the target density.
    """

    kind: Literal["loss", "kl", "density"]
    limit: float

    def value(self, *, loss_gap: float, kl: float, density: float) -> float:
        """The constrained quantity."""
        return {"loss": loss_gap, "kl": kl, "density": density}[self.kind]

    def violation(self, value: Any) -> Any:
        """Relative violation, unit-free, so one multiplier rate suits any limit.

        `value / limit - 1`; for a density, which starts a hundred times above its limit, the logarithm of the ratio.
        """
        return math.log(max(value, 1e-9) / self.limit) if self.kind == "density" else value / self.limit - 1

    def feasible(self, value: float) -> bool:
        """Whether a measured value satisfies the constraint."""
        return value <= self.limit


def constraint_text(kind: str, limit: float) -> str:
    """The optimisation problem in words."""
    return {
        "loss": f"fewest edges with loss <= base + {limit:g} nats",
        "kl": f"fewest edges with KL(base || sparse) <= {limit:g} nats",
        "density": f"lowest loss with density <= {percent(limit)}",
    }[kind]
