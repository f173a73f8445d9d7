"""Exact patching on tiny models of every family with an adapter, dense and gated.

Long because every test runs on the same collected pairs of every family.
"""

from __future__ import annotations

import copy

import pytest
import torch

from attnprune.attention.interface import attach, gates_forced_open
from attnprune.circuit.model.activations import collect, collect_pair
from attnprune.circuit.model.adapters import anatomy_of, open_gates
from attnprune.circuit.model.attribution import attribute
from attnprune.circuit.model.effects import edge_effects, message_effects, node_effects
from attnprune.circuit.model.patching import run_circuit, self_check
from attnprune.errors import InputError, SelfCheckError, UnsupportedModelError
from tests.helpers.families import BIAS, OPTIONS, WINDOW, build, ids, load, logits_of, merged
from tests.helpers.pairs import (
    FAMILIES,
    LENGTH,
    PARTS,
    PROMPTS,
    Pair,
    assert_close,
    dense_and_gated,
    every_family,
    metric,
)

WINDOWED = [family for family in FAMILIES if "sliding_window" in OPTIONS.get(family, {})]


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


def with_prefix(anatomy, length, prefix):
    """Clean and corrupted prompts with their first tokens in common, as whole runs and behind the prefix."""
    clean = ids(PROMPTS, length)
    corrupted = torch.cat((clean[:, :prefix], 97 - clean[:, prefix:]), 1)
    behind = copy.copy(whole := Pair(anatomy.model, clean, corrupted, last=1))
    behind.clean, behind.corrupted = collect_pair(anatomy, clean, corrupted, 1)
    behind.runs = (anatomy, behind.clean, behind.corrupted)
    assert behind.clean.prefix.shape[-2] == prefix
    return whole, behind


@pytest.mark.parametrize("window", [1, 2, WINDOW, 11, 40])
@pytest.mark.parametrize("family", WINDOWED)
@dense_and_gated
def test_a_prefix_longer_than_the_window_changes_no_result(family, gated, window, monkeypatch):
    monkeypatch.setitem(OPTIONS, family, OPTIONS[family] | {"sliding_window": window})
    model = build(family)
    if gated:
        attach(model, BIAS)
    whole, behind = with_prefix(anatomy_of(model), 14, 11)
    for run, name in ((behind.clean, "clean"), (behind.corrupted, "corrupted")):
        assert_close(run.logits, logits_of(model, run.prompts)[:, -1:])
        if gated:
            assert_close(run.patterns, getattr(whole, name).patterns[:, :, :, 11:])
    self_check(*behind.runs)
    circuit = whole.every & (torch.rand(whole.every.shape, generator=torch.Generator().manual_seed(6)) < 0.5)
    assert_close(behind.change(circuit), whole.change(circuit))
    edges = whole.some_edges(3)
    assert_close(edge_effects(*behind.runs, edges, metric), edge_effects(*whole.runs, edges, metric))
    assert_close(attribute(*behind.runs, metric, steps=1).edges, attribute(*whole.runs, metric, steps=1).edges)


def test_a_prefix_has_the_angles_of_the_whole_sequence(monkeypatch):
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    monkeypatch.setitem(OPTIONS, "llama", {"max_position_embeddings": 8, "rope_parameters": rope})
    model = build("llama")
    _, behind = with_prefix(anatomy_of(model), 14, 7)
    assert_close(behind.clean.logits, logits_of(model, behind.clean.prompts)[:, -1:])
    self_check(*behind.runs)


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


@dense_and_gated
def test_the_self_check_finds_a_fault_that_all_runs_behind_a_prefix_share(pair_of, gated):
    anatomy = pair_of("llama", gated).anatomy
    _, behind = with_prefix(anatomy, 10, 6)
    self_check(*behind.runs)
    for wrong in (behind.clean.prefix.roll(1, 2), behind.clean.prefix * 1.01):
        runs = [collect(anatomy, run.prompts, 1, wrong) for run in (behind.clean, behind.corrupted)]
        assert_close(run_circuit(anatomy, *runs, behind.every), runs[0].logits)
        with pytest.raises(SelfCheckError, match="llama: a plain forward of the whole clean prompts"):
            self_check(anatomy, *runs)


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
