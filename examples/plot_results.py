"""The curves of examples/results as PNG files beside them: python examples/plot_results.py"""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter, StrMethodFormatter
from PIL import Image

RESULTS = Path(__file__).parent / "results"
SMOLLM2 = {  # file -> (what the run was, thousand tokens before it, thousand tokens a step)
    "smollm2-cpu": ("first recipe, KL ≤ 0.05, T = 256", 0, 1.024),
    "smollm2-wide": ("tolerance 0.3 → 0.05, T = 512", 0, 1.024),
    "smollm2-kl": ("default recipe, 0.125 → 0.05, T = 512", 0, 1.024),
    "smollm2-frontier": ("20, 10, 4.8 % in turn, T = 512", 0, 1.024),
    "smollm2-half-long": ("from there at 0.5 %", 409.6, 0.512),
    "smollm2-half-gpu": ("from the base at 0.45 %, on a GPU", 0, 16.384),
}
MANY = 6  # million tokens


def small_lm() -> Figure:
    """Loss on unseen text against density of every run on the small language model, and the density as tokens go by."""
    runs = json.loads((RESULTS / "recipe-search.json").read_text())["runs"]
    runs = [run for run in runs if not run["variant"].startswith("held at 1 %")]  # one table; nearly one point here
    figure = Figure(figsize=(14, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    variants = list(dict.fromkeys(run["variant"] for run in runs))
    for colour, variant in enumerate(variants):
        same = [run for run in runs if run["variant"] == variant]
        style: dict[str, Any] = {
            "color": colormaps["turbo"](colour / len(variants)),
            "marker": "s" if "control" in variant else "oDv"[colour % 3],
        }
        for run in same:
            test, fill = run["test"], "full" if run["tokens"] > MANY * 1e6 else "none"
            left.plot(100 * test["density"], test["loss"] - test["base_loss"], linestyle="", fillstyle=fill, **style)
            if "control" in variant:
                continue
            per_step = run["tokens"] / run["settings"]["train"]["steps"] / 1e6
            steps = [point["step"] * per_step for point in run["curve"]]
            right.plot(steps, [100 * point["density"] for point in run["curve"]], alpha=0.7, **style)
        right.plot([], label=variant, linestyle="", **style)
    left.axhline(0, color="0.6", linewidth=1)
    left.set(
        xlabel="density on test.jsonl, %", xscale="log", ylabel="loss - base on test.jsonl, nats",
        title=f"end of each run (filled: more than {MANY} million tokens)",
    )  # fmt: skip
    left.xaxis.set_major_formatter(ScalarFormatter())
    figure.legend(fontsize=7, loc="outside right upper")
    right.set(xlabel="million tokens", ylabel="density on held-out text, %", yscale="log", title="on the way")
    return figure


def broad_lm() -> Figure:
    """Loss and KL against density on unseen text: frontiers, the published settings, and what held 1 %."""
    runs = json.loads((RESULTS / "broad-lm.json").read_text())["runs"]
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    gaps = [run["unseen"]["loss"] - run["unseen"]["base_loss"] for run in runs if run["variant"].startswith("control")]
    left.axhspan(min(gaps), max(gaps), color="0.85", label="open gates, the same budget")
    budget = max(run["tokens"] for run in runs)
    runs = [run for run in runs if run["tokens"] == budget and not run["variant"].startswith("control")]
    for colour, variant in enumerate(dict.fromkeys(run["variant"] for run in runs)):
        for run in (run for run in runs if run["variant"] == variant):
            points = [point["unseen"] for point in run.get("frontier", [])] + [run["unseen"]]
            density = [100 * point["density"] for point in points]
            style: dict[str, Any] = {"color": f"C{colour}", "marker": "o", "alpha": 0.8}
            left.plot(density, [point["loss"] - point["base_loss"] for point in points], **style)
            right.plot(density, [point["kl"] for point in points], **style)
        left.plot([], label=variant, color=f"C{colour}", marker="o")
    left.axhline(0, color="0.6", linewidth=1)
    right.axhline(0.05, color="0.6", linewidth=1)
    left.set(ylabel="loss - base, nats")
    right.set(ylabel="KL(base ‖ sparse), nats", yscale="log")
    for axes in (left, right):
        axes.set(xlabel="density on unseen text, %", xscale="log")
    for axis in (left.xaxis, right.xaxis, right.yaxis):
        _plain_numbers(axis)
    figure.legend(*left.get_legend_handles_labels(), fontsize=8, ncols=3, loc="outside lower center")
    return figure


def smollm2() -> Figure:
    """Open edges per query and KL to the base of the runs on SmolLM2-135M, as tokens go by."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, (label, before, per_step) in SMOLLM2.items():
        curve = json.loads((RESULTS / f"{name}.json").read_text())["curve"]
        curve = [point for point in curve if before + point["step"] > 0]
        thousands = [before + point["step"] * per_step for point in curve]
        left.plot(thousands, [point["eval_edges_per_query"] for point in curve], marker=".", label=label)
        right.plot(thousands, [point["eval_kl"] for point in curve], marker=".", label=label)
    left.set(xlabel="thousand tokens", xscale="log", ylabel="open edges per query and head", yscale="log")
    right.axhline(0.05, color="0.6", linewidth=1)
    right.set(xlabel="thousand tokens", xscale="log", ylabel="KL(base ‖ sparse) on held-out text, nats", yscale="log")
    for axis in (left.xaxis, right.xaxis, left.yaxis, right.yaxis):
        _plain_numbers(axis)
    figure.legend(*left.get_legend_handles_labels(), fontsize=8, ncols=3, loc="outside lower center")
    return figure


def smollm2_frontier() -> Figure:
    """KL and loss - base against open edges per query: a run down a frontier, its sidecars, and another run's end."""
    found, other = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("smollm2-frontier", "smollm2-kl"))
    sidecars = [*found["frontier"], found]
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, value in zip(figure.subplots(1, 2), ("kl", "loss"), strict=True):
        lines = [("held-out text, on the way", "-", [_values(p, value, "eval_") for p in found["curve"]])]
        lines += [("held-out text, kept", "o", [_values(s["result_on_the_held_out_split"], value) for s in sidecars])]
        for number, text in enumerate(report["data"] for report in found["other_texts"]):
            lines += [(Path(text).name, "o--", [_values(s["other_texts"][number], value) for s in sidecars])]
        lines += [("0.41 M tokens under KL", "k*", [_values(other["result_on_the_held_out_split"], value)])]
        for label, style, points in lines:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=7)
        axes.axhline(0.05 if value == "kl" else 0, color="0.6", linewidth=1)
        axes.set(xlabel="open edges per query and head", xscale="log")
        axes.set(ylabel="KL(base ‖ sparse), nats" if value == "kl" else "loss - base, nats")
        _plain_numbers(axes.xaxis)
    figure.legend(*axes.get_legend_handles_labels(), fontsize=8, ncols=3, loc="outside lower center")
    return figure


def _values(point: dict[str, Any], value: str, prefix: str = "") -> tuple[float, float]:
    """(open edges per query, KL or loss - base) of an evaluation."""
    base = point[f"{prefix}base_loss"] if value == "loss" else 0.0
    return point[f"{prefix}edges_per_query"], point[f"{prefix}{value}"] - base


def _plain_numbers(axis: Any) -> None:
    """1, 2, 5 of each decade of a logarithmic axis."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def main() -> None:
    for name, figure in (
        ("recipe-search.png", small_lm()), ("broad-lm.png", broad_lm()), ("smollm2.png", smollm2()),
        ("smollm2-frontier.png", smollm2_frontier()),
    ):  # fmt: skip
        drawn = BytesIO()
        figure.savefig(drawn, dpi=120)
        with Image.open(drawn) as image:  # a palette: a third of the size, and no eye sees it
            image.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(RESULTS / name, optimize=True)
        print(RESULTS / name)


if __name__ == "__main__":
    main()
