"""A tiny model and a text on disk, and a finished run on them."""

from __future__ import annotations

import pytest

import attnprune as ap
from tests.helpers.factory import save_text, save_tiny_llama

TINY = {
    "seq_len": 16, "eval_tokens": 160, "batch_size": 4, "eval_every": 4, "save_every": 4, "scope": "attn",
    "tolerance": 0.5, "device": "cpu", "steps": 8,
}  # fmt: skip


@pytest.fixture(scope="session")
def tiny():
    """Keywords of a run of a moment."""
    return dict(TINY)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, a text, and a finished run."""
    folder = tmp_path_factory.mktemp("api")
    save_tiny_llama(folder / "model")
    save_text(folder / "text.txt")
    ap.sparsify(folder / "model", data=folder / "text.txt", out=folder / "sparse", progress=False, **TINY)
    return folder
