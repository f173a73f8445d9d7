"""Layers x heads on a terminal: numbers where they fit, else one shade per head, told apart without colour too."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from rich.console import Console, ConsoleOptions
from rich.text import Text

# Largest density of a class -> glyph, colour, name.
_CLASSES = [
    (0.0, "·", "bright_black", "closed"),
    (0.003, "░", "blue", "< 0.3 %"),
    (0.03, "▒", "cyan", "< 3 %"),
    (0.3, "▓", "yellow", "< 30 %"),
    (1.0, "█", "red", ">= 30 %"),
]
_NUMBER = 4  # columns of a number
_SIDE = "  mean %  closed"


class HeadGrid:
    """The density of every head, `density` [layers][heads], with each layer's mean and number of closed heads."""

    def __init__(self, density: list[np.ndarray]):
        self.density = density
        self.heads = max(len(layer) for layer in density)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        left, right = len("layer "), len(_SIDE)
        room = options.max_width - left
        width = _NUMBER if room >= _NUMBER * self.heads else 2 if room - right >= 2 * self.heads else 1
        has_side = room - right >= width * self.heads
        step = 1 if width == _NUMBER else 8
        yield Text("density of each head, % of its visible edges: a row per layer, a column per head", style="italic")
        names = (f"{head:>{width}}" if step == 1 else f"{head:<{step * width}}" for head in range(0, self.heads, step))
        names = (" " * (width - 1) * (step > 1) + "".join(names)).ljust(self.heads * width)[: self.heads * width]
        yield Text(f"layer {names}{_SIDE if has_side else ''}", style="bright_black")
        for index, layer in enumerate(self.density):
            row = Text.assemble((f"{index:>5} ", "bright_black"))
            for share in layer:
                glyph, colour = look(float(share))
                row.append((number(float(share)) if width == _NUMBER else glyph).rjust(width), style=colour)
            row.append(" " * (self.heads - len(layer)) * width)
            if has_side:
                closed = int((layer == 0).sum())
                row.append(f"  {number(float(layer.mean())):>6}  {closed or '':>6}")
            yield row
        yield Text("· closed   ≈0 less than 0.01 %") if width == _NUMBER else legend()


def look(share: float) -> tuple[str, str]:
    """(glyph, colour) of a density."""
    for limit, glyph, colour, _ in _CLASSES:
        if share <= limit if limit == 0 else share < limit:
            return glyph, colour
    return _CLASSES[-1][1:3]


def number(share: float) -> str:
    """A density in percent with two significant digits, in three columns."""
    percent = 100 * share
    if percent == 0:
        return "·"
    if percent < 0.0095:
        return "≈0"
    if percent < 0.995:
        return f"{percent:.2f}"[1:]
    return f"{percent:.1f}" if percent < 9.95 else f"{percent:.0f}"


def legend() -> Text:
    """What the glyphs and colours say."""
    text = Text()
    for _, glyph, colour, name in _CLASSES:
        text.append(f"{glyph} {name}   ", style=colour)
    return text
