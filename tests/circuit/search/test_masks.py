"""Learning masks: edges that matter stay, the others go, the target holds, and an interrupted run goes on."""

from __future__ import annotations

import pytest
import torch

from attnprune.circuit.model.adapters import anatomy_of
from attnprune.circuit.planted import plant
from attnprune.circuit.search import masks
from attnprune.circuit.search.cache import Cache
from attnprune.circuit.search.deletion import grow
from attnprune.circuit.search.masks import EVERY, SNAPSHOT, first_sizes, learn_circuits
from attnprune.circuit.search.ranking import eap_ig_orders, score_edges
from attnprune.circuit.search.sizes import circuit_of_size, evaluated, smallest_held
from attnprune.circuit.search.splits import Settings, Split, pattern_visible
from attnprune.circuit.tasks import load_task
from attnprune.sidecar import bases
from tests.helpers.circuits import planted_task, silent


def learn(split, order, size, settings, cache=None):
    gap = (split.clean.mean() - split.corrupted.mean()).item()
    return learn_circuits(split, order, size, gap, settings, silent, cache or Cache())


@pytest.fixture
def steps(monkeypatch):
    """(prompts, mask) of every step."""
    seen = []
    real = masks._error_gradients

    def noted(split, prompts, kept, gap):
        seen.append((prompts, kept))
        return real(split, prompts, kept, gap)

    monkeypatch.setattr(masks, "_error_gradients", noted)
    return seen


def test_what_is_learned_of_all_edges_in_any_order_is_planted():
    planted = plant("llama", gated=False, seed=1)
    anatomy = anatomy_of(planted.model)
    split = Split(anatomy, planted_task(planted, prompts=8).train, "train", Cache(), 8)
    edges = anatomy.graph.mask().flatten().nonzero()[:, 0]
    order = edges[torch.randperm(len(edges), generator=torch.Generator().manual_seed(0))]
    settings = Settings(target=0.9, mask_steps=80)
    circuits = learn(split, order, len(order), settings)
    assert len(circuits) == 80 // SNAPSHOT
    assert not (circuits[-1] & ~planted.edges).any()
    assert settings.in_band(split.faithfulness(circuits[-1]))


def test_a_step_that_breaks_the_circuit_is_taken_back(monkeypatch, steps):
    """Without an edge between them nothing is learned any more, so what broke it must return."""
    planted = plant("llama", gated=False, seed=1)
    split = Split(anatomy_of(planted.model), planted_task(planted, prompts=8).train, "train", Cache(), 8)
    order = planted.edges.flatten().nonzero()[:, 0]
    monkeypatch.setattr(masks, "_LEARNING_RATE", 2.0)  # the first step drops everything
    learn(split, order, 2 * len(order), Settings(target=0.9, mask_steps=3))
    kept = [mask for _, mask in steps]
    assert torch.equal(kept[0], planted.edges)
    assert not kept[1].any()
    assert torch.equal(kept[2], planted.edges)


@pytest.fixture(scope="module")
def addition():
    """(train, validation, ranked edges) of the bundled model."""
    base = bases.load_base("demo")
    task = load_task("addition", base.tokenizer, count=24, more=96)
    anatomy = anatomy_of(base.model)
    ranked = Split(anatomy, task.train, "train", Cache(), 32, to_rank=True, by_template=True)
    with pattern_visible(anatomy):
        order = eap_ig_orders(anatomy.graph, score_edges(ranked, 4, silent, Cache()).edges)[0].edges
    more, validation = (Split(anatomy, part, "part", Cache(), 32) for part in (task.more, task.validation))
    return more, validation, order


def test_an_edge_that_breaks_the_circuit_when_it_comes_back_does_not_come_back_again_and_again(monkeypatch):
    planted = plant("llama", gated=False, seed=1)
    split = Split(anatomy_of(planted.model), planted_task(planted, prompts=8).train, "train", Cache(), 8)
    order = planted.edges.flatten().nonzero()[:, 0]
    gradients = torch.zeros(split.units.shape)
    gradients.view(-1)[order[-1]] = -1e3  # it is said to help
    tried = []

    def breaks(split, prompts, kept, gap):
        tried.append(kept.flatten()[order[-1]].item())
        return gradients, 0.0 if tried[-1] else 1.0

    monkeypatch.setattr(masks, "_error_gradients", breaks)
    learn(split, order, len(order) - 1, Settings(target=0.9, mask_steps=20))
    assert tried.count(True) == 1


