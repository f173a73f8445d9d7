"""The sums of an atlas against loops over pairs, and its control against every possible placement of the edges."""

from __future__ import annotations

from itertools import combinations, permutations

import pytest
import torch

from attnprune.attention.interface import attach
from attnprune.circuit.model.adapters import anatomy_of
from attnprune.circuit.search.splits import pattern_visible
from attnprune.data.blocks import Blocks
from attnprune.heads.counting import COUNTED, Strongest, Tally, by_distance, chances, count, kind_masks
from attnprune.heads.directions import singular, written
from attnprune.measure import gate_statistics
from tests.helpers.families import BIAS, build, ids

LENGTH = 6
TOKENS = torch.tensor([3, 5, 3, 3, 5, 9])
MARKS = torch.tensor([False, True, False, False, True, True])


def is_kind(name, query, key):
    """The definitions in words."""
    tokens, earlier = TOKENS.tolist(), key < query
    return {
        "self": key == query,
        "first": earlier and key == 0,
        "previous": key == query - 1,
        "same": earlier and tokens[key] == tokens[query],
        "induction": earlier and key > 0 and tokens[key - 1] == tokens[query],
        "delimiter": earlier and bool(MARKS[key]),
    }[name]


def causal(window=LENGTH):
    place = torch.arange(LENGTH)
    return (place[None] <= place[:, None]) & (place[:, None] - place[None] < window)


def drawn(visible, real, seed=0, heads=3):
    generator = torch.Generator().manual_seed(seed)
    is_open = (torch.rand(heads, LENGTH, LENGTH, generator=generator) < 0.5) & visible
    return torch.rand(is_open.shape, generator=generator) * is_open if real else is_open.float()


def tally(weights, visible):
    made, kinds = Tally(len(weights), LENGTH, torch.device("cpu")), kind_masks(TOKENS, MARKS)
    made.add(weights, kinds, chances(kinds, visible))
    return made


@pytest.mark.parametrize("window", [LENGTH, 3])
def test_the_control_is_the_mean_over_every_placement_of_the_edges(window):
    visible = causal(window)
    weights = drawn(visible, real=False)
    made = tally(weights, visible)
    for head in range(3):
        for index, name in enumerate(COUNTED):
            expected = 0.0
            for query in range(LENGTH):
                seen = visible[query].nonzero()[:, 0].tolist()
                placements = list(combinations(seen, int(weights[head, query].sum())))
                hits = [sum(is_kind(name, query, key) for key in keys) for keys in placements]
                expected += sum(hits) / len(placements)
            assert made.expected[head, index].item() == pytest.approx(expected, abs=1e-12)


def test_the_control_of_mass_is_the_mean_over_every_permutation():
    visible = causal(4)
    weights = drawn(visible, real=True)[:1]
    made = tally(weights, visible)
    for index, name in enumerate(COUNTED):
        expected = 0.0
        for query in range(LENGTH):
            seen = visible[query].nonzero()[:, 0].tolist()
            placed = list(permutations(weights[0, query, seen].tolist()))
            for values in placed:
                hits = (w for key, w in zip(seen, values, strict=True) if is_kind(name, query, key))
                expected += sum(hits) / len(placed)
        assert made.expected[0, index].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("real", [False, True])
def test_sums_are_those_over_pairs(real):
    visible = causal()
    weights = drawn(visible, real) + drawn(visible, real, seed=1)
    made = tally(weights, visible)
    for head in range(3):
        pairs = [(i, j, weights[head, i, j].item()) for i in range(LENGTH) for j in range(LENGTH)]
        for index, name in enumerate(COUNTED):
            found = sum(w for i, j, w in pairs if is_kind(name, i, j))
            assert made.found[head, index].item() == pytest.approx(found, rel=1e-6)
        for distance in range(LENGTH):
            found = sum(w for i, j, w in pairs if i - j == distance)
            assert made.distances[head, distance].item() == pytest.approx(found, rel=1e-6)
    assert torch.equal(by_distance(weights), made.distances.float())


