"""Three levels: planted heads and MLPs, edges and messages are recovered, with AUROC 1.0 and by the same search."""

from __future__ import annotations

import pytest
import torch

from attnprune.circuit import analysis
from attnprune.circuit.analysis import analyse, search_again
from attnprune.circuit.compare import level_ratios
from attnprune.circuit.model.activations import collect
from attnprune.circuit.model.adapters import anatomy_of
from attnprune.circuit.model.effects import message_effects
from attnprune.circuit.model.messages import message_gradients, run_messages
from attnprune.circuit.model.patching import run_circuit
from attnprune.circuit.planted import auroc, plant
from attnprune.circuit.search import sizes
from attnprune.circuit.search.cache import Cache
from attnprune.circuit.search.masks import first_sizes
from attnprune.circuit.search.splits import Settings, Split, pattern_visible
from attnprune.circuit.search.subject import Subject
from attnprune.circuit.search.units import Edges, Messages, Nodes
from tests.helpers.circuits import planted_task, silent

LENGTH = 6


def planted_messages(planted):
    """[L, H, to, from]: what planted heads send to where it is read, on a way to the logits of the last token."""
    graph = anatomy_of(planted.model).graph
    reach = torch.zeros(graph.sources, LENGTH, dtype=torch.bool)  # where what a source writes is needed
    found = torch.zeros(graph.layers, graph.heads, LENGTH, LENGTH, dtype=torch.bool)
    reach[planted.edges[:, -1], -1] = True
    for layer in reversed(range(graph.layers)):
        mlp = graph.mlp_source(layer)
        reach |= planted.edges[:, graph.readers(layer, "mlp")] & reach[mlp]
        for head in range(graph.heads):
            to = reach[graph.head_sources(layer).start + head]
            found[layer, head] = to[:, None] & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
            for kind in "qkv":
                reader = graph.readers(layer, kind).start + (
                    head if kind == "q" else head * graph.kv_heads // graph.heads
                )
                positions = to if kind == "q" else found[layer, head].any(0)
                reach |= planted.edges[:, reader, None] & positions
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("gated", [False, True], ids=["dense", "gated"])
def test_exact_effects_recover_the_planted_messages(family, gated):
    """But for the signal of a gated model: it stands at every position, and one message less does not turn it."""
    planted = plant(family, gated=gated, seed=1, prompts=16)
    anatomy = anatomy_of(planted.model)
    every = torch.ones(LENGTH, LENGTH).tril().expand(3, 4, LENGTH, LENGTH).nonzero()
    with pattern_visible(anatomy):
        runs = [collect(anatomy, ids) for ids in (planted.clean, planted.corrupted)]
        effects = message_effects(anatomy, *runs, every, planted.metric).abs().mean(1)
    truth = planted_messages(planted)[tuple(every.t())]
    if gated:
        seen = ~((every[:, 0] == 0) & (every[:, 1] == 0))
        effects, truth = effects[seen], truth[seen]
    assert truth.any()
    assert auroc(effects, truth) == 1.0


@pytest.mark.parametrize(("family", "gated"), [("llama", False), ("gpt2", True)])
def test_the_same_search_finds_planted_circuits_on_all_levels(family, gated, monkeypatch):
    monkeypatch.setattr(analysis, "check_ability", lambda *_: None)  # the metric of random prompts may be below 0
    planted = plant(family, gated=gated, seed=1)
    settings = Settings(target=0.998, mask_steps=20, deletions=400)
    found = analyse(
        planted.model, "planted", planted_task(planted, 8), settings, with_controls=False, label="model", watch=silent,
        cache=Cache(),
    )  # fmt: skip
    assert [level.level for level in found.model.levels] == ["edges", "nodes", "messages"]
    (search,) = found.searches
    assert torch.equal(search.found["edges"].chosen.edges, planted.edges)
    nodes = planted.edges.any(1)
    nodes[0] = False
    assert torch.equal(search.found["nodes"].chosen.edges, nodes)
    messages = search.found["messages"]
    truth = planted_messages(planted)
    able = truth.clone()
    able[0, 0] |= gated  # no gradient ranks the messages of the signal, so some more than needed may stay
    assert not (messages.chosen.edges & ~messages.units.flat({(LENGTH, 0): able, (LENGTH, 1): able}).bool()).any()
    by_level = {level.level: level for level in found.model.levels}
    assert by_level["nodes"].size == int(nodes.sum())
    assert by_level["edges"].size == found.model.counts.edges == int(planted.edges.sum())
    assert by_level["messages"].size <= int(able.sum()) < 0.3 * by_level["messages"].whole
    assert all(level.faithfulness.value == pytest.approx(1, abs=0.15) for level in found.model.levels)


