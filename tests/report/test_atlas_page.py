"""The page of an atlas in a real browser: grid, search and dossiers show the record, and it asks for nothing."""

from __future__ import annotations

from itertools import pairwise

import pytest
from rich.console import Console

from attnprune.report.atlas_page import render_page
from attnprune.report.atlases import ranked, summary
from tests.helpers.atlases import atlas_of, model_atlas
from tests.helpers.pages import HOSTILE, Outline, in_browser

CONTROL = "\x1b[31m\n\u202e\u200b\x00 x"


@pytest.fixture
def two_models():
    return atlas_of(model_atlas(), model_atlas(name="some/base", kind="dense", seed=1))


@pytest.fixture
def open_atlas(open_html):
    """Open the page of an atlas."""
    return lambda result, **options: open_html(render_page(result), **options)


def search(page, words):
    page.js(f"(s => {{ s.value = {words!r}; s.dispatchEvent(new Event('input')) }})(document.getElementById('search'))")
    places = "filter(h => !h.cell.classList.contains('out')).map(h => h.layer + '.' + h.head)"
    return [set(page.js(f"models[{i}].heads.{places}")) for i in range(page.js("models.length"))]


def named(heads):
    return {f"{h.layer}.{h.head}" for h in heads}


def rows(page):
    return page.js("[...document.querySelectorAll('#list tbody tr')].map(r => r.cells[0].textContent)")


@in_browser
def test_the_grid_has_every_head_and_its_label(open_atlas, two_models):
    page = open_atlas(two_models)
    for index, model in enumerate(two_models.models):
        classes = page.js(f"models[{index}].heads.map(h => h.cell.getAttribute('class').split(' ')[1] ?? '')")
        labelled = ["closed" if h.closed else "labelled" if h.reading.labels else "" for h in model.heads]
        assert [c if c != "chosen" else "" for c in classes] == labelled
    assert page.js("document.querySelectorAll('#grids .cell').length") == 48
    assert rows(page) == [f"{h.layer}.{h.head}" for h in ranked(two_models.models[0])] + sorted(
        named(h for h in two_models.models[0].heads if h.closed), key=lambda n: [int(x) for x in n.split(".")]
    )


@in_browser
def test_a_click_opens_both_dossiers(open_atlas, two_models):
    page = open_atlas(two_models)
    for index, place in ((0, 7), (1, 4)):
        page.js(f"document.querySelectorAll('#grids svg')[{index}].querySelectorAll('.cell')[{place}].id = 'here'")
        page.click("#here")
        page.js("document.getElementById('here').removeAttribute('id')")
        sparse, dense = (model.heads[place] for model in two_models.models)
        heads = page.js("[...document.querySelectorAll('#dossiers h2')].map(h => h.textContent)")
        assert heads == [f"{sparse.layer}.{sparse.head} sparse", f"{dense.layer}.{dense.head} dense"]
        tags = "querySelectorAll('.tag')].map(t => t.textContent)"
        for which, head in ((0, sparse), (1, dense)):
            shown = page.js(f"[...document.querySelectorAll('article')[{which}].{tags}")
            assert shown == [label if label != "offset" else "offset 3" for label in head.reading.labels]
            meters = page.js(f"document.querySelectorAll('article')[{which}].querySelectorAll('.kinds .meter').length")
            assert meters == (0 if head.closed else 14 if head.edges else 7)
    assert "closed: no edge" in page.text("article p")
    assert page.js("document.querySelectorAll('#grids .chosen').length") == 2
    page.js("document.getElementById('grids').focus()")
    page.press("ArrowLeft", 37)
    page.press("ArrowDown", 40)
    assert page.text("#dossiers h2") == "1.3 sparse"


