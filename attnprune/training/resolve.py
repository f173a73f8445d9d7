"""Every 'auto' of a configuration as a value, and the base model that the run starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from attnprune.data.sources import absolute
from attnprune.data.texts import DEFAULT_HUB_DATASET
from attnprune.errors import InputError
from attnprune.runs import processes
from attnprune.runs.config import RunConfig
from attnprune.runs.folder import DEMO, output_folder
from attnprune.sidecar import bases
from attnprune.training.machine import WORTH_IT, bfloat16_flags, bfloat16_gain, free_memory
from attnprune.units import size

DEFAULT_SEQ_LEN = 512
MOST_FOR_WEIGHTS = 0.6  # of a device's free memory, before weights are sharded: a step needs room as well
SMALL_MODEL = 20_000_000  # parameters; below this everything trains, above it LoRA


def resolve(config: RunConfig, base: bases.BaseModel | None = None) -> tuple[RunConfig, list[str]]:
    """Replace every 'auto' by a value; with `base` also those that depend on the model. Returns (config, notes)."""
    config, notes = config.model_copy(deep=True), []
    model, train, text = config.model, config.train, config.data
    model.device = bases.pick_device(model.device)
    _check_batch(config)
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
    parameters = sum(p.numel() for p in base.model.parameters())
    if train.scope == "auto":
        train.scope = "full" if parameters < SMALL_MODEL else "lora"
        notes.append(f"scope: {train.scope}, for a model of {parameters:,} parameters")
    if train.precision == "auto":
        train.precision, why = _precision(base.model, parameters, model.device)
        notes += [f"precision: {train.precision}, {why}"] if why else []
    elif train.precision == "bf16" and model.device == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        notes.append("precision: this processor has no bf16 instructions; fp32 is many times faster")
    notes += settle_sharding(config, base)
    context = bases.context_length(base.model) or DEFAULT_SEQ_LEN
    if text.seq_len == 0:
        text.seq_len = min(DEFAULT_SEQ_LEN, context)
        notes.append(f"block length: {text.seq_len} tokens")
    if not 2 <= text.seq_len <= context:
        raise InputError(f"data.seq_len: {text.seq_len} is not within 2 and the model's context of {context}")
    return config, notes


def _check_batch(config: RunConfig) -> None:
    """Refuse a batch that the processes cannot share."""
    train = config.train
    micro = 0 if train.micro_batch_size == "auto" else train.micro_batch_size
    if train.batch_size % (processes.count() * max(1, micro)):
        each = f"{processes.count()} processes" + (f" x micro_batch_size {micro}" if micro else "")
        raise InputError(f"train.batch_size: {train.batch_size} is not a multiple of {each}")


def _precision(model: Any, parameters: int, device: str) -> tuple[Literal["fp32", "bf16"], str]:
    """(precision, why): bf16 on CUDA, and on a processor that is measured to be faster in it with this model's shapes.

    Small models stay in fp32 without a measurement, so that their runs do not depend on the machine.
    """
    if device == "cuda":
        return "bf16", ""
    if parameters < SMALL_MODEL:
        return "fp32", ""
    flags = bfloat16_flags()
    if not flags or not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return "fp32", "this processor has no bf16 instructions"
    embedding = model.get_input_embeddings().weight.shape
    matrices = [p for p in model.parameters() if p.ndim == 2 and p.shape != embedding]
    columns, inner = max(matrices, key=lambda p: p.numel()).shape
    gain = bfloat16_gain(DEFAULT_SEQ_LEN, inner, columns)
    why = (
        f"bf16 takes {1 / gain:.2g} times as long as fp32 for a {columns} x {inner} matrix ({', '.join(sorted(flags))})"
    )
    return "bf16" if gain >= WORTH_IT else "fp32", why


def load_dtype(config: RunConfig) -> torch.dtype:
    """bfloat16 only for a frozen base on CUDA: weights that train stay fp32, or small updates round away."""
    if config.model.dtype != "auto":
        return bases.torch_dtype(config.model.dtype)
    frozen = config.train.scope in ("gates", "lora", "auto")
    return torch.bfloat16 if config.model.device == "cuda" and frozen else torch.float32


def load_base(config: RunConfig, device: str | None = None) -> bases.BaseModel:
    """The run's base model, on the run's device or another one."""
    model = config.model
    device = device or model.device
    return bases.load_base(model.name, revision=model.revision, device=device, dtype=load_dtype(config))


def settle_sharding(config: RunConfig, base: bases.BaseModel) -> list[str]:
    """Decide whether the weights are sharded, in `config.train.fsdp`; returns the plan's notes.

    Raises:
        InputError: asked for in one process.
    """
    train = config.train
    if processes.count() == 1:
        if train.fsdp == "on":
            raise InputError("train.fsdp: needs several processes", hint="--processes N, or torchrun")
        train.fsdp = "off"
    if train.fsdp != "auto":
        return []
    weights = sum(p.numel() * p.element_size() for p in base.model.parameters())
    everything = train.scope in ("attn", "full")
    # A frozen copy beside what trains, gradients and AdamW's two moments; adapters are small.
    needed = weights * (1 + 1 + 3) if everything else weights
    free = free_memory(torch.device(config.model.device))
    if config.model.device == "cpu" and free is not None:
        free //= processes.here()
    train.fsdp = "on" if free is not None and needed > MOST_FOR_WEIGHTS * free else "off"
    what = f"weights and optimiser take {size(needed)} in each process, of {size(free or 0)} that are free"
    return [f"fsdp: {train.fsdp}, because {what}"]
