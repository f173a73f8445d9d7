"""Judge the circuits of a record again on its test prompts: python examples/judge_circuits.py DIR MODEL [AGAINST]

For records whose first version did not hold the metric of every test prompt, nor bounds from it. The circuits, sizes
and controls stay as the search found them; their edges are read from the record, run on the same prompts (the
fingerprint says so), and the numbers called `test`, with the verdict and the comparison's, are written anew.
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnprune.circuit.analysis import evaluation
from attnprune.circuit.compare import parity
from attnprune.circuit.folder import COMPRESSED_FILE, RECORD_FILE, read_record
from attnprune.circuit.model.adapters import anatomy_of
from attnprune.circuit.model.graph import Graph
from attnprune.circuit.result import FIRST_NOTE, CircuitResult, ModelCircuit, is_reached
from attnprune.circuit.run import MASK_PROMPTS
from attnprune.circuit.search.cache import Cache
from attnprune.circuit.search.splits import Split, pattern_visible
from attnprune.circuit.tasks import Task, load_task
from attnprune.errors import InputError
from attnprune.files import write_atomic
from attnprune.sidecar.models import by_name

TOLERANCE = 2e-3  # of the faithfulness: what another machine's rounding may change


def edges_of(graph: Graph, model: ModelCircuit) -> Tensor:
    """The circuit of a record, bool [U, V]."""
    kept = torch.zeros(graph.sources, graph.destinations, dtype=torch.bool)
    for edge in model.edges:
        kept[graph.edge(edge.name)] = True
    return kept


def judge(found: ModelCircuit, model: Any, task: Task, result: CircuitResult) -> ModelCircuit:
    """A model's part of a record with its circuit evaluated again.

    Raises:
        InputError: its faithfulness on test prompts is another one: not the model, or not the circuit.
    """
    anatomy = anatomy_of(model)
    with pattern_visible(anatomy):
        split = Split(anatomy, task.test, "test", Cache(), 32)
        test = evaluation(split, edges_of(anatomy.graph, found), result.task.seed)
    before, now = found.test.faithfulness.value, test.faithfulness.value
    if not abs(before - now) <= TOLERANCE:
        raise InputError(f"{found.name}: faithfulness {now:.4f} on test prompts, the record says {before:.4f}")
    reached = is_reached(result.method.band, found.validation_faithfulness, test, result.method.margin)
    return found.model_copy(update={"test": test, "reached": reached})


def judged(result: CircuitResult, names: list[str], base: str | None) -> CircuitResult:
    """A record judged again; `names` are where its models lie here."""
    facts, models = result.task, []
    for found, name in zip(result.models, names, strict=True):
        _, model, tokenizer, *_ = by_name(name, base, "cpu")
        more = MASK_PROMPTS if facts.more else 0
        task = load_task(facts.name, tokenizer, count=facts.test, more=more, seed=facts.seed)
        if task.fingerprint != facts.fingerprint:
            raise InputError(f"{facts.name}: other prompts than the record's")
        models.append(judge(found, model, task, result))
        facts = facts.model_copy(update={"chance": task.chance})
    compare = result.compare
    if compare is not None:
        reasons = parity(*models)
        compare = compare.model_copy(update={"comparable": not reasons, "reasons": reasons})
    notes = [note for note in result.notes if note != FIRST_NOTE]
    return result.model_copy(update={"task": facts, "models": models, "compare": compare, "notes": notes})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--base")
    options = parser.parse_args()
    raw = judged(read_record(options.folder), options.models, options.base).model_dump_json(indent=1).encode() + b"\n"
    compressed = not (options.folder / RECORD_FILE).exists()
    name = COMPRESSED_FILE if compressed else RECORD_FILE
    write_atomic(options.folder / name, gzip.compress(raw, mtime=0) if compressed else raw)
