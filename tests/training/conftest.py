"""Fixtures of this folder."""

from __future__ import annotations

import pytest

from attnprune.training import recipe
from tests.helpers.factory import save_text, save_tiny_llama
from tests.helpers.recipes import run_config


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return save_tiny_llama(folder / "model"), save_text(folder / "text.txt")


@pytest.fixture(scope="session")
def uninterrupted(inputs, tmp_path_factory):
    return recipe.sparsify(run_config(inputs, tmp_path_factory.mktemp("whole") / "run"))
