"""From a circuit to a smaller one: blocks of edges are deleted, the weakest first, as long as the target holds.

What an edge does depends on which others are kept, so every stage asks the gradients inside the circuit that is left.
Train prompts say what may go, from the learned circuit, or, if validation prompts hold none that is smaller, from a
larger one (by a third or more). So many choices fit the prompts they are made on: validation prompts decide how far to
go.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from attnprune.circuit.search.sizes import Sized, evaluated, stable
from attnprune.circuit.search.splits import Settings, Split, Watch
from attnprune.circuit.search.units import Group

# Stages of deletion: how much of what may be lost, and into how many blocks a circuit is cut before a stage gives up.
_STAGES = ((0.1, 32), (0.3, 64), (0.6, 128), (1.0, None))
_LARGER = 1.3  # where deletion begins, relative to the circuit found by size


def delete(
    train: Split, validation: Split, points: list[Sized], best: Sized, settings: Settings, watch: Watch
) -> tuple[Sized, list[Sized]]:
    """A smaller circuit by deletion, or `best`: the smallest stable one of a ranking (`points`), or a learned one.

    Also all circuits that validation prompts evaluated on the way.
    """
    start, ranked = best, points[stable(points, settings)]
    if best is ranked:
        start = next((point for point in points if point.size >= _LARGER * ranked.size), points[-1])
    path = shortest(validation, delete_blocks(train, start.edges, settings, watch), settings, watch)
    return min(best, path[-1], key=lambda sized: sized.size), path


def delete_blocks(train: Split, start: Tensor, settings: Settings, watch: Watch) -> list[Tensor]:
    """Delete edges while train prompts stay in the band: the weakest first, a block that fails in halves.

    The weakest by gradients at the beginning of each stage.

    The band opens in stages, or the first large blocks would use up all that may be lost. Returns the circuits on the
    way, largest first. In the last stage each edge has been tried alone, unless `settings.deletions` ran out.
    """
    path, done = [start], 0
    reached = train.faithfulness(start)
    first = max(settings.target, min(reached, 2 - reached))  # the band has two sides
    for stage, (share, parts) in enumerate(_STAGES, 1):
        stricter = replace(settings, target=first - share * (first - settings.target))
        weakest = _weakest_first(train, path[-1])
        blocks = list(weakest.split(max(1, len(weakest) // 8)))
        smallest = len(weakest) // parts if parts else 1
        while blocks and done < stage * settings.deletions // len(_STAGES):
            watch("deletion of edges", done, settings.deletions)
            block = blocks.pop(0)
            without = path[-1].flatten().clone()
            block = block[without[block]]  # pruning may have taken some along
            if not len(block):
                continue
            without[block] = False
            candidate = train.units.prune(without.view_as(start))
            done += 1
            if stricter.in_band(train.faithfulness(candidate)):
                path.append(candidate)
            elif len(block) > max(1, smallest):
                blocks[:0] = block.split((len(block) + 1) // 2)
    return path


def _weakest_first(train: Split, circuit: Tensor) -> Tensor:
    """The edges of a circuit (flat indices) by the predicted change of the metric without each of them."""

    def score(group: Group) -> Tensor:
        found = train.units.gradients(group, circuit, group.prompts.score)
        return len(group.prompts) * found.double().cpu()

    scores = torch.stack([score(group) for group in train.groups]).sum(0).abs().flatten()
    edges = circuit.flatten().nonzero()[:, 0]
    return edges[scores[edges].argsort(stable=True)]


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
