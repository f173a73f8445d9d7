"""What every record of circuits is made of: strict models, numbers that may be missing, intervals. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[float | None, BeforeValidator(_finite)]
"""What was measured in a circuit or a model that may be broken; null where it is no finite number."""


SHORT, FEW = 100, 8  # characters and items of a field in a repr


class _Said(str):
    """Stands for a value in a repr."""

    __slots__ = ()
    __repr__ = str.__str__


def _shortened(value: Any) -> Any:
    """A value, or where it is long what it is."""
    if isinstance(value, (list, dict)) and (len(value) > FEW or len(repr(value)) > SHORT):
        return _Said(f"<{len(value)} items>")
    said = repr(value)
    return value if len(said) <= SHORT else _Said(f"{said[:SHORT]}…")


class Strict(BaseModel):
    """Nothing but its fields, and no number that JSON cannot hold. Its repr is short, `model_dump()` is all of it."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        return ((name, _shortened(value)) for name, value in super().__repr_args__())


class Interval(Strict):
    """A number and its 95 % bootstrap interval over prompts."""

    value: float
    low: float
    high: float


class Writer(Strict):
    """What a head, an MLP or the input adds to a score; the score without it (null: not removed), and the gate."""

    source: str
    value: float
    without: float | None
    open_without: bool | None


class Opening(Strict):
    """Why an attention edge is open: its score as a sum over what was written into its query and into its key."""

    score: float
    bias: float | None = Field(description="of the gate, which is open if score + bias > 0; null: a dense model")
    is_open: bool
    by_query: list[Writer] = Field(description="largest first; they and query_remainder add up to the score")
    by_key: list[Writer]
    query_remainder: float
    key_remainder: float
