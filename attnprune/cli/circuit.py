"""attnprune circuit MODEL --task TASK"""

from __future__ import annotations

import json
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from attnprune.cli.options import Base, Device, Json, Quiet
from attnprune.cli.output import out
from attnprune.errors import ConstraintNotMetError, InputError, InterruptedRunError

SETTINGS_FILE = "settings.json"
CACHE_FOLDER = "cache"
RESULT_FILE, PAGE_FILE = "circuit.json", "circuit.html"
PROMPTS, QUICK_PROMPTS = 64, 16
MASK_PROMPTS = 2048  # train prompts that a mask is learned on, or as many as a task has


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
        typer.Option("--task", help="ioi, greater-than, sva, ..., or a .csv or .jsonl file.", show_default=False),
    ] = None,
    against: Annotated[
        str | None, typer.Option("--against", help="Second model to compare with: the dense one.", show_default=False)
    ] = None,
    base: Base = None,
    target: Annotated[float, typer.Option("--target", help="Faithfulness to reach, above 0 and up to 1.")] = 0.9,
    prompts: Annotated[
        int, typer.Option("--prompts", help=f"Prompt pairs per split; 0: {PROMPTS}, {QUICK_PROMPTS} if quick.", min=0)
    ] = 0,
    seed: Annotated[int, typer.Option("--seed", help="Prompts, random circuits and resamples.", min=0)] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Few prompts and sizes, no mask, no deletion.")] = False,
    mask_steps: Annotated[
        int | None,
        typer.Option(
            "--mask-steps",
            help="Steps of learning a mask over the edges; 0: none. Default: 200, 0 if quick.",
            min=0,
            show_default=False,
        ),
    ] = None,
    deletions: Annotated[
        int | None,
        typer.Option(
            "--deletions",
            help="Most evaluations that delete edges; 0: none. Default: 480, 0 if quick.",
            min=0,
            show_default=False,
        ),
    ] = None,
    controls: Annotated[bool, typer.Option("--controls/--no-controls", help="Random circuits, broken models.")] = True,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Prompts in one run.", min=1)] = 32,
    output: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Output folder. Default: ./MODEL-circuit-TASK.", show_default=False),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", help="Continue the search in this folder.", show_default=False)
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find the smallest circuit of MODEL for a task by exact patching, with controls, and compare two models."""
    out.configure(json=as_json, quiet=quiet)
    if resume is not None:
        given = _given(context, besides=("resume", "device", "as_json", "quiet"))
        if given:
            raise InputError(f"--resume: goes on as the search was begun; leave out {', '.join(given)}")
        folder, settings = resume, _read_settings(resume)
    else:
        if model is None or task is None:
            raise InputError(
                f"circuit: no {'task' if model else 'model'} given", hint="for example: demo --task addition"
            )
        if not 0 < target <= 1:
            raise InputError(f"--target {target:g}: is not above 0 and up to 1")
        folder = output or Path(_default_name(model, task))
        settings = {
            "model": model, "task": task, "against": against, "base": base, "target": target,
            "prompts": prompts or (QUICK_PROMPTS if quick else PROMPTS), "seed": seed, "quick": quick,
            "mask_steps": mask_steps, "deletions": deletions, "controls": controls, "batch_size": batch_size,
            "command": "attnprune " + shlex.join(sys.argv[1:]),
        }  # fmt: skip
        _check_folder(folder)
    try:
        _run(folder, settings, device, is_new=resume is None)
    except KeyboardInterrupt as error:
        hint = f"continue with: attnprune circuit --resume {shlex.quote(str(folder))}"
        known = (folder / CACHE_FOLDER / SETTINGS_FILE).exists()
        raise InterruptedRunError("interrupted", signal.SIGINT, hint if known else None) from error


def _given(context: typer.Context, besides: tuple[str, ...]) -> list[str]:
    """The arguments and options that the command line holds."""
    names = {parameter.name: parameter.opts[0] for parameter in context.command.params if parameter.name}
    sources = {name: context.get_parameter_source(name) for name in names if name not in besides}
    return [names[name] for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]


def _default_name(model: str, task: str) -> str:
    return f"{Path(model).name.removesuffix('.gguf')}-circuit-{Path(task).stem.replace(':', '-')}"


def _check_folder(folder: Path) -> None:
    """Refuse a folder that holds something, before torch is loaded."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is not a folder")
    if folder.is_dir() and any(folder.iterdir()):
        begun = (folder / CACHE_FOLDER / SETTINGS_FILE).exists()
        hint = f"attnprune circuit --resume {shlex.quote(str(folder))}, or another --out" if begun else "another --out"
        raise InputError(f"{folder}: is not empty", hint=hint)