@pytest.mark.parametrize("window", [LENGTH, 3])
@pytest.mark.parametrize("distance", [2, 4])
def test_a_distance_and_its_control(window, distance):
    visible = causal(window)
    weights = drawn(visible, real=False)
    at, chance = tally(weights, visible).at_distance(distance, visible)
    for head in range(3):
        rows = weights[head].sum(-1).tolist()
        seen = [(i - distance) in visible[i].nonzero()[:, 0].tolist() for i in range(LENGTH)]
        expected = sum(row * hit / int(visible[i].sum()) for i, (row, hit) in enumerate(zip(rows, seen, strict=True)))
        assert chance[head].item() == pytest.approx(expected)
        assert at[head].item() == sum(weights[head, i, i - distance].item() for i in range(distance, LENGTH))


def test_the_strongest_edges_over_blocks():
    strongest, every = Strongest.none(2, torch.device("cpu")), [[], []]
    for block in range(4):
        weights, norms = drawn(causal(), real=True, seed=block, heads=2), torch.rand(2, LENGTH)
        strongest.add(weights, norms, block)
        for head in range(2):
            for key in range(LENGTH):
                value, query = max((weights[head, i, key].item() * norms[head, key].item(), i) for i in range(LENGTH))
                every[head].append((value, block, query, key))
    for head in range(2):
        rows = zip(*(x[head].tolist() for x in vars(strongest).values()), strict=True)
        expected = sorted(every[head], reverse=True)[:5]
        for (strength, weight, *place), (value, *where) in zip(rows, expected, strict=True):
            assert strength == pytest.approx(value, rel=1e-5)
            assert place == where
            assert 0 < weight <= 1


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_counts_are_those_of_the_gates(family):
    """Open edges and distances as in a sidecar's statistics, pattern and values as transformers gives them."""
    model = build(family)
    attach(model, BIAS)
    tokens = ids(3, 16)
    statistics = gate_statistics(model, Blocks(tokens, tokens, "random"))
    anatomy = anatomy_of(model)
    counts = count(anatomy, tokens, tokens < 20)
    with torch.no_grad():
        patterns = [model(input_ids=row[None], output_attentions=True).attentions for row in tokens]
    for layer, counted in enumerate(counts):
        visible = int(counted.visible.sum()) * 3
        torch.testing.assert_close(counted.open / visible, statistics.density[layer])
        assert torch.equal(counted.edges.rows.sum(1).long(), counted.open)
        assert torch.equal(counted.edges.distances.sum(1).long(), counted.open)
        mass = sum(row[layer][0].double().sum((1, 2)) for row in patterns)
        torch.testing.assert_close(counted.mass.rows.sum(1), mass)
        open_queries = sum((row[layer][0] != 0).any(-1).sum(1) for row in patterns)
        assert torch.equal(counted.queries, open_queries)
        assert bool(counted.visible.tril().equal(counted.visible))
        assert int(counted.visible.sum(1).max()) == (6 if family == "mistral" else 16)
    assert all(
        gate.on_chunk is None and not gate.return_pattern for gate in model.modules() if hasattr(gate, "on_chunk")
    )


def test_a_dense_model_has_all_its_mass():
    model = build("llama")
    anatomy = anatomy_of(model)
    with pattern_visible(anatomy):
        counts = count(anatomy, ids(2, 12), torch.zeros(2, 12, dtype=torch.bool))
    for counted in counts:
        torch.testing.assert_close(counted.mass.rows.sum(1), torch.full((4,), 24.0, dtype=torch.float64))
        assert counted.open.tolist() == [2 * 78] * 4


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_directions_are_those_of_the_whole_product(family):
    model = build(family)
    anatomy = anatomy_of(model)
    graph, block = anatomy.graph, anatomy.blocks[1]
    share, outputs = singular(anatomy, 1, 3)
    for head in range(graph.heads):
        group = head // (graph.heads // graph.kv_heads)
        product = block.projections["v"].weight[group] @ block.output_weight(graph.heads)[head]
        _, values, right = torch.linalg.svd(product.detach().double())
        torch.testing.assert_close(share[head].double(), (values**2 / (values**2).sum())[:3], rtol=1e-4, atol=1e-6)
        along = (outputs[head].double() * right[:3]).sum(-1).abs()
        torch.testing.assert_close(along, torch.ones(3, dtype=torch.float64), rtol=1e-3, atol=1e-3)
    assert written(anatomy, 1, 3, 5).raises.shape == (4, 3, 5)
