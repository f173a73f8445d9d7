"""The whole flow on one page: RunConfig in, Sidecar out.

resolve -> load base -> data -> attach gates -> choose what trains -> plan -> where it starts -> train -> export ->
measure the artefact. Long because it is the whole flow on one page.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import TrainerCallback, set_seed

from attnprune.data.blocks import AnyBlocks, Blocks
from attnprune.data.texts import load_blocks
from attnprune.errors import AttnPruneError, InputError, InterruptedRunError
from attnprune.files import locked, write_atomic
from attnprune.runs import processes
from attnprune.runs.config import RunConfig
from attnprune.runs.folder import CHECKPOINTS, METRICS_FILE, RUN_FILE, check_output
from attnprune.sidecar import bases, format
from attnprune.sidecar.folder import Sidecar
from attnprune.sidecar.identity import model_key
from attnprune.sidecar.quantised import is_quantised
from attnprune.sidecar.quiet import quiet
from attnprune.training import checkpoints
from attnprune.training.calibration import calibrate, starts_from_mass
from attnprune.training.callbacks import Deadline, MetricsFile, StopOnSignal
from attnprune.training.export import export_all
from attnprune.training.plan import Clock, Plan, make_plan
from attnprune.training.recover import choose_layers, hold_still, is_state
from attnprune.training.resolve import check_quantised, load_base, load_dtype, resolve
from attnprune.training.scope import DenseBase, attach_gates, causal_lm, make_trainable
from attnprune.training.sharding import shard
from attnprune.training.start import check_start, sidecar_to_start_from, start_from
from attnprune.training.step import settle_step
from attnprune.training.trackers import tracker
from attnprune.training.trainer import SparsifyTrainer
from attnprune.units import seconds


def sparsify(
    config: RunConfig,
    *,
    resume: bool = False,
    finish: bool = False,
    callbacks: list[TrainerCallback] | None = None,
    on_plan: Callable[[Plan], bool] | None = None,
    on_note: Callable[[str], None] = lambda line: None,
    started: float | None = None,
) -> Sidecar | None:
    """Post-train a model until its attention is sparse at the base's loss, and write the sidecar.

    Args:
        config: the run; 'auto' values are resolved here and written back to run.toml.
        resume: continue the run in `config.output.folder` from its last intact checkpoint.
        finish: do not train; export the best state that the unfinished run in that folder has reached.
        callbacks: transformers callbacks, e.g. a progress display.
        on_plan: called with the plan before the first step; return False to stop there (dry run).
        on_note: receives one-line notes.
        started: when the time of `config.train.time` began to run, in seconds of time.monotonic(); None: now.

    Under torchrun every process calls this, and process 0 writes, asks `on_plan` and exports.

    Returns:
        The sidecar, or None when `on_plan` stopped the run, and in every process but the first. Its result says
        whether the constraint is met.

    Raises:
        AttnPruneError: see its subclasses; the last sealed checkpoint stays in place.
    """
    started = time.monotonic() if started is None else started
    config, notes = resolve(config)
    folder = Path(config.output.folder)
    processes.join(config.model.device)
    with ExitStack() as held:
        with processes.together():
            if processes.is_first():
                if not (resume or finish):
                    check_output(folder)
                held.enter_context(locked(folder))
            callbacks = [*(callbacks or []), *tracker(config.output.report_to, folder)]
        return _run(config, notes, folder, resume or finish, finish, callbacks, on_plan, on_note, started)


def _run(
    config: RunConfig,
    notes: list[str],
    folder: Path,
    resume: bool,
    finish: bool,
    callbacks: list[TrainerCallback],
    on_plan: Callable[[Plan], bool] | None,
    on_note: Callable[[str], None],
    started: float,
) -> Sidecar | None:
    """`sparsify` with the folder held."""
    with processes.together():
        run = _load(config, notes, folder, resume, on_note, started)
    config = run.config
    on_note(f"reading {config.data.described}")
    train_blocks, held_out = processes.first_then_all(
        lambda: load_blocks(config, run.base.model, run.base.tokenizer, model_key(run.base_entry))
    )
    with processes.together():
        model, reference, facts = _prepare(run, train_blocks, held_out, on_note)
    if any(others != facts for others in processes.gather(facts)):
        raise InputError("the processes read different data or different base models").of_all()
    processes.copy_from_first([p.data for p in model.parameters() if is_state(p)])
    if config.train.fsdp == "on":
        trains, dense = causal_lm(model), causal_lm(reference.model)
        shard([trains] if dense is trains else [trains, dense], config.model.device)
    deadline = None if config.train.time is None else started + seconds(config.train.time)
    if not finish:
        with processes.together():
            plan = make_plan(model, reference, config, train_blocks, held_out, run.notes, run.clock, on_note)
        plan = processes.from_first(plan)
        with processes.together():
            goes_on = not processes.is_first() or on_plan is None or on_plan(plan)
        if not processes.from_first(goes_on):
            return None
        config = plan.config
        if deadline is not None and plan.costs is not None:
            callbacks = [*callbacks, Deadline(deadline, plan.costs)]
    try:
        with processes.together():
            checkpoint = _start(folder, config, facts, resume, on_note) if processes.is_first() else None
        checkpoint = processes.from_first(checkpoint)
        if finish and checkpoint is None:
            raise InputError(
                f"{folder}: no checkpoint to finish from", hint=f"attnprune sparsify --resume {folder}"
            ).of_all()
        if checkpoint is None and starts_from_mass(config):
            on_note("finding the gates' first biases from scores")
            calibrate(model, config, train_blocks)
        trainer = _train(
            model, config, train_blocks, held_out, reference, folder, run.init is not None, checkpoint, callbacks,
            finish,
        )  # fmt: skip
        if not processes.is_first():
            return None
        if trainer.state.global_step < config.train.steps:
            on_note(f"ended at step {trainer.state.global_step:,} of {config.train.steps:,}")
            config.train.steps = trainer.state.global_step  # what the result says; run.toml keeps what was planned
        trainer.release()
        sidecar = export_all(trainer, config, run.base_entry, held_out, folder, on_note)
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        return sidecar
    except AttnPruneError as error:
        _describe_state(error, folder)
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        # A full disk reaches us as any of these, by the library that was writing.
        text, failure = str(error), processes.unanswered(error)
        if failure is None:
            if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in text and "write failed" not in text:
                raise
            why = getattr(error, "strerror", None) or text.splitlines()[0]
            failure = AttnPruneError(f"{folder}: cannot write: {why}")
        _describe_state(failure, folder)
        raise failure from error


@dataclass
class _Loaded:
    """What a run starts with: its base, and the sidecar that it goes on from."""

    config: RunConfig
    notes: list[str]
    base: bases.BaseModel
    base_entry: dict[str, Any]
    init: Sidecar | None
    clock: Clock


def _load(
    config: RunConfig, notes: list[str], folder: Path, resume: bool, on_note: Callable[[str], None], started: float
) -> _Loaded:
    """Load the base, and settle what depends on it."""
    init = None
    # A run that has a checkpoint needs nothing else.
    if config.model.init and not (resume and checkpoints.last_good(folder / CHECKPOINTS)[0]):
        init = sidecar_to_start_from(config)
    if config.train.recover and not config.model.init:
        raise InputError("train.recover: needs a finished run to start from", hint="--init SIDECAR")
    if init is not None and config.model.dtype == "auto":
        config.model.dtype = init.manifest.base.dtype  # pyright: ignore[reportAttributeAccessIssue]
    on_note(f"loading {config.model.name}")
    loading = time.monotonic()
    may_shard = processes.count() > 1 and config.train.fsdp != "off"
    place = "cpu" if may_shard else config.model.device
    base = load_base(config, place)
    clock = Clock(started, time.monotonic() - loading)
    config, more = resolve(config, base)
    if base.model.dtype != load_dtype(config):  # a small model on CUDA: only now is it known that its weights train
        base = load_base(config, place)
    more += check_quantised(config, base)
    if is_quantised(base.model):
        base = base if place == config.model.device else load_base(config)
    elif config.train.fsdp == "off":
        base.model.to(config.model.device)
    if load_dtype(config) != torch.float32 and config.train.scope in ("attn", "full"):
        raise InputError(
            f"model.dtype: {config.model.dtype} would round away the updates of scope {config.train.scope}",
            hint="leave out --dtype and use --precision bf16",
        )
    config.model.dtype = str(base.model.dtype).removeprefix("torch.")  # pyright: ignore[reportAttributeAccessIssue]
    set_seed(config.train.seed)
    base_entry = bases.identity(base)
    if init is not None:
        check_start(init, base.model)
        more.append(f"start: the gates and weights of {init.path}")
    return _Loaded(config, notes + more, base, base_entry, init, clock)


def _prepare(
    run: _Loaded, train_blocks: AnyBlocks, held_out: Blocks, on_note: Callable[[str], None]
) -> tuple[Any, DenseBase, dict[str, str]]:
    """(the gated model with what trains, its dense base, what has to be the same when the run is resumed)."""
    config, init = run.config, run.init
    if len(train_blocks) < config.train.batch_size and processes.count() > 1:
        raise InputError(f"{len(train_blocks)} blocks of text are less than a step of {config.train.batch_size}")
    if init is not None and config.train.recover == "worst":
        run.notes += choose_layers(config, init, run.base.model, held_out, on_note)
    attach_gates(run.base.model, config)
    model, reference = make_trainable(run.base.model, config)
    run.notes += settle_step(model, config)
    facts = {
        "train": train_blocks.fingerprint,
        "held_out": held_out.fingerprint,
        "base": run.base_entry["content"],
        "base_config": model_key(run.base_entry),
    }
    if init is not None:
        start_from(model, init, config)
        facts["init"] = hashlib.sha256(init.manifest.to_json().encode()).hexdigest()
    run.notes += hold_still(model, config)
    return model, reference, facts


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
        write_atomic(folder / RUN_FILE, config.to_toml())
        (folder / CHECKPOINTS).mkdir()
        write_atomic(facts_file, json.dumps(facts, sort_keys=True))
        return None
    stored = format.parse_json(facts_file.read_bytes(), str(facts_file)) if facts_file.exists() else facts
    for name, value in facts.items():
        if name == "base_config" and name not in stored:
            continue  # a run that began before configurations were compared
        if stored.get(name) != value:
            what = {
                "train": "training data",
                "held_out": "held-out data",
                "base": "base model",
                "base_config": "base model's configuration",
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
    train_blocks: AnyBlocks,
    held_out: Blocks,
    reference: DenseBase,
    folder: Path,
    from_sidecar: bool,
    checkpoint: Path | None,
    callbacks: list[TrainerCallback],
    finish: bool,
) -> SparsifyTrainer:
    """Train to the end, or save and raise InterruptedRunError on a signal; with `finish` end at the checkpoint."""
    inner = config.model_copy(deep=True)
    inner.output.folder = str(folder / CHECKPOINTS)
    stopper = StopOnSignal()
    callbacks = [MetricsFile(folder / METRICS_FILE), stopper, *callbacks]
    trainer = SparsifyTrainer(model, inner, train_blocks, held_out, reference, callbacks, from_sidecar)
    with processes.together():
        if checkpoint is not None:
            trainer.restore_best(checkpoint)
    set_seed(config.train.seed)
    if finish:
        assert checkpoint is not None
        with quiet():
            trainer.finish(checkpoint)
        return trainer
    with stopper, quiet():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if stopper.received is not None and trainer.state.global_step < config.train.steps:
            raise InterruptedRunError(
                f"interrupted: saved checkpoint-{trainer.state.global_step}",
                stopper.received,
                hint=f"continue with: attnprune sparsify --resume {folder}; or --finish to export the best so far",
            ).of_all()
    return trainer
