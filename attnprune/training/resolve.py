"""Every 'auto' of a configuration as a value, and the base model that the run starts from."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from attnprune.data.sources import absolute
from attnprune.data.texts import DEFAULT_HUB_DATASET
from attnprune.errors import InputError
from attnprune.runs.config import RunConfig
from attnprune.runs.folder import DEMO, output_folder
from attnprune.sidecar import bases

DEFAULT_SEQ_LEN = 512
SMALL_MODEL = 20_000_000  # parameters; below this everything trains, above it LoRA


def resolve(config: RunConfig, base: bases.BaseModel | None = None) -> tuple[RunConfig, list[str]]:
    """Replace every 'auto' by a value; with `base` also those that depend on the model. Returns (config, notes)."""
    config, notes = config.model_copy(deep=True), []
    model, train, text = config.model, config.train, config.data
    model.device = bases.pick_device(model.device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("several processes: training runs on one process", hint="leave out torchrun")
    if train.precision == "auto":
        train.precision = "bf16" if model.device == "cuda" else "fp32"
    if "auto" in text.sources:
        text.source = [DEFAULT_HUB_DATASET if source == "auto" else source for source in text.sources]
        notes.append(f"data: {DEFAULT_HUB_DATASET}, because general web text is closest to what models were trained on")
    config.output.folder = str(output_folder(config))
    # run.toml must mean the same from any folder
    text.source = [absolute(source) for source in text.sources]
    for section, key, ours in ((model, "name", DEMO), (model, "init", None)):
        if getattr(section, key) not in (ours, None) and Path(getattr(section, key)).exists():
            setattr(section, key, str(Path(getattr(section, key)).resolve()))
    if base is None:
        return config, notes
    size = sum(p.numel() for p in base.model.parameters())
    if train.scope == "auto":
        train.scope = "full" if size < SMALL_MODEL else "lora"
        notes.append(f"scope: {train.scope}, for a model of {size:,} parameters")
    if train.precision == "bf16" and model.device == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        notes.append("precision: this processor has no bf16 instructions; fp32 is many times faster")
    context = bases.context_length(base.model) or DEFAULT_SEQ_LEN
    if text.seq_len == 0:
        text.seq_len = min(DEFAULT_SEQ_LEN, context)
        notes.append(f"block length: {text.seq_len} tokens")
    if not 2 <= text.seq_len <= context:
        raise InputError(f"data.seq_len: {text.seq_len} is not within 2 and the model's context of {context}")
    return config, notes


def load_dtype(config: RunConfig) -> torch.dtype:
    """bfloat16 only for a frozen base on CUDA: weights that train stay fp32, or small updates round away."""
    if config.model.dtype != "auto":
        return bases.torch_dtype(config.model.dtype)
    frozen = config.train.scope in ("gates", "lora", "auto")
    return torch.bfloat16 if config.model.device == "cuda" and frozen else torch.float32


def load_base(config: RunConfig) -> bases.BaseModel:
    """The run's base model."""
    model = config.model
    return bases.load_base(model.name, revision=model.revision, device=model.device, dtype=load_dtype(config))
