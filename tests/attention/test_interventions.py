"""Masks, open gates and closed heads, against the patterns and outputs of the model itself."""

from __future__ import annotations

import pytest
import torch

import attnprune as ap
from attnprune.attention.interface import attach, gates_of
from attnprune.attention.spans import KnownMask
from tests.helpers.factory import refused
from tests.helpers.gated import BIAS, logits_of


@pytest.fixture
def gated(tiny_llama):
    model = tiny_llama()
    attach(model, BIAS)
    return model


@pytest.mark.parametrize("rows", [1, 3])
def test_masks_are_where_the_patterns_are_not_zero(gated, tokens, rows):
    ids = tokens(rows, 20)
    patterns = gated(ids, output_attentions=True).attentions
    with torch.sparse.check_sparse_tensor_invariants():
        found = ap.masks(gated, ids)
        single = ap.masks(gated, ids[0].tolist())
    for layer, pattern in enumerate(patterns):
        assert found[layer].is_sparse
        assert found[layer].dtype == torch.bool
        assert torch.equal(found[layer].to_dense(), pattern > 0)
        assert torch.equal(single[layer].to_dense(), pattern[0] > 0)
        assert 0 < found[layer]._nnz() < pattern.numel() / 2
        assert found[layer].indices().T.tolist() == sorted(found[layer].indices().T.tolist())
    assert all(gate.on_chunk is None for gate in gates_of(gated))


def test_masks_of_a_head_that_is_closed_are_empty(gated, tokens):
    with ap.close_heads(gated, [(1, 2)]):
        found = ap.masks(gated, tokens(1, 12)[0])
    assert found[1].shape == (4, 12, 12)
    assert found[1].to_dense()[2].sum() == 0
    assert found[1].to_dense()[1].sum() > 0


def test_open_gates_are_the_dense_model(gated, tokens):
    ids = tokens(2, 16)
    before = logits_of(gated, ids)
    with ap.open_gates(gated):
        inside = logits_of(gated, ids)
    assert torch.equal(logits_of(gated, ids), before)
    ap.detach(gated)
    torch.testing.assert_close(inside, logits_of(gated, ids))
    assert (inside - before).abs().max() > 0.01


def test_a_closed_head_outputs_nothing(gated, tokens):
    """Its rows of the output projection are set to zero instead."""
    ids = tokens(2, 16)
    width = gated.config.head_dim
    for outer in (ap.open_gates(gated), ap.close_heads(gated, [(2, 0)])):
        with outer:
            with ap.close_heads(gated, [(0, 1), (2, 3)]):
                closed = logits_of(gated, ids)
            intact = logits_of(gated, ids)
            weights = [(gated.model.layers[layer].self_attn.o_proj.weight, head) for layer, head in ((0, 1), (2, 3))]
            saved = [weight.detach().clone() for weight, _ in weights]
            with torch.no_grad():
                for weight, head in weights:
                    weight[:, head * width : (head + 1) * width] = 0
                torch.testing.assert_close(closed, logits_of(gated, ids), rtol=0, atol=1e-5)
                for (weight, _), whole in zip(weights, saved, strict=True):
                    weight.copy_(whole)
            assert torch.equal(logits_of(gated, ids), intact)
            assert (closed - intact).abs().max() > 1e-3
    torch.testing.assert_close(torch.stack([gate.bias for gate in gates_of(gated)]), BIAS, rtol=0, atol=0)


def test_a_closed_head_stays_closed_in_either_order(gated, tokens):
    """Dense attention too, which would not ask the gates, is without the head."""
    ids = tokens(2, 16)
    with ap.open_gates(gated), ap.close_heads(gated, [(0, 1)]):
        inner = logits_of(gated, ids)
    with ap.close_heads(gated, [(0, 1)]):
        gates_alone = logits_of(gated, ids)
        with ap.open_gates(gated):
            outer, mask = logits_of(gated, ids), ap.masks(gated, ids)[0].to_dense()
            for gate in gates_of(gated):
                gate.mask = KnownMask(None, torch.tensor(2 * 16 * 17 // 2), is_causal=True)
            plain = logits_of(gated, ids)
            for gate in gates_of(gated):
                gate.mask = None
        assert torch.equal(logits_of(gated, ids), gates_alone)
    assert torch.equal(inner, outer)
    torch.testing.assert_close(plain, outer)
    assert not mask[:, 1].any()
    assert mask[:, 0].sum() == 2 * 16 * 17 // 2
    assert not any(gate.closed or gate.forced_open for gate in gates_of(gated))


def test_closing_leaves_the_parameters_alone(gated):
    """Whoever saves or compares them inside the block finds the model as it is."""
    before = {name: value.clone() for name, value in gated.state_dict().items()}
    with ap.close_heads(gated, [(0, 1), (2, 3)]), ap.open_gates(gated):
        assert all(torch.equal(before[name], value) for name, value in gated.state_dict().items())


def test_what_was_changed_comes_back_after_an_error(gated, tokens):
    ids = tokens(1, 8)
    before = logits_of(gated, ids)
    with pytest.raises(ZeroDivisionError), ap.open_gates(gated), ap.close_heads(gated, [(0, 0)]):
        raise ZeroDivisionError
    assert torch.equal(logits_of(gated, ids), before)
    assert not any(gate.forced_open for gate in gates_of(gated))


def test_other_models_heads_and_ids_are_refused(gated, tiny_llama):
    dense = tiny_llama()
    for call in (lambda: ap.masks(dense, [1]), ap.open_gates(dense).__enter__, ap.close_heads(dense, []).__enter__):
        error = refused(call, "has no gates")
        assert "attach" in error.hint
    refused(ap.close_heads(gated, [(3, 0)]).__enter__, "layer 3 is not within 0 and 2")
    refused(ap.close_heads(gated, [(0, 4)]).__enter__, "head 4 is not within 0 and 3")
    refused(ap.close_heads(gated, [(0, -1)]).__enter__, "head -1")
    refused(ap.close_heads(gated, [(True, 1)]).__enter__, "(True, 1) is not (layer, head)")
    for pairs, part in (
        ([3], "3 is not (layer, head)"), (3, "3 is no list of"), ((1, 2), "1 is not (layer, head)"),
        ([(0, 1.5)], "(0, 1.5) is not"), (["01"], "'01' is not"), ([(0, 1, 2)], "(0, 1, 2) is not"),
    ):  # fmt: skip
        refused(ap.close_heads(gated, pairs).__enter__, part)
    refused(lambda: ap.masks(gated, []), "ids are token ids")
    refused(lambda: ap.masks(gated, torch.zeros(1, 2, 3).long()), "ids are token ids")
    refused(lambda: ap.masks(gated, torch.zeros(4)), "ids are token ids")
    refused(lambda: ap.masks(gated, "text"), "ids are token ids")
    refused(lambda: ap.masks(gated, [97]), "not within 0 and 96")
    refused(lambda: ap.masks(gated, [-1]), "not within 0 and 96")
    refused(lambda: ap.masks(gated, [1] * 65), "more than the model's context of 64")
