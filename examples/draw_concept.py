"""The idea in one picture, with a made-up head: python examples/draw_concept.py [docs/pictures/concept.png]"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Curve

TARGET = Path(__file__).parents[1] / "docs" / "pictures" / "concept.png"
TOKENS = ["When", "Mary", "and", "John", "met", ",", "John", "told"]
THRESHOLD = 1.2  # a gate opens where score + bias > 0; here bias = -THRESHOLD
MESSAGES = [(0, 1, 3, "C1"), (1, 3, 6, "C0"), (2, 6, 7, "C0"), (2, 1, 7, "C2")]  # layer, from, to, colour
LAYERS = 3
INK, FAINT = "#1f2430", "#c9ced6"


def scores() -> np.ndarray:
    """Scores of a head that reads equal tokens, some names and little else: [query, key], nan where not visible."""
    count = len(TOKENS)
    made = np.random.default_rng(1).normal(0, 0.45, (count, count))
    for query, key in [(6, 3), (7, 1), (7, 6), (3, 1), (4, 3), (0, 0)]:
        made[query, key] = 2.2
    return np.where(np.tri(count, dtype=bool), made, np.nan)


def softmax(values: np.ndarray) -> np.ndarray:
    """Rows that sum to 1 over what is visible."""
    weights = np.where(np.isnan(values), 0, np.exp(np.nan_to_num(values)))
    return weights / weights.sum(1, keepdims=True)


def pattern(axes: Any, weights: np.ndarray, title: str, below: str) -> None:
    """A pattern as a triangle of squares: queries down, keys to the right."""
    count = len(TOKENS)
    for query in range(count):
        for key in range(query + 1):
            weight = weights[query, key]
            colour = "white" if weight == 0 else (0.20, 0.32, 0.74, 0.15 + 0.85 * weight**0.6)
            square = {"facecolor": colour, "edgecolor": FAINT, "linewidth": 0.8}
            axes.add_patch(_square(key, query, square))
    axes.set(xlim=(-0.1, count + 0.1), ylim=(count + 0.1, -0.1), aspect="equal")
    axes.set_xticks(np.arange(count) + 0.5, TOKENS, rotation=60)
    axes.set_yticks(np.arange(count) + 0.5, TOKENS)
    _finish(axes, title, below)


def _square(x: float, y: float, look: dict[str, Any]) -> PathPatch:
    corners = [(x + 0.06, y + 0.06), (x + 0.94, y + 0.06), (x + 0.94, y + 0.94), (x + 0.06, y + 0.94)]
    return PathPatch(Curve([*corners, corners[0]], closed=True), **look)


def messages(axes: Any) -> None:
    """Tokens as columns, layers as rows, and the messages that one prediction needs."""
    count = len(TOKENS)
    for column in range(count):
        axes.plot([column, column], [0, LAYERS], color=FAINT, linewidth=1.2, zorder=0)
    for layer, source, target, colour in MESSAGES:
        knots = [(source, layer), (source, layer + 0.75), (target, layer + 0.25), (target, layer + 1)]
        curve = Curve(knots, [Curve.MOVETO, *[Curve.CURVE4] * 3])
        axes.add_patch(PathPatch(curve, fill=False, edgecolor=colour, linewidth=3, capstyle="round"))
    axes.annotate("Mary", (count - 1, LAYERS + 0.08), ha="center", va="bottom", color="C2", fontweight="bold")
    axes.set(xlim=(-0.5, count - 0.5), ylim=(-0.05, LAYERS + 0.45))
    axes.set_xticks(range(count), TOKENS, rotation=60)
    axes.set_yticks(np.arange(LAYERS) + 0.5, [f"layer {layer}" for layer in range(LAYERS)])
    _finish(axes, "one prediction", "a trace finds the few messages\nthat are needed for it")


def _finish(axes: Any, title: str, below: str) -> None:
    axes.set_title(title, color=INK, fontsize=13, fontweight="bold", pad=8)
    axes.set_xlabel(below, color=INK, fontsize=11, labelpad=8)
    axes.tick_params(length=0, labelsize=9.5, labelcolor=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)


def draw() -> Figure:
    """A dense head, the same head with gates, and a trace."""
    made = scores()
    dense = softmax(made)
    figure = Figure(figsize=(11, 4.3), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    pattern(left, dense, "a dense head", "every token reads\nevery earlier token")
    gated = np.where(np.nan_to_num(made, nan=-np.inf) > THRESHOLD, dense, 0)
    pattern(middle, gated, "the head with gates", "an edge stays only if\nits score + the head's bias > 0")
    messages(right)
    return figure


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else TARGET
    draw().savefig(target, dpi=90, metadata={"Software": None}, pil_kwargs={"optimize": True})
