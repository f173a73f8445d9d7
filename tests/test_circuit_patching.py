"""Exact patching and attribution on tiny models of every family with an adapter, dense and gated."""

import copy

import pytest
import torch

from attnprune.attention.interface import attach, gates_forced_open, gates_of
from attnprune.circuit.model.activations import Hooks, collect, collect_pair
from attnprune.circuit.model.adapters import _LAYOUTS, anatomy_of, open_gates
from attnprune.circuit.model.attribution import attribute, attribute_circuit, edge_gradients, gate_flips
from attnprune.circuit.model.effects import edge_effects, message_effects, node_effects
from attnprune.circuit.model.patching import CircuitRun, run_circuit, self_check
from attnprune.errors import InputError, SelfCheckError, UnsupportedModelError
from tests.test_families import BIAS, build, ids, load, logits_of, merged

FAMILIES = sorted(_LAYOUTS)
PARTS = ["gemma2", "gpt2", "gpt_neox", "llama", "olmo2", "qwen3"]  # every kind of layout, and one with q/k norms
PROMPTS, LENGTH = 2, 8
WEIGHTS = torch.randn(97, generator=torch.Generator().manual_seed(3)) / 10


def metric(logits):
    return logits[:, -1] @ WEIGHTS.to(logits.dtype)


class Pair:
    """A model with a clean and a corrupted run."""

    def __init__(self, model, clean=None, corrupted=None, last=0):
        self.anatomy = anatomy_of(model)
        self.graph = self.anatomy.graph
        self.clean = collect(self.anatomy, ids(PROMPTS, LENGTH) if clean is None else clean, last)
        self.corrupted = collect(self.anatomy, ids(PROMPTS, LENGTH, seed=2) if corrupted is None else corrupted, last)
        self.runs = (self.anatomy, self.clean, self.corrupted)
        self.every = self.graph.mask()

    def without(self, *edge):
        kept = self.every.clone()
        kept[edge] = False
        return kept

    def change(self, edges, messages=None):
        """The metric of a circuit, less that of the clean run [B]."""
        return metric(run_circuit(*self.runs, edges, messages)) - metric(self.clean.logits)

    def some_edges(self, count):
        """Random edges that reach every kind of destination."""
        edges = self.every.nonzero()
        return edges[torch.randperm(len(edges), generator=torch.Generator().manual_seed(4))[:count]]


@pytest.fixture(scope="module")
def pair_of():
    """Cached pairs by family, dense or gated; nothing may change their models."""
    pairs = {}

    def get(family, gated=False):
        if (family, gated) not in pairs:
            model = build(family)
            if gated:
                attach(model, BIAS)
            pairs[family, gated] = Pair(model)
        return pairs[family, gated]

    return get


def assert_close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


every_family = pytest.mark.parametrize("family", FAMILIES)
dense_and_gated = pytest.mark.parametrize("gated", [False, True], ids=["dense", "gated"])


@pytest.fixture
def pair(pair_of, family, gated):
    return pair_of(family, gated)


@every_family
@dense_and_gated
def test_all_edges_are_the_clean_run_and_none_the_corrupted_one(pair):
    assert (pair.clean.logits - pair.corrupted.logits).abs().max() > 0.5
    assert_close(pair.clean.logits, logits_of(pair.anatomy.model, pair.clean.ids), 0)
    assert_close(run_circuit(*pair.runs, pair.every), pair.clean.logits)
    assert_close(run_circuit(*pair.runs, pair.every & False), pair.corrupted.logits)


@every_family
@dense_and_gated
def test_what_all_sources_write_adds_up_to_the_stream(pair):
    for run in (pair.clean, pair.corrupted):
        constant = run.streams[-1] - run.outputs.sum(0)  # biases of the output maps
        assert_close(constant, constant[:1, :1].expand_as(constant), 1e-4)
        assert_close(run.outputs[0], run.streams[0], 0)


@every_family
@dense_and_gated
def test_batched_edge_effects_equal_single_circuit_runs(pair):
    edges = pair.some_edges(10)
    effects = edge_effects(*pair.runs, edges, metric)
    for edge, effect in zip(edges.tolist(), effects, strict=True):
        assert_close(effect, pair.change(pair.without(*edge)))
    assert effects.abs().max() > 0.01


