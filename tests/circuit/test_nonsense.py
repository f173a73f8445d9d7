"""The nonsense control fails on planted circuits, and a circuit that is not clearly below it says so everywhere."""

from __future__ import annotations

import pytest
import torch

from attnprune.circuit import analysis, nonsense
from attnprune.circuit.analysis import analyse
from attnprune.circuit.compare import parity, result_of, task_facts
from attnprune.circuit.model.adapters import anatomy_of
from attnprune.circuit.planted import plant
from attnprune.circuit.result import NOT_CLEAR, doubts
from attnprune.circuit.search.cache import Cache
from attnprune.circuit.search.splits import QUICK, Settings
from attnprune.circuit.search.subject import Subject
from attnprune.circuit.worth import KINDS, SHARES
from attnprune.report import circuits
from attnprune.report.circuit_page import render_page
from attnprune.sidecar import bases
from tests.helpers.circuits import planted_task, silent


def searched(monkeypatch, family, gated, **settings):
    monkeypatch.setattr(analysis, "check_ability", lambda *_: None)  # the metric of random prompts may be below 0
    planted = plant(family, gated=gated, seed=1)
    task = planted_task(planted, 24)
    options = Settings(**{"target": 0.99, "mask_steps": 20, "deletions": 60, "draws": 1, "control_sizes": 2} | settings)
    found = analyse(
        planted.model, "planted", task, options, with_controls=True, label="model", watch=silent, cache=Cache()
    )
    return planted, task, options, found


@pytest.mark.parametrize(("family", "gated"), [("llama", False), ("llama", True), ("gpt2", True)])
def test_it_fails_on_planted_circuits(family, gated, monkeypatch):
    planted, *_, found = searched(monkeypatch, family, gated)
    control = found.model.controls.nonsense
    assert torch.equal(found.edges, planted.edges)
    assert control.edges is None
    assert max(control.train, control.validation, control.test) < 0.5
    assert control.upper < found.model.test.lower
    assert control.clear
    assert NOT_CLEAR not in doubts(found.model)


def test_a_planted_circuit_holds_with_any_share_corrupted_and_says_where_it_does_not(monkeypatch):
    """Zero ablation takes the constant away that keeps the norms almost linear; nothing but that shows."""
    *_, found = searched(monkeypatch, "llama", True, **QUICK)
    stress = found.model.controls.stress
    assert [(t.ablation, t.share) for t in stress.trials] == [(k, s) for k in KINDS for s in SHARES]
    for trial in stress.trials:
        assert trial.low <= trial.faithfulness <= trial.high
        if trial.ablation != "zero":
            assert trial.faithfulness == pytest.approx(1, abs=0.01)
    everything = next(t for t in stress.trials if (t.ablation, t.share) == ("corrupt", 1))
    assert everything.faithfulness == pytest.approx(found.model.test.faithfulness.value)
    assert not stress.holds
    assert stress.worst_trial.ablation == "zero"
    assert any(
        "does not hold under every ablation" in doubt and "zero ablation" in doubt for doubt in doubts(found.model)
    )


def test_a_circuit_no_smaller_than_that_of_nonsense_says_so_everywhere(monkeypatch):
    """With the true answers for nonsense the control finds what the search found."""
    monkeypatch.setattr(nonsense, "nonsense_task", lambda task, seed: task)
    _, task, settings, found = searched(monkeypatch, "llama", False, mask_steps=0, deletions=0)
    control = found.model.controls.nonsense
    assert control.edges is not None
    assert control.edges < 2 * found.model.counts.edges
    assert not control.clear
    facts = task_facts(task, bases.load_base("demo").tokenizer, 0)
    result = result_of([found], facts, settings, command="test", quick=True, seconds=1.0, notes=[])
    assert NOT_CLEAR in repr(result)
    assert NOT_CLEAR in circuits.verdict(found.model, result)
    assert NOT_CLEAR in render_page(result)
    assert f"planted: its circuit is {NOT_CLEAR}" in parity(found.model, found.model)


def test_mean_ablation_finds_planted_edges_alone(monkeypatch):
    planted, *_, found = searched(monkeypatch, "llama", True, **QUICK | {"ablate": "mean"})
    assert found.edges.any()
    assert not (found.edges & ~planted.edges).any()  # an edge whose mean says nearly as much may be missing
    assert found.model.validation_faithfulness == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("ablate", [*KINDS, "mixed"])
def test_faithfulness_counts_from_the_model_without_edges_to_the_model(ablate):
    planted = plant("gpt2", gated=True)
    anatomy = anatomy_of(planted.model)
    subject = Subject(anatomy, planted_task(planted, 6), "model", Settings(ablate=ablate), silent, Cache())
    test = subject.split("test")
    assert test.faithfulness(anatomy.graph.mask()) == pytest.approx(1, abs=1e-4)
    assert test.faithfulness(anatomy.graph.mask() & False) == pytest.approx(0, abs=1e-4)
    means = {kind: subject.split("test", ablate=kind).corrupted for kind in KINDS}
    wanted = [means[ablate if ablate != "mixed" else KINDS[row % 3]][row] for row in range(6)]
    torch.testing.assert_close(test.corrupted, torch.stack(wanted), rtol=1e-4, atol=1e-4)
