"""A record's circuits are judged again on its own prompts; another circuit or other prompts are refused."""

from __future__ import annotations

import pytest

from attnprune.circuit.compare import task_facts
from attnprune.circuit.model.graph import Graph
from attnprune.circuit.result import FIRST_NOTE
from attnprune.circuit.tasks import load_task
from attnprune.errors import InputError
from attnprune.sidecar import bases
from examples.judge_circuits import judged
from tests.helpers.pages import circuit_result, model_circuit


@pytest.fixture(scope="module")
def record():
    """The bundled model as its own circuit, without bounds."""
    model = model_circuit(Graph(4, 4, 4), 479, "demo", "dense", seed=1)
    assert len(model["edges"]) == 479
    model["validation_faithfulness"] = model["test"]["faithfulness"]["value"] = 1.0
    del model["test"]["lower"], model["test"]["upper"]
    tokenizer = bases.load_base("demo").tokenizer
    facts = task_facts(load_task("addition", tokenizer, count=24, seed=3), tokenizer, 3)
    found = circuit_result(model)
    return found.model_copy(update={"task": facts.model_copy(update={"chance": None}), "notes": [FIRST_NOTE]})


def test_a_record_is_judged_again(record):
    found = judged(record, ["demo"], None)
    (model,) = found.models
    assert model.reached
    assert len(model.test.each) == found.task.test == 24
    assert model.test.lower == pytest.approx(22 / 25, abs=0.01)  # of 24 prompts at 1 and one at 0, the latter thrice
    assert (found.task.chance, found.notes) == (0.5, [])
    assert model.model_copy(update={"test": None, "reached": None}) == record.models[0].model_copy(
        update={"test": None, "reached": None}
    )


def test_another_circuit_and_other_prompts_are_refused(record):
    (model,) = record.models
    fewer = record.model_copy(update={"models": [model.model_copy(update={"edges": model.edges[:20]})]})
    with pytest.raises(InputError, match="on test prompts, the record says 1"):
        judged(fewer, ["demo"], None)
    other = record.model_copy(update={"task": record.task.model_copy(update={"seed": 4})})
    with pytest.raises(InputError, match="addition: other prompts than the record's"):
        judged(other, ["demo"], None)
