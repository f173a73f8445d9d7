"""attnprune sparsify MODEL"""

from __future__ import annotations

import sys
from pathlib import Path
from time import monotonic
from typing import Annotated, Any

import typer

from attnprune.cli.given import refuse
from attnprune.cli.options import RUN_DEFAULTS, Json, Quiet
from attnprune.cli.output import out
from attnprune.errors import AttnPruneError, ConstraintNotMetError, InputError
from attnprune.runs import processes


def _option(*names: str, help: str) -> Any:
    default = RUN_DEFAULTS.get(names[0])
    return typer.Option(*names, help=help if default is None else f"{help} Default: {default}.", show_default=False)


def sparsify(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Argument(help="Hub id, folder, .gguf file, or 'demo'.", show_default=False)
    ] = None,
    data: Annotated[
        list[str] | None,
        _option(
            "--data",
            help="Hub data set [:config[:split]], file, folder or pattern of .txt, .jsonl or .parquet (also .gz, .xz, "
            ".zst), or 'self'. Repeatable: several are mixed in proportion to their sizes.",
        ),
    ] = None,
    weights: Annotated[
        str | None,
        _option("--weights", help="Shares of several --data in the training text, such as 3,1,1. Default: by size."),
    ] = None,
    output: Annotated[str | None, _option("--out", "-o", help="Output folder. Default: ./MODEL-attnprune.")] = None,
    scope: Annotated[
        str | None, _option("--scope", help="What trains: gates, lora, attn or full. Default: by model size.")
    ] = None,
    steps: Annotated[int | None, _option("--steps", help="Optimiser steps.")] = None,
    time: Annotated[
        str | None,
        _option("--time", help="Time of the whole run, export included: 90s, 10m, 1h30m. Gives the number of --steps."),
    ] = None,
    batch_size: Annotated[int | None, _option("--batch-size", help="Blocks per step.")] = None,
    micro_batch_size: Annotated[
        str | None,
        _option("--micro-batch-size", help="Blocks per forward pass. Default: auto, as many as fit into memory."),
    ] = None,
    seq_len: Annotated[
        int | None, _option("--seq-len", help="Tokens per block. Default: the context, at most 512.")
    ] = None,
    eval_tokens: Annotated[int | None, _option("--eval-tokens", help="Held-out tokens.")] = None,
    text_field: Annotated[
        str | None, _option("--text-field", help="Column of text or chat messages. Default: text, else messages.")
    ] = None,
    constraint: Annotated[str | None, _option("--constraint", help="kl, loss, or density.")] = None,
    tolerance: Annotated[float | None, _option("--tolerance", help="Nats per token above the base (kl, loss).")] = None,
    target_density: Annotated[
        float | None, _option("--target-density", help="Largest density; implies --constraint density.")
    ] = None,
    frontier: Annotated[
        str | None,
        _option(
            "--frontier",
            help="Falling densities in percent, such as 5,2,1,0.5: the best state of each is kept, the last one is "
            "the target. Implies --constraint density. Default: the target alone.",
        ),
    ] = None,
    match: Annotated[
        float | None, _option("--match", help="Weight of matching the base's hidden states after each layer.")
    ] = None,
    estimator: Annotated[str | None, _option("--estimator", help="threshold or gumbel.")] = None,
    temperature: Annotated[float | None, _option("--temperature", help="Penalty temperature.")] = None,
    learning_rate: Annotated[float | None, _option("--lr", help="Learning rate of the weights.")] = None,
    gate_learning_rate: Annotated[float | None, _option("--gate-lr", help="Learning rate of the gate biases.")] = None,
    lora_rank: Annotated[int | None, _option("--lora-rank", help="Rank of the adapters.")] = None,
    lora_targets: Annotated[
        str | None, _option("--lora-targets", help="Linear layers with adapters: attention, or all.")
    ] = None,
    optimizer: Annotated[
        str | None, _option("--optimizer", help="adamw, adamw8bit, paged_adamw or paged_adamw8bit (bitsandbytes).")
    ] = None,
    precision: Annotated[str | None, _option("--precision", help="fp32, bf16 (autocast) or auto.")] = None,
    gradient_checkpointing: Annotated[
        bool | None, _option("--gradient-checkpointing", help="Less memory, more time.")
    ] = None,
    eval_every: Annotated[int | None, _option("--eval-every", help="Steps between evaluations.")] = None,
    save_every: Annotated[int | None, _option("--save-every", help="Steps between checkpoints.")] = None,
    seed: Annotated[int | None, _option("--seed", help="All random choices.")] = None,
    device: Annotated[str | None, _option("--device", help="auto, cpu or cuda.")] = None,
    load_in: Annotated[
        str | None,
        _option(
            "--load-in", help="The base while it trains: full, or its linear layers in 4bit (nf4) or 8bit (LLM.int8)."
        ),
    ] = None,
    keep_quantised: Annotated[
        bool | None,
        _option("--keep-quantised", help="With --load-in: the sidecar is for the quantised base, and needs it."),
    ] = None,
    dtype: Annotated[str | None, _option("--dtype", help="float32, bfloat16, float16 or auto.")] = None,
    revision: Annotated[str | None, _option("--revision", help="Hub branch, tag or commit of MODEL.")] = None,
    init: Annotated[
        str | None, _option("--init", help="Sidecar of MODEL to start from: folder or Hub repository.")
    ] = None,
    recover: Annotated[
        bool,
        typer.Option(
            "--recover",
            help="With --init: train only the layers that lost most, with all gates and the density held.",
        ),
    ] = False,
    config: Annotated[Path | None, _option("--config", help="run.toml with defaults; flags override it.")] = None,
    resume: Annotated[Path | None, _option("--resume", help="Continue the unfinished run in this folder.")] = None,
    finish: Annotated[
        Path | None, _option("--finish", help="Do not train on: export the best state of the unfinished run there.")
    ] = None,
    report_to: Annotated[
        str | None, _option("--report-to", help="Experiment tracker: tensorboard, wandb or trackio.")
    ] = None,
    fsdp: Annotated[
        str | None,
        _option(
            "--fsdp", help="Shard the weights over the processes (FSDP2): on, off, or auto, if one cannot hold them."
        ),
    ] = None,
    number: Annotated[
        int,
        typer.Option(
            "--processes",
            help="Processes on this machine that share each batch, one per GPU; as torchrun.",
            show_default=True,
        ),
    ] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Post-train MODEL until its attention is sparse at its own loss, and write a sidecar."""
    if number != 1 and not processes.launched():
        return processes.launch(number, sys.argv[1:])
    out.configure(json=as_json and processes.is_first(), quiet=quiet or not processes.is_first())
    marks: list[float] | None = None
    if frontier is not None:
        if target_density is not None:
            raise InputError("--frontier: its last density is the target; leave out --target-density")
        *marks, target_density = [density / 100 for density in _numbers("--frontier", frontier)]
    if target_density is not None and constraint is None:
        constraint = "density"
    if recover and constraint is None:
        constraint = "density"  # that of the sidecar
    if scope not in (None, "lora"):
        refuse(context, f"with --scope {scope}", "lora_rank", "lora_targets", *(["learning_rate"] * (scope == "gates")))
    if constraint in ("kl", "loss"):
        refuse(context, f"with --constraint {constraint}", "target_density")
    flags = {
        "model": {
            "name": model, "revision": revision, "init": init, "device": device, "dtype": dtype,
            "load_in": load_in, "keep_quantised": keep_quantised,
        },
        "data": {
            "source": data or None, "weights": weights and _numbers("--weights", weights), "seq_len": seq_len,
            "eval_tokens": eval_tokens, "text_field": text_field,
        },
        "gate": {"estimator": estimator, "temperature": temperature},
        "constraint": {
            "kind": constraint, "tolerance": tolerance, "target_density": target_density, "frontier": marks,
        },
        "train": {
            "scope": scope, "recover": "worst" if recover else None, "time": time, "steps": steps,
            "batch_size": batch_size, "micro_batch_size": micro_batch_size, "learning_rate": learning_rate,
            "gate_learning_rate": gate_learning_rate, "lora_rank": lora_rank, "lora_targets": lora_targets,
            "match": match, "optimizer": optimizer,
            "precision": precision, "fsdp": fsdp, "gradient_checkpointing": gradient_checkpointing,
            "eval_every": eval_every, "save_every": save_every, "seed": seed,
        },
        "output": {"folder": output, "report_to": report_to},
    }  # fmt: skip
    given = {s: {k: v for k, v in values.items() if v is not None} for s, values in flags.items()}
    given = {section: values for section, values in given.items() if values}
    if resume is not None and finish is not None:
        raise InputError("--finish: leave out --resume")
    return _run(given, config, resume or finish, finish is not None, dry_run)


def _numbers(option: str, text: str) -> list[float]:
    """Numbers between commas.

    Raises:
        InputError
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{option}: numbers between commas are needed (got {text!r})") from None


