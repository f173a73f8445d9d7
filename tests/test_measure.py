"""Loss, KL, control, density and gate statistics against brute force."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch.nn import functional

from attnprune.attention.interface import attach, gates_forced_open, gates_of
from attnprune.data.blocks import IGNORED_LABEL, Blocks
from attnprune.measure import gate_statistics, measure, offset_edges
from attnprune.sidecar.bases import dense


@pytest.fixture
def case(tiny_llama, tokens):
    base = tiny_llama()
    sparse = copy.deepcopy(base)
    attach(sparse, bias=0.3)
    ids = tokens(5, 12)
    return base, sparse, Blocks(ids, ids.clone(), "random")


@torch.no_grad()
def patterns(model, ids):
    return torch.stack(model(input_ids=ids, output_attentions=True, use_cache=False).attentions)  # [L, B, H, T, T]


def test_report_equals_brute_force(case):
    base, sparse, blocks = case
    report = measure(sparse, blocks, reference=dense(base), control=True, batch_size=2)
    ids = blocks.input_ids
    with torch.no_grad():
        logits, base_logits = sparse(input_ids=ids).logits[:, :-1], base(input_ids=ids).logits[:, :-1]
        with gates_forced_open(sparse):
            open_logits = sparse(input_ids=ids).logits[:, :-1]
    targets = ids[:, 1:].flatten()
    for value, scores in ((report.loss, logits), (report.base_loss, base_logits), (report.control_loss, open_logits)):
        assert value == pytest.approx(functional.cross_entropy(scores.flatten(0, 1), targets).item(), abs=1e-5)
    p, q = base_logits.log_softmax(-1), logits.log_softmax(-1)
    assert report.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), abs=1e-5)
    open_edges = int((patterns(sparse, ids) > 0).sum())
    assert report.open_edges == open_edges
    assert report.visible_edges == 3 * 4 * 5 * 12 * 13 // 2
    assert report.density == open_edges / report.visible_edges
    assert report.edges_per_query == open_edges / (3 * 4 * 5 * 12)
    assert report.control_loss == pytest.approx(report.base_loss, abs=1e-5)
    assert 0 < report.density < 1


def test_batch_size_does_not_change_counts(case):
    _, sparse, blocks = case
    counts = {measure(sparse, blocks, batch_size=size).open_edges for size in (1, 2, 5)}
    assert len(counts) == 1


def test_labels_choose_what_counts(case):
    _, sparse, blocks = case
    labels = blocks.labels.clone()
    labels[:, :-2] = IGNORED_LABEL
    few = measure(sparse, Blocks(blocks.input_ids, labels, "few"))
    with torch.no_grad():
        logits = sparse(input_ids=blocks.input_ids).logits[:, -3:-1]
    expected = functional.cross_entropy(logits.flatten(0, 1), blocks.input_ids[:, -2:].flatten())
    assert few.tokens == 10
    assert few.loss == pytest.approx(expected.item(), abs=1e-5)


def test_exact_match_counts_rows_that_are_all_right(case):
    base, _, blocks = case
    with torch.no_grad():
        best = base(input_ids=blocks.input_ids).logits.argmax(-1)
    labels = torch.full_like(blocks.input_ids, IGNORED_LABEL)
    labels[:, 4:6] = best[:, 3:5]
    assert measure(base, Blocks(blocks.input_ids, labels, "right")).exact_match == 1.0
    labels[0, 5] = (labels[0, 5] + 1) % 97
    assert measure(base, Blocks(blocks.input_ids, labels, "one wrong")).exact_match == 0.8


def test_statistics_equal_brute_force(case):
    _, sparse, blocks = case
    statistics = gate_statistics(sparse, blocks)
    is_open = patterns(sparse, blocks.input_ids) > 0
    edges = offset_edges(12).tolist()
    assert edges == statistics.offset_edges.tolist() == [0, 1, 2, 4, 8, 12]
    distance = torch.arange(12)[:, None] - torch.arange(12)
    for layer in range(3):
        opened = is_open[layer].sum(0)  # [H, T, T]
        torch.testing.assert_close(statistics.density[layer], opened.sum((1, 2)) / (5 * 78))
        torch.testing.assert_close(statistics.sink[layer], opened[..., 0].sum(1) / opened.sum((1, 2)))
        for bucket, (low, high) in enumerate(pairwise(edges)):
            inside = (distance >= low) & (distance < high)
            expected = (opened * inside).sum((1, 2)) / (5 * inside.sum())
            torch.testing.assert_close(statistics.open_by_offset[layer][:, bucket], expected)
    assert all(gate.on_chunk is None for gate in gates_of(sparse))