@every_family
@dense_and_gated
def test_node_effects_equal_circuits_without_the_edges_of_the_node(pair):
    nodes = torch.tensor([0, 2, pair.graph.mlp_source(0), pair.graph.head_sources(2).start + 3, pair.graph.sources - 1])
    effects = node_effects(*pair.runs, nodes, metric)
    for node, effect in zip(nodes.tolist(), effects, strict=True):
        assert_close(effect, pair.change(pair.without(node)))
        assert effect.abs().max() > 1e-3


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
@dense_and_gated
def test_batch_size_does_not_matter(pair):
    edges = pair.every.nonzero()[::7]
    expected = edge_effects(*pair.runs, edges, metric, pairs=1)
    assert_close(edge_effects(*pair.runs, edges, metric, pairs=1000), expected)
    mask = torch.zeros_like(pair.every)
    mask[tuple(edges.t())] = True
    assert_close(edge_effects(*pair.runs, mask, metric), expected)


@pytest.mark.parametrize("family", PARTS)
@dense_and_gated
def test_restoring_is_patching_the_other_way_round(pair):
    anatomy, clean, corrupted = pair.runs
    edges = pair.some_edges(6)
    effects = edge_effects(anatomy, corrupted, clean, edges, metric)
    for edge, effect in zip(edges.tolist(), effects, strict=True):
        restored = metric(run_circuit(anatomy, corrupted, clean, pair.without(*edge)))
        assert_close(effect, restored - metric(corrupted.logits))
    whole = node_effects(anatomy, corrupted, clean, torch.tensor([0]), metric)[0]
    assert_close(whole, metric(clean.logits) - metric(corrupted.logits))


@pytest.mark.parametrize("family", PARTS)
@dense_and_gated
def test_pruning_does_not_change_what_a_circuit_computes(pair):
    for seed in range(3):
        kept = pair.every & (torch.rand(pair.every.shape, generator=torch.Generator().manual_seed(seed)) < 0.02)
        pruned = pair.graph.prune(kept)
        assert pruned.sum() < kept.sum()
        assert_close(run_circuit(*pair.runs, pruned), run_circuit(*pair.runs, kept))


@pytest.mark.parametrize("family", PARTS)
@dense_and_gated
def test_edges_by_position(pair):
    edge = pair.graph.edge("m1->logits")
    by_position = pair.every[..., None].repeat(1, 1, LENGTH)
    assert_close(run_circuit(*pair.runs, by_position & False), pair.corrupted.logits)
    by_position[edge] = False
    assert_close(run_circuit(*pair.runs, by_position), run_circuit(*pair.runs, pair.without(*edge)))
    by_position[(*edge, LENGTH - 1)] = True
    found = run_circuit(*pair.runs, by_position)
    assert_close(found[:, -1], pair.clean.logits[:, -1])
    assert_close(found[:, :-1], run_circuit(*pair.runs, pair.without(*edge))[:, :-1])


@pytest.mark.parametrize("family", PARTS)
def test_message_effects_equal_single_circuit_runs(pair_of, family):
    pair = pair_of(family, True)
    assert (pair.clean.patterns[..., 0] != 0).any()
    assert (pair.clean.patterns[..., 0] == 0).any()
    candidates = ((pair.clean.patterns != 0) | (pair.corrupted.patterns != 0)).any(1).nonzero()
    messages = candidates[torch.randperm(len(candidates), generator=torch.Generator().manual_seed(5))[:6]]
    effects = message_effects(*pair.runs, messages, metric)
    every = torch.ones(pair.graph.layers, pair.graph.heads, LENGTH, LENGTH, dtype=torch.bool)
    for message, effect in zip(messages.tolist(), effects, strict=True):
        kept = every.clone()
        kept[tuple(message)] = False
        assert_close(effect, pair.change(pair.every, kept))
    assert effects.abs().max() > 1e-3
    assert_close(run_circuit(*pair.runs, pair.every, every), pair.clean.logits)


