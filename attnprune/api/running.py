"""`attnprune.sparsify`: a run by keywords."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnprune.api.console import progress_console
from attnprune.api.inputs import on_disk
from attnprune.errors import InputError, checked
from attnprune.runs.config import RunConfig, build_config, override, read_toml
from attnprune.runs.folder import check_output, defaults_for, output_folder, read_resumed

if TYPE_CHECKING:
    from attnprune.sidecar.folder import Sidecar

# What an option is called where its name in run.toml is another one.
_WORDS = {
    "data": ("data", "source"),
    "constraint": ("constraint", "kind"),
    "out": ("output", "folder"),
    "lr": ("train", "learning_rate"),
    "gate_lr": ("train", "gate_learning_rate"),
}


@checked()
def sparsify(
    model: Any = None,
    tokenizer: Any = None,
    *,
    data: Any = None,
    out: str | Path | None = None,
    scope: str | None = None,
    steps: int | None = None,
    time: str | None = None,
    batch_size: int | None = None,
    seq_len: int | None = None,
    constraint: str | None = None,
    tolerance: float | None = None,
    target_density: float | None = None,
    learning_rate: float | None = None,
    seed: int | None = None,
    device: str | None = None,
    init: str | Path | None = None,
    config: str | Path | None = None,
    resume: bool | str | Path = False,
    finish: str | Path | None = None,
    dry_run: bool = False,
    progress: bool = True,
    callbacks: list[Any] | None = None,
    on_plan: Callable[[Any], bool] | None = None,
    on_note: Callable[[str], None] | None = None,
    started: float | None = None,
    **settings: Any,
) -> Sidecar | None:
    """Post-train a model until its attention is sparse at the base's loss, and write a sidecar.

        sidecar = attnprune.sparsify("gpt2", data="text.txt", constraint="kl", tolerance=0.05, steps=1000)
        sidecar = attnprune.sparsify(model, tokenizer, data=dataset, out="mine")

    Args:
        model: Hub id, folder, .gguf file or "demo"; or a transformers model in memory (with `tokenizer`), which is
            written to the folder OUT-inputs, as are texts: `resume` and `attnprune.load` find them there. A
            `RunConfig` runs as it is and in silence.
        data: a source as `--data` takes it, or a tuple of several; or the text itself: a list of strings or a
            `datasets.Dataset` with a column "text" or "messages" (`text_field` names another).
        out: output folder. Default: ./MODEL-attnprune.
        scope: what trains: "gates", "lora", "attn" or "full". Default: by model size.
        steps, time: optimiser steps (3,000), or the time of the whole run ("10m") that gives their number.
        batch_size, seq_len: blocks per step (16), and tokens per block (the context, at most 512).
        constraint: "kl", "loss" or "density"; `tolerance` is in nats per token above the base (0.05), `target_density`
            the largest density (0.01) and implies "density".
        init: sidecar of the model to start from.
        config: a run.toml with defaults.
        resume: the folder of an unfinished run, which goes on as it was begun.
        finish: the folder of an unfinished run, whose best state so far is exported; nothing is trained.
        dry_run: show the plan and stop.
        progress: show plan, evaluations and time left on stderr, or in the notebook.
        callbacks, on_plan, on_note, started: as `attnprune.training.recipe.sparsify` takes them.
        settings: any other setting of run.toml by its name (`lora_rank=32`, `start_factor=1.0`, ...).

    Returns:
        The sidecar; `sidecar.manifest.result.feasible` says whether the constraint is met. None where the plan stopped.

    Raises:
        InputError: a wrong option, model or text; nothing was changed.
        AttnPruneError: the run failed; its hint says what to continue from.
    """
    if resume and finish is not None:
        raise InputError("finish: leave out resume")
    options = settings | {
        "out": out, "scope": scope, "steps": steps, "time": time, "batch_size": batch_size, "seq_len": seq_len,
        "constraint": constraint, "tolerance": tolerance, "target_density": target_density,
        "learning_rate": learning_rate, "seed": seed, "device": device, "init": init,
    }  # fmt: skip
    if isinstance(model, RunConfig):
        others = options | {"tokenizer": tokenizer, "data": data, "config": config, "finish": finish}
        others["dry_run"] = dry_run or None
        if unused := [name for name, value in others.items() if value is not None]:
            raise InputError(f"sparsify: a RunConfig runs as it is; leave out {', '.join(unused)}")
        from attnprune.training import recipe

        return recipe.sparsify(
            model, resume=bool(resume), callbacks=callbacks, on_plan=on_plan, on_note=on_note or (lambda line: None),
            started=started,
        )  # fmt: skip
    if constraint is None and target_density is not None:
        options["constraint"] = "density"
    goes_on = finish if finish is not None else resume
    given = _sections({name: value for name, value in options.items() if value is not None})
    with on_disk(model, tokenizer, data, given, is_new=not goes_on) as given:
        run = _configuration(given, config, goes_on)
        if not goes_on:
            check_output(output_folder(run))
        how = {"resume": bool(resume), "finish": finish is not None, "started": started}
        return _run(run, how, dry_run, progress, callbacks or [], on_plan, on_note)


def _configuration(given: dict[str, Any], config: str | Path | None, resume: bool | str | Path) -> RunConfig:
    """The run that was asked for, or the one to go on with."""
    if resume:
        if config is not None:
            raise InputError("resume, finish: take their settings from the run; leave out config")
        folder = given.get("output", {}).get("folder") if resume is True else resume
        if folder is None:
            raise InputError("resume: name the folder of the run")
        return read_resumed(Path(folder), given)
    values = override(read_toml(Path(config)) if config is not None else {}, given)
    name = values.get("model", {}).get("name")
    if not name:
        raise InputError("sparsify: no model given", hint='for example: attnprune.sparsify("demo")')
    return build_config(override(defaults_for(name), values))


def _run(
    config: RunConfig,
    how: dict[str, Any],
    dry_run: bool,
    progress: bool,
    callbacks: list[Any],
    on_plan: Callable[[Any], bool] | None,
    on_note: Callable[[str], None] | None,
) -> Sidecar | None:
    """A run with its progress shown; `how`: resume, finish and started."""
    from attnprune.report.plan import plan_table
    from attnprune.report.progress import display
    from attnprune.report.sidecar import verdict_lines
    from attnprune.training import recipe

    console = progress_console()

    def note(line: str) -> None:
        if on_note is not None:
            on_note(line)
        elif progress:
            console.print(line, style="dim", markup=False)

    def show_plan(plan: Any) -> bool:
        shown.steps = plan.config.train.steps
        if progress:
            console.print(plan_table(plan))
        return (on_plan is None or on_plan(plan)) and not dry_run

    shown = display(console, live=progress and console.is_terminal, quiet=not progress, steps=config.train.steps)
    with shown:
        sidecar = recipe.sparsify(
            config, callbacks=[shown.callback, *callbacks], on_plan=show_plan, on_note=note, **how
        )  # fmt: skip
    if sidecar is not None and progress:
        for line in verdict_lines(sidecar.manifest.result):
            console.print(line, style="bold", markup=False)
    return sidecar


def _sections(options: dict[str, Any]) -> dict[str, Any]:
    """Options by name -> sections of a RunConfig.

    Raises:
        InputError: no such option, with the nearest one.
    """
    sections: dict[str, Any] = {name: field.annotation for name, field in RunConfig.model_fields.items()}
    places = {key: (section, key) for section, kind in sections.items() for key in kind.model_fields} | _WORDS
    given: dict[str, Any] = {}
    for name, value in options.items():
        if name not in places:
            near = difflib.get_close_matches(name, list(places), n=1)
            raise InputError(f"sparsify: unknown option {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        section, key = places[name]
        given.setdefault(section, {})[key] = str(value) if isinstance(value, Path) else value
    return given