def test_a_learned_circuit_explains_more_than_as_many_of_the_best_edges(addition):
    more, _, order = addition
    *_, learned = learn(more, order, 250, Settings(mask_steps=EVERY))
    graph = more.anatomy.graph
    assert torch.equal(learned, graph.prune(learned))
    best = circuit_of_size(graph, order, int(learned.sum()))
    assert 100 < int(learned.sum()) < 250
    assert more.faithfulness(learned) > more.faithfulness(best) + 0.05


def test_the_smallest_circuit_that_validation_prompts_hold(addition):
    _, validation, order = addition
    graph = validation.anatomy.graph
    circuits = [circuit_of_size(graph, order, size) for size in (60, 400, 100, 500)]
    points = [evaluated(validation, circuit) for circuit in circuits]
    found = smallest_held(points, 1000, Settings(target=0.85))
    assert found is not None
    assert found.size == int(circuits[1].sum())
    assert found.faithfulness == pytest.approx(validation.faithfulness(circuits[1]))
    assert smallest_held(points[::2], 1000, Settings(target=0.85)) is None
    assert smallest_held(points, found.size, Settings(target=0.85)) is None
    assert smallest_held([], 1000, Settings(target=0.85)) is None


def test_a_circuit_grows_by_the_units_that_bring_it_nearer_to_the_model(addition):
    more, validation, order = addition
    graph = validation.anatomy.graph
    chosen = evaluated(validation, circuit_of_size(graph, order, 300))
    assert chosen.faithfulness < 0.9
    larger = grow(more, validation, chosen, silent)
    added = [point.size - chosen.size for point in larger]
    assert added[:5] == [1, 2, 4, 8, 16]
    assert all(not (chosen.edges & ~point.edges).any() for point in larger)
    by_rank = evaluated(validation, circuit_of_size(graph, order, chosen.size + 16))
    assert larger[4].faithfulness > max(chosen.faithfulness, by_rank.faithfulness) + 0.01


def test_an_interrupted_run_goes_on_and_ends_the_same(addition, tmp_path, monkeypatch):
    more, _, order = addition
    settings = Settings(mask_steps=2 * EVERY + 5)
    whole = learn(more, order, 250, settings)
    assert len(whole) == (2 * EVERY + 5) // SNAPSHOT

    steps = []
    real = masks._error_gradients

    def counted(*arguments):
        steps.append(arguments)
        if len(steps) == EVERY + 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(masks, "_error_gradients", counted)
    with pytest.raises(KeyboardInterrupt):
        learn(more, order, 250, settings, Cache(tmp_path))
    again = learn(more, order, 250, settings, Cache(tmp_path))
    assert len(steps) == EVERY + 3 + EVERY + 5
    assert all(map(torch.equal, whole, again))
    learn(more, order, 250, settings, Cache(tmp_path))
    assert len(steps) == EVERY + 3 + EVERY + 5
    learn(more, order, 200, settings, Cache(tmp_path))  # another beginning is another run
    assert len(steps) > EVERY + 3 + EVERY + 5


def test_where_there_are_many_units_a_search_begins_with_few_of_them_and_then_with_all():
    """Rankings of a sparse model may need a quarter of its edges, and from so many a mask hardly gets anywhere."""
    assert first_sizes(250, 479, Settings(all_edges=479)) == [250]
    assert first_sizes(250, 479, Settings(all_edges=478)) == [14, 250]
    assert first_sizes(9, 479, Settings(all_edges=478)) == [9]


