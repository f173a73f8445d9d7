"""Gradient scores: exact where the model is smooth, counted where it is not, equal to the EAP-IG package."""

from __future__ import annotations

import pytest
import torch

from attnprune.attention.interface import attach, gates_of
from attnprune.circuit.model.activations import Hooks
from attnprune.circuit.model.attribution import attribute, attribute_circuit, edge_gradients, gate_flips
from attnprune.circuit.model.effects import edge_effects, message_effects
from attnprune.circuit.model.patching import CircuitRun, run_circuit
from tests.helpers.families import BIAS, build, ids, logits_of
from tests.helpers.pairs import LENGTH, PARTS, PROMPTS, Pair, assert_close, dense_and_gated, every_family, metric

# --- attribution


def perturbed(family, size, bias=None, seed=0):
    """A pair in fp64 whose corrupted prompts have embeddings that differ by `size` (further tokens of the model)."""
    model = build(family).double()
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        noise = torch.randn(40, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        embedding[50:90] = embedding[1:41] + size * noise
    if bias is not None:
        attach(model, bias)
    tokens = ids(PROMPTS, LENGTH) % 40 + 1
    return Pair(model, tokens, tokens + 49)


def without_flips(family):
    """A gated pair with a small change that opens and closes no gate."""
    tries = (perturbed(family, 1e-4, BIAS, seed) for seed in range(100))
    return next(pair for pair in tries if gate_flips(pair.clean, pair.corrupted).flipped == 0)


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def eap_error(pair):
    edges = pair.some_edges(40)
    scores = attribute(*pair.runs, metric, rule="eap").edges
    return relative_error(scores[tuple(edges.t())], edge_effects(*pair.runs, edges, metric).mean(1))


@pytest.mark.parametrize("family", PARTS)
def test_eap_becomes_exact_for_small_changes(family):
    large, small = (eap_error(perturbed(family, size)) for size in (1e-2, 1e-3))
    assert small < 0.05
    assert 0.05 < small / large < 0.2  # the change is ten times smaller


@pytest.mark.parametrize("family", PARTS)
def test_edge_and_message_scores_are_exact_for_small_changes_without_flips(family):
    pair = without_flips(family)
    assert eap_error(pair) < 0.02
    messages = (pair.clean.patterns != 0).all(1).nonzero()[::31]
    scores = attribute(*pair.runs, metric, rule="eap").messages
    exact = message_effects(*pair.runs, messages, metric).mean(1)
    assert relative_error(scores[tuple(messages.t())], exact) < 0.02


@every_family
def test_input_edges_add_up_to_the_change_of_the_metric(pair_of, family):
    pair = pair_of(family)
    found = attribute(*pair.runs, metric)
    change = (metric(pair.corrupted.logits) - metric(pair.clean.logits)).mean()
    assert found.gap < 0.05
    assert found.steps in (4, 8, 16, 32, 64)
    scale = (metric(pair.corrupted.logits) - metric(pair.clean.logits)).abs().mean()
    assert abs((found.edges[0].sum() - change) / scale) == pytest.approx(found.gap, abs=1e-6)
    assert not found.edges[~pair.every].any()
    assert found.messages is None
    assert found.flips is None


def test_the_gap_falls_with_the_steps_and_the_cap_holds(pair_of):
    pair = pair_of("llama")
    gaps = [attribute(*pair.runs, metric, steps=steps).gap for steps in (1, 8, 64)]
    assert gaps[0] > 3 * gaps[1] > 9 * gaps[2]
    capped = attribute(*pair.runs, metric, tolerance=0.0, max_steps=9)
    assert capped.steps == 8
    assert capped.gap == pytest.approx(gaps[1], rel=1e-3)


def test_rules_are_averages_over_their_points(pair_of):
    pair = pair_of("gpt2")
    left = {steps: attribute(*pair.runs, metric, rule="eap-ig", steps=steps).edges for steps in (1, 2)}
    middle = {steps: attribute(*pair.runs, metric, steps=steps).edges for steps in (1, 2)}
    assert_close(left[2], (left[1] + middle[1]) / 2)  # 0, 1/2 and 1/2
    four = attribute(*pair.runs, metric, rule="eap-ig", steps=4).edges
    assert_close(four, (left[2] + middle[2]) / 2)  # 0, 1/4, 1/2, 3/4
    backwards = attribute(pair.anatomy, pair.corrupted, pair.clean, metric, rule="eap").edges
    assert_close(left[1], -backwards)  # in GPT-2 the token ids matter for the embedding alone


@pytest.mark.parametrize("family", PARTS)
@dense_and_gated
def test_scores_by_position_add_up(pair):
    whole = attribute(*pair.runs, metric, steps=2).edges
    parts = attribute(*pair.runs, metric, steps=2, per_position=True).edges
    assert parts.shape == (*whole.shape, LENGTH)
    assert_close(parts.sum(-1), whole)
    assert not parts[:, -1, :-1].any()  # the metric reads the logits at the last position


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_flips_are_counted_like_the_gates_do(pair_of, family):
    pair = pair_of(family, True)
    flips = attribute(*pair.runs, metric, rule="eap").flips
    assert flips.flipped > 0
    assert gate_flips(pair.clean, pair.clean).flipped == 0
    total = 0
    for run in (pair.clean, pair.corrupted):
        logits_of(pair.anatomy.model, run.ids)
        total += sum(int(gate.last.open_edges.sum()) for gate in gates_of(pair.anatomy.model))
    assert total == 2 * flips.open - flips.flipped  # open in both are counted twice


def test_the_training_slope_of_the_gates_is_on_request(pair_of):
    pair = pair_of("llama", True)
    hard, soft = (attribute(*pair.runs, metric, steps=2, straight_through=s).edges for s in (False, True))
    value = pair.graph.readers(3, "v")  # behind the last gates: no slope on the way
    assert_close(hard[:, value], soft[:, value])
    query = pair.graph.readers(3, "q")
    assert (hard[:, query] - soft[:, query]).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "llama"])
