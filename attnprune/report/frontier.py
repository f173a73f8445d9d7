"""The frontier of a run: what each density costs, as a table and as a picture. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from attnprune.errors import not_installed
from attnprune.runs.frontier import Point
from attnprune.units import percent

PICTURE_FILE = "frontier.png"


def frontier_data(points: list[Point]) -> list[dict[str, Any]]:
    """A frontier for JSON."""
    return [point.model_dump() for point in points]


def frontier_table(points: list[Point], place: int | None = None) -> Table:
    """One row for each sidecar; `place` is marked as the one that is looked at."""
    table = Table(title=f"frontier, at T = {points[0].seq_len}", title_justify="left", box=None)
    table.add_column("")
    table.add_column("folder", header_style="dim", overflow="fold")
    for name in ("limit", "density", "edges", "KL", "loss - base", "control"):
        table.add_column(name, justify="right", header_style="dim")
    for number, point in enumerate(points):
        control = "" if point.control_loss is None else f"{point.control_loss - point.base_loss:+.4f}"
        table.add_row(
            "▶" if number == place else "", point.folder, percent(point.limit),
            percent(point.density) + ("" if point.feasible else " (over)"), f"{point.edges_per_query:.3g}",
            f"{point.kl:.4f}", f"{point.gap:+.4f}", control,
        )  # fmt: skip
    table.caption = "edges: open per query and head; control: loss - base with every gate open"
    table.caption_justify = "left"
    return table


def draw_frontier(points: list[Point], file: Path) -> None:
    """KL, loss - base and the open-gate control against density, as a PNG.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise not_installed("matplotlib", "plots") from None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    density = [100 * point.density for point in points]
    axes.plot(density, [point.kl for point in points], "o-", label="KL(base || sparse)")
    axes.plot(density, [point.gap for point in points], "s-", label="loss - base")
    controls = [point.control_loss for point in points]
    if None not in controls:
        gaps = [control - point.base_loss for control, point in zip(controls, points, strict=True) if control]
        axes.plot(density, gaps, "^:", color="0.5", label="the same weights, every gate open: loss - base")
    axes.axhline(0, color="0.7", linewidth=1)
    axes.set(xscale="log", xlabel=f"open edges, % (T = {points[0].seq_len})", ylabel="nats per token")
    axes.invert_xaxis()
    top = axes.secondary_xaxis("top")
    top.set_xlabel("open edges per query and head")
    for axis, labels in ((axes, density), (top, [point.edges_per_query for point in points])):
        axis.set_xticks(density, [f"{value:.2g}" for value in labels])
        axis.minorticks_off()
    axes.legend()
    figure.savefig(file, dpi=120)
