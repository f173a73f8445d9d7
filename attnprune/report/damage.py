"""Where a sparse model lost something: its layers, worst first, then the worst heads. No torch."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from attnprune.report.tables import bar, facts_table
from attnprune.sidecar import hub
from attnprune.sidecar.damage import Damage
from attnprune.sidecar.folder import Sidecar
from attnprune.units import counted, percent

ROWS = 16  # of each table
BAR = 12


def as_data(sidecar: Sidecar, damage: Damage) -> dict[str, Any]:
    """The whole record and its rankings, for JSON."""
    return {
        "path": str(sidecar.path),
        "damage": damage.model_dump(),
        "layers": [{"layer": layer, "kl_won": damage.won(layer)} for layer in damage.ranked_layers()],
        "heads": [{"layer": layer, "head": head, "kl_won": won} for layer, head, won in damage.ranked_heads()],
        "worst_layers": damage.worst_layers(),
    }


def render(sidecar: Sidecar, damage: Damage) -> list[Any]:
    """The renderables of `inspect --damage`, for 80 columns."""
    worst = ", ".join(map(str, damage.worst_layers())) or "none"
    facts = [
        ("measured", f"{damage.data}, {damage.tokens:,} tokens, T = {damage.seq_len}"),
        ("KL", f"{damage.kl:.4f} nats from base to sparse"),
        ("loss", f"{damage.loss:.4f}, base {damage.base_loss:.4f} ({damage.loss - damage.base_loss:+.4f} nats)"),
        ("worst layers", f"{worst}, with half of the KL that single layers win back"),
    ]
    return [facts_table(hub.shown(sidecar.path), facts), "", _layers(sidecar, damage), "", *_heads(sidecar, damage)]


def _layers(sidecar: Sidecar, damage: Damage) -> Table:
    ranked = damage.ranked_layers()
    table = _table("layer", len(ranked), counted(len(ranked), "layer"), with_loss=True)
    most = max(damage.won(ranked[0]), 1e-12)
    for index in ranked[:ROWS]:
        layer, won = damage.layers[index], damage.won(index)
        table.add_row(
            str(index), percent(float(sidecar.density[index].mean())), percent(layer.teacher_error),
            percent(layer.student_error), f"{won:+.4f}", f"{damage.kl - layer.kl_open:+.4f}",
            f"{layer.loss_open - damage.base_loss:+.4f}", bar(max(0.0, won / most), BAR),
        )  # fmt: skip
    return table


def _heads(sidecar: Sidecar, damage: Damage) -> list[Any]:
    ranked = damage.ranked_heads()
    if not ranked:
        return ["no head was measured"]
    measured = f"{counted(len(ranked), 'head')} (of {sum(sidecar.manifest.gate.heads)})"
    table = _table("head", len(ranked), measured, with_loss=False)
    most = max(ranked[0][2], 1e-12)
    for index, head, won in ranked[:ROWS]:
        layer = damage.layers[index]
        opened = layer.head_kl_open[head]
        table.add_row(
            f"{index}.{head}", percent(float(sidecar.density[index][head])), percent(layer.head_teacher_error[head]),
            percent(layer.head_student_error[head]), f"{won:+.4f}",
            "" if opened is None else f"{damage.kl - opened:+.4f}", bar(max(0.0, won / most), BAR),
        )  # fmt: skip
    return [table]


def _table(first: str, rows: int, what: str, *, with_loss: bool) -> Table:
    shown = f"{ROWS} of {what}" if rows > ROWS else what
    title = f"{shown}, each alone: KL won when patched from the base, when opened"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1))
    names = [first, "density", "error, base's inputs", "error, own inputs", "patched", "opened"]
    for name in [*names, *(["opened, loss - base"] if with_loss else [])]:
        table.add_column(name, justify="right", header_style="dim")
    table.add_column("", style="cyan", no_wrap=True)
    return table
