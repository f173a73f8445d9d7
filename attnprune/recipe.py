"""The whole flow on one page: RunConfig in, Sidecar out.

resolve -> load base -> data -> attach gates -> choose what trains (and where it starts) -> plan -> train -> export ->
measure the artefact.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import re
import resource
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import TrainerCallback, set_seed
from transformers.pytorch_utils import Conv1D

from attnprune import checkpoints, data, format, hub, runtime
from attnprune.attention.interface import GATE_ATTRIBUTE, attach, detach, gates_forced_open, gates_of
from attnprune.calibration import bias_for_mass
from attnprune.config import RunConfig
from attnprune.data import Blocks
from attnprune.errors import AttnPruneError, InputError, InterruptedRunError
from attnprune.export import STAGING, export
from attnprune.measure import Reference, token_losses
from attnprune.runs import CHECKPOINTS, DEMO, METRICS_FILE, RUN_FILE, check_output, locked, output_folder
from attnprune.sidecar import Sidecar, check_base, is_merged, open_sidecar
from attnprune.trainer import MetricsFile, SparsifyTrainer, StopOnSignal, compares_with_base

DEFAULT_SEQ_LEN = 512
CALIBRATION_BLOCKS = 16
SMALL_MODEL = 20_000_000  # parameters; below this everything trains, above it LoRA


@dataclass(frozen=True)
class Plan:
    """What a run is about to do, measured on one real forward and backward pass.

    Attributes:
        trainable, total: numbers of parameters (gate biases count as trainable).
        tokens_per_step, train_tokens, eval_tokens: sizes in tokens.
        seconds_per_1000_steps: one micro-batch's time times the micro-batches of a step, times 1000.
        memory_bytes: peak memory of that pass plus optimiser state.
        notes: choices made for the user, one line each.
    """

    config: RunConfig
    trainable: int
    total: int
    tokens_per_step: int
    train_tokens: int
    eval_tokens: int
    seconds_per_1000_steps: float
    memory_bytes: int
    notes: list[str]


def resolve(config: RunConfig, base: runtime.BaseModel | None = None) -> tuple[RunConfig, list[str]]:
    """Replace every 'auto' by a value; with `base` also those that depend on the model. Returns (config, notes)."""
    config, notes = config.model_copy(deep=True), []
    model, train, text = config.model, config.train, config.data
    model.device = runtime.pick_device(model.device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("several processes: training runs on one process", hint="leave out torchrun")
    if train.precision == "auto":
        train.precision = "bf16" if model.device == "cuda" else "fp32"
    if text.source == "auto":
        text.source = data.DEFAULT_HUB_DATASET
        notes.append(f"data: {text.source}, because general web text is closest to what open models were trained on")
    config.output.folder = str(output_folder(config))
    # run.toml must mean the same from any folder
    for section, key, ours in ((model, "name", DEMO), (model, "init", None), (text, "source", "task")):
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
    context = runtime.context_length(base.model) or DEFAULT_SEQ_LEN
    if text.seq_len == 0:
        text.seq_len = min(DEFAULT_SEQ_LEN, context)
        notes.append(f"block length: {text.seq_len} tokens")
    if not 2 <= text.seq_len <= context:
        raise InputError(f"data.seq_len: {text.seq_len} is not within 2 and the model's context of {context}")
    return config, notes


def load_dtype(config: RunConfig) -> torch.dtype:
    """bfloat16 only for a frozen base on CUDA: weights that train stay fp32, or small updates round away."""
    if config.model.dtype != "auto":
        return runtime.torch_dtype(config.model.dtype)
    frozen = config.train.scope in ("gates", "lora", "auto")
    return torch.bfloat16 if config.model.device == "cuda" and frozen else torch.float32


def load_base(config: RunConfig) -> runtime.BaseModel:
    """The run's base model."""
    model = config.model
    return runtime.load_base(model.name, revision=model.revision, device=model.device, dtype=load_dtype(config))


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The attention modules that carry gates, in layer order."""
    found = [m for m in model.modules() if hasattr(m, GATE_ATTRIBUTE)]
    return sorted(found, key=lambda module: getattr(module, GATE_ATTRIBUTE).layer)


def projection_names(model: nn.Module) -> list[str]:
    """Names of the linear projections inside the attention modules (q, k, v, o; or the fused qkv and o)."""
    gated = {id(module) for module in attention_modules(model)}
    return [
        f"{name}.{child}"
        for name, module in model.named_modules()
        if id(module) in gated
        for child, layer in module.named_children()
        if isinstance(layer, (nn.Linear, Conv1D))
    ]


def make_trainable(model: Any, config: RunConfig) -> tuple[Any, Reference]:
    """Freeze all but the scope's parameters and the gates; return (model to train, dense base as a function).

    With scope gates or lora the base is the same model with adapters off and gates open; otherwise a frozen copy.
    """
    scope = config.train.scope
    copied = None
    if scope in ("attn", "full"):
        copied = copy.deepcopy(model).requires_grad_(False).eval()
        detach(copied)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(scope == "full" or GATE_ATTRIBUTE in name)
    if scope == "attn":
        for module in attention_modules(model):
            module.requires_grad_(True)
    if scope == "lora":
        model = _add_lora(model, config)
    _switch_off_dropout(model)

    def reference(ids: Tensor) -> Tensor:
        target = copied if copied is not None else model
        adapters_off = model.disable_adapter() if scope == "lora" else nullcontext()
        with torch.no_grad(), adapters_off, gates_forced_open(target):
            return target(input_ids=ids, use_cache=False).logits

    return model, reference


def sidecar_to_start_from(config: RunConfig) -> Sidecar:
    """The sidecar that `config.model.init` names.

    Raises:
        InputError: it is no sidecar, but a merged model for example.
    """
    assert config.model.init is not None
    folder = hub.locate(config.model.init, weights=False)
    if is_merged(folder):
        raise InputError(
            f"{config.model.init}: is a merged model", hint="--init takes the sidecar that it was made from"
        )
    return open_sidecar(hub.locate(config.model.init))


def check_start(sidecar: Sidecar, model: nn.Module) -> None:
    """Refuse a sidecar that was made on another base than `model`, which has no gates yet.

    Raises:
        InputError: another data type, other structure or other weights.
    """
    dtype, made_on = str(model.dtype).removeprefix("torch."), sidecar.manifest.base.dtype
    if dtype != made_on:
        raise InputError(f"{sidecar.path}: made on a {made_on} base, not {dtype}", hint=f"--dtype {made_on}")
    try:
        check_base(sidecar.manifest, model)
    except InputError as error:  # its hint is for loading
        raise InputError(f"{sidecar.path}: {error.message}") from None


def start_from(model: Any, sidecar: Sidecar, config: RunConfig) -> None:
    """Put a sidecar's gate biases and weights into the gated model that is about to train.

    Raises:
        InputError: what the sidecar changed is not what this run trains (scope, rank or alpha of the adapters), or it
            does not fit the model.
    """
    gates = gates_of(model)
    if [len(gate.bias) for gate in gates] != sidecar.manifest.gate.heads:
        raise InputError(f"{sidecar.path}: the gates do not fit the model's layers and heads")
    entry, trains = sidecar.manifest.weights, {n: p for n, p in model.named_parameters() if p.requires_grad}
    # PEFT stores an adapter's tensors without the name ("default") that they have in the model.
    weights = {re.sub(r"\.lora_([AB])\.", r".lora_\1.default.", name): t for name, t in sidecar.weights().items()}
    fits = all(name in trains and trains[name].shape == tensor.shape for name, tensor in weights.items())
    if not fits or (entry.kind == "lora" and entry.alpha != model.peft_config["default"].lora_alpha):
        what, scope = "weights", "full"
        if entry.kind == "lora":
            what, scope = f"adapters of rank {entry.rank} (alpha {entry.alpha:g})", f"lora --lora-rank {entry.rank}"
        raise InputError(
            f"{sidecar.path}: its {what} do not fit a run with scope {config.train.scope}", hint=f"--scope {scope}"
        )
    with torch.no_grad():
        for name, tensor in weights.items():
            if not bool(trains[name].copy_(tensor).isfinite().all()):
                raise InputError(f"{sidecar.path}: {name} is not finite in {trains[name].dtype}")
        for gate, bias in zip(gates, sidecar.biases(), strict=True):
            gate.bias.copy_(torch.from_numpy(bias.copy()))


def _switch_off_dropout(model: nn.Module) -> None:
    """Dropout would be noise on the constraint. Families keep the rate in nn.Dropout or in floats of many names."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name):
                setattr(module, name, 0.0)


