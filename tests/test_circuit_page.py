"""The page of a circuit in a real browser: what it draws is the circuit, it asks for nothing, names stay text.

The browser is headless Chromium, driven over a pipe (Chrome DevTools Protocol); without it only the text is tested.
"""

import base64
import json
import os
import select
import shutil
import subprocess
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch

from attnprune.circuit.model.graph import Graph
from attnprune.circuit.result import CircuitResult
from attnprune.report.circuit_page import render_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome") or ""
in_browser = pytest.mark.skipif(not CHROMIUM, reason="needs chromium (Debian: apt-get install chromium)")
HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>\"'><svg onload=window.hacked=1>"


def scored(graph, seed):
    """Every real edge with a score, strongest first: a few nodes matter, as writers and as readers; most do not."""
    random = torch.Generator().manual_seed(seed)
    importance = dict(zip(graph.source_names, torch.randn(graph.sources, generator=random).tolist(), strict=True))
    importance |= {"input": 2.0, "logits": 2.0}
    readers = [name.partition("<")[0].replace("kv", "h") for name in graph.destination_names]
    noise = torch.randn(graph.sources, graph.destinations, generator=random)
    sign = torch.where(torch.rand(noise.shape, generator=random) < 0.3, 1.0, -1.0)
    both = torch.tensor([[importance[u] + importance[v] for v in readers] for u in graph.source_names])
    score = sign * torch.exp(1.4 * both + noise - 8)
    pairs = graph.mask().nonzero()
    values = score[tuple(pairs.T)]
    order = values.abs().argsort(descending=True)
    return pairs[order], values[order]


def kept(graph, pairs):
    """The circuit of some edges, pruned."""
    mask = torch.zeros(graph.sources, graph.destinations, dtype=torch.bool)
    mask[tuple(pairs.T)] = True
    return graph.prune(mask)


def model_circuit(graph, size, name="some/model", kind="sparse", seed=0, top=2000):
    """A model of a circuit.json: the circuit is the best `size` edges, pruned."""
    pairs, values = scored(graph, seed)
    circuit = kept(graph, pairs[:size])
    heads, mlps = graph.touched(circuit)
    counts = {"heads": int(heads.sum()), "mlps": int(mlps.sum()), "edges": int(circuit.sum())}
    points = []
    for k in sorted({min(len(pairs), round(10 * 2.2**step)) for step in range(12)}):
        mask = kept(graph, pairs[:k])
        heads, mlps = graph.touched(mask)
        points.append({"edges": int(mask.sum()), "heads": int(heads.sum()), "mlps": int(mlps.sum())})
        points[-1]["faithfulness"] = min(1.0, (int(mask.sum()) / max(size, 1)) ** 0.6 * 0.95)

    def edge(pair, value):
        return {"name": graph.edge_name(*pair.tolist()), "score": float(value), "kept": bool(circuit[tuple(pair)])}

    edges = [edge(pair, value) for pair, value in zip(pairs[:size], values, strict=False) if circuit[tuple(pair)]]
    broken = {"accuracy": 0.48, "clean": 0.02, "corrupted": 0.01, "able": False, "edges": None, "faithfulness": 0.07}
    broken["recovered"] = 0.01
    return {
        "name": name,
        "kind": kind,
        "family": "llama",
        "graph": {key: getattr(graph, key) for key in ("layers", "heads", "kv_heads", "parallel")}
        | {"sources": graph.sources, "destinations": graph.destinations, "edges": graph.edge_count},
        "accuracy": 0.97,
        "clean": 4.21,
        "corrupted": -0.62,
        "attribution": {"steps": 8, "gap": 0.021, "flips": {"flipped": 1200, "open": 9000} if seed == 0 else None},
        "curves": [{"ranking": "eap-ig abs", "points": points, "first": counts["edges"], "stable": counts["edges"]}],
        "ranking": "eap-ig abs",
        "ranked": counts | {"messages": None, "open_messages": None},
        "counts": counts | {"messages": 81.5 if seed == 0 else None, "open_messages": 412.0 if seed == 0 else None},
        "heads": [],
        "mlps": [],
        "edges": edges,
        "top_edges": [edge(pair, value) for pair, value in zip(pairs[:top], values, strict=False)],
        "validation_faithfulness": 0.92,
        "test": {
            "faithfulness": {"value": 0.91, "low": 0.87, "high": 0.95},
            "metric": 3.8,
            "accuracy": 0.95,
            "kl": 0.21,
            "quartiles": [0.81, 0.9, 1.02],
        },
        "reached": True,
        "controls": {
            "complement": 0.11,
            "random": {"draws": 20, "faithfulness": 0.02, "low": -0.01, "high": 0.06},
            "random_weights": broken,
            "shuffled_gates": broken if seed == 0 else None,
            "templates": {"templates": [0, 1], "jaccard": [[1.0, 0.6], [0.6, 1.0]], "mean": 0.6},
        },
        "seconds": 312.0,
    }


def circuit_result(*models, compare=True, **text):
    """A result of one or two models."""
    ratio = {"value": 4.1, "ranked": {"value": 3.9, "low": 2.8, "high": 5.2}}
    two = compare and len(models) == 2
    return CircuitResult.model_validate(
        {
            "command": text.get("command", "attnprune circuit some/model --task ioi --against some/base"),
            "task": {
                "name": text.get("task", "ioi"),
                "metric": "logit_difference",
                "templates": ["{A} and {B} went to the {place}."] * 8,
                "fingerprint": "3f" * 32,
                "seed": 0,
                "train": 64,
                "validation": 64,
                "test": 128,
                "lengths": [15, 18],
                "example": {
                    "clean": text.get("prompt", "When Mary and John went to the store, John gave a drink to"),
                    "corrupted": "When Mary and John went to the store, Anna gave a drink to",
                    "answers": [" Mary"],
                    "wrong": [" John"],
                },
            },
            "method": {"target": 0.9, "band": [0.9, 1.1], "quick": False, "refine": True, "bootstrap": 1000},
            "models": list(models),
            "compare": {
                "comparable": False,
                "reasons": [text.get("reason", "the losses differ by 0.3 nats")],
                **dict.fromkeys(("heads", "mlps", "edges", "messages"), ratio),
                "first_in_second": 0.4,
                "second_in_first": 0.7,
                "jaccard": 0.12,
            }
            if two
            else None,
            "seconds": 800.0,
            "notes": [text.get("note", "a note")],
        }
    )


