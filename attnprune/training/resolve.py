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
from attnprune.sidecar.identity import fingerprint, note_fingerprint
from attnprune.sidecar.quantised import held_bytes, is_quantised, parameter_count
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
    parameters = parameter_count(base.model)
    if train.scope == "auto":
        train.scope = "full" if parameters < SMALL_MODEL and not is_quantised(base.model) else "lora"
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
    if is_quantised(model):
        return "fp32", "as the layers of a quantised base compute on a processor"
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


def load_base(config: RunConfig, device: str | None = None, *, quantised: bool = True) -> bases.BaseModel:
    """The run's base model, on the run's device or another one; as it trains, or (`quantised` False) in full precision
    where `load_in` quantises it."""
    model = config.model
    quantise = model.load_in if quantised and model.load_in != "full" else None
    device = device or model.device
    base = bases.load_base(
        model.name, revision=model.revision, device=device, dtype=load_dtype(config), quantise=quantise
    )
    if quantise is not None and not model.keep_quantised:  # the sidecar is for the base in full precision
        note_fingerprint(base.model, fingerprint(base.model)._replace(quantisation=None))
    return base


def check_quantised(config: RunConfig, base: bases.BaseModel) -> list[str]:
    """Refuse what cannot train on a quantised base; returns the plan's notes about one.

    Raises:
        InputError: whole weights would train, or the base itself would write the text.
    """
    stored = config.model.load_in == "full"
    if not is_quantised(base.model):
        if stored:
            return []
        raise InputError(f"model.load_in: {config.model.name} has no linear layer to hold in {config.model.load_in}")
    if config.train.scope in ("attn", "full"):
        raise InputError(
            f"train.scope: {config.train.scope} trains whole weights, which a quantised base has not",
            hint="--scope lora or gates" if stored else "--scope lora or gates, or leave out --load-in",
        )
    if config.train.fsdp == "on":
        raise InputError("train.fsdp: the layers of a quantised base cannot be sharded", hint="leave out --fsdp")
    for way in ("compile", "cuda_graph"):
        if getattr(config.train, way) == "auto":
            setattr(config.train, way, "off")
    if stored:
        return ["base: quantised in its own files; the sidecar will need it as it is"]
    if config.model.keep_quantised:
        return [f"base: in {config.model.load_in}, and the sidecar will need it so"]
    if "self" in config.data.sources:
        raise InputError(
            f"data.source: self would be written by the base in {config.model.load_in}, which is another model",
            hint="write the text first with the base in full precision, or use --keep-quantised",
        )
    return [f"base: in {config.model.load_in} while it trains; measured and saved on the base in full precision"]


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
    if is_quantised(base.model) and train.fsdp == "auto":
        train.fsdp = "off"
    if train.fsdp != "auto":
        return []
    weights = held_bytes(base.model)
    everything = train.scope in ("attn", "full")
    # A frozen copy beside what trains, gradients and AdamW's two moments; adapters are small.
    needed = weights * (1 + 1 + 3) if everything else weights
    free = free_memory(torch.device(config.model.device))
    train.fsdp = "on" if free is not None and needed > MOST_FOR_WEIGHTS * free else "off"
    what = f"weights and optimiser take {size(needed)} in each process, of {size(free or 0)} that are free"
    return [f"fsdp: {train.fsdp}, because {what}"]
