"""Sizes, bands and deletion mean what they say; the cache keeps what was measured."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from attnprune.attention.interface import attach
from attnprune.circuit import controls
from attnprune.circuit.model.adapters import anatomy_of
from attnprune.circuit.model.graph import Graph
from attnprune.circuit.result import Evaluation, is_reached
from attnprune.circuit.search import deletion, splits
from attnprune.circuit.search.cache import Cache, check_same, digest
from attnprune.circuit.search.sizes import Sized, circuit_of_size, size_grid, stable
from attnprune.circuit.search.splits import (
    Settings,
    Split,
    _resampled,
    faithfulness_bounds,
    faithfulness_interval,
    ratio_of_means,
)
from attnprune.errors import InputError
from attnprune.sidecar import bases
from tests.helpers.circuits import NO_DELETION

# Parts


def points(*values: float) -> list[Sized]:
    return [Sized(torch.zeros(0), size, torch.zeros(0), value) for size, value in enumerate(values)]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((0.1, 0.95, 0.7, 0.92, 1.0), 3),  # the first one inside was luck
        ((0.95, 0.9, 1.1, 1.0), 0),
        ((0.95, 1.3, 1.0), 2),  # too much is not faithful either
        ((0.2, 0.5), 2),
    ],
)
def test_stable_means_all_larger_sizes_too(values, expected):
    assert stable(points(*values), NO_DELETION) == expected


def test_band_of_target_1_allows_rounding_only():
    settings = Settings(target=1.0)
    assert settings.in_band(1.00005)
    assert not settings.in_band(0.999)
    assert not settings.in_band(1.001)
    assert not settings.in_band(float("nan"))


def test_circuits_have_the_size_asked_for_after_pruning():
    graph = Graph(3, 4, 2)
    order = graph.mask().flatten().nonzero()[:, 0]
    order = order[torch.randperm(len(order), generator=torch.Generator().manual_seed(0))]
    sizes = []
    for size in size_grid(graph.edge_count, 8):
        found = circuit_of_size(graph, order, size)
        assert torch.equal(graph.prune(found), found)
        sizes.append(int(found.sum()))
        assert sizes[-1] <= size
    assert sizes == sorted(sizes)
    assert int(circuit_of_size(graph, order, graph.edge_count).sum()) == graph.edge_count
    assert int(circuit_of_size(graph, order, 0).sum()) == 0


def test_faithfulness_is_a_ratio_of_means():
    clean, corrupted, circuit = torch.tensor([1.0, 3.0]), torch.tensor([0.0, 0.0]), torch.tensor([1.0, 0.0])
    assert ratio_of_means(circuit, clean, corrupted) == 0.25
    assert ratio_of_means(circuit, clean, clean) == 0.0
    interval = faithfulness_interval(circuit, clean, corrupted, 0)
    assert (interval.low, interval.value, interval.high) == (0.0, 0.25, 1.0)


def measured(values):
    """Metrics (circuit, clean, corrupted) whose faithfulness per prompt is `values`, with gaps from 8 to 12."""
    values = torch.as_tensor(values, dtype=torch.double)
    clean = 5 + 2 * torch.linspace(0, 1, len(values)).double()
    return 2 * clean * values - clean, clean, -clean


def test_bounds_of_few_prompts_claim_little_and_of_many_are_percentiles():
    lower, upper = zip(
        *(faithfulness_bounds(*measured([1.0] * n), 0) for n in (1, 2, 4, 8, 16, 32, 64, 512)), strict=True
    )
    assert list(lower) == sorted(lower)
    assert list(upper) == sorted(upper, reverse=True)
    assert (lower[0], upper[0]) == (0.0, 2.0)
    assert lower[3] < 0.7 < 0.85 < lower[5] < lower[7] < 1
    values = 0.9 + 0.3 * torch.randn(512, generator=torch.Generator().manual_seed(0))
    metrics = measured(values)
    drawn = _resampled(*metrics, 1)
    assert faithfulness_bounds(*metrics, 0) == pytest.approx(
        drawn.quantile(torch.tensor([0.05, 0.95]).double()), abs=6e-3
    )


def test_more_prompts_make_success_easier_and_a_wrong_claim_never_likely():
    """Most prompts at 1, some failing: what a plain bootstrap of few prompts claims without ever having seen one."""
    generator = torch.Generator().manual_seed(0)

    def share_reached(failing, count):
        hits = 0
        for _ in range(60):
            values = torch.where(torch.rand(count, generator=generator) < failing, -0.3, 1.0)
            lower, upper = faithfulness_bounds(*measured(values), 0)
            hits += is_reached(NO_DELETION.band, 0.9, Evaluation(**EMPTY, lower=lower, upper=upper))
        return hits / 60

    true = [share_reached(0.01, count) for count in (2, 8, 32, 128)]
    assert true == sorted(true)
    assert true[0] == true[1] == 0
    assert true[-1] > 0.9
    assert max(share_reached(0.16, count) for count in (1, 4, 16, 64)) <= 0.1  # faithfulness 0.79


EMPTY = {
    "faithfulness": {"value": 0.9, "low": 0.9, "high": 0.9}, "metric": 1.0, "accuracy": 1.0, "kl": 0.0, "quartiles": [],
}  # fmt: skip


@pytest.mark.parametrize(
    ("validation", "lower", "upper", "expected"),
    [
        (0.9, 0.86, 0.97, True),
        (0.899, 0.86, 0.97, False),  # validation prompts chose it, so they must allow it
        (1.11, 0.95, 1.05, False),  # too much is not faithful either
        (0.9, 0.849, 0.97, False),
        (0.9, 0.65, 0.93, False),  # was "reached": a part of the interval lies in the band
        (0.9, 0.86, 1.16, False),
        (0.9, None, None, False),  # a record that does not say
        (math.nan, 0.86, 0.97, False),
    ],
)
def test_reached_means_shown(validation, lower, upper, expected):
    assert is_reached(NO_DELETION.band, validation, Evaluation(**EMPTY, lower=lower, upper=upper)) is expected


def test_kl_of_the_whole_model_is_0_and_of_nothing_is_not(addition):
    model, _, task, _ = addition
    split = Split(anatomy_of(model), task.test, "test", Cache(), 5)
    graph = split.anatomy.graph
    assert split.measure(graph.mask()).kl.max() < 1e-5
    assert split.measure(graph.mask() & False).kl.mean() > 1
    assert torch.allclose(split.measure(graph.mask()).metric, split.clean, atol=1e-4)
    assert len(split) == 12
    whole = Split(anatomy_of(model), task.test, "test", Cache(), 64)
    assert torch.allclose(whole.clean, split.clean, atol=1e-4)  # in the same order, whatever the batches


def test_a_hopeless_circuit_is_not_run_to_the_end(addition, monkeypatch):
    model, _, task, _ = addition
    split = Split(anatomy_of(model), task.test, "test", Cache(), 4)  # three runs
    every, ran = split.anatomy.graph.mask(), []
    measured = splits._measured
    monkeypatch.setattr(splits, "_measured", lambda *given: ran.append(1) or measured(*given))
    assert split.lost(every & False, 0.1) == math.inf
    assert len(ran) == 1
    assert split.lost(every, 0.1) < 1e-4
    assert len(ran) == 4
    some = circuit_of_size(split.anatomy.graph, every.flatten().nonzero()[:, 0], 400)
    assert split.lost(some, 2.0) == pytest.approx(abs(1 - split.faithfulness(some)))
    assert split.lost(some, 2.0) > 0.01


def test_gates_are_shuffled_and_put_back(addition):
    model = bases.load_base("demo").model
    gates = attach(model)
    for number, gate in enumerate(gates):
        gate.bias.data = torch.arange(4.0) + 4 * number
    with controls.shuffled_gates(anatomy_of(model), 0):
        mixed = torch.cat([gate.bias.detach() for gate in gates])
    assert sorted(mixed.tolist()) == list(map(float, range(16))) != mixed.tolist()
    assert torch.cat([gate.bias.detach() for gate in gates]).tolist() == list(map(float, range(16)))


def test_cache_survives_a_cut_line_and_refuses_a_damaged_one(tmp_path):
    cache = Cache(tmp_path)
    cache.numbers("a", lambda: [0.1])
    cache.numbers("b", lambda: [0.2])
    file = tmp_path / "evaluations.jsonl"
    text = file.read_text()
    file.write_text(text[:-4])
    again = Cache(tmp_path)
    assert again.numbers("a", lambda: [9.9]) == [0.1]
    assert again.numbers("b", lambda: [0.3]) == [0.3]
    assert Cache(tmp_path).numbers("b", lambda: [9.9]) == [0.3]
    file.write_text(text[:-1])  # a whole value without its line end: the next one must not be glued to it
    assert Cache(tmp_path).numbers("b", lambda: [0.4]) == [0.4]
    assert Cache(tmp_path).numbers("b", lambda: [9.9]) == [0.4]
    for damage in ("}", "5"):
        file.write_text(f"{damage}\n{text}")
        with pytest.raises(InputError, match="line 1 is damaged"):
            Cache(tmp_path)


@pytest.mark.parametrize("tail", [b"\0" * 600, b'["c"' + b"\0" * 600 + b"\n", b'["c", [0', b'{"c": 1}\n', b'["c"]\n'])
def test_cache_drops_what_a_power_loss_leaves(tmp_path, tail):
    Cache(tmp_path).numbers("a", lambda: [0.1])
    file = tmp_path / "evaluations.jsonl"
    file.write_bytes(file.read_bytes() + tail)
    again = Cache(tmp_path)
    assert again.numbers("c", lambda: [0.3]) == [0.3]
    assert Cache(tmp_path).numbers("a", lambda: [9.9]) == [0.1]
    assert Cache(tmp_path).numbers("c", lambda: [9.9]) == [0.3]


@pytest.mark.parametrize("damage", [b"", b"\0" * 200, b"\x10\0\0\0\0\0\0\0{}"])
def test_tensors_that_a_power_loss_cut_short_are_computed_again(tmp_path, damage):
    Cache(tmp_path).tensors("scores a", lambda: {"x": torch.ones(3)})
    (file,) = (tmp_path / "scores").iterdir()
    file.write_bytes(damage)
    assert Cache(tmp_path).tensors("scores a", lambda: {"x": torch.zeros(3)})["x"].tolist() == [0, 0, 0]
    assert Cache(tmp_path).tensors("scores a", lambda: {"x": torch.ones(3)})["x"].tolist() == [0, 0, 0]
    assert list((tmp_path / "scores").iterdir()) == [file]


class ConstantSplit:
    """A split on which every circuit has one faithfulness."""

    def __init__(self, anatomy, faithfulness):
        self.units, self._faithfulness, self.evaluated = anatomy.graph, faithfulness, 0

    def faithfulness(self, edges):
        self.evaluated += 1
        return self._faithfulness

    def lost(self, edges, most):
        return abs(1 - self.faithfulness(edges))


@pytest.mark.parametrize("faithfulness", [1.08, 0.92])
def test_deletion_begins_from_either_side_of_the_model(monkeypatch, faithfulness):
    graph = Graph(layers=2, heads=2, kv_heads=2, parallel=False)
    split = ConstantSplit(SimpleNamespace(graph=graph), faithfulness)
    monkeypatch.setattr(deletion, "_weakest_first", lambda _, circuit: circuit.flatten().nonzero()[:, 0])
    path = deletion.delete_units(split, graph.mask(), Settings(deletions=40), lambda *told: None)
    assert split.evaluated <= 9  # the first look, then one for each of the eight blocks: nothing is refused
    assert not path[-1].any()


def test_nothing_is_deleted_from_a_hopeless_circuit(monkeypatch):
    graph = Graph(layers=2, heads=2, kv_heads=2, parallel=False)
    split = ConstantSplit(SimpleNamespace(graph=graph), 0.44)
    path = deletion.delete_units(split, graph.mask(), Settings(deletions=40), lambda *told: None)
    assert split.evaluated == 1
    assert [int(circuit.sum()) for circuit in path] == [graph.edge_count]


def test_cache_keeps_tensors_and_notices_another_model(tmp_path):
    made = {"x": torch.rand(3)}
    Cache(tmp_path).tensors("one / two 3", lambda: made)
    assert torch.equal(Cache(tmp_path).tensors("one / two 3", dict)["x"], made["x"])
    cache = Cache()
    check_same(cache, "scores", torch.tensor([1.0, 2.0]))
    check_same(cache, "scores", torch.tensor([1.0, 2.0001]))
    with pytest.raises(InputError):
        check_same(cache, "scores", torch.tensor([1.0, 2.1]))
    assert digest(torch.tensor([True])) != digest(torch.tensor([False]))
