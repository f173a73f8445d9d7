"""The frontier of a run: which sidecar lies at which density, and at what loss. No torch.

OUT/frontier.json lists them, sparsest last; OUT itself is the last one, and the others lie in OUT/frontier/.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from attnprune.errors import InputError
from attnprune.files import write_atomic

FRONTIER_FILE = "frontier.json"
FRONTIER_FOLDER = "frontier"
MAX_BYTES = 1 << 20

Number = Annotated[float, Field(allow_inf_nan=False)]


class Point(BaseModel):
    """One sidecar of a frontier, measured on the run's held-out text. Losses and kl in nats per token.

    `limit` is the density that the state was to stay within, `density` what it has. `folder` is relative to OUT.
    """

    model_config = ConfigDict(frozen=True, strict=True)

    folder: str
    limit: Number
    density: Number
    edges_per_query: Number
    kl: Number
    loss: Number
    base_loss: Number
    control_loss: Number | None
    feasible: bool
    seq_len: int

    @property
    def gap(self) -> float:
        """loss - base loss."""
        return self.loss - self.base_loss


_Points = TypeAdapter(list[Point])


def point_folder(density: float) -> str:
    """Where the sidecar for a density of the frontier lies, relative to OUT; named by the percentage."""
    return f"{FRONTIER_FOLDER}/{100 * density:.6g}"


def write_frontier(folder: Path, points: list[Point]) -> None:
    """Write OUT/frontier.json."""
    text = json.dumps([point.model_dump() for point in points], indent=1) + "\n"
    write_atomic(folder / FRONTIER_FILE, text)


def read_frontier(sidecar: Path) -> tuple[list[Point], int] | None:
    """(the frontier that a sidecar's folder belongs to, its own place there); None if there is none.

    Raises:
        InputError: frontier.json is not one.
    """
    for folder in (sidecar, sidecar.parent.parent):
        file = folder / FRONTIER_FILE
        if not file.is_file():
            continue
        try:
            with file.open("rb") as stream:
                points = _Points.validate_json(stream.read(MAX_BYTES), strict=True)
        except (OSError, ValidationError):
            raise InputError(f"{file}: is damaged", hint="delete it to see the sidecar alone") from None
        for place, point in enumerate(points):
            if (folder / point.folder).resolve() == sidecar.resolve():
                return points, place
    return None
