"""The search: planted circuits are found exactly, the controls control, models compare."""

from __future__ import annotations

import pytest
import torch

from attnprune.circuit import controls
from attnprune.circuit.analysis import analyse
from attnprune.circuit.compare import compare, parity, result_of, task_facts
from attnprune.circuit.exchange import graph_json
from attnprune.circuit.model.adapters import anatomy_of
from attnprune.circuit.planted import plant
from attnprune.circuit.result import MARGIN, CircuitResult
from attnprune.circuit.search.cache import Cache
from attnprune.circuit.search.counts import needed_messages
from attnprune.circuit.search.splits import QUICK, Settings
from attnprune.errors import AttnPruneError, InputError
from attnprune.sidecar import bases
from tests.helpers.circuits import NO_DELETION, planted_task, silent


def search_planted(family, gated, seed, monkeypatch, prompts=4, **settings):
    monkeypatch.setattr("attnprune.circuit.analysis.check_ability", lambda *_: None)  # its metric may be below 0
    planted = plant(family, gated=gated, seed=seed)
    task = planted_task(planted, prompts)
    found = analyse(
        planted.model, "planted", task, Settings(**settings), with_controls=False, label="model", watch=silent,
        cache=Cache(),
    )  # fmt: skip
    return planted, found


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("gated", [False, True], ids=["dense", "gated"])
def test_a_planted_circuit_is_found_exactly(family, gated, monkeypatch):
    planted, found = search_planted(family, gated, 1, monkeypatch, target=0.998)
    assert torch.equal(found.edges, planted.edges)
    assert found.model.test.faithfulness.value == pytest.approx(1, abs=0.005)
    assert found.model.test.kl < 0.01
    stable = {curve.ranking: curve.stable for curve in found.model.curves}
    assert {edge.name for edge in found.model.edges} == {edge.name for edge in found.model.top_edges if edge.kept}
    if gated:  # gradients rank the edges behind the gate last
        assert found.model.ranking == "exact edges"
        assert stable["eap-ig abs"] > stable["exact edges"]


def test_a_perfect_circuit_is_shown_with_many_prompts_and_not_with_few(monkeypatch):
    few, many = (
        search_planted(
            "llama", False, 1, monkeypatch, prompts=n, **(QUICK | {"target": 0.998, "all_edges": 0, "sizes": 3})
        )[1]
        for n in (4, 80)
    )
    assert torch.equal(few.edges, many.edges)
    assert (few.model.reached, many.model.reached) == (False, True)
    assert few.model.test.lower < 0.7
    assert 0.998 - MARGIN < many.model.test.lower < 1 < many.model.test.upper < 1.002 + MARGIN
    assert len(many.model.test.each) == 80


@pytest.mark.parametrize("gated", [False, True], ids=["dense", "gated"])
def test_target_1_ends_with_a_circuit_as_good_as_the_model(gated, monkeypatch):
    _, found = search_planted("llama", gated, 0, monkeypatch, target=1.0, sizes=4, deletions=20)
    assert found.model.validation_faithfulness == pytest.approx(1, abs=2e-4)
    assert 0 < found.model.counts.edges <= found.anatomy.graph.edge_count


@pytest.fixture(scope="module")
def both(addition, tmp_path_factory):
    """Both searched quickly, with a cache in a folder."""
    dense, sparse, task, _ = addition
    settings = Settings(**{**QUICK, "all_edges": 0, "control_sizes": 2, "sizes": 6})
    folder = tmp_path_factory.mktemp("cache")
    cache = Cache(folder)
    options = {"with_controls": True, "watch": silent, "cache": cache}
    return folder, settings, [
        analyse(sparse, "sparse", task, settings, label="model", **options),
        analyse(dense, "dense", task, settings, label="against", **options),
    ]  # fmt: skip


def test_both_models_reach_the_target_and_the_file_is_valid(both, addition):
    _, settings, analyses = both
    *_, task, tokenizer = addition
    facts = task_facts(task, tokenizer, 0)
    result = result_of(analyses, facts, settings, command="test", quick=True, seconds=1.0, notes=[])
    assert CircuitResult.model_validate_json(result.model_dump_json()) == result
    for model in result.models:
        assert settings.in_band(model.validation_faithfulness)
        assert model.counts.edges == len(model.edges) == sum(edge.kept for edge in model.edges)
        assert (len(model.heads), len(model.mlps)) == (model.counts.heads, model.counts.mlps)
        assert model.test.faithfulness.low <= model.test.faithfulness.value <= model.test.faithfulness.high
        assert model.counts.messages <= model.counts.open_messages
    sparse, dense = result.models
    assert (sparse.kind, dense.kind) == ("sparse", "dense")
    assert sparse.counts.open_messages < dense.counts.open_messages
    assert result.compare.edges.value == dense.counts.edges / sparse.counts.edges
    assert result.compare.edges.ranked.low <= result.compare.edges.ranked.value <= result.compare.edges.ranked.high