@in_browser
def test_examples_mark_query_and_key(open_atlas, two_models):
    page = open_atlas(two_models)
    page.js("choose({layer: 0, head: 1})")
    head = two_models.models[0].heads[1]
    marks = page.js(
        "[...document.querySelector('article').querySelectorAll('.window')].map(w =>"
        "['.from', '.to'].map(m => [w.querySelector(m).title, w.querySelector(m).textContent]))"
    )
    for example, (source, target) in zip(head.examples, marks, strict=True):
        assert source[0] == f"position {example.key}"
        assert target[0] == f"position {example.query}"
        texts = {w.start + i: t for w in example.text for i, t in enumerate(w.tokens)}
        assert source[1] == texts[example.key].replace("\n", "\\n")
        assert target[1] == texts[example.query].replace("\n", "\\n")


@in_browser
def test_search_by_head_label_and_token(open_atlas, two_models):
    example = two_models.models[0].heads[8].examples[0]
    example.text[0].tokens[example.key - example.text[0].start] = " needle"
    two_models.models[1].heads[2].directions[1].lowers[3] = " Needles"
    page = open_atlas(two_models)
    assert search(page, "") == [named(m.heads) for m in two_models.models]
    assert search(page, "2.") == [{f"2.{h}" for h in range(6)}] * 2
    assert search(page, "3.5") == [{"3.5"}] * 2
    assert page.text("#dossiers h2") == "3.5 sparse"
    assert page.text("#matches") == "1 sparse, 1 dense heads"
    assert search(page, "induc") == [
        named(h for h in m.heads if "induction" in h.reading.labels) for m in two_models.models
    ]
    assert search(page, "closed") == [named(h for h in two_models.models[0].heads if h.closed), set()]
    assert search(page, "needle") == [{"1.2"}, {"0.2"}]
    assert sorted(rows(page)) == ["0.2", "1.2"]
    assert search(page, "nowhere") == [set(), set()]
    assert rows(page) == []


@in_browser
@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize(("layers", "heads"), [(4, 6), (30, 9), (32, 32)])
def test_nothing_is_wider_than_the_window(open_atlas, width, layers, heads):
    models = [model_atlas(layers, heads), model_atlas(layers, heads, "some/base", "dense", seed=1)]
    page = open_atlas(atlas_of(*models))
    page.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
    page.js("new Promise(requestAnimationFrame)")
    assert page.js("document.documentElement.scrollWidth") <= width
    wide = "[...document.querySelectorAll('article, #grids svg')].map(a => a.getBoundingClientRect())"
    assert page.js(f"{wide}.every(b => b.left >= 0 && b.right <= {width})")
    tops = page.js("[...document.querySelectorAll('article')].map(a => a.getBoundingClientRect().top)")
    assert (tops[0] == tops[1]) == (width == 1280)


@in_browser
@pytest.mark.parametrize("width", [400, 1280])
def test_a_head_with_long_numbers_fits(open_atlas, width):
    model = model_atlas(30, 9)
    for head in model["heads"]:
        for reading in (head["edges"], head["mass"]):
            reading["kinds"] = {name: {"share": 0.00365, "control": 0.00109} for name in reading["kinds"]}
    page = open_atlas(atlas_of(model))
    page.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
    page.js("new Promise(requestAnimationFrame)")
    assert page.js("document.documentElement.scrollWidth") <= width
    assert page.js("(b => b.scrollWidth <= b.clientWidth)(document.querySelector('.kinds').parentNode)")


@in_browser
@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("count", [1, 2])
def test_distances_are_named_whole_and_drawn_in_the_size_of_text(open_atlas, width, count):
    edges = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    models = [model_atlas(), model_atlas(name="some/base", kind="dense", seed=1)][:count]
    for head in (head for model in models for head in model["heads"]):
        for reading in filter(None, (head["edges"], head["mass"])):
            reading["distances"] = [0.1] * 10
    result = atlas_of(*models)
    result.offset_edges = edges
    page = open_atlas(result)
    page.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
    page.js("new Promise(requestAnimationFrame)")
    texts = "[...document.querySelectorAll('article svg')].map(s => [...s.querySelectorAll('text')])"
    names = ["0", "1", "2-3", "4-7", "8-15", "16-31", "32-63", "64-127", "128-255", "256-511"]
    for index in range(count):
        labels = f"{texts}[{index}].filter(t => t.getAttribute('y') === '79')"
        assert page.js(f"{labels}.map(t => t.textContent)") == names
        boxes = page.js(f"{labels}.map(t => t.getBoundingClientRect()).map(b => [b.left, b.right])")
        assert all(left[1] < right[0] for left, right in pairwise(boxes))
        assert page.js(f"(m => m.a)({labels}[0].getScreenCTM())") == pytest.approx(1, abs=0.05)


