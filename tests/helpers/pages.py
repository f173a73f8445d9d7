"""Records of made-up circuits, and a headless Chromium driven over a pipe (Chrome DevTools Protocol)."""

from __future__ import annotations

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

from attnprune.circuit.result import CircuitResult

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
            "lower": 0.872,
            "upper": 0.951,
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
                "chance": 0.5,
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


def expected(graph, seed, k):
    """(edges after pruning, heads, MLPs) of the best k edges."""
    circuit = kept(graph, scored(graph, seed)[0][:k])
    heads, mlps = graph.touched(circuit)
    return int(circuit.sum()), int(heads.sum()), int(mlps.sum())


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
