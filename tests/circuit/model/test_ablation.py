"""Runs that are made up: their streams are the sums of what their sources are said to write."""

import torch

from attnprune.circuit.model.ablation import ablated, rows_in_turn
from attnprune.circuit.model.activations import collect
from attnprune.circuit.model.patching import run_circuit
from tests.helpers.pairs import assert_close, dense_and_gated, every_family


@every_family
@dense_and_gated
def test_a_made_up_run_is_where_patching_starts_from(pair):
    """Any constant outputs: all edges give the model, none what the unembedding makes of their sum."""
    graph = pair.anatomy.graph
    outputs = 0.1 * torch.randn(graph.sources, pair.anatomy.width, generator=torch.Generator().manual_seed(0))
    run = ablated(pair.anatomy, pair.clean, outputs)
    constant = pair.clean.streams[-1] - pair.clean.outputs.sum(0)
    assert_close(run.streams[-1], outputs.sum(0) + constant, 1e-4)
    assert_close(run.streams[0], outputs[0].expand_as(run.streams[0]), 1e-4)
    made = pair.anatomy.model.get_output_embeddings()(pair.anatomy.final_norm(run.streams[-1]))
    cap = getattr(pair.anatomy.model.config, "final_logit_softcapping", None)
    assert_close(run.logits, made if cap is None else cap * torch.tanh(made / cap), 1e-4)
    assert_close(run_circuit(pair.anatomy, pair.clean, run, pair.every), pair.clean.logits)
    assert_close(run_circuit(pair.anatomy, pair.clean, run, pair.every & False), run.logits)
    assert (run.patterns is None) == (pair.clean.patterns is None)


@every_family
@dense_and_gated
def test_sources_that_write_what_they_wrote_change_nothing(pair):
    """One token alone: its own outputs at the only position there is."""
    ids = pair.clean.ids[:1, :1]
    one = collect(pair.anatomy, ids)
    again = ablated(pair.anatomy, one, one.outputs[:, 0, 0])
    assert_close(again.logits, one.logits)
    assert_close(again.streams, one.streams, 1e-4)
    if one.patterns is not None:
        assert_close(again.patterns, one.patterns)
        assert_close(again.values, one.values)


def test_prompts_take_their_runs_in_turn(pair_of):
    pair = pair_of("llama", True)
    mean, zero = (
        ablated(pair.anatomy, pair.clean, torch.full_like(pair.clean.outputs[:, 0, 0], x)) for x in (1.0, 0.0)
    )
    mixed = rows_in_turn([pair.corrupted, mean, zero])
    for row in range(len(pair.clean.ids)):
        run = (pair.corrupted, mean, zero)[row % 3]
        for name, axis in (("prompts", 0), ("logits", 0), ("outputs", 1), ("streams", 1), ("patterns", 1)):
            assert torch.equal(getattr(mixed, name).select(axis, row), getattr(run, name).select(axis, row))
    assert_close(run_circuit(pair.anatomy, pair.clean, mixed, pair.every & False), mixed.logits)
