"""attnprune circuit MODEL --task TASK"""

from __future__ import annotations

import shlex
import signal
from pathlib import Path
from typing import Annotated, Any

import typer

from attnprune.cli.given import refuse_others
from attnprune.cli.options import Base, Device, Json, Quiet
from attnprune.cli.output import command_line, out
from attnprune.cli.signals import EndedBySignal
from attnprune.errors import ConstraintNotMetError, InputError, InterruptedRunError


def circuit(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            help="Sidecar or merged folder, base model, Hub name, .gguf file or 'demo'.", show_default=False
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            "--task",
            help="ioi, greater-than, sva, ..., or a file of prompts, also of MIB or Edge-Pruning. Default: none.",
            show_default=False,
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            "--against", help="Second model to compare with: the dense one. Default: none.", show_default=False
        ),
    ] = None,
    base: Base = None,
    target: Annotated[float, typer.Option("--target", help="Faithfulness to reach, above 0 and up to 1.")] = 0.9,
    prompts: Annotated[int, typer.Option("--prompts", help="Prompt pairs per split; 0: 64, 32 if quick.", min=0)] = 0,
    seed: Annotated[int, typer.Option("--seed", help="Prompts, random circuits and resamples.", min=0)] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Few prompts and sizes, no mask, no deletion.")] = False,
    mask_steps: Annotated[
        int | None,
        typer.Option(
            "--mask-steps",
            help="Steps of learning a mask, up to 3 times as many while it shrinks; 0: none. Default: 100, 0 if quick.",
            min=0,
            show_default=False,
        ),
    ] = None,
    deletions: Annotated[
        int | None,
        typer.Option(
            "--deletions",
            help="Most evaluations that delete edges; 0: none. Default: 240, 0 if quick.",
            min=0,
            show_default=False,
        ),
    ] = None,
    ablate: Annotated[
        str, typer.Option("--ablate", help="What edges outside a circuit carry: corrupt, mean, zero or mixed.")
    ] = "corrupt",
    procedure: Annotated[
        str, typer.Option("--procedure", help="exact, or published: heads and edges counted as published beside it.")
    ] = "exact",
    levels: Annotated[
        bool | None,
        typer.Option(
            "--levels/--no-levels",
            help="Search heads and MLPs, and messages, as well as edges. Default: --levels, not if quick.",
            show_default=False,
        ),
    ] = None,
    searches: Annotated[
        int, typer.Option("--searches", help="Searches, with seeds from --seed on; each takes as long.", min=1)
    ] = 1,
    controls: Annotated[
        bool,
        typer.Option(
            "--controls/--no-controls", help="Random circuits, broken models, nonsense answers, other ablations."
        ),
    ] = True,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Prompts in one run.", min=1)] = 32,
    output: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Output folder. Default: ./MODEL-circuit-TASK.", show_default=False),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option("--resume", help="Continue the search in this folder. Default: none.", show_default=False),
    ] = None,
    edges: Annotated[
        Path | None,
        typer.Option(
            "--edges",
            help="Evaluate the circuit in this EAP-IG .json or .pt file, or those in a folder for MIB, without a "
            "search. Default: none.",
            show_default=False,
        ),
    ] = None,
    explain: Annotated[
        str | None,
        typer.Option(
            "--explain",
            help="Say why an attention edge of the first test prompt is open: HEAD:QUERY<-KEY, for example "
            "'a5.h1:END<-S1' or 'a5.h1:9<-3'. Default: none.",
            show_default=False,
        ),
    ] = None,
    render: Annotated[
        Path | None,
        typer.Option(
            "--render",
            help="Draw page and curve of the finished search in this folder. Default: none.",
            show_default=False,
        ),
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find the smallest circuit of MODEL for a task by exact patching, with controls, and compare two models."""
    out.configure(json=as_json, quiet=quiet)
    from attnprune.circuit.folder import default_name, is_begun

    if render is not None:
        refuse_others(context, "--render: draws what a finished search found", besides=("render", "as_json", "quiet"))
        _draw(render)
        return
    if explain is not None and model is not None and task is not None:
        able = ("model", "task", "explain", "base", "seed", "device", "as_json", "quiet")
        refuse_others(context, "--explain: runs one prompt", besides=able)
        _explain(model, task, explain, {"base": base, "seed": seed, "device": device})
        return
    if edges is not None and model is not None and task is not None:
        able = ("model", "task", "edges", "base", "prompts", "seed", "quick", "ablate", "batch_size", "device")
        refuse_others(context, "--edges: evaluates without a search", besides=(*able, "as_json", "quiet"))
        how = {"base": base, "prompts": prompts, "seed": seed, "quick": quick, "ablate": ablate}
        _evaluate(model, task, edges, how | {"batch_size": batch_size, "device": device})
        return
    if resume is not None:
        refuse_others(
            context, "--resume: goes on as the search was begun", besides=("resume", "device", "as_json", "quiet")
        )
        folder = resume
    else:
        if model is None or task is None:
            raise InputError(
                f"circuit: no {'task' if model else 'model'} given", hint="for example: demo --task addition"
            )
        if not 0 < target <= 1:
            raise InputError(f"--target {target:g}: is not above 0 and up to 1")
        folder = output or Path(default_name(model, task))
    options = {
        "against": against, "base": base, "target": target, "prompts": prompts, "seed": seed, "quick": quick,
        "mask_steps": mask_steps, "deletions": deletions, "ablate": ablate, "procedure": procedure,
        "levels": levels, "searches": searches, "controls": controls,
        "batch_size": batch_size, "command": command_line(),
    }  # fmt: skip
    try:
        _run(model, task, folder, options, resume, device)
    except (KeyboardInterrupt, EndedBySignal) as error:
        number = error.number if isinstance(error, EndedBySignal) else signal.SIGINT
        hint = f"continue with: attnprune circuit --resume {shlex.quote(str(folder))}"
        raise InterruptedRunError("interrupted", number, hint if is_begun(folder) else None) from error


def _run(
    model: str | None, task: str | None, folder: Path, options: dict[str, Any], resume: Path | None, device: str
) -> None:
    from attnprune.api.commands import circuit as search
    from attnprune.report import circuits as report

    watching = report.Watching(out.stderr, live=out.live, quiet=out.quiet)
    result = search(model, task, out=folder, resume=resume, device=device, progress=watching, **options)
    _note_curve(folder)
    out.result(result.model_dump(mode="json"), *report.summary(result), f"written to {folder}")
    missed = [m for m in result.models if not m.reached]
    if missed:
        raise ConstraintNotMetError(report.not_shown(missed[0], result), hint="try more --prompts, with another --out")


def _evaluate(model: str, task: str, edges: Path, how: dict[str, Any]) -> None:
    from attnprune.api.circuits import circuit_of_file
    from attnprune.report.circuits import Watching
    from attnprune.report.given_circuit import summary

    watching = Watching(out.stderr, live=out.live, quiet=out.quiet)
    found = circuit_of_file(model, task, edges, progress=watching, **how)
    out.result(found.model_dump(mode="json"), *summary(found))


def _explain(model: str, task: str, edge: str, how: dict[str, Any]) -> None:
    from attnprune.api.circuits import explain
    from attnprune.report.explained import summary

    found = explain(model, task, edge, **how)
    out.result(found.model_dump(mode="json"), *summary(found))


def _draw(folder: Path) -> None:
    from attnprune.circuit.folder import read_record
    from attnprune.files import reason
    from attnprune.report.circuit_page import write_pictures

    result = read_record(folder)
    try:
        written = write_pictures(result, folder)
    except OSError as error:
        raise InputError(f"{folder}: cannot write: {reason(error)}") from None
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:  # numbers that no search ends with
        raise InputError(f"{folder}: this record cannot be drawn: {error}") from error
    _note_curve(folder)
    out.result({"written": [str(file) for file in written]}, *(f"written: {file}" for file in written))


def _note_curve(folder: Path) -> None:
    if not (folder / "curve.png").exists():
        out.note("no curve.png: matplotlib is not installed")
