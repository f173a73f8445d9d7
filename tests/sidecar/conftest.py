"""Fixtures of this folder."""

from __future__ import annotations

import pytest

from tests.helpers.formats import make


@pytest.fixture
def folder(tmp_path):
    return make(tmp_path / "sidecar")