def _run(given: dict[str, Any], config_file: Path | None, resume: Path | None, finish: bool, dry_run: bool) -> int:
    from attnprune.runs.config import build_config, override, read_toml

    started = monotonic()
    if {"time", "steps"} <= given.get("train", {}).keys():
        raise InputError("--time: gives the number of steps; leave out --steps")
    if resume is not None:
        if config_file is not None:
            option = "--finish" if finish else "--resume"
            raise InputError(f"{option}: takes its settings from the run; leave out --config")
        from attnprune.runs.folder import read_resumed

        config = read_resumed(resume, given)
    else:
        values = override(read_toml(config_file) if config_file else {}, given)
        name = values.get("model", {}).get("name")
        if not name:
            raise InputError("sparsify: no model given", hint="for example: attnprune sparsify demo")
        from attnprune.runs.folder import check_output, defaults_for, output_folder

        config = build_config(override(defaults_for(name), values))
        if processes.is_first():
            check_output(output_folder(config))  # before the seconds that torch takes to load

    from attnprune.report import progress
    from attnprune.report.plan import plan_data, plan_table
    from attnprune.report.sidecar import next_commands, summary, summary_data
    from attnprune.training.recipe import sparsify as run_recipe

    def show_plan(plan: Any) -> bool:
        display.steps = plan.config.train.steps
        if out.json and dry_run:
            out.result(plan_data(plan))
        else:
            out.show(plan_table(plan))
        return not dry_run

    display = progress.display(out.stderr, live=out.live, quiet=out.quiet, steps=config.train.steps)
    with display:
        sidecar = run_recipe(
            config,
            resume=resume is not None,
            finish=finish,
            callbacks=[display.callback],
            on_plan=show_plan,
            on_note=out.note,
            started=started,
        )
    if sidecar is None:
        return 0
    data, shown = _frontier(sidecar.path)
    out.result(summary_data(sidecar) | data, *summary(sidecar), *shown, next_commands(sidecar))
    result = sidecar.manifest.result
    if not result.feasible:
        option = "--target-density" if result.constraint == "density" else "--tolerance"
        raise ConstraintNotMetError(
            f"{sidecar.path}: finished and saved, but {result.constraint} <= {result.limit:g} does not hold",
            hint=f"try more --steps or a larger {option}, with another --out",
        )
    return 0


def _frontier(folder: Path) -> tuple[dict[str, Any], list[Any]]:
    """Draw the frontier of a run that has one; what there is to show of it: (for JSON, for a terminal)."""
    from attnprune.report.frontier import PICTURE_FILE, draw_frontier, frontier_data, frontier_table
    from attnprune.runs.frontier import read_frontier

    found = read_frontier(folder)
    if found is None:
        return {}, []
    points, place = found
    try:
        draw_frontier(points, folder / PICTURE_FILE)
    except AttnPruneError as error:
        out.note(f"{error.message}: {error.hint}")
    return {"frontier": frontier_data(points)}, ["", frontier_table(points, place)]
