"""Text that a base model writes itself, and its cache."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from attnprune.data.blocks import Blocks
from attnprune.data.vocabulary import check_tokens
from attnprune.errors import InputError
from attnprune.files import write_atomic

_SAMPLING_BYTES = 4 << 30


def cache_folder() -> Path:
    """Where text that a model wrote is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "attnprune"


def self_written(model: Any, tokenizer: Any, seq_len: int, tokens: int, seed: int, cache: Path, key: str) -> Blocks:
    """Blocks sampled from the base model itself (temperature 1, from its start token), cached under `cache`.

    On this text the expected loss difference to the base IS the KL divergence, and no data set is needed.
    `key` identifies the model; the cache file name also holds the sizes, the seed and the kind of device.
    """
    drawn = f"{key} {seq_len} {tokens} {seed} {model.device.type}"
    name = f"self-{hashlib.sha256(drawn.encode()).hexdigest()[:16]}.safetensors"
    file = cache / name
    if file.exists():
        try:
            ids = load_file(file)["input_ids"]
            return Blocks(ids, ids.clone(), "self")
        except SafetensorError:
            file.unlink()  # cut short: write it again
    ids = sample(model, tokenizer, -(-tokens // seq_len), seq_len, seed)
    cache.mkdir(parents=True, exist_ok=True)
    write_atomic(file, save({"input_ids": ids}))
    return Blocks(ids, ids.clone(), "self")


def sample(model: Any, tokenizer: Any, rows: int, seq_len: int, seed: int, rows_at_once: int = 0) -> Tensor:
    """[rows, seq_len] tokens drawn from the model, each row from its start token on, at temperature 1.

    What is drawn depends on `rows_at_once` and on the device; 0 means 8 on a CPU, on CUDA as many as fit into 4 GiB.
    The global random state is left alone.

    Raises:
        InputError: the tokenizer has no token to start with, or one that the model does not have.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise InputError("self: this tokenizer has no BOS or EOS token to start a text with")
    check_tokens(torch.tensor([start]), tokenizer, model.config.vocab_size, "self")
    from transformers import GenerationConfig

    own = model.generation_config
    # The checkpoint's own settings (repetition penalty, top-k, ...) would make it another distribution. Without an EOS
    # a finished row starts the next document by itself, as in packed text.
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=seq_len - 1, pad_token_id=start
    )
    at_once = rows_at_once or rows_that_fit(model, seq_len)
    pieces = []
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            torch.manual_seed(seed)
            for first in range(0, rows, at_once):
                prompt = torch.full((min(at_once, rows - first), 1), start, device=model.device)
                pieces.append(model.generate(prompt, attention_mask=torch.ones_like(prompt)).cpu())
    finally:
        model.generation_config = own
    return torch.cat(pieces)


def rows_that_fit(model: Any, seq_len: int) -> int:
    """Rows to sample at once: 8 on a CPU; on CUDA as many as keep their cache and their logits in about 4 GiB."""
    if model.device.type != "cuda":
        return 8
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cached = 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize
    logits = 4 * config.vocab_size * torch.float32.itemsize  # logits, softmax and what the draw makes of them
    return max(8, _SAMPLING_BYTES // (seq_len * cached + logits))
