"""Fixtures of this folder."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from attnprune.sidecar import bases
from tests.helpers.factory import gguf_file
from tests.helpers.tasks import word_tokenizer


@pytest.fixture(scope="session")
def smol():
    """SmolLM2's tokenizer: one token per digit, no BOS."""
    file = gguf_file()
    return AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)


@pytest.fixture(scope="session")
def demo():
    return AutoTokenizer.from_pretrained(bases.demo_folder())


@pytest.fixture(scope="session")
def pairs():
    return word_tokenizer()
