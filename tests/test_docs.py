"""The map for people leads somewhere: every path and name in it exists, every link has a target."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.helpers.pages import Browser, Page, in_browser
from tests.helpers.paths import ROOT

DOCUMENTS = ["docs/architecture.md", "CONTRIBUTING.md"]
RESULTS = "examples/results/README.md"
RECORD = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "examples/results/record").glob("*.md"))
PAGES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md") if path.name != "architecture.md")
TEXT = {".py", ".md", ".json"}
MODULE = r"(?<![\w./-])attnprune\.(?:[a-z_]+\.)+\w+"
NO_MODULES = r"attnprune\.v1\."  # formats/attnprune.v1.schema.json
ROOMS = ("attnprune", "docs", "examples", "formats", "tests")


def prose(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def paths(text: str) -> list[str]:
    """What is written like a path of this repository: in backticks or in a command, with a folder or a known suffix."""
    quoted = re.findall(r"`([^`\n]+)`", text) + re.findall(r"(?m)^\.venv/bin/.*", text)
    words = [word.rstrip(",.") for span in quoted for word in span.split()]
    inside = [word for word in words if "/" in word and word.partition("/")[0] in ROOMS]
    return inside + [word for word in words if re.fullmatch(r"[A-Z]+\.md|pyproject\.toml|constraints\.txt", word)]


@pytest.mark.parametrize("document", [*DOCUMENTS, "README.md", RESULTS, *RECORD, *PAGES])
def test_every_path_exists(document):
    found = paths(prose(document))
    assert document in [*RECORD, *PAGES, "README.md"] or len(found) > 10
    assert [path for path in found if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_that_a_sentence_leaves_in_a_room_exists(document):
    """`chunked.py` in a paragraph about attention/."""
    known = {path.name for path in (ROOT / "attnprune").rglob("*.py")}
    names = set(re.findall(r"`([\w]+\.py)`", prose(document)))
    assert names <= known
    for room, text in re.findall(r"(?ms)^- \*\*(\w+)/\*\*(.*?)(?=^- |^##|\Z)", prose(document)):
        for name in re.findall(r"`(\w+(?:\.py|/))`", text):
            assert (ROOT / "attnprune" / room / name).exists(), f"{room}/: {name}"


@pytest.mark.parametrize("document", [*DOCUMENTS, "README.md", RESULTS, *RECORD, *PAGES])
def test_every_link_has_a_target(document):
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", prose(document)) if "://" not in link]
    assert links or document in PAGES
    for link in links:
        file, _, anchor = link.partition("#")
        target = (ROOT / document).parent / file if file else ROOT / document
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"(?m)^#+ (.+)$", target.read_text(encoding="utf-8"))
            slugs = [re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings]
            assert anchor in slugs, link


@pytest.mark.parametrize(("document", "least"), [("CONTRIBUTING.md", 9), ("docs/architecture.md", 2)])
def test_names_to_copy_from_exist(document, least):
    """`FAMILIES` in `attnprune/...`: the name is defined in that file."""
    text = " ".join(prose(document).split())
    pairs = re.findall(r"`(\w+)`(?: and `(\w+)`)? in `([\w/.]+\.py)`", text)
    assert len(pairs) >= least
    for first, second, file in pairs:
        code = (ROOT / file).read_text(encoding="utf-8")
        for name in filter(None, (first, second)):
            assert re.search(rf"(?m)^(def |class )?{name}\b", code), f"{name} in {file}"


def test_every_module_that_a_text_names_exists():
    """`attnprune.circuit.model.graph` in a docstring, a hint, a comment or a document."""
    files = [f for room in ("attnprune", "formats", "docs") for f in (ROOT / room).rglob("*") if f.suffix in TEXT]
    files += [*(ROOT / "tests").rglob("*.py"), *(ROOT / "examples").glob("*.py")]
    files += [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    names = {(name, file) for file in files for name in re.findall(MODULE, file.read_text(encoding="utf-8"))}
    assert len(names) > 100
    assert sorted((name, str(file)) for name, file in names if not leads_somewhere(name)) == []


def leads_somewhere(name: str) -> bool:
    """Whether a dotted name is a module, or a name in one."""
    if re.match(NO_MODULES, name):
        return True
    parts = name.split(".")
    for end in range(len(parts), 1, -1):
        place = ROOT.joinpath(*parts[:end])
        for file in (place.with_suffix(".py"), place / "__init__.py"):
            if file.is_file():
                text = file.read_text(encoding="utf-8")
                return end == len(parts) or parts[end] in re.findall(r"\w+", text)
    return False


def test_readme_leads_to_the_map():
    assert "docs/architecture.md" in prose("README.md")
    assert "CONTRIBUTING.md" in prose("README.md")


def test_results_lead_to_the_whole_record():
    assert RECORD
    for document in RECORD:
        assert f"({document.removeprefix('examples/results/')})" in prose(RESULTS)
        assert "(../README.md)" in prose(document)


def test_readme_is_short_and_leads_to_every_page():
    readme = prose("README.md")
    assert readme.count("\n") <= 150
    assert [page for page in PAGES if f"({page})" not in readme and page != "docs/index.md"] == []


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site of docs/, with every warning an error: links and anchors without a target, pages that the menu lacks."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


def test_the_site_documents_every_public_name(site):
    import attnprune

    page = (site / "python.html").read_text(encoding="utf-8")
    names = {name for name in attnprune.__all__ if name not in ("__version__", "lens")} | {"lens.load"}
    assert [name for name in sorted(names) if f'id="attnprune.{name}"' not in page] == []
    assert "Post-train a model until its attention is sparse" in page  # from the docstring


def test_the_site_loads_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    loaded = r'<(?:script|img|iframe|source)[^>]*\bsrc="?(?:https?:)?//|<link[^>]*\bhref="?(?:https?:)?//'
    assert [page.name for page in pages if re.search(loaded, page.read_text(encoding="utf-8"))] == []
    assert (site / "formats/attnprune-v1.html").exists()  # brought in by links
    assert (site / "examples/results/smollm2.png").exists()
    assert not (site / "architecture.html").exists()


@in_browser
def test_search_works_from_the_disk(site, tmp_path):
    browser = Browser(tmp_path)
    try:
        page = Page(browser, site / "gates.html")
        found = page.js(
            """(async () => {
                const entry = document.querySelector("[data-md-component=search-query]")
                const results = document.querySelector("[data-md-component=search-result]")
                entry.focus()
                for (let tries = 0; tries < 200 && !results.querySelector("a"); tries++) {
                    entry.value = "renormalised"
                    entry.dispatchEvent(new KeyboardEvent("keyup", { bubbles: true }))
                    await new Promise(done => setTimeout(done, 50))
                }
                return results.textContent
            })()"""
        )
        assert "Why is a mask not renormalised?" in found
        assert page.errors() == []
        assert [url for url in page.requests() if url.startswith("http")] == []
    finally:
        browser.close()
