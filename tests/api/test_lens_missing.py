"""Without TransformerLens the adapter says what to install; the package itself does not need it."""

from __future__ import annotations

import sys

import attnprune
from tests.helpers.factory import refused
from tests.helpers.paths import VECTORS


def test_without_transformer_lens_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_lens.model_bridge", None)
    error = refused(lambda: attnprune.lens.load(VECTORS / "first-release"), "TransformerLens cannot be imported")
    assert error.hint == 'pip install "attnprune[lens]"'
