"""A circuit by gradient descent on a mask over the edges: a score per edge, kept while it is above 0.

Edges are pruned as the gates of a sparse model are trained: a hard threshold with a straight-through gradient, the
logarithm of the number of edges as the penalty, and a multiplier that holds faithfulness at the target. What one edge
does depends on which others are kept, so rankings of the whole model's edges need far more of them. To learn a mask
over edges by gradients is from Bhaskar et al. (arXiv 2406.16778), who relax the mask and match the output's
distribution; here every step runs a circuit as it will be evaluated, and the error is that of the task's metric.

What reads no edge any more, or writes nothing of its own, is cut off for good: its edges have no gradient that could
bring them back. So steps that break a circuit that held are taken back. Gates of the model are constants to the
gradient, as in the other attributions. What is learned may fit the prompts it is learned on, and what a gate does may
be missed: validation prompts decide whether a circuit holds.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from attnprune.circuit.search.cache import Cache, digest
from attnprune.circuit.search.splits import HOPELESS, Settings, Split, Watch
from attnprune.circuit.tasks import Prompts
from attnprune.training.constraint import Multiplier

SNAPSHOT, EVERY = 5, 20  # steps between circuits that may be chosen; between the states that a search resumes from
# Scores lie in [-1, 1]. Where there are many units few of them matter, and they can go fast; on the bundled model (479
# edges) that rate breaks the circuit.
_LEARNING_RATE, _LEARNING_RATE_OF_MANY = 0.05, 0.15
_FIRST_OF_MANY = 0.03  # share of the units
_BARRIER = 4.0  # except for what was taken back: so far from 0, or it would come back every few steps
_LAST_RATE = 0.5  # share of the learning rate at the end; it falls over the third quarter
_BETAS = (0.8, 0.95)
_SPREAD = 0.3  # of the first scores, per factor of e in rank
# The first multiplier, and how it follows; see `Multiplier`. Above 1, the noise of the gradients is larger than the
# penalty, which is spread over all edges: large circuits hardly shrink.
_MULTIPLIER, _MULTIPLIER_RATE, _MULTIPLIER_GAIN = 1.0, 0.07, 1.0
_SMOOTHING = 0.7  # of the faithfulness, which varies between parts of the prompts
_MARGIN = 0.3  # how far inside the band to stay, as a share of 1 - target: other prompts hold a little less
_LONGEST = 3  # times the steps that were asked for, where a circuit still shrinks, or grows and does not hold yet
_SHRINKS = 0.9  # of its size in `EVERY` steps


def first_sizes(size: int, units: int, settings: Settings) -> list[int]:
    """How many of the best units to begin with: few of many, then, if nothing holds, the `size` that a ranking needs.

    What the gates of a sparse model do to a circuit of thousands of edges is mostly noise, and a mask that begins there
    hardly shrinks. But where a task needs thousands, those that are missing at the beginning do not all come back.
    """
    few = size if settings.is_small(units) else min(size, round(_FIRST_OF_MANY * units))
    return sorted({few, size})


def learn_circuits(
    split: Split, order: Tensor, size: int, gap: float, settings: Settings, watch: Watch, cache: Cache
) -> list[Tensor]:
    """The circuits, pruned, after every `SNAPSHOT` of `settings.mask_steps` steps, or more (see `_LONGEST`).

    Args:
        split: prompts to learn on: in each step those that run together, in a seeded order, over and over.
        order: edges, or what circuits of the split are made of (flat indices), best first; `size` of
            them are kept at the beginning.
        gap: mean metric of clean minus corrupted prompts.
    """
    units, steps = split.units, settings.mask_steps
    batches = torch.randperm(len(split.prompts), generator=torch.Generator().manual_seed(settings.seed)).tolist()
    state = _start(units.shape, order, size)
    name = f"{split.key} steps {digest(state['scores'])} {steps} {settings.target}"
    circuits: list[Tensor] = []
    done, goes_on = 0, True
    while done < steps or (done < _LONGEST * steps and goes_on):
        before = int((state["scores"] > 0).sum())
        count = min(EVERY, (steps if done < steps else _LONGEST * steps) - done)
        turns = {step: batches[step % len(batches)] for step in range(done, done + count)}
        done += count
        state = cache.tensors(f"{name} {done}", partial(_steps, split, state, turns, gap, settings, watch))
        circuits += [units.prune(kept) for kept in state["circuits"]]
        change = int((state["scores"] > 0).sum()) / max(1, before)
        best = state["best"].item()
        grows = best < settings.target and change > 1  # it does not hold yet
        shrinks = change < _SHRINKS ** (count / EVERY)
        goes_on = best >= HOPELESS * settings.target and (grows or shrinks)
    return circuits


def _start(shape: tuple[int, ...], order: Tensor, size: int) -> dict[str, Tensor]:
    """Scores that fall with the rank to 0 at `size`, the same before the last step, Adam's two moments, the level of
    the multiplier and the smoothed faithfulness (NaN before the first step)."""
    scores = torch.full(shape, -1.0).flatten()
    rank = torch.arange(1, len(order) + 1, dtype=torch.float)
    scores[order] = (_SPREAD * ((size + 0.5) / rank).log()).clamp(-1, 1)
    scores = scores.view(shape)
    return {
        "scores": scores, "before": scores, "exp_avg": torch.zeros_like(scores), "exp_avg_sq": torch.zeros_like(scores),
        "level": _number(_MULTIPLIER), "faithfulness": _number(math.nan),
    }  # fmt: skip


def _steps(
    split: Split, state: dict[str, Tensor], turns: dict[int, int], gap: float, settings: Settings, watch: Watch
) -> dict[str, Tensor]:
    """The state after some steps, each on the part of the prompts whose turn it is, and the circuits on the way."""
    every = split.units.mask()
    scores, before = state["scores"].clone().requires_grad_(), state["before"]
    moments = {name: state[name].clone() for name in ("exp_avg", "exp_avg_sq")}
    optimizer = torch.optim.Adam([scores], betas=_BETAS, eps=1e-12)
    optimizer.state[scores] = {"step": torch.tensor(float(min(turns))), **moments}
    level = state["level"].item()
    multiplier = Multiplier(level, rate=_MULTIPLIER_RATE, gain=_MULTIPLIER_GAIN, smoothing=0.0, level=level)
    mean = state["faithfulness"].item()
    aim = settings.target + _MARGIN * (1 - settings.target)
    rate = _LEARNING_RATE if settings.is_small(split.units.edge_count) else _LEARNING_RATE_OF_MANY
    circuits, best = [], -math.inf
    for step, part in turns.items():
        watch("learning which edges to keep", step, max(settings.mask_steps, max(turns) + 1))
        kept = scores.detach() > 0
        gradients, reached = _error_gradients(split, split.prompts[part], kept, gap)
        if reached < HOPELESS * settings.target <= mean and not torch.equal(kept, before > 0):
            take_back(scores, before, kept, _BARRIER)
        else:
            before = scores.detach().clone()
            mean = reached if math.isnan(mean) else _SMOOTHING * mean + (1 - _SMOOTHING) * reached
            best = max(best, mean)
            multiplier.step((abs(1 - mean) - (1 - aim)) / max(1 - settings.target, 0.01))
            penalty = every / max(1, int(kept.sum()))  # the gradient of the logarithm of their number
            scores.grad = multiplier.value * gradients + penalty
            optimizer.param_groups[0]["lr"] = rate * _rate(step / settings.mask_steps)
            optimizer.step()
            with torch.no_grad():
                scores.clamp_(before.clamp(max=-1), before.clamp(min=1))
        if (step + 1) % SNAPSHOT == 0 or step == max(turns):
            circuits.append(scores.detach() > 0)
    return {
        "scores": scores.detach(), "before": before, **{name: optimizer.state[scores][name] for name in moments},
        "level": _number(multiplier.level or level), "faithfulness": _number(mean), "best": _number(best),
        "circuits": torch.stack(circuits),
    }  # fmt: skip


@torch.no_grad()
def take_back(scores: Tensor, before: Tensor, kept: Tensor, barrier: float = 1.0) -> None:
    """Undo the step that led from the scores `before` to the set `kept`; what it changed is now this far from 0."""
    scores.copy_(torch.where((before > 0) != kept, barrier * before.sign(), before))


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.double)


def _rate(progress: float) -> float:
    return min(1.0, max(_LAST_RATE, 2 * (1 - progress)))


def _error_gradients(split: Split, prompts: Prompts, kept: Tensor, gap: float) -> tuple[Tensor, float]:
    """(gradient by unit of the mean squared error of the metric, in units of the gap; the faithfulness)."""
    group = split.collected(prompts)
    clean = split.wanted(group)
    kept = split.units.prune(kept)  # what is cut off computes the corrupted run, but no mean or zero one
    short: list[Tensor] = []

    def error(logits: Tensor) -> Tensor:
        missing = (prompts.score(logits) - clean) / gap
        short.append(missing.detach())
        return missing.square()

    gradients = split.units.gradients(group, kept, error)
    return gradients.float().cpu(), 1 + short[-1].mean().item()
