"""Somebody else's circuit: what it computes exactly, beside random circuits of its size and other ablations."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from attnprune.circuit import controls
from attnprune.circuit.analysis import evaluation
from attnprune.circuit.mib import NAMES, areas, read_submission
from attnprune.circuit.model.adapters import anatomy_of
from attnprune.circuit.model.patching import self_check
from attnprune.circuit.record import Number, Strict
from attnprune.circuit.result import Evaluation
from attnprune.circuit.search.cache import Cache
from attnprune.circuit.search.splits import Settings, Split, Watch, pattern_visible
from attnprune.circuit.search.subject import Subject
from attnprune.circuit.tasks import Task, accuracy, check_ability
from attnprune.circuit.worth import Ablation, RandomCircuits, Stress

SCHEMA, SEVERAL = "attnprune-given-circuit-1", "attnprune-given-circuits-1"


class Given(Strict):
    """What was given, and on which prompts it was run: the test prompts of a task."""

    model: str
    task: str
    fingerprint: str = Field(description="of the prompts, as in the record of a search")
    file: str
    ablation: Ablation
    of: int = Field(description="edges of the model")
    prompts: int
    accuracy: float = Field(description="of the model")
    notes: list[str] = Field(default=[], description="what a reader has to know of the prompts")


class Sized(Strict):
    """A circuit, and random ones of its size."""

    given: int = Field(description="edges that are in_graph, heads that share a key or value counted once")
    edges: int = Field(description="without those that change nothing")
    test: Evaluation
    random: RandomCircuits


class GivenCircuit(Given, Sized):
    """A circuit from a file on the test prompts of a task. It was not searched here, so no target is judged."""

    schema_id: Literal["attnprune-given-circuit-1"] = SCHEMA
    heads: int
    mlps: int
    complement: Number = Field(description="faithfulness of all other edges")
    stress: Stress


class NamedCircuit(Sized):
    """One circuit of a submission."""

    name: str = Field(description="its share of the edges, or its file")


class GivenCircuits(Given):
    """The circuits of a submission to MIB on the test prompts of a task: one for each size or file."""

    schema_id: Literal["attnprune-given-circuits-1"] = SEVERAL
    circuits: list[NamedCircuit]
    cpr: Number | None = Field(
        default=None, description="MIB's circuit performance ratio: area under the faithfulness over the share of the "
        "edges, from 0.1 to 100 %; null: not one circuit for each of the benchmark's sizes",
    )  # fmt: skip
    cmd: Number | None = Field(default=None, description="MIB's circuit-model distance: the area of |1 - faithfulness|")


def evaluate_given(
    model: Any, name: str, task: Task, file: Path, settings: Settings, watch: Watch
) -> GivenCircuit | GivenCircuits:
    """Evaluate the circuit in an EAP-IG file, or those of a submission to MIB.

    Raises:
        InputError: as `mib.read_submission`.
        AttnPruneError: the model cannot do the task.
        UnsupportedModelError, SelfCheckError: as `analysis.analyse`.
    """
    anatomy = anatomy_of(model)
    graph = anatomy.graph
    given = read_submission(file, graph)
    subject = Subject(anatomy, task, "circuit", settings, watch, Cache())
    with pattern_visible(anatomy):
        test = subject.split("test")
        subject.told("test prompts", 0, 1)
        check_ability(f"{name}: {task.name}", task.metric, test.clean, test.corrupted, task.chance)
        plain = subject.split("test", ablate="corrupt").groups[0]
        self_check(anatomy, plain.clean, plain.corrupted)
        said: dict[str, Any] = {
            "model": name, "task": task.name, "fingerprint": task.fingerprint, "file": str(file),
            "ablation": settings.ablate, "of": graph.edge_count, "prompts": len(test), "accuracy": accuracy(test.clean),
            "notes": list(task.notes),
        }  # fmt: skip
        if len(given) > 1:
            circuits = [NamedCircuit(name=one.name, **_sized(subject, test, one.kept)) for one in given]
            return GivenCircuits(**said, circuits=circuits, **_areas(circuits))
        kept = graph.prune(given[0].kept)
        heads, mlps = graph.touched(kept)
        return GivenCircuit(
            **said, **_sized(subject, test, given[0].kept), heads=int(heads.sum()), mlps=int(mlps.sum()),
            complement=test.faithfulness(graph.mask() & ~kept), stress=controls.stress(subject, kept),
        )  # fmt: skip


def _areas(circuits: list[NamedCircuit]) -> dict[str, Any]:
    """MIB's areas, where there is a circuit of each of its sizes."""
    if tuple(one.name for one in circuits) != NAMES:
        return {}
    cpr, cmd = areas([one.test.faithfulness.value for one in circuits])
    return {"cpr": cpr, "cmd": cmd}


def _sized(subject: Subject, test: Split, given: Tensor) -> dict[str, Any]:
    """What `Sized` says of a circuit, bool [U, V]."""
    kept, settings = subject.anatomy.graph.prune(given), subject.settings
    size = int(kept.sum())
    random = controls.random_circuits(test, size, settings.draws, settings.seed, subject.told)
    return {"given": int(given.sum()), "edges": size, "test": evaluation(test, kept, settings.seed), "random": random}
