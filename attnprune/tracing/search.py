"""From all messages of a prediction to few: gradients propose, runs with all others closed decide.

First a set is learned, see attnprune.tracing.learning. Then messages are deleted: the set is cut into blocks by rank,
each block is left out alone, and as many of the least harmful ones as hold are left out together. One that cannot go
with those before it stays, and those after it are tried without it. Blocks get smaller when little can go, down to
single messages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from attnprune.tracing.learning import STEPS, learn
from attnprune.tracing.messages import Messages

Watch = Callable[[str, int, int], None]
"""Told what is going on: (stage, done, of)."""

POINTS = tuple((i + 0.5) / 8 for i in range(8))  # of the path that a ranking's gradients are taken at
AT_ONCE = 8  # sizes of one round of bisection
BLOCKS = 64  # a set is cut into at most about so many, until single messages are tried
TRIES = 10  # in one round, each without the block that stopped the last one
LITTLE = 0.1  # of the set: where less can go, blocks get smaller
DELETION_TOKENS, FEWEST, MOST = 4000, 64, 400  # of all runs that delete; bounds on their number
EFFECT_TOKENS = 4096  # of the runs without one message each; where they would be more, gradients take their place


@dataclass(frozen=True)
class Found:
    """A set of candidates (their numbers, int64 [n]), the most effective first.

    effects: what the KL grows by without each message, fp64 [n]; exact: measured, else estimated by its derivative.
    can_go: how many of them could go alone; None where that was not tried.
    """

    kept: Tensor
    effects: Tensor
    exact: bool
    can_go: int | None


def smallest(messages: Messages, allowed: float, watch: Watch) -> Found:
    """The smallest set found whose KL to the full run is at most `allowed` nats."""
    kept = learn(messages, allowed, POINTS, lambda step: watch("learning which to keep", step, STEPS))
    kept = _deleted(messages, kept, allowed, watch)
    watch("effects", 0, 1)
    found = _ranked(messages, kept, allowed)
    while len(fewer := _fewer(messages, found, allowed)) < len(found.kept):
        found = _ranked(messages, fewer, allowed)
    return found


def _fewer(messages: Messages, found: Found, allowed: float) -> Tensor:
    """The shortest prefix that holds; the whole set without those that can go, where no shorter one does."""
    kept = found.kept[: _shortest_prefix(messages, found.kept, allowed)]
    if len(kept) < len(found.kept) or not found.can_go:
        return kept
    least = torch.arange(len(kept), device=kept.device).flip(0)[: found.can_go]
    return _without(kept, _together(messages, kept, list(least.split(1)), allowed))


def _ranked(messages: Messages, kept: Tensor, allowed: float) -> Found:
    """A set in the order of its effects."""
    whole, exact = float(messages.kl([kept])[0]), _each_affordable(messages, kept)
    if exact:
        effects = messages.kl([_without(kept, [place]) for place in range(len(kept))]) - whole
    else:
        effects = messages.slopes(kept, (1.0,))
    order = effects.argsort(descending=True, stable=True)
    can_go = int((whole + effects <= allowed).sum()) if exact else None
    return Found(kept[order], effects[order], exact, can_go)


def prefix_sizes(size: int) -> list[int]:
    """Sizes of the first messages of a list: about 16, in equal steps of their logarithm."""
    return sorted({max(1, round(size ** (step / 16))) for step in range(17)}) if size else []


def _shortest_prefix(messages: Messages, kept: Tensor, allowed: float) -> int:
    """How many of the first messages hold alone: deletion may have left some that do harm."""
    sizes = prefix_sizes(len(kept))[:-1]  # the whole set is the answer if none of them holds
    holds = (messages.kl([kept[:size] for size in sizes]) <= allowed).tolist() if sizes else []
    return next((size for size, held in zip(sizes, holds, strict=True) if held), len(kept))


def _between(low: int, high: int) -> list[int]:
    """Sizes between two, in about equal steps of their logarithm."""
    first = max(low, 1)
    ratio = (high / first) ** (1 / (AT_ONCE + 1))
    sizes = {low + 1} | {round(first * ratio**step) for step in range(1, AT_ONCE + 1)}
    return sorted(size for size in sizes if low < size < high)


def _deleted(messages: Messages, kept: Tensor, allowed: float, watch: Watch) -> Tensor:
    """What is left of a set after deletion, until no message can go alone or there are no runs left."""
    most = min(MOST, max(FEWEST, DELETION_TOKENS // messages.ids.shape[1]))
    size, started = max(1, len(kept) // BLOCKS), messages.runs
    while len(kept):
        done = messages.runs - started
        watch("deletion", min(done, most - 1), most)
        order = messages.slopes(kept, POINTS).argsort(stable=True)
        blocks = order.split(size)
        if done + len(blocks) > most:
            break
        without = messages.kl([_without(kept, block) for block in blocks])
        able = [blocks[i] for i in without.argsort().tolist() if without[i] <= allowed]
        gone = _together(messages, kept, able, allowed)
        if not len(gone) and size == 1:
            break
        size = size // 2 if len(gone) < LITTLE * len(kept) else size
        kept = _without(kept, gone)
        size = max(1, min(size, len(kept) // BLOCKS))
    return kept


def _each_affordable(messages: Messages, kept: Tensor) -> bool:
    """Whether there may be a run without each of the messages."""
    return len(kept) * messages.ids.shape[1] <= EFFECT_TOKENS


def _together(messages: Messages, kept: Tensor, blocks: list[Tensor], allowed: float) -> Tensor:
    """What can go at once of blocks, the first ones first, without those that stop others: places in the set."""
    gone = torch.zeros(0, dtype=torch.int64, device=kept.device)
    for _ in range(TRIES):
        count = _most(messages, kept, gone, blocks, allowed)
        gone, blocks = torch.cat([gone, *blocks[:count]]), blocks[count + 1 :]
        if not blocks:
            break
    return gone


def _most(messages: Messages, kept: Tensor, gone: Tensor, blocks: list[Tensor], allowed: float) -> int:
    """How many of the blocks, from the first on, can go together with what is gone."""
    low, high = 0, len(blocks) + 1  # holds, fails
    while high - low > 1:
        counts = _between(low, high)
        tried = [torch.cat([gone, *blocks[:count]]) for count in counts]
        holds = (messages.kl([_without(kept, places) for places in tried]) <= allowed).tolist()
        fails = holds.index(False) if False in holds else len(counts)
        low = counts[fails - 1] if fails else low
        high = counts[fails] if fails < len(counts) else high
    return low


def _without(kept: Tensor, places: Tensor | list[int]) -> Tensor:
    """A set without those at some places of it."""
    stays = torch.ones(len(kept), dtype=torch.bool, device=kept.device)
    stays[places] = False
    return kept[stays]
