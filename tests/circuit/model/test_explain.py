"""Why an edge is open: terms add up to the score, removing one is a run, and the planted writer comes first."""

import pytest
import torch

from attnprune.circuit.model.activations import Hooks, forward
from attnprune.circuit.model.adapters import anatomy_of
from attnprune.circuit.model.explain import explain
from attnprune.circuit.planted import plant
from attnprune.errors import InputError, UnsupportedModelError
from tests.helpers.pairs import FAMILIES

EDGE = (1, 2, 5, 3)


def scores(pair, layer, head, query, key):
    """The score itself, from what comes to the gates."""
    seen = {}
    gate = pair.anatomy.blocks[layer].gate

    def keep(_, args, options):
        seen.update(zip(("query", "key"), args, strict=False), **options)

    with torch.no_grad(), Hooks() as hooks:
        hooks.add(gate.register_forward_pre_hook(keep, with_kwargs=True))
        forward(pair.anatomy, pair.clean.ids[:1], 1)
    group = head // (pair.graph.heads // pair.graph.kv_heads)
    return (seen["query"][0, head, query] @ seen["key"][0, group, key] * seen["scaling"]).item()


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma2"])
def test_terms_add_up_to_the_score(pair_of, family):
    pair = pair_of(family, True)
    found = explain(pair.anatomy, pair.clean.ids[:1], EDGE, removed=2)
    assert found.score == pytest.approx(scores(pair, *EDGE), abs=1e-4)
    assert found.bias == pair.anatomy.blocks[1].gate.bias[2].item()
    is_open = pair.clean.patterns[1, 0, 2, 5, 3] != 0
    assert found.is_open == bool(is_open)
    for terms, rest in ((found.query, found.query_remainder), (found.key, found.key_remainder)):
        assert len(terms) == pair.graph.upstream(1, "q")
        assert rest + sum(term.value for term in terms) == pytest.approx(found.score, abs=1e-4)
        assert [term.without is not None for term in terms] == [True] * 2 + [False] * (len(terms) - 2)
    biased = [getattr(pair.anatomy.blocks[1].projections[kind].module, "bias", None) is not None for kind in "qk"]
    constant = (pair.clean.streams[2] - pair.clean.outputs[: pair.graph.upstream(1, "q")].sum(0)).abs().max()
    norm = getattr(pair.anatomy.blocks[1].attention_norm, "bias", None)
    if not any(biased) and constant < 1e-4 and norm is None:  # nothing but what was written
        assert found.query_remainder == pytest.approx(0, abs=1e-3)
        assert found.key_remainder == pytest.approx(0, abs=1e-3)


def test_a_soft_cap_is_refused(pair_of):
    pair = pair_of("gemma2", True)
    with pytest.raises(UnsupportedModelError, match="soft cap"):
        explain(pair.anatomy, pair.clean.ids[:1], EDGE)


@pytest.mark.parametrize("edge", [(9, 0, 3, 1), (0, 99, 3, 1), (0, 0, 3, 4), (0, 0, 99, 1), (0, 0, 3, -1)])
def test_an_edge_that_is_not_there_is_refused(pair_of, edge):
    pair = pair_of("llama", True)
    with pytest.raises(InputError, match="no such edge"):
        explain(pair.anatomy, pair.clean.ids[:1], edge)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("seed", range(2))
def test_the_planted_writer_comes_first_and_the_edge_closes_without_it(family, seed):
    """The switch reads the signal as its query and the constant of the input as its key."""
    planted = plant(family, gated=True, seed=seed)
    anatomy = anatomy_of(planted.model)
    clean, corrupted = (explain(anatomy, ids[:1], (2, 0, 5, 3)) for ids in (planted.clean, planted.corrupted))
    assert clean.is_open
    assert not corrupted.is_open
    for found in (clean, corrupted):
        first, second = found.query[:2]
        assert first.source == "a0.h0"
        assert abs(first.value) > 20 * abs(second.value)
        assert first.value == pytest.approx(found.score, rel=0.05)
        assert abs(first.without) < 0.05 * abs(found.score)
        assert found.key[0].source == "input"
        assert found.key[0].value == pytest.approx(found.score, rel=0.05)