def _add_lora(model: Any, config: RunConfig) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise AttnPruneError("scope lora needs peft", hint="pip install 'attnprune[lora]'") from None
    names = projection_names(model)
    modules = dict(model.named_modules())
    rank = config.train.lora_rank
    lora = LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, bias="none", target_modules=names,
        fan_in_fan_out=isinstance(modules[names[0]], Conv1D), task_type="CAUSAL_LM",
    )  # fmt: skip
    wrapped = get_peft_model(model, lora)
    for gate in gates_of(wrapped):
        gate.bias.requires_grad_(True)
    return wrapped


def sparsify(
    config: RunConfig,
    *,
    resume: bool = False,
    callbacks: list[TrainerCallback] | None = None,
    on_plan: Callable[[Plan], bool] | None = None,
    on_note: Callable[[str], None] = lambda line: None,
) -> Sidecar | None:
    """Post-train a model until its attention is sparse at the base's loss, and write the sidecar.

    Args:
        config: the run; 'auto' values are resolved here and written back to run.toml.
        resume: continue the run in `config.output.folder` from its last intact checkpoint.
        callbacks: transformers callbacks, e.g. a progress display.
        on_plan: called with the plan before the first step; return False to stop there (dry run).
        on_note: receives one-line notes.

    Returns:
        The sidecar, or None when `on_plan` stopped the run. Its result says whether the constraint is met.

    Raises:
        AttnPruneError: see its subclasses; the last sealed checkpoint stays in place.
    """
    config, notes = resolve(config)
    folder = Path(config.output.folder)
    if not resume:
        check_output(folder)
    with locked(folder):
        return _run(config, notes, folder, resume, callbacks or [], on_plan, on_note)


