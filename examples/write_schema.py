"""Write the JSON Schemas in formats/ from the pydantic models: python examples/write_schema.py"""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel

from attnprune.bench.record import Record
from attnprune.circuit.explained import ExplainedEdge
from attnprune.circuit.given import GivenCircuit, GivenCircuits
from attnprune.circuit.result import CircuitResult
from attnprune.heads import pieces
from attnprune.heads.result import Atlas
from attnprune.sidecar.damage import Damage
from attnprune.sidecar.format import AdapterConfig, Manifest
from attnprune.tracing.result import Trace

FORMATS = Path(__file__).parent.parent / "formats"
SCHEMAS = {
    "attnprune.v1.schema.json": Manifest, "adapter_config.v1.schema.json": AdapterConfig,
    "attnprune-bench-1.schema.json": Record, "attnprune-circuit-2.schema.json": CircuitResult,
    "attnprune-given-circuit-1.schema.json": GivenCircuit,
    "attnprune-given-circuits-1.schema.json": GivenCircuits, "attnprune-explained-edge-1.schema.json": ExplainedEdge,
    "attnprune-damage-1.schema.json": Damage,
    "attnprune-trace-1.schema.json": Trace, "attnprune-atlas-1.schema.json": Atlas,
    "attnprune-index-1.schema.json": pieces.Record,
}  # fmt: skip


def schema_text(model: type[BaseModel]) -> str:
    """The JSON Schema of a file, canonical."""
    return json.dumps(model.model_json_schema(), indent=2, sort_keys=True) + "\n"


if __name__ == "__main__":
    for name, model in SCHEMAS.items():
        (FORMATS / name).write_text(schema_text(model), encoding="utf-8")