@pytest.fixture(scope="module")
def two_models():
    """4 layers of 4 heads on 2 key/value heads; the first model needs fewer edges."""
    graph = Graph(4, 4, 2)
    return circuit_result(model_circuit(graph, 40), model_circuit(graph, 150, "some/base", "dense", seed=1))


class Browser:
    """Chromium behind a pair of pipes: commands out, answers and events back, as JSON that ends in a zero byte."""

    def __init__(self, profile):
        (commands, self._out), (self._in, answers) = os.pipe(), os.pipe()
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        options += ["--hide-scrollbars", f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"]
        start = f'exec "$0" "$@" 3<&{commands} 4>&{answers}'
        self._process = subprocess.Popen(
            ["bash", "-c", start, CHROMIUM, *options],
            pass_fds=(commands, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self._rest, self._next, self.events = b"", 0, []

    def close(self):
        self.call("Browser.close")
        self._process.wait(20)
        os.close(self._out)
        os.close(self._in)

    def call(self, method, session=None, **params):
        """Send a command and wait for its answer."""
        self._next += 1
        message = {"id": self._next, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._next:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def wait(self, method, session):
        """Wait for an event."""
        while not any(e["method"] == method and e.get("sessionId") == session for e in self.events):
            self.events.append(self._receive())

    def _receive(self):
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], 60)
            data = os.read(self._in, 1 << 16) if ready else b""
            assert data, "chromium does not answer"
            self._rest += data
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)


class Page:
    """One open page, 1200 pixels wide."""

    def __init__(self, browser, path, dark=False):
        self._browser, self.url = browser, path.as_uri()
        target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=1200, height=900, deviceScaleFactor=1, mobile=False)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self.call("Page.navigate", url=self.url)
        browser.wait("Page.loadEventFired", self._session)

    def call(self, method, **params):
        return self._browser.call(method, self._session, **params)

    def js(self, expression):
        """The value of an expression."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key, code=0):
        """A key, as the user presses it."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def move(self, x, y):
        """The pointer."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, selector):
        """The middle of an element."""
        box = self.js(f"(b => [b.x + b.width / 2, b.y + b.height / 2])({query(selector)}.getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def slide(self, stop):
        """Put the slider on a stop, as a drag does."""
        self.js(f"(k => {{ k.value = {stop}; k.dispatchEvent(new Event('input')) }})(document.getElementById('k'))")
        return self.js("state.k")

    def state(self):
        """Drawn edges, and what the tiles say."""
        tiles = self.js("[...document.querySelectorAll('#counts dd')].map(d => d.firstChild.textContent)")
        note = self.text("#counts small")
        edges = self.js("document.querySelectorAll('#graph .edge').length")
        faithfulness, heads, mlps, count, _ = tiles
        return SimpleNamespace(
            drawn=edges, heads=int(heads), mlps=int(mlps), edges=int(count.replace(",", "")), f=faithfulness, note=note
        )

    def boxes(self):
        """Where the parts of the page are."""
        return self.js(
            "['#controls', '#graph', '#counts', '#chart', '#detail', '#report', '#k'].map(s => {"
            "const b = document.querySelector(s).getBoundingClientRect(); return [b.x, b.y, b.width, b.height] })"
        )

    def text(self, selector):
        return self.js(f"{query(selector)}.textContent")

    def events(self, method):
        return [e["params"] for e in self._browser.events if e["method"] == method and e["sessionId"] == self._session]

    def errors(self):
        """Uncaught exceptions, console errors and log entries (refused requests are there)."""
        said = [e for e in self.events("Runtime.consoleAPICalled") if e["type"] in ("error", "assert", "warning")]
        return self.events("Runtime.exceptionThrown") + said + self.events("Log.entryAdded")

    def requests(self):
        return [e["request"]["url"] for e in self.events("Network.requestWillBeSent")]

    def screenshot(self):
        """The whole page as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"])


def query(selector):
    return f"document.querySelector({json.dumps(selector)})"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium = Browser(tmp_path_factory.mktemp("profile"))
    yield chromium
    chromium.close()


@pytest.fixture
def open_page(browser, tmp_path):
    """Open the page of a result; what it did wrong by the end of the test fails the test."""
    pages = []

    def open_result(result):
        path = tmp_path / f"circuit-{len(pages)}.html"
        path.write_text(render_page(result), "utf-8")
        pages.append(Page(browser, path))
        return pages[-1]

    yield open_result
    for page in pages:
        page.js("0")  # events so far have arrived
        assert page.errors() == []
        assert [url for url in page.requests() if not url.startswith("data:")] == [page.url]


def expected(graph, seed, k):
    """(edges after pruning, heads, MLPs) of the best k edges."""
    circuit = kept(graph, scored(graph, seed)[0][:k])
    heads, mlps = graph.touched(circuit)
    return int(circuit.sum()), int(heads.sum()), int(mlps.sum())


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


class Outline(HTMLParser):
    """Tags, attributes and text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data)


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
