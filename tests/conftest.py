"""Shared fixtures: one torch thread, seeded tests, a quiet and offline transformers, tiny random models."""

import os
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import transformers
from transformers.utils import logging as transformers_logging

torch.set_num_threads(1)
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def spread(model):
    """Redraw the matrices of a tiny random model so that its attention scores have a spread of about one."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return model.eval()


@pytest.fixture
def tiny_llama():
    """Factory of random Llama models: 3 layers, 4 heads on 2 key/value heads, 97 tokens."""

    def make(**options):
        defaults = {
            "vocab_size": 97,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
        }
        return spread(transformers.LlamaForCausalLM(transformers.LlamaConfig(**defaults | options)))

    return make


@pytest.fixture
def tokens():
    """Factory of random token ids [rows, length] without the padding token 0."""

    def make(rows, length, vocabulary=97):
        return torch.randint(1, vocabulary, (rows, length))

    return make


@pytest.fixture
def as_nobody():
    """A public folder and a switch to a user who may not read everything (root may)."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)

        def switch():
            if os.geteuid() == 0:
                os.seteuid(65534)

        uid = os.geteuid()
        yield folder, switch
        os.seteuid(uid)
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o700)