def _run(
    config: RunConfig,
    notes: list[str],
    folder: Path,
    resume: bool,
    callbacks: list[TrainerCallback],
    on_plan: Callable[[Plan], bool] | None,
    on_note: Callable[[str], None],
) -> Sidecar | None:
    """`sparsify` with the folder held."""
    init = None
    # A run that has a checkpoint needs nothing else.
    if config.model.init and not (resume and checkpoints.last_good(folder / CHECKPOINTS)[0]):
        init = sidecar_to_start_from(config)
    if init is not None and config.model.dtype == "auto":
        config.model.dtype = init.manifest.base.dtype  # pyright: ignore[reportAttributeAccessIssue]
    base = load_base(config)
    config, more = resolve(config, base)
    if base.model.dtype != load_dtype(config):  # a small model on CUDA: only now is it known that its weights train
        base = load_base(config)
    if load_dtype(config) != torch.float32 and config.train.scope in ("attn", "full"):
        raise InputError(
            f"model.dtype: {config.model.dtype} would round away the updates of scope {config.train.scope}",
            hint="leave out --dtype and use --precision bf16",
        )
    config.model.dtype = str(base.model.dtype).removeprefix("torch.")  # pyright: ignore[reportAttributeAccessIssue]
    set_seed(config.train.seed)
    base_entry = runtime.identity(base)
    if init is not None:
        check_start(init, base.model)
        more.append(f"start: the gates and weights of {init.path}")
    train_blocks, held_out = data.load(config, base.model, base.tokenizer, base_entry["content"])
    attach_gates(base.model, config, train_blocks)
    model, reference = make_trainable(base.model, config)
    run_facts = {"train": train_blocks.fingerprint, "held_out": held_out.fingerprint, "base": base_entry["content"]}
    if init is not None:
        start_from(model, init, config)
        run_facts["init"] = hashlib.sha256(init.manifest.to_json().encode()).hexdigest()
    plan = make_plan(model, reference, config, train_blocks, held_out, notes + more)
    if on_plan is not None and not on_plan(plan):
        return None
    try:
        checkpoint = _start(folder, config, run_facts, resume, on_note)
        trainer = _train(
            model, config, train_blocks, held_out, reference, folder, init is not None, checkpoint, callbacks
        )
        trainer.load_best()
        trainer.model.cpu()  # makes room on a GPU
        sidecar = export(trainer.model, load_base(config), base_entry, config, held_out, folder)
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        return sidecar
    except AttnPruneError as error:
        _describe_state(error, folder)
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        # A full disk reaches us as any of these, by the library that was writing.
        text = str(error)
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in text and "write failed" not in text:
            raise
        failure = AttnPruneError(f"{folder}: cannot write: {getattr(error, 'strerror', None) or text.splitlines()[0]}")
        _describe_state(failure, folder)
        raise failure from error


def attach_gates(model: Any, config: RunConfig, blocks: Blocks) -> None:
    """Attach gates with the run's temperatures and initial biases."""
    settings = config.gate
    gates = attach(model, bias=settings.bias_init)
    for gate in gates:
        gate.temperature, gate.slope_temperature = settings.temperature, settings.slope_temperature
        gate.deterministic = config.train.deterministic
    if settings.initial_mass and not config.model.init:
        rows = torch.linspace(0, len(blocks) - 1, min(CALIBRATION_BLOCKS, len(blocks))).long()
        ids = blocks.take(rows).input_ids.to(model.device)
        for gate, bias in zip(gates, bias_for_mass(model, ids, settings.initial_mass), strict=True):
            with torch.no_grad():
                gate.bias.copy_(bias)