def _read_settings(folder: Path) -> dict[str, Any]:
    file = folder / CACHE_FOLDER / SETTINGS_FILE
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(f"{folder}: holds no search to continue", hint="start one with --out") from None
    wanted = {
        "model": str, "task": str, "against": (str, type(None)), "base": (str, type(None)), "target": float,
        "prompts": int, "seed": int, "quick": bool, "mask_steps": (int, type(None)), "deletions": (int, type(None)),
        "controls": bool, "batch_size": int, "command": str, "fingerprint": str,
    }  # fmt: skip
    if isinstance(values, dict):
        values.setdefault("mask_steps", 0)  # begun when there was no such step
    if not isinstance(values, dict) or any(not isinstance(values.get(key), kind) for key, kind in wanted.items()):
        raise InputError(f"{file}: damaged", hint="start again in another folder")
    return values


def _run(folder: Path, settings: dict[str, Any], device: str, *, is_new: bool) -> None:
    started = time.monotonic()
    from attnprune.checkpoints import write_atomic
    from attnprune.circuit.cache import Cache
    from attnprune.circuit.compare import analyse, eap_ig_data, result_of, task_facts
    from attnprune.circuit.splits import QUICK, Settings
    from attnprune.circuit.tasks import load_task, task_names
    from attnprune.report import circuits as report
    from attnprune.report.circuit_page import render_page

    if not settings["task"].endswith((".csv", ".jsonl")) and settings["task"] not in task_names():  # before any weights
        raise InputError(f"{settings['task']}: no such task", hint=", ".join(task_names()))
    model, tokenizer = _load(settings["model"], settings["base"], device)
    models = {"model": (settings["model"], model)}
    chosen: dict[str, Any] = dict(QUICK) if settings["quick"] else {}
    chosen |= {name: settings[name] for name in ("mask_steps", "deletions") if settings[name] is not None}
    how = Settings(**chosen, target=settings["target"], batch_size=settings["batch_size"], seed=settings["seed"])
    more = MASK_PROMPTS if how.mask_steps else 0
    task = load_task(settings["task"], tokenizer, count=settings["prompts"], more=more, seed=settings["seed"])
    if settings["against"] is not None:
        other, other_tokenizer = _load(settings["against"], settings["base"], device)
        _check_pair(model, tokenizer, other, other_tokenizer, settings["against"])
        models["against"] = (settings["against"], other)
    (folder / CACHE_FOLDER).mkdir(parents=True, exist_ok=True)
    if is_new:
        stored = settings | {"fingerprint": task.fingerprint}
        write_atomic(folder / CACHE_FOLDER / SETTINGS_FILE, json.dumps(stored, indent=1) + "\n")
    elif settings["fingerprint"] != task.fingerprint:
        raise InputError(f"{settings['task']}: not the prompts that this search was begun with")
    cache = Cache(folder / CACHE_FOLDER)
    with report.Watching(out.stderr, live=out.live, quiet=out.quiet) as watch:
        analyses = [
            analyse(one, name, task, how, with_controls=settings["controls"], label=label, watch=watch, cache=cache)
            for label, (name, one) in models.items()
        ]
        facts = task_facts(task, tokenizer, settings["seed"])
        notes: list[str] = []
        exports = {"eap-ig.json": eap_ig_data(analyses[0])}
        if len(analyses) > 1:
            exports["eap-ig-against.json"] = eap_ig_data(analyses[1])
        if None in exports.values():
            notes.append("no eap-ig.json: that format has no shared key/value heads")
        result = result_of(
            analyses, facts, how, command=settings["command"], quick=settings["quick"],
            seconds=time.monotonic() - started, notes=notes,
        )  # fmt: skip
    for name, data in exports.items():
        if data is not None:
            write_atomic(folder / name, json.dumps(data))
    write_atomic(folder / RESULT_FILE, result.model_dump_json(indent=1) + "\n")
    write_atomic(folder / PAGE_FILE, render_page(result))
    if not report.save_curve(result, folder / "curve.png"):
        out.note("no curve.png: matplotlib is not installed")
    out.result(result.model_dump(mode="json"), *report.summary(result), f"written to {folder}")
    missed = [m for m in result.models if not m.reached]
    if missed:
        raise ConstraintNotMetError(
            f"{missed[0].name}: finished and saved, but faithfulness on test prompts is "
            f"{missed[0].test.faithfulness.value:.3f}, not {how.target:g}",
            hint="try more --prompts, with another --out",
        )


def _load(name: str, base: str | None, device: str) -> tuple[Any, Any]:
    """(model, tokenizer) of a sparse model or a base model."""
    from attnprune import runtime
    from attnprune.hub import sparse_folder

    where = runtime.pick_device(device)
    folder = sparse_folder(name)
    if folder is not None:
        return runtime.load(folder, base, device=where)
    loaded = runtime.load_base(name, device=where)
    return loaded.model, loaded.tokenizer


def _check_pair(model: Any, tokenizer: Any, other: Any, other_tokenizer: Any, name: str) -> None:
    """Two models are compared edge by edge on the same tokens."""
    from attnprune.circuit.adapters import graph_of

    if graph_of(model.config) != graph_of(other.config):
        raise InputError(f"--against {name}: has other layers or heads")
    if tokenizer.get_vocab() != other_tokenizer.get_vocab():
        raise InputError(f"--against {name}: has another tokenizer")
