"""Fixtures of this folder."""

from __future__ import annotations

import pytest

from attnprune.attention.interface import attach
from tests.helpers.gated import BIAS


@pytest.fixture
def attached(tiny_llama):
    """Factory of (model, gates) with another bias for every head."""

    def make(**options):
        model = tiny_llama(**options)
        return model, attach(model, BIAS)

    return make
