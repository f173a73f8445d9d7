"""A trace outside a browser: the text in its title, its tables on the terminal, its picture."""

from __future__ import annotations

import re
from colorsys import hls_to_rgb
from io import BytesIO
from time import perf_counter

import pytest
from PIL import Image
from rich.console import Console

from attnprune.report.trace_page import render_page
from attnprune.report.trace_picture import trace_png
from attnprune.report.traces import said, summary
from tests.helpers.traces import model_trace, trace_of

CONTROL = "\x1b[31m\n\u202e\u200b\x00 x"


def test_a_cut_text_has_whole_escapes():
    result = trace_of(model_trace(5, 3), tokens=["\u202e" * 5, "\x1b" * 5, "end"])
    whole = r"\u202e" * 5 + r"\x1b" * 5 + "end"
    assert said(result, len(whole)) == whole
    for limit in range(1, len(whole)):
        line = said(result, limit)
        assert len(line) <= limit
        assert re.fullmatch(r"…(\\u202e)*(\\x1b)*(end|nd|d|)", line)


@pytest.mark.parametrize(
    ("tokens", "text", "title"),
    [
        (["I", " \ufffd", "\ufffd", " ca", "f\ufffd", "\ufffd"], "I 猫 café", "I 猫 café"),
        (["I", " \ufffd", "\ufffd\ufffd", " now"], "I 猫犬 now and later", "I 猫犬 now"),  # traced before the end
        (["\ufffd", "\ufffd", "\ufffd", "\ufffd", "!"], "猫犬!", "猫犬!"),
        (["I", " \ufffd"], "I 猫犬", "I \ufffd"),  # between the bytes of a character: no text ends here
        (["<s>", "I", " \ufffd", "\ufffd", "!"], "I 猫!", "<s>I 猫!"),
        (["<s>", "I", "am", "\ufffd", "\ufffd"], "I am 猫", "<s>Iam\ufffd\ufffd"),  # tokens without the text's spaces
    ],
)  # fmt: skip
def test_characters_split_over_tokens_are_whole_in_the_title(tokens, text, title):
    result = trace_of(model_trace(3, len(tokens)), tokens=tokens, text=text)
    assert said(result, 60) == title
    assert f"<title>Trace of model: {title} →" in render_page(result).replace("&lt;s&gt;", "<s>")


def test_a_title_of_many_parts_is_found_at_once():
    tokens = ["\ufffd\ufffd", "a"] * 250 + ["b"]  # the text ends otherwise: every place is tried
    started = perf_counter()
    assert said(trace_of(model_trace(1, 501), tokens=tokens, text="a" * 1000), 5000) == "".join(tokens)
    assert perf_counter() - started < 2


@pytest.mark.parametrize("width", [80, 140])
def test_the_table_fits_and_drives_no_terminal(width):
    tokens = [CONTROL, " Mary" * 9, "\u202eend"] + [CONTROL, "[/]猫"] * 48 + ["[red]When[/red]"]
    models = [model_trace(40, 100, token="[/]\x1b[2J"), model_trace(40, 100, "x" * 90, "dense", layers=30, heads=32)]
    console = Console(width=width, record=True, force_terminal=False, highlight=False, soft_wrap=True)
    with console.capture() as captured:
        for line in summary(trace_of(*models, tokens=tokens)):
            console.print(line) if not isinstance(line, str) else console.print(line, markup=False)
    lines = captured.get().splitlines()
    assert max(map(len, lines)) <= width
    assert any(line.startswith("share kept: 1 - KL") for line in lines)
    assert not {"\x1b", "\u202e", "\x00"} & set(captured.get())
    assert "[red]When[/red]"[:12] in captured.get()
    assert "+20 more" in captured.get()
    for cell in ("weight", "effect", "share kept", "random sets", "0.910"):
        assert cell in captured.get()


@pytest.mark.parametrize("count", [0, 3, 300])
def test_the_picture(count):
    tokens = ["When", CONTROL, "猫", " end"] * 25
    picture = Image.open(BytesIO(trace_png(trace_of(model_trace(count, 100, layers=30, heads=9), tokens=tokens))))
    assert picture.format == "PNG"
    assert picture.width > 1000
    colours = {pixel for _, pixel in picture.getcolors(1 << 24)}
    coloured = [c for c in colours if max(c) - min(c) > 90]
    assert bool(coloured) == (count > 0)


@pytest.mark.parametrize(("layers", "heads", "tokens"), [(4, 4, 3), (30, 32, 3), (30, 32, 100)])
def test_the_picture_says_which_colour_is_which_head(layers, heads, tokens):
    result = trace_of(model_trace(300, tokens, layers=layers, heads=heads), tokens=[" end"] * tokens)
    picture = Image.open(BytesIO(trace_png(result)))
    legend = picture.crop((0, 52 + max(14, min(44, 640 // layers)) * layers + 96, *picture.size))  # below the labels
    colours = {colour for _, colour in legend.getcolors(1 << 24)}
    hues = [tuple(round(255 * part) for part in hls_to_rgb(head / heads, 0.42, 0.68)) for head in range(heads)]
    assert set(hues) <= colours
