"""attnprune eval MODEL_OR_SIDECAR"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnprune.cli.given import refuse
from attnprune.cli.options import AllowMismatch, Base, Device, Json, Quiet, Revision, TextField
from attnprune.cli.output import out

if TYPE_CHECKING:
    from attnprune.sidecar.folder import Sidecar


def evaluate(
    context: typer.Context,
    path: Annotated[
        str, typer.Argument(metavar="MODEL_OR_SIDECAR", help="Sidecar folder or repository, or a base model.")
    ],
    data: Annotated[
        list[str] | None,
        typer.Option("--data", help="Text to measure on, or 'self' (repeatable). Default: the run's held-out split."),
    ] = None,
    seq_len: Annotated[int, typer.Option("--seq-len", help="Tokens per block; 0: as in training.", min=0)] = 0,
    tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens",
            help="At most this many tokens per text. Default: 16384; with --damage 4096.",
            min=2,
            show_default=False,
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            help="Benchmarks of lm-eval: hellaswag,lambada_openai. Default: text.",
            show_default=False,
        ),
    ] = None,
    task_folder: Annotated[
        Path | None,
        typer.Option(
            "--task-folder", help="With --tasks: further definitions for lm-eval. Default: none.", show_default=False
        ),
    ] = None,
    task_limit: Annotated[
        int | None,
        typer.Option(
            "--task-limit", help="With --tasks: so many documents of each. Default: all.", min=1, show_default=False
        ),
    ] = None,
    damage: Annotated[
        bool,
        typer.Option(
            "--damage",
            help="Put every layer right alone, then the worst heads; the record is the sidecar's damage.json.",
        ),
    ] = False,
    damage_heads: Annotated[
        int, typer.Option("--damage-heads", help="With --damage: heads that are measured.", min=0)
    ] = 16,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Blocks per forward pass; 0: by length.", min=0)] = 0,
    text_field: TextField = "text",
    revision: Revision = None,
    base: Base = None,
    device: Device = "cpu",
    device_map: Annotated[
        str | None,
        typer.Option(
            "--device-map",
            help="auto: spread the models over GPUs, the host's memory and the disk. Default: one --device.",
            show_default=False,
        ),
    ] = None,
    allow_base_mismatch: AllowMismatch = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure loss, base loss, open-gate control, KL, density and edges per query on text."""
    out.configure(json=as_json, quiet=quiet)
    if tasks is None:
        refuse(context, "without --tasks", "task_folder", "task_limit")
    else:
        refuse(context, "with --tasks", "seq_len", "tokens", "text_field")
    if damage:
        refuse(context, "with --damage", "batch_size")
    else:
        refuse(context, "without --damage", "damage_heads")
    if data == ["task"]:
        refuse(context, "with --data task", "seq_len", "text_field", *([] if damage else ["tokens"]))
    if device_map is not None:
        refuse(context, "with --device-map", "device")
    from attnprune.api.commands import sidecar_at
    from attnprune.errors import InputError
    from attnprune.sidecar.hub import is_repo

    notes: list[str] = []
    sidecar = sidecar_at(path, revision)
    if sidecar is None:
        refuse(context, "for a model that is no sidecar", "allow_base_mismatch")
    if device_map is not None and (tasks is not None or damage):
        raise InputError("--device-map: is for measuring on text; leave out --tasks and --damage")
    if tasks is not None:
        if data or damage:
            raise InputError("--tasks: brings its own text; leave out --data and --damage")
        from attnprune.report.evaluation import scores_data, scores_table
        from attnprune.training.harness import evaluate_tasks

        found = evaluate_tasks(
            path, sidecar, tasks.split(","), base=base, revision=revision, device=device, limit=task_limit,
            batch_size=batch_size, definitions=task_folder, allow_base_mismatch=allow_base_mismatch, bars=out.live,
            on_note=notes.append,
        )  # fmt: skip
        out.result(scores_data(found, notes), scores_table(found), *(f"note: {note}" for note in notes))
        return
    if not data:
        refuse(context, "without --data", "seq_len", "text_field", *([] if damage else ["tokens"]))
    if sidecar is None and not data:
        raise InputError(f"{path}: say what to measure on", hint="--data FILE.txt")
    if damage:
        if sidecar is None or is_repo(path):
            raise InputError(f"{path}: is not a local sidecar", hint="--damage takes the folder that a run wrote")
        _damage(sidecar, data, base, device, seq_len, tokens, damage_heads, text_field, allow_base_mismatch)
        return
    from attnprune.report.evaluation import report_data, report_table, warnings_of
    from attnprune.training.evaluation import evaluate_model

    reports = evaluate_model(
        path, sidecar, data or [], base=base, revision=revision, device=device, seq_len=seq_len,
        tokens=tokens or 16_384, batch_size=batch_size, text_field=text_field, allow_base_mismatch=allow_base_mismatch,
        device_map=device_map, on_note=notes.append,
    )  # fmt: skip
    facts: dict[str, Any] = {"reports": [report_data(r) for r in reports], "notes": notes}
    lines: list[object] = [report_table(reports), *warnings_of(reports), *(f"note: {note}" for note in notes)]
    if sidecar is not None and not data:
        stored, now = sidecar.manifest.result, reports[0]
        facts["reproduced"] = (now.loss, now.open_edges) == (stored.loss, stored.open_edges)
        verdict = "reproduced exactly" if facts["reproduced"] else "DIFFERS"
        lines.append(f"stored result: loss {stored.loss:.6f}, {stored.open_edges:,} open edges: {verdict}")
    out.result(facts, *lines)


def _damage(
    sidecar: Sidecar, data: list[str] | None, base: str | None, device: str, seq_len: int, tokens: int | None,
    heads: int, text_field: str, allow_base_mismatch: bool,
) -> None:  # fmt: skip
    from attnprune.errors import InputError
    from attnprune.files import check_writable
    from attnprune.report.damage import as_data, render
    from attnprune.sidecar.damage import write_damage

    if data is not None and len(data) > 1:
        raise InputError("--damage: takes one --data")
    if allow_base_mismatch:
        raise InputError("--damage: compares with the sidecar's own base; leave out --allow-base-mismatch")
    check_writable(sidecar.path)
    from attnprune.training.damage import TOKENS, sidecar_damage

    found = sidecar_damage(
        sidecar, data[0] if data else None, base=base, device=device, seq_len=seq_len, tokens=tokens or TOKENS,
        heads=heads, text_field=text_field, on_note=out.note,
    )  # fmt: skip
    write_damage(sidecar, found)
    out.result(as_data(sidecar, found), *render(sidecar, found))