def _describe_state(error: AttnPruneError, folder: Path) -> None:
    """Say which checkpoint the run can continue from."""
    if error.hint is None and (folder / CHECKPOINTS).is_dir():
        good, _ = checkpoints.last_good(folder / CHECKPOINTS)
        if good is not None:
            error.hint = f"last good checkpoint: {good.name}; continue with: attnprune sparsify --resume {folder}"


def _start(
    folder: Path, config: RunConfig, facts: dict[str, str], resume: bool, on_note: Callable[[str], None]
) -> Path | None:
    """Write run.toml of a new run, or find the checkpoint a resumed run continues from."""
    facts_file = folder / CHECKPOINTS / "data.json"
    if not resume:
        checkpoints.write_atomic(folder / RUN_FILE, config.to_toml())
        (folder / CHECKPOINTS).mkdir()
        checkpoints.write_atomic(facts_file, json.dumps(facts, sort_keys=True))
        return None
    for stale in folder.glob(f"{STAGING}*"):
        shutil.rmtree(stale)
    stored = format.parse_json(facts_file.read_bytes(), str(facts_file)) if facts_file.exists() else facts
    for name, value in facts.items():
        if stored.get(name) != value:
            what = {
                "train": "training data",
                "held_out": "held-out data",
                "base": "base model",
                "init": "first sidecar",
            }
            raise InputError(f"{folder}: the {what[name]} differs from the run's")
    good, skipped = checkpoints.last_good(folder / CHECKPOINTS)
    for damaged in skipped:
        on_note(f"skipping {damaged.name} (incomplete)")
    # Without a seal a save was cut short and the run can start over; a sealed one that fails was damaged later.
    if good is None and any((folder / checkpoints.SEAL).exists() for folder in skipped):
        raise AttnPruneError(f"{folder}: no intact checkpoint", hint="start again with another --out")
    for damaged in skipped:
        shutil.rmtree(damaged)
    on_note(f"continuing from {good.name}" if good else "no checkpoint yet: starting at step 0")
    return good


def _train(
    model: Any,
    config: RunConfig,
    train_blocks: Blocks,
    held_out: Blocks,
    reference: Reference,
    folder: Path,
    from_sidecar: bool,
    checkpoint: Path | None,
    callbacks: list[TrainerCallback],
) -> SparsifyTrainer:
    """Train to the end, or save and raise InterruptedRunError on a signal."""
    inner = config.model_copy(deep=True)
    inner.output.folder = str(folder / CHECKPOINTS)
    stopper = StopOnSignal()
    callbacks = [MetricsFile(folder / METRICS_FILE), stopper, *callbacks]
    trainer = SparsifyTrainer(model, inner, train_blocks, held_out, reference, callbacks, from_sidecar)
    if checkpoint is not None:
        trainer.restore_best(checkpoint)
    set_seed(config.train.seed)
    with stopper, runtime.quiet():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if trainer.state.global_step < config.train.steps:
            assert stopper.received is not None  # nothing else ends training early
            raise InterruptedRunError(
                f"interrupted: saved checkpoint-{trainer.state.global_step}",
                stopper.received,
                hint=f"continue with: attnprune sparsify --resume {folder}",
            )
    return trainer


def make_plan(
    model: Any, reference: Reference, config: RunConfig, train: Blocks, held_out: Blocks, notes: list[str]
) -> Plan:
    """Time one real micro-batch (forward, base if needed, backward), add up what the run will need; leaves no trace."""
    settings = config.train
    micro = settings.micro_batch_size or settings.batch_size
    device = next(model.parameters()).device
    batch = train.take(torch.arange(min(micro, len(train))))
    ids, labels = batch.input_ids.to(device), batch.labels.to(device)
    seconds = 0.0
    for _ in range(2):  # the first pass pays for warm-up
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            losses = token_losses(model(input_ids=ids, use_cache=False).logits, labels)[1]
            penalty = torch.stack([gate.last.penalty.sum() for gate in gates_of(model) if gate.last is not None]).sum()
            if compares_with_base(config):
                token_losses(reference(ids), labels)
        (losses.mean() + 0.0 * penalty).backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        model.zero_grad(set_to_none=True)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Plan(
        config=config,
        trainable=trainable,
        total=sum(p.numel() for p in model.parameters()),
        tokens_per_step=settings.batch_size * train.seq_len,
        train_tokens=train.input_ids.numel(),
        eval_tokens=held_out.input_ids.numel(),
        seconds_per_1000_steps=1000 * seconds * math.ceil(settings.batch_size / micro),
        memory_bytes=peak + 8 * trainable,
        notes=notes,
    )
