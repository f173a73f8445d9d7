"""What a benchmark writes: one JSON record with the machine, the versions and a row per measurement. No torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from attnprune.errors import first_line

SCHEMA = "attnprune-bench-1"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Machine(_Strict):
    """Where the numbers come from."""

    device: str = Field(description="name of the GPU or of the processor architecture")
    cores: int = Field(description="processor cores of the machine")
    threads: int = Field(description="threads that PyTorch used")
    versions: dict[str, str]
    commit: str | None = Field(description="git commit of the checkout; null outside of one")


class Timing(_Strict):
    """Wall-clock milliseconds over `repeats` runs: the median and the 20 % and 80 % quantiles."""

    median_ms: float
    low_ms: float
    high_ms: float
    repeats: int


class Row(_Strict):
    """One implementation in one configuration."""

    suite: Literal["train", "prefill", "decode", "train step", "generate", "step"]
    provider: str
    configuration: str = Field(description="the same for rows that were measured side by side")
    status: Literal["ok", "wrong", "could not run"]
    note: str = Field(default="", description="why it could not run, or what was found wrong")
    density: float | None = Field(default=None, description="open / visible edges, as measured (gated providers)")
    error: float | None = Field(
        default=None, description="largest relative error of output and gradients against the fp64 definition"
    )
    timing: Timing | None = None
    peak_bytes: int | None = Field(default=None, description="memory above what the inputs took")
    tokens_per_second: float | None = None
    ps_per_score: float | None = Field(default=None, description="picoseconds per visible (query, key, head)")
    ratio_to_sdpa: float | None = Field(
        default=None, description="time of the fastest SDPA / time of this; > 1: faster"
    )
    ratio_to_eager: float | None = Field(default=None, description="time of eager / time of this")
    ratio_to_trainer: float | None = Field(default=None, description="time of transformers' Trainer / time of this")
    operators: int | None = Field(default=None, description="operators that the host dispatched in one step")
    waits: int | None = Field(default=None, description="times that the host waited for the device in one step")
    kernels: int | None = Field(default=None, description="kernels that the device ran in one step (CUDA)")
    launches: int | None = Field(default=None, description="launches of kernels and graphs in one step (CUDA)")
    matmul_flops: int | None = Field(default=None, description="of the matrix products of one step, attention left out")
    matmul_share: float | None = Field(
        default=None, description="time of these products alone on this device / time of the step"
    )
    floor_share: float | None = Field(default=None, description="issue limit of the kernel / time of this, on an H100")


class Record(_Strict):
    """A benchmark run."""

    schema_id: Literal["attnprune-bench-1"] = SCHEMA
    command: str
    seed: int
    machine: Machine
    rows: list[Row]
    left_out: list[str] = Field(description="configurations that the time budget did not reach")


def first_sentence(problem: Exception) -> str:
    """What went wrong, short enough for a row's note."""
    text = getattr(problem, "message", None) or first_line(problem).split(". ")[0]
    return text[:200] or type(problem).__name__
