"""What every record of circuits is made of: strict models, numbers that may be missing, intervals. No torch."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[float | None, BeforeValidator(_finite)]
"""What was measured in a circuit or a model that may be broken; null where it is no finite number."""


class Strict(BaseModel):
    """Nothing but its fields, and no number that JSON cannot hold."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Interval(Strict):
    """A number and its 95 % bootstrap interval over prompts."""

    value: float
    low: float
    high: float