@in_browser
def test_light_and_dark_differ(open_atlas, two_models):
    pages = [open_atlas(two_models), open_atlas(two_models, dark=True)]
    grounds = [page.js("getComputedStyle(document.body).backgroundColor") for page in pages]
    fills = [page.js("getComputedStyle(document.querySelector('.cell.labelled')).fill") for page in pages]
    assert grounds[0] != grounds[1]
    assert fills[0] != fills[1]


@in_browser
def test_tokens_never_become_markup(open_atlas):
    models = [model_atlas(2, 3, HOSTILE, token=HOSTILE), model_atlas(2, 3, "@@data@@", "dense", seed=1, token=CONTROL)]
    page = open_atlas(atlas_of(*models, data=HOSTILE, note=HOSTILE))
    page.js("choose({layer: 0, head: 0})")
    assert page.js("window.hacked") is None
    assert page.js("document.querySelectorAll('img, svg[onload]').length") == 0
    assert page.js("document.scripts.length") == 2
    marks = page.js("[...document.querySelectorAll('mark[title]')].map(m => m.textContent)")
    assert set(marks) == {HOSTILE, r"\x1b[31m\n\u202e\u200b\x00 x"}


@in_browser
def test_a_dense_model_alone(open_atlas):
    page = open_atlas(atlas_of(model_atlas(kind="dense")))
    assert page.js("document.querySelectorAll('article').length") == 1
    assert len(rows(page)) == 24


def test_text_without_a_browser(two_models):
    outline = Outline(render_page(two_models))
    said = " ".join(outline.text)
    assert not {"src", "srcset", "action", "onload", "onerror", "onclick"} & {name for name, _ in outline.attributes}
    assert [value for name, value in outline.attributes if name == "href"] == ["data:,"]
    for fact in ("1,280 tokens in 20 blocks of 64", "24 heads: ", "4 closed", "a note", two_models.rule):
        assert fact in said


def test_hostile_text_without_a_browser():
    def tags(token):
        return Outline(render_page(atlas_of(model_atlas(2, 2, token, token=token), data=token, note=token))).tags

    assert tags(HOSTILE) == tags("harmless")
    page = render_page(atlas_of(model_atlas(2, 2, CONTROL, token=CONTROL), data=CONTROL, note=CONTROL))
    assert not {"\x1b", "\u202e", "\x00"} & set(page)


@pytest.mark.parametrize("width", [80, 140])
def test_the_table_fits_and_drives_no_terminal(width):
    models = [model_atlas(30, 32, "[/]\x1b[2J" * 12), model_atlas(30, 32, "x" * 90, "dense", seed=1)]
    result = atlas_of(*models, data="[red]\x1b[2J")
    console = Console(width=width, record=True, force_terminal=False, highlight=False, soft_wrap=True)
    with console.capture() as captured:
        for line in summary(result):
            console.print(line) if not isinstance(line, str) else console.print(line, markup=False)
    lines = captured.get().splitlines()
    assert max(len(line.rstrip()) for line in lines) <= width
    assert not {"\x1b", "\u202e", "\x00"} & set(captured.get())
    best = ranked(result.models[0])[0]
    assert f"{best.layer}.{best.head}" in captured.get()
    for cell in ("per query", "control", "by mass", "+748", "192 closed", "label: ", "note: a note"):
        assert cell in captured.get()
