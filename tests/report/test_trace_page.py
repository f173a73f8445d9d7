"""The page of a trace in a real browser: what it draws is the set, it follows messages, it asks for nothing."""

from __future__ import annotations

from itertools import pairwise

import pytest
from rich.console import Console

from attnprune.circuit.record import Opening, Writer
from attnprune.report.trace_page import render_page
from attnprune.report.traces import summary
from tests.helpers.pages import HOSTILE, Outline, in_browser
from tests.helpers.traces import model_trace, trace_of

CONTROL = "\x1b[31m\n\u202e\u200b\x00 x"


@pytest.fixture
def two_models():
    return trace_of(model_trace(24, 10), model_trace(60, 10, "some/base", "dense", seed=1))


@pytest.fixture
def open_trace(open_html):
    """Open the page of a trace."""
    return lambda result, **options: open_html(render_page(result), **options)


def drawn(page):
    return page.js("[...document.querySelectorAll('.message')].filter(m => m.style.display !== 'none').length")


def hot(page):
    """The messages that are followed, as [layer, head, query, key]."""
    ends = "map(m => [m.layer, m.head, m.query, m.key])"
    rows = page.js(f"state.model.messages.filter(m => m.element.classList.contains('hot')).{ends}")
    return {tuple(row) for row in rows}


def followed(messages, start):
    """What a click on a message must mark: by the definition, in its own words."""

    def grow(message, touches):
        return {message}.union(*(grow(other, touches) for other in messages if touches(other, message)))

    up = grow(start, lambda m, e: m[0] < e[0] and m[2] == e[3])
    down = grow(start, lambda m, e: m[0] > e[0] and m[3] == e[2])
    return up | down


def middle(page, selector):
    """Where an arc is half-way."""
    return page.js(
        "(p => { const q = p.getPointAtLength(p.getTotalLength() / 2).matrixTransform(p.getScreenCTM());"
        f"return [q.x, q.y] }})({selector})"
    )


def press(page, x, y):
    for kind in ("mousePressed", "mouseReleased"):
        page.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)


@in_browser
def test_slider_changes_the_drawing_and_the_tiles(open_trace, two_models):
    page = open_trace(two_models)
    assert drawn(page) == 24
    assert page.text("#counts dd").startswith("0.910")
    seen = set()
    for k in (1, 2, 7, 13, 24):
        page.slide(k)
        assert drawn(page) == k
        assert page.text("#k-text") == f"{k} of 24"
        seen.add(page.text("#counts dd"))
        assert page.js("document.querySelectorAll('#list tr.out').length") == 24 - k
    assert len(seen) == 5


@in_browser
def test_shares_say_whether_they_were_measured(open_trace, two_models):
    page = open_trace(two_models)
    points = {p.size: p.share for p in two_models.models[0].curve}
    for k in range(1, 25):
        page.slide(k)
        value, note = page.text("#counts dd").split("measured")[0], page.text("#counts dd")
        if k in points:
            assert value == f"{points[k]:.3f}"
        else:
            low, high = max(s for s in points if s < k), min(s for s in points if s > k)
            assert f"between {low} and {high} messages" in note
            assert points[low] <= float(value.removeprefix("≈ ").removesuffix("not ")) <= points[high]


@in_browser
def test_click_follows_a_message_up_and_down(open_trace, two_models):
    page = open_trace(two_models)
    messages = {(m.layer, m.head, m.query, m.key) for m in two_models.models[0].messages}
    assert hot(page) == set()
    page.move(*middle(page, "document.querySelectorAll('.message')[23]"))
    assert page.text("#tip").startswith(page.js("tipOf(messageOf.get(document.querySelectorAll('.message')[23]))")[:6])
    press(page, *middle(page, "document.querySelectorAll('.message')[23]"))
    chosen = tuple(page.js("(m => [m.layer, m.head, m.query, m.key])(state.chosen)"))
    assert hot(page) == followed(messages, chosen)
    assert page.js("document.getElementById('graph').classList.contains('focused')")
    assert page.text("#detail h2").endswith(f"layer {chosen[0]}, head {chosen[1]}")
    page.js("document.getElementById('graph').focus()")
    sizes = set()
    for _ in range(20):
        page.press("ArrowRight", 39)
        chosen = tuple(page.js("(m => [m.layer, m.head, m.query, m.key])(state.chosen)"))
        assert hot(page) == followed(messages, chosen)
        sizes.add(len(hot(page)))
    assert len(sizes) > 3
    page.press("Escape", 27)
    assert hot(page) == set()


