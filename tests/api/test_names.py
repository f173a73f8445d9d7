"""What `import attnprune` offers: every name listed, documented, and nothing heavy imported for it."""

from __future__ import annotations

import inspect
import pydoc
import subprocess
import sys

import attnprune as ap
from attnprune.circuit.run import run  # makes attnprune.circuit the package, which has to be callable all the same

FUNCTIONS = (
    "sparsify", "load", "evaluate", "circuit", "diff", "verify", "merge", "push", "attach", "detach", "masks",
    "close_heads", "open_gates", "index", "open_index",
)  # fmt: skip


def test_dir_lists_what_people_look_for():
    assert set(FUNCTIONS) <= set(dir(ap))
    assert dir(ap) == sorted(ap.__all__)
    for name in ap.__all__:
        assert getattr(ap, name) is not None


def test_every_function_says_what_it_takes_and_raises():
    for name in FUNCTIONS:
        function = getattr(ap, name)
        text = inspect.getdoc(function) or ""
        assert callable(function)
        assert len(text) > 60, name
    for name in set(FUNCTIONS) - {"circuit"}:
        assert "Raises:" in inspect.getdoc(getattr(ap, name)), name


def test_the_circuit_package_is_called_as_the_function():
    from attnprune.api import commands

    assert inspect.ismodule(ap.circuit)
    assert inspect.signature(ap.circuit) == inspect.signature(commands.circuit)
    assert ap.circuit.run.run is run
    assert "faithfulness" in pydoc.plain(pydoc.render_doc(commands.circuit))


def test_listing_the_names_imports_nothing_heavy():
    program = (
        "import sys, attnprune as ap; names = dir(ap);"
        "ap.AttnPruneError, ap.circuit, ap.RunConfig, ap.sparsify, ap.push;"
        "print([name for name in ('torch', 'transformers', 'datasets', 'pandas') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
