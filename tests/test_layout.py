"""The layout keeps its promises: imports go down, rooms stay few and short, the tree stays light.

import-linter checks the same layers without the imports that only type checkers see; here those count too.
"""

from __future__ import annotations

import ast
import subprocess
import tomllib
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import attnprune
from tests.helpers.paths import ROOT

PACKAGE = ROOT / "attnprune"
SIDECARS = ("examples/smollm2-half/", "examples/smollm2-sparse/")
LONG = 350  # lines
MIB = 1 << 20


def layers() -> dict[str, list[set[str]]]:
    """The layers of each room, top first, as the import contract in pyproject.toml lists them."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    return {
        c["containers"][0]: [{name.strip() for name in layer.split("|")} for layer in c["layers"]]
        for c in contracts
        if c["type"] == "layers"
    }


def modules() -> dict[str, Path]:
    """Every module of the package by its name."""
    found = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(name: str, file: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of the package that a module imports, anywhere in it and for whatever reason.

    What `attnprune` itself exports counts as the module that it is loaded from on first use.
    """
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                inner = attnprune._HOMES.get(alias.name, inner) if node.module == "attnprune" else inner
                if inner in known or node.module in known:
                    yield inner if inner in known else str(node.module)


def floor(name: str, room: str, floors: list[set[str]]) -> int | None:
    """On which layer of a room a module lies, from the top; None outside of it."""
    child = name.removeprefix(f"{room}.").split(".")[0]
    return next((i for i, layer in enumerate(floors) if child in layer), None) if name.startswith(f"{room}.") else None


def test_no_import_goes_up_or_sideways():
    known, rooms = modules(), layers()
    wrong = []
    for name, file in known.items():
        for target in imports(name, file, known):
            for room, floors in rooms.items():
                here, there = floor(name, room, floors), floor(target, room, floors)
                inside = name.split(".")[: room.count(".") + 2] == target.split(".")[: room.count(".") + 2]
                if here is not None and there is not None and not inside and here >= there:
                    wrong.append(f"{name} -> {target}")
            if name.startswith(f"{target}.") and target != "attnprune":
                wrong.append(f"{name} -> {target}, the package that it is in")
            # Its names load any room; the command line asks it for the version.
            if target == "attnprune" and name != "attnprune.cli.app":
                wrong.append(f"{name} -> {target}")
    assert wrong == []


def test_every_module_is_on_a_layer():
    rooms = layers()
    for name in modules():
        room, _, child = name.rpartition(".")
        if room:
            assert room in rooms, f"{room} has no contract"
            assert any(child in layer for layer in rooms[room]), f"{name} is on no layer"
    for room, floors in rooms.items():
        assert not any(a & b for a, b in combinations(floors, 2)), f"{room}: a module on two layers"


def test_the_listing_is_short():
    entries = [path for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    assert len([path for path in entries if path.is_dir()]) <= 14
    assert len([path for path in entries if path.suffix == ".py"]) <= 8


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def test_a_long_file_says_why_in_its_first_comment():
    made = "docs/pictures/"  # by commands
    code = [ROOT / n for n in tracked() if n.endswith((".py", ".js", ".css", ".html")) and not n.startswith(made)]
    assert len(code) > 100
    for file in code:
        text = file.read_text()
        if text.count("\n") > LONG:
            first = ast.get_docstring(ast.parse(text)) if file.suffix == ".py" else text[: text.index("\n\n")]
            assert "Long because" in (first or ""), f"{file}: {text.count(chr(10))} lines"


def test_the_tree_is_light():
    sizes = {name: (ROOT / name).stat().st_size for name in tracked()}
    assert sum(sizes.values()) < 44 * MIB
    assert sum(size for name, size in sizes.items() if not name.startswith(SIDECARS)) < 12 * MIB
    text = (".json", ".jsonl", ".html", ".txt", ".csv", ".toml", ".md", ".py")
    assert [name for name, size in sizes.items() if name.endswith(text) and size > MIB] == []


def test_records_of_circuits_are_stored_compressed_and_without_a_page():
    stored = [Path(name) for name in tracked() if name.startswith("examples/results/circuits/")]
    assert len(stored) >= 6
    others = {f"{path.parent.name}/{path.name}" for path in stored if path.name != "circuit.json.gz"}
    assert others == {"smollm2-half-ioi/more-1.json", "smollm2-half-ioi/more-2.json"}
    assert {path.parent for path in stored} == {path.parent for path in stored if path.name == "circuit.json.gz"}
