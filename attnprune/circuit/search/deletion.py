"""From a circuit to a smaller one: units are deleted, the weakest first, as long as the target holds.

What an edge does depends on which others are kept, so every round asks the gradients inside the circuit that is left.
The first rounds delete as many of the weakest edges as hold together. Then the circuit is cut into blocks, each is left
out alone, and as many of the least harmful ones as hold are left out together; blocks get smaller when little can go,
down to single edges.

Train prompts say what may go, from the learned circuit, or, if validation prompts hold none that is smaller, from a
larger one (by a third or more). So many choices fit the prompts they are made on: validation prompts decide how far to
go.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnprune.circuit.search.sizes import Sized, between, evaluated, stable
from attnprune.circuit.search.splits import HOPELESS, ROUNDING, Settings, Split, Watch
from attnprune.circuit.search.units import Group

_LARGER = 1.3  # where deletion begins, relative to the circuit found by size
_SHARES = (0.2, 0.4, 0.6, 0.8)  # of what may be lost, in the first rounds: at once the first one would use up all
_BLOCKS = 32  # a circuit is cut into at most about so many, until single edges are tried
_TRIES = 4  # in one round, each without the block that stopped the last one
_LITTLE = 0.1  # of the circuit: where less can go, blocks get smaller


def delete(
    train: Split, validation: Split, points: list[Sized], best: Sized, settings: Settings, watch: Watch
) -> tuple[Sized, list[Sized]]:
    """A smaller circuit by deletion, or `best`: the smallest stable one of a ranking (`points`), or a learned one.

    Also all circuits that validation prompts evaluated on the way.
    """
    start, ranked = best, points[stable(points, settings)]
    if best is ranked:
        start = next((point for point in points if point.size >= _LARGER * ranked.size), points[-1])
    path = shortest(validation, delete_units(train, start.edges, settings, watch), settings, watch)
    return min(best, path[-1], key=lambda sized: sized.size), path


def delete_units(train: Split, start: Tensor, settings: Settings, watch: Watch) -> list[Tensor]:
    """The circuits on the way, largest first, with at most `settings.deletions` evaluations on the train prompts.

    No unit of the last one could go alone, unless evaluations ran out, or the first one is hopeless.
    """
    deletion = _Deletion(train, start, settings, watch)
    reached = train.faithfulness(start)
    if not reached >= HOPELESS * settings.target:
        return deletion.path
    first = max(settings.target, min(reached, 2 - reached))  # the band has two sides
    for share in _SHARES:
        deletion.weakest(first - share * (first - settings.target))
    size = max(1, int(deletion.path[-1].sum()) // _BLOCKS)
    while deletion.left and deletion.path[-1].any():
        before = int(deletion.path[-1].sum())
        deletion.blocks(size, settings.target)
        after = int(deletion.path[-1].sum())
        if size == 1 and after == before:
            break
        size = size // 2 if before - after < _LITTLE * before else size
        size = max(1, min(size, after // _BLOCKS))
    return deletion.path


class _Deletion:
    """A circuit that gets smaller; `path` has it as it was before each deletion, and as it is."""

    def __init__(self, train: Split, start: Tensor, settings: Settings, watch: Watch):
        self.path = [start]
        self._train, self._settings, self._watch = train, settings, watch
        self._done = 0

    @property
    def left(self) -> int:
        """How many evaluations there may still be."""
        return self._settings.deletions - self._done

    def weakest(self, target: float) -> None:
        """Delete the most of the weakest units that can go together."""
        here = self.path[-1]
        if not self.left or not here.any():
            return
        order = _weakest_first(self._train, here)
        held = self._most([*order.split(1)], target)
        for part in (1, 2, 3, 4):  # validation prompts may want to stop on the way
            self._goes(self._without(here, order[: part * held // 4]))

    def blocks(self, size: int, target: float) -> None:
        """Try blocks of units by themselves, and delete those that can go together."""
        blocks = _weakest_first(self._train, self.path[-1]).split(size)
        lost = [self._lost(block, target) for block in blocks[: self.left]]
        able = [blocks[i] for i in torch.tensor(lost).argsort(stable=True).tolist() if lost[i] <= _most_lost(target)]
        for _ in range(_TRIES):
            if not able:
                break
            held = self._most(able, target)
            if held:
                self._goes(self._without(self.path[-1], torch.cat(able[:held])))
            able = able[held + 1 :]  # the next one stopped the deletion

    def _most(self, blocks: list[Tensor], target: float) -> int:
        """How many of the blocks, from the first on, can go together; by bisection."""
        if self.left and self._holds(blocks, target):
            return len(blocks)
        low, high = 0, len(blocks)  # holds, fails
        while self.left and (middle := between(low, high)) is not None:
            low, high = (middle, high) if self._holds(blocks[:middle], target) else (low, middle)
        return low

    def _holds(self, blocks: list[Tensor], target: float) -> bool:
        """Whether the target holds without these blocks."""
        return self._lost(torch.cat(blocks), target) <= _most_lost(target)

    def _lost(self, units: Tensor, target: float) -> float:
        """How far from 1 the faithfulness is without these units; see `Split.lost`."""
        self._watch("deletion", self._done, self._settings.deletions)
        self._done += 1
        return self._train.lost(self._without(self.path[-1], units), _most_lost(target))

    def _without(self, circuit: Tensor, units: Tensor) -> Tensor:
        kept = circuit.flatten().clone()
        kept[units] = False
        return self._train.units.prune(kept.view_as(circuit))

    def _goes(self, circuit: Tensor) -> None:
        if int(circuit.sum()) < int(self.path[-1].sum()):
            self.path.append(circuit)


def _most_lost(target: float) -> float:
    return 1 - target + ROUNDING


def grow(train: Split, validation: Split, chosen: Sized, watch: Watch) -> list[Sized]:
    """A circuit with 1, 2, 4, ... of the other units that are predicted to bring it nearer to the model, on the
    validation prompts: where other prompts do not hold it, one of these may do."""
    gain = _predicted(train, chosen.edges) * (1 if chosen.faithfulness < 1 else -1)
    gain[chosen.edges.flatten()] = 0.0
    best, found, count = gain.argsort(descending=True, stable=True)[: int((gain > 0).sum())], [], 1
    while count <= min(chosen.size, len(best)):
        watch("larger circuits", count, chosen.size)
        edges = chosen.edges.flatten().clone()
        edges[best[:count]] = True
        found.append(evaluated(validation, validation.units.prune(edges.view_as(chosen.edges))))
        count *= 2
    return found


def _weakest_first(train: Split, circuit: Tensor) -> Tensor:
    """The units of a circuit (flat indices) by the predicted change of the metric without each of them."""
    scores = _predicted(train, circuit).abs()
    units = circuit.flatten().nonzero()[:, 0]
    return units[scores[units].argsort(stable=True)]


def _predicted(train: Split, circuit: Tensor) -> Tensor:
    """The predicted change of the metric, summed over the prompts, by each unit that is kept; flat."""

    def score(group: Group) -> Tensor:
        found = train.units.gradients(group, circuit, group.prompts.score)
        return len(group.prompts) * found.double().cpu()

    return torch.stack([score(group) for group in train.groups]).sum(0).flatten()


def shortest(split: Split, path: list[Tensor], settings: Settings, watch: Watch) -> list[Sized]:
    """By bisection the last circuit of a path of deletions that validation prompts keep in the band.

    It is the last of those returned; before it stand the others that were evaluated.
    """
    found, others = evaluated(split, path[0]), []
    low, high = 0, len(path)
    while high - low > 1:
        watch("deletions that hold", low, len(path))
        middle = (low + high) // 2
        candidate = evaluated(split, path[middle])
        if settings.in_band(candidate.faithfulness):
            others.append(found)
            low, found = middle, candidate
        else:
            others.append(candidate)
            high = middle
    return [*others, found]