def test_a_dense_prompt_sends_a_message_along_every_visible_edge(both, addition):
    *_, dense = both[2]
    batches = addition[2].validation
    graph = dense.anatomy.graph
    pairs = 0
    for batch in batches:
        first = (batch.clean != batch.corrupted).int().argmax(1)  # what comes before is the same in both runs
        pairs += sum(batch.length * (batch.length + 1) // 2 - k * (k + 1) // 2 for k in first.tolist())
    assert dense.model.counts.open_messages == graph.layers * graph.heads * pairs / sum(map(len, batches))


def test_controls_say_what_a_circuit_is_worth(both):
    for analysis in both[2]:
        found, own = analysis.model.controls, analysis.model.test.faithfulness.value
        assert found.complement < 0.5 < own
        assert found.random.low <= found.random.faithfulness <= found.random.high < own
        assert not found.random_weights.able
        assert found.random_weights.recovered < 0.5
        assert (found.shuffled_gates is None) == (analysis.model.kind == "dense")
        size = len(found.templates.templates)
        assert size == 3
        assert all(found.templates.jaccard[i][i] == 1 for i in range(size))


def test_models_are_as_before_after_the_search(both, addition):
    for analysis, model in zip(both[2], (addition[1], addition[0]), strict=True):
        batch = addition[2].test[0]
        with torch.no_grad():
            again = batch.score(model(batch.clean).logits)
        assert torch.allclose(again, analysis.test.clean[: len(batch)], atol=1e-4)


def test_a_second_search_takes_everything_from_the_cache(both, addition, monkeypatch):
    folder, settings, analyses = both
    monkeypatch.setattr("attnprune.circuit.model.patching.run_circuit", None)  # would fail
    monkeypatch.setattr("attnprune.circuit.analysis.patching.self_check", lambda *_: None)
    again = analyse(
        addition[0], "dense", addition[2], settings, with_controls=True, label="against", watch=silent,
        cache=Cache(folder),
    )  # fmt: skip
    assert again.model.model_copy(update={"seconds": 0}) == analyses[1].model.model_copy(update={"seconds": 0})


def test_a_cache_of_another_model_is_refused(both, addition):
    with pytest.raises(InputError, match="not the model"):
        analyse(
            addition[1], "sparse", addition[2], both[1], with_controls=False, label="against", watch=silent,
            cache=Cache(both[0]),
        )  # fmt: skip


def test_a_model_that_cannot_do_the_task_is_refused(addition):
    model = bases.load_base("demo").model
    with controls.random_weights(anatomy_of(model), 0), pytest.raises(AttnPruneError, match="cannot do the task"):
        analyse(
            model, "noise", addition[2], NO_DELETION, with_controls=False, label="model", watch=silent, cache=Cache()
        )


def test_equal_models_compare_as_equal(both):
    _, settings, analyses = both
    found = compare(analyses[0], analyses[0], settings)
    assert (found.edges.value, found.heads.value, found.jaccard) == (1.0, 1.0, 1.0)
    assert (found.edges.ranked.low, found.edges.ranked.high) == (1.0, 1.0)
    assert found.first_in_second == found.second_in_first == pytest.approx(analyses[0].model.test.faithfulness.value)


def test_models_that_behave_differently_are_not_comparable(both):
    one = both[2][0].model
    assert parity(one, one.model_copy(update={"accuracy": one.accuracy - 0.2}))
    assert parity(one, one.model_copy(update={"clean": one.clean + 5 * (one.clean - one.corrupted)}))
    assert parity(one, one.model_copy(update={"reached": False}))


def test_eap_ig_file_has_every_edge(both):
    analysis = both[2][1]
    data = graph_json(analysis.anatomy.graph, analysis.anatomy.width, analysis.edges, analysis.scores)
    assert len(data["edges"]) == analysis.anatomy.graph.edge_count
    assert sum(edge["in_graph"] for edge in data["edges"].values()) == analysis.model.counts.edges
    assert set(data["nodes"]) == {*analysis.anatomy.graph.source_names, "logits"}
    assert data["cfg"] == {"n_layers": 4, "n_heads": 4, "parallel_attn_mlp": False, "d_model": 64}


def test_messages_of_other_templates_do_not_matter_for_the_count(both, addition):
    """Without any scores the messages are in no order; then it takes more of them."""
    analysis = both[2][0]
    needed = needed_messages(analysis.validation, analysis.edges, {}, both[1], silent)
    assert analysis.model.counts.messages <= needed.needed <= needed.open
    analysis.validation.free()