@pytest.mark.parametrize("family", PARTS)
def test_without_any_message_all_heads_are_corrupted(pair_of, family):
    pair = pair_of(family, True)
    none = torch.zeros(pair.graph.layers, pair.graph.heads, LENGTH, LENGTH, dtype=torch.bool)
    heads = [source for layer in range(4) for source in range(*pair.graph.head_sources(layer).indices(99))]
    assert_close(run_circuit(*pair.runs, pair.every, none), run_circuit(*pair.runs, pair.without(heads)))


def test_a_message_outside_the_open_gates_has_no_effect(pair_of):
    pair = pair_of("llama", True)
    closed = ((pair.clean.patterns == 0) & (pair.corrupted.patterns == 0)).all(1).tril().nonzero()
    assert len(closed) > 4
    assert not message_effects(*pair.runs, closed[:4], metric).any()


@pytest.mark.parametrize("family", PARTS)
def test_open_gates_are_the_dense_model(pair_of, family):
    dense, model = pair_of(family), build(family)
    model.set_attn_implementation("eager")
    eager = Pair(model)
    edges = dense.some_edges(6)
    expected, scores = edge_effects(*eager.runs, edges, metric), attribute(*eager.runs, metric, steps=2).edges
    with open_gates(model):
        opened = Pair(model)
        assert_close(opened.clean.logits, eager.clean.logits)
        assert_close(edge_effects(*opened.runs, edges, metric), expected)
        found = attribute(*opened.runs, metric, steps=2)
    assert_close(found.edges, scores)
    assert found.flips.flipped == 0
    sparse = pair_of(family, True)
    with gates_forced_open(sparse.anatomy.model):
        forced = Pair(sparse.anatomy.model)
        assert_close(edge_effects(*forced.runs, edges, metric), expected)


def test_a_merged_model_is_patched_like_the_attached_one(pair_of, tmp_path):
    attached = pair_of("llama", True)
    merged(attached.anatomy.model).save_pretrained(tmp_path)
    loaded = Pair(load(tmp_path, "llama"))
    edges = attached.some_edges(6)
    assert_close(edge_effects(*loaded.runs, edges, metric), edge_effects(*attached.runs, edges, metric))
    assert_close(loaded.clean.patterns, attached.clean.patterns)
    found, expected = (attribute(*pair.runs, metric, steps=2) for pair in (loaded, attached))
    assert_close(found.edges, expected.edges)
    assert_close(found.messages, expected.messages)
    assert found.flips == expected.flips
    none = torch.zeros(4, 4, LENGTH, LENGTH, dtype=torch.bool)
    circuits = [run_circuit(*pair.runs, pair.every, none) for pair in (loaded, attached)]
    assert_close(*circuits)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_logits_of_the_last_position_alone(pair_of, family):
    whole = pair_of(family)
    short = Pair(whole.anatomy.model, last=1)
    assert short.clean.logits.shape == (PROMPTS, 1, 97)
    edges = whole.some_edges(6)
    assert_close(edge_effects(*short.runs, edges, metric), edge_effects(*whole.runs, edges, metric))
    assert_close(run_circuit(*short.runs, whole.every & False), short.corrupted.logits)
    assert_close(attribute(*short.runs, metric, steps=1).edges, attribute(*whole.runs, metric, steps=1).edges)


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
    run.weights = weights
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


# --- a prefix that clean and corrupted prompts share runs once


