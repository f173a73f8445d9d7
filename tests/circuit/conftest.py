"""Fixtures of this folder."""

from __future__ import annotations

import pytest

from attnprune.attention.interface import attach
from attnprune.circuit.tasks import load_task
from attnprune.sidecar import bases

# The bundled model


@pytest.fixture(scope="session")
def addition():
    """The bundled model, the same with most edges closed by gates, and few prompts."""
    dense, sparse = bases.load_base("demo"), bases.load_base("demo")
    for gate in attach(sparse.model):
        gate.bias.data.fill_(1.0)
    return dense.model, sparse.model, load_task("addition", dense.tokenizer, count=12), dense.tokenizer
