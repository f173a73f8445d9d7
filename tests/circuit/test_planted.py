"""Planted circuits: exact patching recovers every one of them; gradients do not see the edge behind a gate."""

import pytest
import torch

from attnprune.attention.interface import gates_of
from attnprune.circuit.model.activations import collect
from attnprune.circuit.model.adapters import anatomy_of
from attnprune.circuit.model.attribution import attribute
from attnprune.circuit.model.effects import edge_effects, node_effects
from attnprune.circuit.model.patching import run_circuit, self_check
from attnprune.circuit.planted import auroc, plant
from attnprune.errors import InputError

every_kind = pytest.mark.parametrize("gated", [False, True], ids=["dense", "gated"])
both_families = pytest.mark.parametrize("family", ["llama", "gpt2"])
some_seeds = pytest.mark.parametrize("seed", range(3))


@pytest.fixture(scope="module")
def measured():
    """Cached (planted, graph, clean, corrupted, mean |exact effect| of every real edge) by family, gates and seed."""
    known = {}

    def get(family, gated, seed):
        if (family, gated, seed) not in known:
            planted = plant(family, gated=gated, seed=seed)
            anatomy = anatomy_of(planted.model)
            clean, corrupted = collect(anatomy, planted.clean), collect(anatomy, planted.corrupted)
            effects = edge_effects(anatomy, clean, corrupted, anatomy.graph.mask(), planted.metric)
            known[family, gated, seed] = planted, (anatomy, clean, corrupted), effects.abs().mean(1)
        return known[family, gated, seed]

    return get


@pytest.fixture
def case(measured, family, gated, seed):
    return measured(family, gated, seed)


def on_real_edges(anatomy, values):
    return values[anatomy.graph.mask()]


@both_families
@every_kind
@some_seeds
def test_exact_effects_recover_every_planted_edge(case):
    planted, (anatomy, *_), effects = case
    truth = on_real_edges(anatomy, planted.edges)
    assert auroc(effects, truth) == 1.0
    assert effects[truth].min() > 5 * effects[~truth].max()


@both_families
@every_kind
@some_seeds
def test_planted_edges_are_a_circuit(case):
    planted, (anatomy, *_), _ = case
    assert planted.edges.any()
    assert not (planted.edges & ~anatomy.graph.mask()).any()
    assert torch.equal(anatomy.graph.prune(planted.edges), planted.edges)
    heads, mlps = anatomy.graph.touched(planted.edges)
    assert int(heads.sum() + mlps.sum()) == (6 if planted.hidden.any() else 4)


@both_families
@every_kind
@some_seeds
def test_the_circuit_alone_computes_the_metric(case):
    planted, runs, _ = case
    clean, corrupted = planted.metric(runs[1].logits), planted.metric(runs[2].logits)
    scale = (clean - corrupted).abs().max()
    alone = planted.metric(run_circuit(*runs, planted.edges))
    rest = planted.metric(run_circuit(*runs, runs[0].graph.mask() & ~planted.edges))
    assert (alone - clean).abs().max() < 0.02 * scale
    assert (rest - corrupted).abs().max() < 0.02 * scale
    self_check(*runs)


@both_families
@every_kind
@some_seeds
def test_exact_effects_recover_the_planted_nodes(case):
    planted, (anatomy, clean, corrupted), _ = case
    nodes = torch.arange(anatomy.graph.sources)
    effects = node_effects(anatomy, clean, corrupted, nodes, planted.metric).abs().mean(1)
    assert auroc(effects, planted.edges.any(1)) == 1.0


@both_families
@some_seeds
def test_gradients_miss_the_edge_behind_a_gate_and_exact_patching_finds_it(measured, family, seed):
    planted, (anatomy, clean, corrupted), effects = measured(family, True, seed)
    hidden, truth = (on_real_edges(anatomy, mask) for mask in (planted.hidden, planted.edges))
    assert int(hidden.sum()) == 2
    for options in ({"rule": "eap"}, {"steps": 16}, {"rule": "eap-ig", "steps": 16}):
        found = attribute(anatomy, clean, corrupted, planted.metric, **options)
        scores = on_real_edges(anatomy, found.edges).abs()
        assert scores[hidden].max() < 0.02 * effects[hidden].min()
        assert auroc(scores, truth) < 1.0
        assert found.flips.flipped > 0
    assert effects[hidden].min() > 5 * effects[~truth].max()