def test_a_circuit_that_has_become_too_small_grows_back(addition, monkeypatch):
    more, _, order = addition
    held, sizes = [], []

    def linear(split, prompts, kept, gap):
        """Each of the 100 best edges explains a hundredth."""
        held.append(kept.flatten()[order[:100]].sum().item() / 100)
        sizes.append(int(kept.sum()))
        gradients = torch.zeros(split.units.shape)
        gradients.view(-1)[order[:100]] = -2 * (1 - held[-1]) / 100
        return gradients, held[-1]

    monkeypatch.setattr(masks, "_error_gradients", linear)
    learn(more, order, 250, Settings(mask_steps=100))
    assert all(one > 0.75 for one in held[50:]), held
    assert max(sizes[50:]) < 105


@pytest.mark.parametrize(
    ("each", "best", "steps", "learned"),
    [
        (0.8, 0.95, EVERY, 3 * EVERY),
        (0.8, 0.95, 25, 75),
        (0.95, 0.95, EVERY, EVERY),
        (0.8, 0.44, EVERY, EVERY),
        (1.2, 0.89, EVERY, 3 * EVERY),
        (1.2, 0.91, EVERY, EVERY),
        (1.2, 0.44, EVERY, EVERY),
    ],
)
def test_a_mask_goes_on_while_it_shrinks_or_does_not_hold_yet(addition, monkeypatch, each, best, steps, learned):
    more, _, order = addition
    done = []

    def shrunk(split, state, turns, *rest):
        done.extend(turns)
        kept = round(each ** (len(turns) / EVERY) * int((state["scores"] > 0).sum()))
        return masks._start(split.units.shape, order, kept) | {
            "circuits": torch.zeros(0, *split.units.shape), "best": torch.tensor(best)
        }  # fmt: skip

    monkeypatch.setattr(masks, "_steps", shrunk)
    learn(more, order, 479 if each < 1 else 250, Settings(mask_steps=steps))
    assert done == list(range(learned))


def test_a_mask_that_begins_far_below_the_target_is_learned(addition, monkeypatch):
    """As those of the nonsense control do: no step of theirs breaks anything."""
    more, _, order = addition
    held = []

    def linear(split, prompts, kept, gap):
        held.append(kept.flatten()[order[:60]].sum().item() / 60)
        gradients = torch.zeros(split.units.shape)
        gradients.view(-1)[order[:60]] = -2 * (1 - held[-1]) / 60
        return gradients, held[-1]

    monkeypatch.setattr(masks, "_error_gradients", linear)
    learn(more, order, 15, Settings(mask_steps=2 * EVERY))
    assert held[0] == 0.25
    assert max(held) > 0.9


def test_a_run_in_parts_learns_what_a_run_in_one_does(addition, monkeypatch):
    more, _, order = addition
    settings = Settings(mask_steps=EVERY + 10)
    parts = learn(more, order, 250, settings)
    monkeypatch.setattr(masks, "EVERY", 1000)
    assert all(map(torch.equal, parts, learn(more, order, 250, settings)))


def test_the_rate_falls_and_stays():
    assert [masks._rate(progress) for progress in (0, 0.5, 0.75, 1, 3)] == [1, 1, 0.5, 0.5, 0.5]


def test_all_parts_have_their_turn_and_no_steps_learn_nothing(addition, steps):
    more, _, order = addition
    assert learn(more, order, 250, Settings(mask_steps=0)) == []
    learn(more, order, 250, Settings(mask_steps=len(more.prompts)))
    assert {id(prompts) for prompts, _ in steps} == {id(prompts) for prompts in more.prompts}


def test_a_bad_beginning_is_learned_from_all_the_same(addition, monkeypatch):
    """There is no step to take back."""
    more, _, order = addition
    kept = []
    real = masks._error_gradients

    def noted(split, prompts, mask, gap):
        kept.append(mask)
        return real(split, prompts, mask, gap)[0], 0.0

    monkeypatch.setattr(masks, "_error_gradients", noted)
    learn(more, order, 250, Settings(mask_steps=2))
    assert not torch.equal(kept[0], kept[1])


def test_a_circuit_without_edges_has_no_gradients(addition):
    more, _, order = addition
    circuits = learn(more, order, 0, Settings(mask_steps=2))
    assert not any(edges.any() for edges in circuits)
