"""Somebody else's circuit: what it computes exactly, beside random circuits of its size and other ablations."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from attnprune.circuit import controls
from attnprune.circuit.analysis import evaluation
from attnprune.circuit.exchange import read_edges
from attnprune.circuit.model.adapters import anatomy_of
from attnprune.circuit.model.patching import self_check
from attnprune.circuit.record import Number, Strict
from attnprune.circuit.result import Evaluation
from attnprune.circuit.search.cache import Cache
from attnprune.circuit.search.splits import Settings, Watch, pattern_visible
from attnprune.circuit.search.subject import Subject
from attnprune.circuit.tasks import Task, accuracy, check_ability
from attnprune.circuit.worth import Ablation, RandomCircuits, Stress

SCHEMA = "attnprune-given-circuit-1"


class GivenCircuit(Strict):
    """A circuit from a file on the test prompts of a task. It was not searched here, so no target is judged."""

    schema_id: Literal["attnprune-given-circuit-1"] = SCHEMA
    model: str
    task: str
    fingerprint: str = Field(description="of the prompts, as in the record of a search")
    file: str
    ablation: Ablation
    given: int = Field(description="edges in the file that are in_graph, heads that share a key or value counted once")
    edges: int = Field(description="without those that change nothing")
    of: int = Field(description="edges of the model")
    heads: int
    mlps: int
    prompts: int
    accuracy: float = Field(description="of the model")
    test: Evaluation
    complement: Number = Field(description="faithfulness of all other edges")
    random: RandomCircuits
    stress: Stress
    notes: list[str] = Field(default=[], description="what a reader has to know of the prompts")


def evaluate_given(model: Any, name: str, task: Task, file: Path, settings: Settings, watch: Watch) -> GivenCircuit:
    """Evaluate the circuit in an EAP-IG file.

    Raises:
        InputError: as `exchange.read_edges`.
        AttnPruneError: the model cannot do the task.
        UnsupportedModelError, SelfCheckError: as `analysis.analyse`.
    """
    anatomy = anatomy_of(model)
    graph = anatomy.graph
    given = read_edges(file, graph)
    kept = graph.prune(given)
    subject = Subject(anatomy, task, "circuit", settings, watch, Cache())
    with pattern_visible(anatomy):
        test = subject.split("test")
        subject.told("test prompts", 0, 1)
        check_ability(f"{name}: {task.name}", task.metric, test.clean, test.corrupted, task.chance)
        plain = subject.split("test", ablate="corrupt").groups[0]
        self_check(anatomy, plain.clean, plain.corrupted)
        heads, mlps = graph.touched(kept)
        return GivenCircuit(
            model=name, task=task.name, fingerprint=task.fingerprint, file=str(file), ablation=settings.ablate,
            given=int(given.sum()), edges=int(kept.sum()), of=graph.edge_count, heads=int(heads.sum()),
            mlps=int(mlps.sum()), prompts=len(test), accuracy=accuracy(test.clean),
            test=evaluation(test, kept, settings.seed), complement=test.faithfulness(graph.mask() & ~kept),
            random=controls.random_circuits(test, int(kept.sum()), settings.draws, settings.seed, subject.told),
            stress=controls.stress(subject, kept), notes=list(task.notes),
        )  # fmt: skip
