"""What a search on one level found, judged again on resamples of the validation prompts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import torch

from attnprune.circuit.search.cache import digest
from attnprune.circuit.search.ranking import Order
from attnprune.circuit.search.sizes import Sized
from attnprune.circuit.search.splits import Settings, resamples
from attnprune.circuit.search.whole import Found

PROMPTS = 40
SPREAD = torch.linspace(-0.15, 0.15, PROMPTS)


def circuit(size: int, faithfulness: float) -> Sized:
    """So many edges; on average this metric, by prompts that vary."""
    return Sized(torch.arange(1000) < size, size, faithfulness + SPREAD, faithfulness)


def found(masks: list[Sized], path: list[Sized], larger: tuple[Sized, ...] = ()) -> Found:
    curve = [circuit(500, 0.3), Sized(torch.ones(1000, dtype=torch.bool), 1000, torch.ones(PROMPTS), 1.0)]
    chosen = path[-1] if path else curve[-1]
    sizes = {digest(point.edges): float(point.size) for point in (*curve, *masks, *path, *larger)}
    order = Order("eap-ig abs", torch.arange(1000), torch.zeros(1000))
    return Found(cast(Any, None), {"eap-ig abs": curve}, order, curve[-1], masks, None, chosen, path, [*larger], sizes)


def resampled(one: Found) -> list[float]:
    validation = SimpleNamespace(clean=torch.ones(PROMPTS), corrupted=torch.zeros(PROMPTS))
    return one.resampled(cast(Any, validation), resamples(PROMPTS, 0), Settings(target=0.9)).unique().tolist()


def test_where_the_smallest_does_not_hold_the_next_of_the_mask_does_and_not_the_ranking():
    masks = [circuit(120, 0.5), circuit(90, 1.0), circuit(70, 0.91), circuit(10, 0.2)]
    assert resampled(found(masks, [])) == [70, 90]
    assert resampled(found([circuit(70, 0.91)], [])) == [70, 1000]  # what it came to when only the best was kept


def test_or_the_next_between_what_was_found_and_the_ranking_does():
    assert resampled(found([circuit(70, 0.91)], [], (circuit(95, 0.85), circuit(120, 1.0)))) == [70, 120]


def test_as_in_the_search_the_fewest_units_win_and_their_size_is_what_counts():
    """As of messages: 70 of them stand for 50 in a prompt, 90 for 40."""
    one = found([circuit(70, 1.0), circuit(90, 1.0)], [])
    one.sizes.update({digest(circuit(70, 1.0).edges): 50.0, digest(circuit(90, 1.0).edges): 40.0})
    assert resampled(one) == [50]


def test_of_a_ranking_and_of_deletions_all_larger_ones_have_to_hold():
    assert resampled(found([], [circuit(90, 0.3), circuit(70, 1.0)])) == [1000]
    assert resampled(found([], [circuit(90, 1.0), circuit(70, 1.0)])) == [70]