@every_family
@dense_and_gated
def test_a_shared_prefix_changes_no_result(family, gated, pair_of):
    anatomy, clean = pair_of(family, gated).anatomy, ids(PROMPTS, LENGTH)
    corrupted = torch.cat((clean[:, :5], ids(PROMPTS, LENGTH, seed=2)[:, 5:]), 1)
    whole, behind = Pair(anatomy.model, clean, corrupted, last=1), copy.copy(pair_of(family, gated))
    behind.clean, behind.corrupted = collect_pair(anatomy, clean, corrupted, 1)
    behind.runs = (anatomy, behind.clean, behind.corrupted)
    assert torch.equal(behind.clean.ids, clean[:, 5:])
    assert_close(behind.clean.logits, whole.clean.logits)
    generator = torch.Generator().manual_seed(6)
    circuit = whole.every & (torch.rand(whole.every.shape, generator=generator) < 0.5)
    assert whole.change(circuit).abs().max() > 1e-3
    assert_close(behind.change(circuit), whole.change(circuit))
    edges = whole.some_edges(6)
    for effects, what in ((edge_effects, edges), (node_effects, edges[:, 0])):
        assert_close(effects(*behind.runs, what, metric, pairs=4), effects(*whole.runs, what, metric))
    found, expected = (attribute(*p.runs, metric, steps=2) for p in (behind, whole))
    assert_close(found.edges, expected.edges)
    if gated:
        assert_close(found.messages, expected.messages)
        kept = torch.rand(anatomy.graph.layers, anatomy.graph.heads, LENGTH, LENGTH, generator=generator) < 0.5
        assert_close(behind.change(circuit, kept[:, :, 5:]), whole.change(circuit, kept))


def test_prompts_that_are_the_same_keep_a_position_to_run(pair_of):
    anatomy = pair_of("llama").anatomy
    clean, corrupted = collect_pair(anatomy, ids(2, 6), ids(2, 6), 1)
    assert clean.ids.shape == (2, 1)
    assert_close(clean.logits, logits_of(anatomy.model, ids(2, 6))[:, -1:])
    assert collect_pair(anatomy, ids(2, 1), ids(2, 1), 1)[0].prefix is None
    assert torch.equal(clean.logits, corrupted.logits)


# --- what is left behind, and what is refused


def state_of(model):
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
    wanted = [p.requires_grad for p in model.parameters()]
    return hooks, wanted, model.training, [vars(m).get("forward") for m in model.modules()]


def failing(logits):
    raise ArithmeticError("metric")


