"""Fixtures of this folder."""

from __future__ import annotations

import pytest

from attnprune.attention.interface import attach
from tests.helpers.families import BIAS, build
from tests.helpers.pairs import Pair


@pytest.fixture(scope="session")
def pair_of():
    """Cached pairs by family, dense or gated; nothing may change their models."""
    pairs = {}

    def get(family, gated=False):
        if (family, gated) not in pairs:
            model = build(family)
            if gated:
                attach(model, BIAS)
            pairs[family, gated] = Pair(model)
        return pairs[family, gated]

    return get


@pytest.fixture
def pair(pair_of, family, gated):
    return pair_of(family, gated)
