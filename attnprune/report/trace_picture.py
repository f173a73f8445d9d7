"""A trace as a picture: tokens as columns, layers as rows from bottom to top, arcs in the colours of their heads."""

from __future__ import annotations

import math
from colorsys import hls_to_rgb
from io import BytesIO
from typing import TYPE_CHECKING

from attnprune.report.traces import said, shown

if TYPE_CHECKING:
    from PIL import ImageFont

    from attnprune.tracing.result import Message, ModelTrace, Trace

_SMOOTH = 2  # drawn so many times larger, then scaled down
_LEFT, _TOP, _BOTTOM = 44, 52, 96
_ENTRY, _LINE_HEIGHT = 70, 18  # of the legend
_INK, _DIM, _LINE = (29, 33, 38), (93, 102, 112), (226, 228, 230)

Point = tuple[float, float]


def trace_png(result: Trace) -> bytes:
    """The first model's messages as PNG."""
    from PIL import Image, ImageDraw, ImageFont

    model, count = result.models[0], len(result.tokens)
    column, row = max(17, min(72, 1200 // count)), max(14, min(44, 640 // model.layers))
    width = max(_LEFT + column * count + 30, 420)
    heads, per_line = sorted({message.head for message in model.messages}), (width - 16) // _ENTRY
    legend = _TOP + row * model.layers + _BOTTOM
    height = legend + math.ceil(len(heads) / per_line) * _LINE_HEIGHT
    image = Image.new("RGB", (width * _SMOOTH, height * _SMOOTH), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(12 * _SMOOTH)

    def place(position: float, level: float) -> Point:
        return _SMOOTH * (_LEFT + column * (position + 0.5)), _SMOOTH * (_TOP + row * (model.layers - level))

    title = f"{said(result, width // 8)}  -> {shown(model.predicted.text)}"
    draw.text((8 * _SMOOTH, 8 * _SMOOTH), title, _INK, font)
    note = f"{len(model.messages):,} of {model.open:,} messages keep {model.kept.share:.2f} of the prediction"
    draw.text((8 * _SMOOTH, 26 * _SMOOTH), note, _DIM, font)
    for position in range(count):
        draw.line((*place(position, 0), *place(position, model.layers)), _LINE, _SMOOTH)
    for layer in range(0, model.layers, math.ceil(15 / row)):
        x, y = place(-0.5, layer + 0.5)
        draw.text((x - 8 * _SMOOTH, y), str(layer), _DIM, font, anchor="rm")
    for message in reversed(model.messages):
        points = _curve(place(message.key, message.layer), place(message.query, message.layer + 1))
        draw.line(points, _colour(message.head, model), round(_SMOOTH * _width(message, model)), joint="curve")
    for position, token in enumerate(result.tokens):
        x, y = place(position, 0)
        label = _slanted(shown(token.text, 14), font)
        image.paste(_INK, (round(x - label.width + 6 * _SMOOTH), round(y + 6 * _SMOOTH)), label)
    for index, head in enumerate(heads):
        x, y = 8 + index % per_line * _ENTRY, legend + index // per_line * _LINE_HEIGHT
        draw.rectangle([_SMOOTH * at for at in (x, y, x + 9, y + 9)], _colour(head, model))
        draw.text((_SMOOTH * (x + 14), _SMOOTH * (y + 5)), f"head {head}", _DIM, font, anchor="lm")
    raw = BytesIO()
    image.resize((width, height), Image.Resampling.LANCZOS).save(raw, "PNG", optimize=True)
    return raw.getvalue()


def _curve(start: Point, end: Point, steps: int = 24) -> list[Point]:
    """An arc that leaves and arrives upright."""
    (x1, y1), (x2, y2) = start, end
    lift = 0.75 * (y1 - y2)
    points = []
    for step in range(steps + 1):
        t = step / steps
        a, b, c, d = (1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3
        points.append(((a + b) * x1 + (c + d) * x2, a * y1 + b * (y1 - lift) + c * (y2 + lift) + d * y2))
    return points


def _colour(head: int, model: ModelTrace) -> tuple[int, int, int]:
    red, green, blue = hls_to_rgb(head / model.heads, 0.42, 0.68)
    return round(255 * red), round(255 * green), round(255 * blue)


def _width(message: Message, model: ModelTrace) -> float:
    """In pixels, over three decades of the effect."""
    most = max(abs(m.effect) for m in model.messages) or 1.0
    share = 1 + math.log10(max(abs(message.effect) / most, 1e-3)) / 3
    return 0.8 + 3.2 * share**2


def _slanted(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont):
    """A label that rises to its column, as a mask."""
    from PIL import Image, ImageDraw

    left, top, right, bottom = font.getbbox(text)
    mask = Image.new("L", (max(1, math.ceil(right - left)), max(1, math.ceil(bottom - top))))
    ImageDraw.Draw(mask).text((-left, -top), text, 255, font)
    return mask.rotate(58, expand=True, resample=Image.Resampling.BICUBIC)
