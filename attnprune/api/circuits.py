"""Beside a search: a circuit from a file, and why one edge is open."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnprune.api.commands import PROMPTS, QUICK_PROMPTS
from attnprune.api.console import progress_console
from attnprune.errors import InputError, checked

if TYPE_CHECKING:
    from attnprune.circuit.explained import ExplainedEdge
    from attnprune.circuit.given import GivenCircuit, GivenCircuits


@checked(prompts=0, seed=0, batch_size=1)
def circuit_of_file(
    model: str | Path,
    task: str | Path,
    edges: str | Path,
    *,
    base: str | Path | None = None,
    prompts: int = 0,
    seed: int = 0,
    quick: bool = False,
    ablate: str = "corrupt",
    batch_size: int = 32,
    device: str = "auto",
    progress: bool | AbstractContextManager[Any] = True,
) -> GivenCircuit | GivenCircuits:
    """Evaluate somebody else's circuit exactly: a .json or .pt graph of EAP-IG. Arguments as for `circuit`.

    A folder TASK_MODEL of a submission to MIB, or a graph that has only scores, gives a circuit for each size.

    Raises:
        InputError: no such file, or one for another model.
        AttnPruneError: the model cannot do the task.
    """
    from attnprune.circuit.worth import ABLATIONS

    if not Path(edges).exists():
        raise InputError(f"{edges}: no such file")
    if ablate not in ABLATIONS:
        raise InputError(f"ablate {ablate}: is none of {', '.join(ABLATIONS)}")
    from attnprune.circuit.run import evaluate_file
    from attnprune.report.circuits import Watching

    settings = {
        "model": str(model), "task": str(task), "base": base and str(base), "seed": seed, "quick": quick,
        "prompts": prompts or (QUICK_PROMPTS if quick else PROMPTS), "ablate": ablate, "batch_size": batch_size,
        "target": 0.9, "procedure": "exact", "mask_steps": None, "deletions": None, "levels": None,
    }  # fmt: skip
    console = progress_console()
    if isinstance(progress, bool):
        progress = Watching(console, live=progress and console.is_terminal, quiet=not progress)
    return evaluate_file(Path(edges), settings, device, progress)


@checked(seed=0)
def explain(
    model: str | Path,
    task: str | Path,
    edge: str,
    *,
    base: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
) -> ExplainedEdge:
    """Why an attention edge is open in a task's first test prompt: `edge` is HEAD:QUERY<-KEY, as "a5.h1:END<-S1".

    Query and key are positions from 0 on, or roles of the prompt.

    Raises:
        InputError: no such edge.
        UnsupportedModelError: a family without an adapter, or whose scores have a soft cap.
    """
    from attnprune.circuit.run import explain as why

    settings = {"model": str(model), "task": str(task), "base": base and str(base), "seed": seed, "prompts": 1}
    return why(edge, settings, device)
