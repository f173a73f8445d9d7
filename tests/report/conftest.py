"""Fixtures of this folder."""

from __future__ import annotations

import pytest

from attnprune.circuit.model.graph import Graph
from attnprune.report.circuit_page import render_page
from tests.helpers.pages import Browser, Page, circuit_result, model_circuit


@pytest.fixture(scope="session")
def two_models():
    """4 layers of 4 heads on 2 key/value heads; the first model needs fewer edges."""
    graph = Graph(4, 4, 2)
    return circuit_result(model_circuit(graph, 40), model_circuit(graph, 150, "some/base", "dense", seed=1))


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    chromium = Browser(tmp_path_factory.mktemp("profile"))
    yield chromium
    chromium.close()


@pytest.fixture
def open_html(browser, tmp_path):
    """Open a page; what it did wrong by the end of the test fails the test."""
    pages = []

    def open_text(text, **options):
        path = tmp_path / f"page-{len(pages)}.html"
        path.write_text(text, "utf-8")
        pages.append(Page(browser, path, **options))
        return pages[-1]

    yield open_text
    for page in pages:
        page.js("0")  # events so far have arrived
        assert page.errors() == []
        assert [url for url in page.requests() if not url.startswith("data:")] == [page.url]


@pytest.fixture
def open_page(open_html):
    """Open the page of a circuit."""
    return lambda result: open_html(render_page(result))