@dense_and_gated
def test_the_same_bits_twice(pair):
    again = Pair(pair.anatomy.model)
    edges = pair.some_edges(6)
    for one, two in zip(pair.clean, again.clean, strict=True):
        assert one == two if one is None or isinstance(one, int) else torch.equal(one, two)
    assert torch.equal(*(edge_effects(*p.runs, edges, metric) for p in (pair, again)))
    assert torch.equal(*(attribute(*p.runs, metric, steps=2).edges for p in (pair, again)))
    kept = pair.every & (torch.rand(pair.every.shape) < 0.1)
    assert torch.equal(*(run_circuit(*p.runs, kept) for p in (pair, again)))


def with_weights(pair, weights):
    """The metric of a circuit run whose edges carry a share of their change."""
    run = CircuitRun(*pair.runs[::2], weights != 0)
    run.weights = weights[run.used]
    with torch.no_grad(), Hooks() as hooks:
        run.install(hooks)
        return metric(pair.anatomy.model(input_ids=pair.clean.ids, logits_to_keep=1).logits)


@pytest.mark.parametrize("family", PARTS)
@dense_and_gated
def test_scores_inside_a_circuit_are_the_slope_of_each_edge(family, gated):
    model = build(family).double()
    if gated:
        attach(model, BIAS)
    pair = Pair(model, last=1)
    drawn = torch.rand(pair.every.shape, generator=torch.Generator().manual_seed(7))
    circuit = pair.graph.prune(pair.every & (drawn < 0.6))
    scores = attribute_circuit(*pair.runs, circuit, metric)
    assert not scores[~circuit].any()
    assert int((scores.abs() > 1e-6).sum()) > 50
    gradients = edge_gradients(*pair.runs, circuit, metric)
    assert torch.equal(scores[circuit], -gradients[circuit])
    outside = (pair.every & ~circuit & (gradients.abs() > 1e-4)).nonzero()
    assert len(outside) > 50
    for edges in (circuit.nonzero(), outside):
        for edge in edges[:: max(1, len(edges) // 8)]:
            less, more = circuit.double(), circuit.double()
            less[tuple(edge)] -= 1e-3  # some norms compute in fp32
            more[tuple(edge)] += 1e-3
            slope = (with_weights(pair, more) - with_weights(pair, less)).mean() / 2e-3
            assert_close(gradients[tuple(edge)], slope, 1e-3 * gradients.abs().max().item())


# --- the package of the authors of EAP-IG (github.com/hannamw/EAP-IG, with a TransformerLens below 4)


def hooked_transformer(model):
    """The same GPT-2 as a HookedTransformer."""
    lens = pytest.importorskip("transformer_lens", reason="pip install 'transformer-lens<4'")
    if not isinstance(getattr(lens, "__dict__", {}).get("HookedTransformer"), type):
        pytest.skip("needs a transformer-lens below 4")
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

    config = lens.HookedTransformerConfig(
        n_layers=4, d_model=32, n_ctx=64, d_head=8, n_heads=4, d_mlp=128, d_vocab=97, act_fn="gelu_new",
        normalization_type="LN", eps=model.config.layer_norm_epsilon, use_attn_result=True,
        use_split_qkv_input=True, use_hook_mlp_in=True, device="cpu",
    )  # fmt: skip
    hooked = lens.HookedTransformer(config)
    hooked.load_state_dict(convert_gpt2_weights(model, config), strict=False)
    return hooked


def test_equal_to_the_eap_ig_package(pair_of, monkeypatch):
    package = pytest.importorskip("eap.attribute", reason="github.com/hannamw/EAP-IG is not installed")
    from eap import evaluate, graph

    pair = pair_of("gpt2")
    hooked = hooked_transformer(pair.anatomy.model)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *a, **k: zeros(*a, **{**k, "device": None}))  # it asks for "cuda"
    for module in (package, evaluate):
        monkeypatch.setattr(module, "tokenize_plus", lambda model, x, *a: (x, None, None, LENGTH))
    data = [(pair.clean.ids, pair.corrupted.ids, None)]
    assert_close(hooked(pair.clean.ids), pair.clean.logits, 1e-4)

    def scored(method, metric_of_logits, **options):
        theirs = graph.Graph.from_model(hooked)
        made = method(hooked, theirs, data, metric_of_logits, quiet=True, **options)
        assert {*theirs.edges} == {pair.graph.edge_name(*edge) for edge in pair.every.nonzero().tolist()}
        return made.detach()

    def total(logits, *_):
        return metric(logits).sum()

    assert_close(scored(package.get_scores_eap, total), attribute(*pair.runs, metric, rule="eap").edges, 1e-4)
    ours = attribute(*pair.runs, metric, rule="eap-ig", steps=5).edges
    assert_close(scored(package.get_scores_eap_ig, total, steps=5), ours, 1e-4)
    exact = torch.zeros_like(ours)
    exact[pair.every] = edge_effects(*pair.runs, pair.every, metric).mean(1)
    assert_close(scored(package.get_scores_exact, lambda logits, *_: metric(logits)) * pair.every, exact, 1e-4)
    for seed in range(3):
        kept = pair.every & (torch.rand(pair.every.shape, generator=torch.Generator().manual_seed(seed)) < 0.2)
        theirs = graph.Graph.from_model(hooked)
        theirs.in_graph |= kept
        theirs.nodes_in_graph |= True
        found = evaluate.evaluate_graph(hooked, theirs, data, lambda logits, *_: metric(logits), quiet=True)
        assert_close(found, metric(run_circuit(*pair.runs, kept)), 1e-4)
        assert torch.equal(theirs.in_graph & pair.every, pair.graph.prune(kept))