@dense_and_gated
def test_nothing_is_left_behind(gated):
    model = build("llama")
    if gated:
        attach(model, BIAS)
    next(model.parameters()).requires_grad_(False)
    model.train()
    before, logits = state_of(model), logits_of(model, ids(2, 6))
    pair = Pair(model)
    edges = pair.some_edges(3)
    run_circuit(*pair.runs, pair.every & False)
    edge_effects(*pair.runs, edges, metric)
    node_effects(*pair.runs, edges[:, 0], metric)
    attribute(*pair.runs, metric, rule="eap")
    assert state_of(model) == before
    calls = 0

    def fails_late(logits):
        nonlocal calls
        calls += 1
        return metric(logits) if calls < 3 else failing(logits)

    for attempt in (
        lambda: edge_effects(*pair.runs, edges, fails_late),
        lambda: attribute(*pair.runs, fails_late, rule="eap"),
    ):
        calls = 0
        with pytest.raises(ArithmeticError, match="metric"):
            attempt()
        assert state_of(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(logits_of(model, ids(2, 6)), logits)


def test_a_forward_that_somebody_replaced_stays(pair_of):
    model = copy.deepcopy(pair_of("llama").anatomy.model)
    first = model.model.layers[0]
    original, calls = first.forward, []

    def counting(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    first.forward = counting
    pair = Pair(model)
    edge_effects(*pair.runs, pair.every.nonzero()[-3:], metric)
    assert vars(first)["forward"] is counting
    assert len(calls) == 2  # not for the edges, which start behind it


def test_the_self_check_passes_and_finds_a_wrong_part(pair_of):
    for gated in (False, True):
        self_check(*pair_of("gemma2", gated).runs)
    model = build("llama")
    for layer in model.model.layers:  # an output that no adapter knows of
        layer.mlp.register_forward_hook(lambda module, args, output: output * 2)
        layer.register_forward_hook(lambda module, args, output: output + args[0].square())
    with pytest.raises(SelfCheckError, match="llama: a circuit of all edges is off by"):
        self_check(*Pair(model).runs)


def test_the_self_check_holds_one_flipped_gate_and_refuses_many():
    model = build("llama")
    attach(model, BIAS)
    pair = Pair(model)  # its runs are those of before the change
    bias = pair.anatomy.blocks[-1].gate.bias.data
    open_before = pair.clean.patterns[-1] != 0
    for _ in range(10_000):  # as rounding would: move a head's threshold until one of its gates is on the other side
        bias[0] -= 1e-3
        flipped = open_before != (collect(pair.anatomy, pair.clean.ids).patterns[-1] != 0)
        if flipped.any():
            break
    assert flipped.sum() == 1
    assert (run_circuit(*pair.runs, pair.every) - pair.clean.logits).abs().max() > 1e-3
    self_check(*pair.runs)
    bias[0] -= 100
    with pytest.raises(SelfCheckError, match=r"llama: a circuit of all edges flips .* % of the gates"):
        self_check(*pair.runs)


def test_bad_input_is_refused(pair_of):
    pair = pair_of("llama")
    longer = collect(pair.anatomy, ids(PROMPTS, LENGTH + 1))
    with pytest.raises(InputError, match=r"differ in shape: \(2, 8\) and \(2, 9\)"):
        run_circuit(pair.anatomy, pair.clean, longer, pair.every)
    with pytest.raises(InputError, match="differ in shape"):
        edge_effects(pair.anatomy, pair.clean, longer, pair.some_edges(1), metric)
    with pytest.raises(InputError, match="differ in shape"):
        attribute(pair.anatomy, longer, pair.clean, metric)
    with pytest.raises(InputError, match=r"token ids \[prompts, length\], got shape \(3,\)"):
        collect(pair.anatomy, torch.tensor([1, 2, 3]))
    with pytest.raises(InputError, match="edges: expected a bool mask"):
        run_circuit(*pair.runs, pair.every.float())
    with pytest.raises(InputError, match="edges: expected a bool mask"):
        run_circuit(*pair.runs, pair.every.t())
    with pytest.raises(InputError, match="not all of them are edges"):
        edge_effects(*pair.runs, torch.tensor([[1, 0]]), metric)
    for nodes in ([-1], [pair.graph.sources]):
        with pytest.raises(InputError, match="nodes: expected sources 0 to 20"):
            node_effects(*pair.runs, torch.tensor(nodes), metric)


def test_a_metric_of_another_shape_is_refused(pair_of):
    pair = pair_of("gpt2")
    for wrong in (lambda logits: logits.mean(), lambda logits: logits[:, -1]):
        with pytest.raises(InputError, match=r"metric: expected one number per prompt \[2\]"):
            attribute(*pair.runs, wrong)
        with pytest.raises(InputError, match=r"metric: expected one number per prompt \[2\]"):
            edge_effects(*pair.runs, pair.some_edges(1), wrong)


@pytest.mark.parametrize("options", [{"rule": "right"}, {"steps": 0}])
def test_a_rule_that_does_not_exist_is_refused(pair_of, options):
    with pytest.raises(InputError, match="midpoint, eap-ig or eap"):
        attribute(*pair_of("gpt2").runs, metric, **options)


def test_messages_need_gates(pair_of):
    dense, gated = pair_of("llama"), pair_of("llama", True)
    everything = torch.ones(4, 4, LENGTH, LENGTH, dtype=torch.bool)
    with pytest.raises(UnsupportedModelError, match="need a model with gates") as error:
        run_circuit(*dense.runs, dense.every, everything)
    assert "open_gates" in error.value.hint
    with pytest.raises(UnsupportedModelError, match="need a model with gates"):
        message_effects(*dense.runs, torch.tensor([[0, 0, 1, 0]]), metric)
    with pytest.raises(InputError, match="messages: expected a bool mask"):
        run_circuit(*gated.runs, gated.every, everything[:2])


def test_no_edges_and_no_nodes_to_patch(pair_of):
    pair = pair_of("llama")
    nothing = torch.zeros(0, 2, dtype=torch.int64)
    assert edge_effects(*pair.runs, nothing, metric).shape == (0, PROMPTS)
    assert node_effects(*pair.runs, nothing[:, 0], metric).shape == (0, PROMPTS)


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
