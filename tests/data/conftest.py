"""Fixtures of this folder."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.helpers.texts import on_the_hub, written


@pytest.fixture(scope="session")
def writer():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(params=[".jsonl", ".parquet", "hub"])
def source_of(request, tmp_path, monkeypatch):
    """Rows as a source of each kind."""

    def make(rows, field="text"):
        if request.param == "hub":
            return on_the_hub(monkeypatch, rows, field)
        return str(written(tmp_path, request.param, rows, field))

    return make