@both_families
@some_seeds
def test_the_training_slope_sees_the_edge_into_the_switch(measured, family, seed):
    planted, (anatomy, clean, corrupted), _ = measured(family, True, seed)
    switch = planted.hidden.nonzero()[-1].tolist()
    assert anatomy.graph.edge_name(*switch) == "a0.h0->a2.h0<q>"
    hard, soft = (
        attribute(anatomy, clean, corrupted, planted.metric, steps=8, straight_through=s).edges[tuple(switch)].abs()
        for s in (False, True)
    )
    assert soft > 20 * hard


@both_families
@some_seeds
def test_only_the_switch_opens_and_closes(measured, family, seed):
    planted, (_, clean, corrupted), _ = measured(family, True, seed)
    triangle = torch.ones(6, 6, dtype=torch.bool).tril()
    for run, switch_is_open in ((clean, True), (corrupted, False)):
        is_open = run.patterns != 0
        assert torch.equal(is_open[-1, :, 0], triangle.expand(4, 6, 6) & switch_is_open)
        is_open[-1, :, 0] = triangle
        assert torch.equal(is_open, triangle.expand_as(is_open))
    assert not planted.hidden[~planted.edges].any()


@both_families
@some_seeds
def test_gradients_recover_a_dense_circuit(measured, family, seed):
    planted, (anatomy, clean, corrupted), _ = measured(family, False, seed)
    found = attribute(anatomy, clean, corrupted, planted.metric)
    assert found.gap < 0.05
    assert auroc(on_real_edges(anatomy, found.edges).abs(), on_real_edges(anatomy, planted.edges)) > 0.99


@pytest.mark.parametrize(("layers", "nodes"), [(1, 1), (2, 6), (5, 10)])
@both_families
def test_other_sizes(family, layers, nodes):
    planted = plant(family, layers=layers, nodes=nodes, prompts=3, length=5, seed=1)
    anatomy = anatomy_of(planted.model)
    assert anatomy.graph.layers == layers
    heads, mlps = anatomy.graph.touched(planted.edges)
    assert int(heads.sum() + mlps.sum()) == nodes
    assert planted.clean.shape == planted.corrupted.shape == (3, 5)


@every_kind
def test_the_same_seed_gives_the_same_model_and_leaves_the_generator_alone(gated):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, two, other = (plant(gated=gated, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    weights = [model.state_dict() for model in (one.model, two.model, other.model)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(not torch.equal(weights[0][name], weights[2][name]) for name in weights[0])
    for name in ("edges", "hidden", "clean", "corrupted"):
        assert torch.equal(getattr(one, name), getattr(two, name))
    assert bool(gates_of(one.model)) == gated


def test_what_cannot_be_planted_is_refused():
    with pytest.raises(InputError, match="1 layers hold 1 to 3 planted nodes"):
        plant("llama", layers=1, nodes=4)
    with pytest.raises(InputError, match="hold 1 to"):
        plant("gpt2", nodes=0)
    with pytest.raises(InputError, match="from 2 layers on"):
        plant("gpt2", layers=1, nodes=1, gated=True)
    with pytest.raises(InputError, match="opt: circuits can be planted in llama and gpt2"):
        plant("opt")


def test_auroc_counts_pairs():
    truth = torch.tensor([True, True, False, False, False])
    assert auroc(torch.tensor([3.0, 2.0, 1.0, 1.0, 0.0]), truth) == 1.0
    assert auroc(torch.tensor([0.0, 0.0, 1.0, 1.0, 2.0]), truth) == 0.0
    assert auroc(torch.tensor([1.0, 2.0, 1.0, 3.0, 0.0]), truth) == pytest.approx((1.5 + 2) / 6)
    assert auroc(torch.zeros(5), truth) == 0.5
