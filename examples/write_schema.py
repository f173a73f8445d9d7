"""Write formats/attnprune.v1.schema.json from the pydantic models: python examples/write_schema.py"""

from __future__ import annotations

import json
from pathlib import Path

from attnprune.format import Manifest

SCHEMA_FILE = Path(__file__).parent.parent / "formats" / "attnprune.v1.schema.json"


def schema_text() -> str:
    """The JSON Schema of attnprune.json, canonical."""
    return json.dumps(Manifest.model_json_schema(), indent=2, sort_keys=True) + "\n"


if __name__ == "__main__":
    SCHEMA_FILE.write_text(schema_text(), encoding="utf-8")