@pytest.fixture
def group():
    planted = plant("llama", gated=True, seed=2)
    anatomy = anatomy_of(planted.model)
    task = planted_task(planted, 6)
    split = Split(anatomy, task.train, "train", Cache(), 8, to_rank=True)
    return anatomy, split.groups[0], task


def test_messages_alone_are_a_circuit_run_with_all_edges(group):
    anatomy, runs, _ = group
    clean, corrupted = runs.clean, runs.corrupted
    kept = torch.rand(clean.patterns.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    found = run_messages(anatomy, clean, corrupted, kept)
    whole = run_circuit(anatomy, clean, corrupted, anatomy.graph.mask(), kept)
    torch.testing.assert_close(found, whole, atol=1e-2, rtol=2e-3)
    assert (found - clean.logits).abs().max() > 0.1


def test_gradients_of_nodes_are_those_of_the_edges_at_both_ends(group):
    """Added up by name, inside a circuit that lacks some nodes."""
    anatomy, runs, _ = group
    graph, nodes = anatomy.graph, Nodes(anatomy)
    kept = nodes.mask()
    kept[[2, 5, 9]] = False
    edges = nodes.edges(kept)
    gradient = nodes.gradients(runs, kept, runs.prompts.score)
    by_edge = Edges(anatomy).gradients(runs, edges, runs.prompts.score)
    for node in kept.nonzero()[:, 0].tolist():
        name, total = graph.source_names[node], 0.0
        layer, _, head = name.partition(".h")
        group_name = f"{layer}.kv{int(head) // 2}" if head else name
        for source, destination in edges.nonzero().tolist():
            reader = graph.destination_names[destination].partition("<")[0]
            if source == node or reader in (name, group_name):
                total += by_edge[source, destination].item()
        assert gradient[node].item() == pytest.approx(total, rel=1e-3, abs=1e-2)
    assert gradient[0] == 0


def test_gradients_of_messages_are_derivatives(group):
    anatomy, runs, task = group
    units = Messages(anatomy, task.train)
    kept = torch.rand(units.shape, generator=torch.Generator().manual_seed(1)) < 0.7
    gradient = units.gradients(runs, kept, runs.prompts.score)
    masks = units.masks(runs, kept).float()
    each = message_gradients(anatomy, runs.clean, runs.corrupted, masks, runs.prompts.score)
    assert gradient.sum().item() == pytest.approx(each.sum().item() / len(runs.prompts), rel=1e-3, abs=1e-4)
    place = int(each.abs().flatten().argmax())
    moved = masks.flatten().clone()
    step = 1e-2
    moved[place] += step
    with torch.no_grad():
        change = sum(
            sign * runs.prompts.score(run_messages(anatomy, runs.clean, runs.corrupted, m)).sum().item()
            for sign, m in ((1, moved.view_as(masks)), (-1, masks))
        )
    assert change / step == pytest.approx(each.flatten()[place].item(), rel=0.05)


def test_ratios_are_paired_over_prompts_and_searches(monkeypatch):
    """A model against itself is 1 in every resample; three searches have their own prompts."""
    monkeypatch.setattr(analysis, "check_ability", lambda *_: None)
    planted = plant("llama", seed=1)
    settings = Settings(target=0.99, sizes=5, mask_steps=0, deletions=0)
    found = analyse(
        planted.model, "planted", planted_task(planted, 6), settings, with_controls=False, label="model", watch=silent,
        cache=Cache(),
    )  # fmt: skip
    for seed in (1, 2):
        again = Settings(target=0.99, sizes=5, mask_steps=0, deletions=0, seed=seed)
        subject = Subject(found.anatomy, planted_task(planted, 6), f"search {seed}", again, silent, Cache())
        found = found.with_search(search_again(subject, "planted"))
    assert [level.seed for level in found.model.levels] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for ratio in level_ratios(found, found):
        assert (ratio.searches, ratio.value, ratio.low, ratio.high) == (3, 1, 1, 1)


def test_a_mask_that_never_holds_from_few_edges_begins_again_from_as_many_as_the_ranking_needs(monkeypatch):
    monkeypatch.setattr(analysis, "check_ability", lambda *_: None)
    planted, begun = plant("llama", gated=False, seed=1), []

    def nothing_holds(split, order, size, gap, settings, watch, cache):
        begun.append(size)
        return []

    monkeypatch.setattr(sizes, "learn_circuits", nothing_holds)
    settings = Settings(target=0.998, mask_steps=20, deletions=0, levels=False, all_edges=1)
    found = analyse(
        planted.model, "planted", planted_task(planted, 8), settings, with_controls=False, label="model", watch=silent,
        cache=Cache(),
    )  # fmt: skip
    assert begun == first_sizes(found.model.ranked.edges, found.model.graph.edges, settings)
    assert len(begun) == 2
    assert found.model.learned is None
