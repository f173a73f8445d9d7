"""The page of a circuit in a real browser: what it draws is the circuit, it asks for nothing, names stay text."""

from __future__ import annotations

from attnprune.circuit.model.graph import Graph
from attnprune.report.circuit_page import render_page
from tests.helpers.pages import HOSTILE, Outline, Page, circuit_result, expected, in_browser, model_circuit


@in_browser
def test_slider_shows_the_pruned_circuit_of_every_size(open_page, two_models):
    page = open_page(two_models)
    seen = set()
    for stop in range(0, page.js("+document.getElementById('k').max") + 1, 9):
        k = page.slide(stop)
        now = page.state()
        assert (now.edges, now.heads, now.mlps) == expected(Graph(4, 4, 2), 0, k)
        assert now.drawn == now.edges
        seen.add(now.drawn)
    assert len(seen) > 5


@in_browser
def test_parallel_blocks_are_pruned_alike(open_page):
    graph = Graph(3, 3, 3, parallel=True)
    page = open_page(circuit_result(model_circuit(graph, 30)))
    for stop in range(0, page.js("+document.getElementById('k').max") + 1, 11):
        k = page.slide(stop)
        now = page.state()
        assert (now.edges, now.heads, now.mlps) == expected(graph, 0, k)


@in_browser
def test_dangling_edges_on_request(open_page, two_models):
    page = open_page(two_models)
    k = page.slide(20)
    pruned = page.state()
    page.click("#dangling")
    with_dangling = page.state()
    assert with_dangling.drawn == k > pruned.drawn
    assert with_dangling.edges == pruned.edges  # the counts are those of the circuit


@in_browser
def test_opens_on_the_chosen_circuit_and_finds_back(open_page, two_models):
    page = open_page(two_models)
    chosen = two_models.models[0].counts
    first = page.state()
    assert (first.drawn, first.edges, first.heads) == (chosen.edges, chosen.edges, chosen.heads)
    assert (first.f, first.note) == ("0.91 [0.87, 0.95]", "measured, test prompts")
    page.slide(5)
    assert page.state().edges != chosen.edges
    page.click("[name=view][value=chosen]")
    assert page.state() == first


@in_browser
def test_toggle_switches_the_model(open_page, two_models):
    page = open_page(two_models)
    page.click("[name=model][value='1']")
    assert page.state().drawn == two_models.models[1].counts.edges
    k = page.slide(30)
    assert page.state().edges == expected(Graph(4, 4, 2), 1, k)[0]
    page.click("[name=model][value='0']")  # the same k in the other model
    assert page.state().edges == expected(Graph(4, 4, 2), 0, k)[0]


@in_browser
def test_faithfulness_says_whether_it_was_measured(open_page, two_models):
    page = open_page(two_models)
    points = {p.edges: p.faithfulness for p in two_models.models[0].curves[0].points}
    measured = 0
    for stop in range(page.js("+document.getElementById('k').max") + 1):
        page.slide(stop)
        now = page.state()
        if now.edges in points:
            measured += 1
            assert (now.f, now.note) == (f"{points[now.edges]:.2f}", "measured, validation prompts")
        elif min(points) < now.edges < max(points):
            low = max(edges for edges in points if edges < now.edges)
            high = min(edges for edges in points if edges > now.edges)
            assert now.note == f"not measured; between {low} and {high} edges"
            bounds = sorted([points[low], points[high]])
            assert bounds[0] - 0.01 <= float(now.f.removeprefix("≈ ")) <= bounds[1] + 0.01
        else:
            assert now.f == "-"
    assert measured >= len(points)  # every measured size is a stop of the slider


@in_browser
def test_pointer_names_edges_and_nodes(open_page, two_models):
    page = open_page(two_models)
    strongest = two_models.models[0].edges[0]
    x, y = page.js(
        "(p => { const q = p.getPointAtLength(p.getTotalLength() / 2).matrixTransform(p.getScreenCTM());"
        "return [q.x, q.y] })([...document.querySelectorAll('#graph .edge')].at(-1))"
    )
    page.move(x, y)
    assert page.text("#tip").startswith(f"{strongest.name}  {'+' if strongest.score > 0 else '-'}")
    page.move(5, 5)
    assert page.js("document.getElementById('tip').hidden")
    x, y = page.js("(b => [b.x + b.width / 2, b.y + b.height / 2])(state.model.nodes[0].getBoundingClientRect())")
    page.move(x, y)
    assert page.text("#tip") == "input"
    hot = page.js("[...document.querySelectorAll('#graph .edge.hot')].length")
    assert hot == sum(edge.name.startswith("input->") for edge in two_models.models[0].edges)


@in_browser
def test_all_of_it_works_from_the_keyboard(open_page, two_models):
    page = open_page(two_models)
    order = []
    for _ in range(4):
        page.press("Tab", 9)
        order.append(page.js("document.activeElement.id || document.activeElement.name"))
    assert order == ["model", "view", "k", "graph"]
    page.js("document.getElementById('k').focus()")
    page.press("End", 35)
    full = page.state().drawn
    page.press("ArrowLeft", 37)
    assert 0 < page.state().drawn < full
    page.js("document.getElementById('graph').focus()")
    page.press("ArrowRight", 39)
    assert page.text("#detail h2").startswith("input: ")
    page.press("ArrowRight", 39)
    assert page.text("#detail h2")[0] in "am"
    page.press("Escape", 27)
    assert page.text("#detail h2") == "Strongest edges"