@in_browser
def test_an_explained_message_says_why_it_is_open(open_trace, two_models):
    writers = [Writer(source="a0.h1", value=1.25, without=-0.5, open_without=False),
               Writer(source="m0", value=-0.25, without=None, open_without=None)]  # fmt: skip
    message = two_models.models[0].messages[0]
    message.opened = Opening(score=2.0, bias=-1.0, is_open=True, by_query=writers, by_key=writers[1:],
                             query_remainder=1.0, key_remainder=2.25)  # fmt: skip
    page = open_trace(two_models)
    page.js("choose(state.model.messages[0])")
    detail = page.text("#detail")
    assert "2.00, bias -1.00" in detail
    assert "a0.h1 +1.25 (-0.50, closed)  m0 -0.25  others +1.00" in detail
    page.js("choose(state.model.messages[1])")
    assert "bias" not in page.text("#detail")
    console = Console(width=80, record=True, force_terminal=False)
    console.print(*summary(two_models), sep="\n")
    assert "a0.h1 +1.25 (-0.50x)  m0 -0.25  others +1.00" in console.export_text()


@in_browser
def test_following_stays_within_the_size(open_trace, two_models):
    page = open_trace(two_models)
    page.slide(8)
    page.js("choose(state.model.messages[0])")
    first = {(m.layer, m.head, m.query, m.key) for m in two_models.models[0].messages[:8]}
    assert hot(page) <= first
    page.js("document.querySelector('#list').scrollIntoView()")
    page.click("#list tbody tr:nth-child(12)")  # beyond the size: it is shown
    assert drawn(page) == 12
    assert page.js("state.chosen.rank") == 11


@in_browser
def test_toggle_switches_the_model(open_trace, two_models):
    page = open_trace(two_models)
    page.click("[name=model][value='1']")
    assert drawn(page) == 60
    assert page.js("document.querySelectorAll('#list tbody tr').length") == 60
    page.click("[name=model][value='0']")
    assert drawn(page) == 24


@in_browser
@pytest.mark.parametrize("width", [1280, 400])
def test_a_hundred_tokens_fit_and_are_drawn_at_once(open_trace, width):
    tokens = [f" word{i}" for i in range(100)]
    page = open_trace(trace_of(model_trace(400, 100, layers=30, heads=9), tokens=tokens))
    page.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
    milliseconds = page.js(
        "(t => { turnTo(models[0]); document.body.offsetHeight; return performance.now() - t })(performance.now())"
    )
    assert milliseconds < 2000
    assert drawn(page) == 400
    assert page.js("document.querySelectorAll('#graph .token').length") == 100
    assert page.js("document.documentElement.scrollWidth") == width  # the picture scrolls in its own box
    assert page.js("document.getElementById('scroll').scrollWidth") > width


@in_browser
def test_heads_have_colours_in_light_and_dark(open_trace, two_models):
    stroke = "[...document.querySelectorAll('.message')].map(m => [messageOf.get(m).head, getComputedStyle(m).stroke])"
    pages = [open_trace(two_models, dark=dark) for dark in (False, True)]
    light, dark = ({(head, colour) for head, colour in page.js(stroke)} for page in pages)
    assert len(light) == len(dark) == 4
    assert not light & dark
    assert page_ground(pages[0]) != page_ground(pages[1])


def page_ground(page):
    return page.js("getComputedStyle(document.body).backgroundColor")


@in_browser
def test_tokens_never_become_markup(open_trace):
    tokens = [HOSTILE, CONTROL, "@@data@@", " end"]
    models = [model_trace(9, 4, HOSTILE, token=HOSTILE), model_trace(9, 4, "@@data@@", "dense", seed=1, token=CONTROL)]
    page = open_trace(trace_of(*models, tokens=tokens))
    for value in ("1", "0"):
        page.click(f"[name=model][value='{value}']")
        page.js("choose(state.model.messages[0])")
        assert page.js("window.hacked") is None
    assert page.js("document.querySelectorAll('img, svg[onload]').length") == 0
    assert page.js("document.scripts.length") == 2
    labels = page.js("[...document.querySelectorAll('.token title')].map(t => t.textContent)")
    assert labels[0] == HOSTILE.replace(" ", "·") + "(0)"
    assert labels[1] == r"\x1b[31m\n\u202e\u200b\x00·x(1)"


@in_browser
@pytest.mark.parametrize(
    ("count", "marks"), [(1, ["1", "2"]), (8, ["1", "2", "5"]), (60, ["1", "2", "5", "10", "20", "50"]),
                         (4000, ["1", "10", "100", "1,000"])]
)  # fmt: skip
def test_the_axis_of_the_curve_has_marks(open_trace, count, marks):
    page = open_trace(trace_of(model_trace(count, 10)))
    found = page.js("[...document.querySelectorAll('#chart text')].map(t => [t.textContent, t.getAttribute('y')])")
    level = found[-1][1]
    assert [text for text, y in found if y == level] == marks
    boxes = page.js(
        "[...document.querySelectorAll('#chart text')].slice(3).map(t => t.getBBox()).map(b => [b.x, b.x + b.width])"
    )
    assert all(left[1] < right[0] for left, right in pairwise(boxes))
    assert boxes[-1][1] <= 300


@in_browser
@pytest.mark.parametrize(
    ("lowest", "labels"), [(-0.02, ["1", "0.5", "0"]), (-0.374, ["1", "0.5", "0", "-0.37"]),
                           (-1.0, ["1", "0.5", "0", "-1"]), (-3808.0, ["1", "0.5", "0", "≤ -1"])]
)  # fmt: skip
@pytest.mark.parametrize("which", [0, 1])
def test_negative_shares_are_drawn_below_0(open_trace, two_models, lowest, labels, which):
    two_models.models[which].curve[2].share = lowest
    page = open_trace(two_models)
    found = page.js("[...document.querySelectorAll('#chart text')].map(t => [t.textContent, +t.getAttribute('y')])")
    height = dict(found[: len(labels)])
    assert [text for text, _ in found[: len(labels)]] == labels
    assert found[len(labels)][0] == "1"  # of the counts
    group = f"document.querySelectorAll('#chart g')[{1 - which}]"  # the shown model lies on top
    points = page.js(f"[...{group}.querySelector('polyline').points].map(p => p.y + 4)")
    unit = height["0"] - height["1"]
    for y, measured in zip(points, two_models.models[which].curve, strict=True):
        assert y == pytest.approx(height["0"] - unit * max(measured.share, -1), abs=0.1)
    assert page.js(f"{group}.querySelectorAll('circle').length") == len(points) - (lowest < -1)
    assert page.js(f"[...{group}.querySelectorAll('.beyond')].map(m => m.textContent)") == ["-3808.000"] * (lowest < -1)


@in_browser
@pytest.mark.parametrize("count", [1, 4])
def test_messages_to_oneself_swing_off_the_line_of_the_traced_token(open_trace, count):
    model = model_trace(count, 60)
    for message in model["messages"]:
        message |= {"layer": 2, "query": 59, "key": 59}
    page = open_trace(trace_of(model, tokens=[f" word{i}" for i in range(60)]))
    line = page.js("document.querySelector('#graph .traced').getBoundingClientRect().x")
    halves = [middle(page, f"document.querySelectorAll('.message')[{i}]")[0] for i in range(count)]
    assert all(line - half > 4 for half in halves)
    assert all(abs(a - b) > 1 for a, b in pairwise(sorted(halves)))


@in_browser
def test_few_layers_are_spread_over_the_card(open_trace):
    page = open_trace(trace_of(model_trace(5, 10, layers=4)))
    box = page.js("(b => [b.height, b.width])(document.querySelector('#graph svg').getBoundingClientRect())")
    card = page.js("document.querySelector('#stage section').getBoundingClientRect().height")
    assert box[0] > 0.75 * card


@in_browser
def test_what_a_value_raises_is_seen_at_400_pixels(open_trace):
    tokens = [" incomprehensibilities"] * 10
    page = open_trace(trace_of(model_trace(150, 10, layers=30, heads=16, token=" incomprehensible"), tokens=tokens))
    page.call("Emulation.setDeviceMetricsOverride", width=400, height=900, deviceScaleFactor=1, mobile=False)
    page.js("new Promise(requestAnimationFrame)")
    assert page.js("document.documentElement.scrollWidth") == 400
    assert page.js("(b => b.scrollWidth <= b.clientWidth)(document.getElementById('list'))")
    cells = "[...document.querySelectorAll('#list tr > *')]"
    assert page.js(f"{cells}.every(c => c.scrollWidth <= c.clientWidth)")
    ends = page.js("[...document.querySelectorAll('#list tr > :last-child')].map(c => c.getBoundingClientRect().right)")
    assert max(ends) <= page.js("document.getElementById('list').getBoundingClientRect().right")


@in_browser
def test_an_empty_set(open_trace):
    page = open_trace(trace_of(model_trace(0, 10)))
    assert drawn(page) == 0
    page.js("document.getElementById('graph').focus()")
    page.press("ArrowRight", 39)
    assert page.text("#counts dd").startswith("0.000")


def test_text_without_a_browser(two_models):
    outline = Outline(render_page(two_models))
    text = " ".join(outline.text)
    assert not {"src", "srcset", "action", "onload", "onerror", "onclick"} & {name for name, _ in outline.attributes}
    assert [value for name, value in outline.attributes if name == "href"] == ["data:,"]
    for fact in ("share 0.910", "share -0.020, from -0.100 to 0.050 in 8 draws", "a note", "24 of", "behind token 9"):
        assert fact in text


def test_hostile_text_without_a_browser():
    def tags(text):
        return Outline(render_page(trace_of(model_trace(5, 3, text, token=text), tokens=[text] * 3))).tags

    assert tags(HOSTILE) == tags("harmless")
    assert not {"\x1b", "\u202e", "\x00"} & set(render_page(trace_of(model_trace(5, 3), tokens=[CONTROL] * 3)))