@in_browser
def test_nothing_jumps_and_nothing_overflows(open_page, two_models):
    page = open_page(two_models)
    before = page.boxes()
    for act in (lambda: page.slide(0), lambda: page.slide(60), lambda: page.click("[name=model][value='1']")):
        act()
        assert page.boxes() == before
    page.js("document.getElementById('graph').focus()")
    page.press("ArrowRight", 39)
    assert page.boxes() == before
    assert page.js("document.documentElement.scrollWidth") == 1200


@in_browser
def test_names_never_become_markup(open_page):
    graph = Graph(2, 2, 2)
    models = [model_circuit(graph, 10, HOSTILE), model_circuit(graph, 20, "@@data@@ " + HOSTILE, "dense", seed=1)]
    text = dict.fromkeys(("command", "task", "prompt", "reason", "note"), HOSTILE)
    page = open_page(circuit_result(*models, **text))
    page.click("[name=model][value='1']")
    assert page.js("window.hacked") is None
    assert page.js("document.querySelectorAll('img, svg[onload]').length") == 0
    assert page.js("document.scripts.length") == 2
    assert page.js("document.title").count(HOSTILE) == 3
    assert page.text("h1").count(HOSTILE) == 3
    assert "@@data@@" in page.text("h1")


@in_browser
def test_policy_refuses_requests_and_foreign_scripts(browser, tmp_path, two_models):
    (tmp_path / "page.html").write_text(render_page(two_models), "utf-8")
    page = Page(browser, tmp_path / "page.html")
    refused = "await new Promise(done => document.addEventListener('securitypolicyviolation', e => done(e.blockedURI)))"
    act = "const s = document.createElement('script'); s.textContent = 'window.hacked = 1'; document.body.append(s)"
    assert page.js(f"(async () => {{ setTimeout(() => {{ {act} }}); return {refused} }})()") == "inline"
    assert page.js("window.hacked") is None
    act = "fetch('https://example.invalid/x').catch(() => 0)"
    assert "example.invalid" in page.js(f"(async () => {{ setTimeout(() => {{ {act} }}); return {refused} }})()")


@in_browser
def test_a_circuit_larger_than_what_is_drawn_or_ranked(open_page):
    graph = Graph(12, 12, 12)
    model = model_circuit(graph, 6000)
    page = open_page(circuit_result(model))
    now = page.state()
    assert (now.drawn, now.edges) == (2000, model["counts"]["edges"])
    before = page.boxes()
    assert page.js("document.getElementById('chosen-mark').hidden")  # beyond the ranked edges of the file
    k = page.slide(page.js("document.getElementById('k').max"))
    assert k == len(model["top_edges"])
    assert page.state().edges == expected(graph, 0, k)[0]
    assert page.boxes() == before


@in_browser
def test_scores_without_a_sign_have_no_colour(open_page):
    """A ranking by nodes scores edges by size alone."""
    by_nodes = model_circuit(Graph(2, 2, 2), 30)
    by_nodes["ranking"] = by_nodes["curves"][0]["ranking"] = "exact nodes"
    for edge in by_nodes["edges"] + by_nodes["top_edges"]:
        edge["score"] = abs(edge["score"])
    page = open_page(circuit_result(by_nodes, model_circuit(Graph(2, 2, 2), 30, "base", "dense", seed=1)))
    colours = "new Set([...document.querySelectorAll('#graph .edge')].map(e => getComputedStyle(e).stroke)).size"
    assert page.js(colours) == 1
    assert not page.text("#detail td.num").startswith("+")
    before = page.boxes()
    page.click("[name=model][value='1']")
    assert page.js(colours) == 2
    assert page.boxes() == before


@in_browser
def test_an_empty_circuit(open_page):
    model = model_circuit(Graph(2, 2, 2), 0, top=0)
    page = open_page(circuit_result(model))
    assert page.state().drawn == 0
    page.click("[name=view][value=top]")
    assert page.state().edges == 0


def test_text_without_a_browser(two_models):
    outline = Outline(render_page(two_models))
    text = " ".join(outline.text)
    assert not {"src", "srcset", "action", "onload", "onerror", "onclick"} & {name for name, _ in outline.attributes}
    assert [value for name, value in outline.attributes if name == "href"] == ["data:,"]
    assert "@import" not in text
    for fact in (
        "0.910 [0.870, 0.950]",
        "4.10; by ranking 3.90 [2.80, 5.20]",
        "faithfulness 0.110",
        "above 0.872, below 0.951",
        "target 0.9 reached",
        "97 % (chance 50 %)",
        "95 % (chance 50 %)",
        "accuracy 48 %, chance 50 %",
        "128 for every",
    ):
        assert fact in text
    assert "cannot be compared" in text
    assert "cannot be compared" not in " ".join(
        Outline(render_page(circuit_result(model_circuit(Graph(2, 2, 2), 9)))).text
    )


def test_hostile_text_without_a_browser():
    def tags(text):
        models = [model_circuit(Graph(2, 2, 2), 10, text), model_circuit(Graph(2, 2, 2), 20, text, "dense", seed=1)]
        models[0]["edges"][0]["name"] = text
        texts = dict.fromkeys(("command", "task", "prompt", "reason", "note"), text)
        return Outline(render_page(circuit_result(*models, **texts))).tags

    assert tags(HOSTILE) == tags("harmless")
