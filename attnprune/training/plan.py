"""What a run is about to do: sizes, time and memory, estimated first and then measured on one block.

The micro-batch and, where a time is given, the steps are chosen here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from attnprune.attention.interface import gates_of
from attnprune.data.blocks import AnyBlocks, Blocks, Source, unknown_notes
from attnprune.errors import AttnPruneError
from attnprune.measure import BATCH_TOKENS, measure
from attnprune.runs import processes
from attnprune.runs.config import RunConfig
from attnprune.training.budget import DISK, MARGIN, Costs, steps_within
from attnprune.training.calibration import CALIBRATION_BLOCKS, bias_for_mass, starts_from_mass
from attnprune.training.loss import chunk_tokens
from attnprune.training.machine import free_memory, held_memory, peak_bytes
from attnprune.training.memory import Estimator, Memory, largest_divisor, shape_of
from attnprune.training.scope import DenseBase
from attnprune.training.step import MicroStep, compares_with_base
from attnprune.units import counted, duration, seconds, size

MAX_PASSES = 20  # over the training text, without a warning
SHARE = {"cpu": 0.8, "cuda": 0.9}  # of the free memory that a run may take
USEFUL_TOKENS = 2048  # at once on a CPU: with more the matmuls are no faster
QUICK = 10.0  # seconds: what is sure to take less is measured at its real size
OVERHEAD = 0.01  # seconds per step beside the micro-batches: optimiser, Trainer and its callbacks
WARM = 1.0  # seconds: a block that takes less is timed in its micro-batch, if that is not many of them
FIRST = 5.0  # seconds: a first pass that took less is followed by a second, as up to a quarter of it is warming up
CARDS = (24, 48, 80)  # GB of GPUs that people have
CONTEXT = 1e9  # bytes that CUDA and its libraries take on a GPU


@dataclass(frozen=True)
class Plan:
    """What a run is about to do, measured on one real block.

    Attributes:
        config: the run, with its micro-batch and number of steps.
        trainable, total: numbers of parameters (gate biases count as trainable).
        tokens_per_step, train_tokens, eval_tokens: sizes in tokens.
        seconds_per_1000_steps: one micro-batch's time times the micro-batches of a step, and OVERHEAD, times 1000.
        memory: of a step with one micro-batch, by what it is for, in each process.
        evaluation_bytes, export_bytes: in all, while held-out text is measured in training, and while the artefact is.
        limit_bytes: what the process may hold in all; None where the system does not tell.
        fits: GB of a GPU -> blocks at once that fit (with bf16).
        costs: what a run of some length takes; None without a time budget.
        sources: what each source of text gave, before some was held out.
        notes: choices made for the user and warnings, one line each.
    """

    config: RunConfig
    trainable: int
    total: int
    tokens_per_step: int
    train_tokens: int
    eval_tokens: int
    seconds_per_1000_steps: float
    memory: Memory
    evaluation_bytes: float
    export_bytes: float
    limit_bytes: int | None
    fits: dict[int, int]
    costs: Costs | None
    sources: tuple[Source, ...]
    notes: list[str]

    @property
    def passes(self) -> float:
        """How often the run reads its training text."""
        return self.tokens_per_step * self.config.train.steps / self.train_tokens


@dataclass(frozen=True)
class Clock:
    """When the run began, as time.monotonic() has it, and the seconds that loading the base took."""

    started: float
    loading: float


class _Steps:
    """Real micro-batches that leave no trace, with their time and memory."""

    def __init__(self, model: Any, base: DenseBase, config: RunConfig, train: AnyBlocks):
        self.model, self.config, self.train = model, config, train
        self.step, self.draws = MicroStep(model, base, config), config.gate.estimator == "gumbel"
        self.device = next(model.parameters()).device

    def measured(self, blocks: int) -> tuple[float, int | None]:
        """(seconds, peak bytes above what is held) of a micro-batch with this many blocks."""
        taken: list[float] = []
        was_training = self.model.training
        self.model.train()
        checkpointing = self.config.train.gradient_checkpointing
        if checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        try:
            peak = peak_bytes(lambda: taken.append(self._run(blocks)), self.device)
            if processes.from_first(taken[0] < FIRST) or self.device.type == "cuda":
                taken.append(self._run(blocks))
        finally:
            self.model.train(was_training)
            if checkpointing:
                self.model.gradient_checkpointing_disable()
        return processes.from_first((taken[-1], peak))

    def _run(self, blocks: int) -> float:
        batch = self.train.take(torch.arange(blocks) % len(self.train))
        coefficients = torch.ones(2, device=self.device)
        seed = torch.zeros((), dtype=torch.int64, device=self.device) if self.draws else None
        start = time.perf_counter()
        self.step(batch.input_ids.to(self.device), batch.labels.to(self.device), coefficients, seed)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        taken = time.perf_counter() - start
        self.model.zero_grad(set_to_none=True)
        for gate in gates_of(self.model):
            gate.last = None  # it holds the graph
        return taken


def make_plan(
    model: Any,
    reference: DenseBase,
    config: RunConfig,
    train: AnyBlocks,
    held_out: Blocks,
    notes: list[str],
    clock: Clock | None = None,
    on_note: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Estimate, measure one block, choose the micro-batch and (with `train.time`, which needs `clock`) the steps.

    All processes decide by what process 0 measured: a sharded model runs in all of them or in none.

    Raises:
        AttnPruneError: the memory that is free does not hold one block, by the estimate.
        InputError: `train.time` is too short.
    """
    config, notes = config.model_copy(deep=True), [*notes, *_text_notes(train.sources)]
    settings, steps = config.train, _Steps(model, reference, config, train)
    estimator, limit = processes.from_first(_before(model, config, train.seq_len, steps.device))
    _check_one_block_fits(estimator, limit, config)
    on_note(f"measuring a step of one block of {train.seq_len} tokens (about {size(estimator.of(1).total)})")
    taken, peak = steps.measured(1)
    formulas = estimator
    if peak is not None:
        estimator = formulas.corrected(1, peak)
    if settings.micro_batch_size == "auto":
        settings.micro_batch_size = _micro_batch(estimator, limit, config, train.seq_len)
    here = processes.share(settings.batch_size)
    micro = settings.micro_batch_size or here
    memory = estimator.of(micro)
    too_much = limit is not None and memory.total > limit
    if too_much:
        notes.append(
            f"warning: {counted(micro, 'block')} at once: about {size(memory.total)}, of {size(limit or 0)} that can "
            "be had; use --micro-batch-size auto, a smaller --seq-len or --gradient-checkpointing"
        )
    if (
        micro > 1
        and not too_much
        and (micro * taken < QUICK or (taken < WARM and micro * train.seq_len <= 2 * USEFUL_TOKENS))
    ):
        seconds_of_micro, peak = steps.measured(micro)  # small tensors are slow, and large, for their size
        if peak is not None:
            estimator = formulas.corrected(micro, peak)
            memory = estimator.of(micro)
    else:
        seconds_of_micro = micro * taken
    step = seconds_of_micro * (here // micro) + OVERHEAD
    costs = None
    if settings.time is not None:
        assert clock is not None
        on_note("measuring an evaluation")
        costs = processes.from_first(_costs(model, reference, config, train, held_out, step, clock))
        notes.append(_choose_steps(config, costs, clock))
    plan = Plan(
        config=config,
        trainable=estimator.shape.trainable,
        total=estimator.shape.parameters,
        tokens_per_step=settings.batch_size * train.seq_len,
        train_tokens=train.tokens,
        eval_tokens=held_out.tokens,
        seconds_per_1000_steps=1000 * step,
        memory=memory,
        evaluation_bytes=estimator.evaluation(),
        export_bytes=estimator.export(config.model.keep_quantised),
        limit_bytes=limit,
        fits={card: _on_card(estimator, config).fits(SHARE["cuda"] * card * 1e9) for card in CARDS},
        costs=costs,
        sources=train.sources,
        notes=notes,
    )
    if plan.passes > MAX_PASSES and plan.sources:
        plan.notes.append(
            f"warning: {plan.passes:.0f} passes over the text; beyond {MAX_PASSES} a model learns it by heart: "
            "give more text (--data, several times if need be) or fewer --steps"
        )
    return plan


def _before(model: Any, config: RunConfig, seq_len: int, device: torch.device) -> tuple[Estimator, int | None]:
    """(formulas for this model, bytes that the process may hold in all), before anything is allocated."""
    shape = shape_of(model)
    estimator = Estimator(
        shape, config.train, seq_len, on_cpu=device.type == "cpu", bf16=config.train.precision == "bf16",
        compares=compares_with_base(config),
        chunk=chunk_tokens(device.type, shape.vocabulary) if config.train.step == "fast" else None,
        processes=processes.count(), sharded=config.train.fsdp == "on",
    )  # fmt: skip
    free, held = free_memory(device), held_memory(device)
    if free is None:
        return estimator, None
    one = estimator.of(1)
    estimator = replace(estimator, process=max(0.0, held - one.weights - one.copied))
    return estimator, round(held + SHARE[device.type] * free)


def _check_one_block_fits(estimator: Estimator, limit: int | None, config: RunConfig) -> None:
    needed = estimator.of(1).total
    if limit is not None and needed > limit and config.train.micro_batch_size == "auto":
        raise AttnPruneError(
            f"memory: a step of one block needs about {size(needed)}, and {size(limit)} can be had",
            hint="use a smaller --seq-len, --gradient-checkpointing or another --scope; --micro-batch-size 1 tries it",
        )


def _micro_batch(estimator: Estimator, limit: int | None, config: RunConfig, seq_len: int) -> int:
    """The largest divisor of this process's part of the batch that fits; on a CPU no more than makes it faster."""
    here = processes.share(config.train.batch_size)
    most = here if limit is None else estimator.fits(limit)
    if estimator.on_cpu:
        most = min(most, USEFUL_TOKENS // seq_len)
    return largest_divisor(here, most)


def _on_card(estimator: Estimator, config: RunConfig) -> Estimator:
    """The formulas for a GPU: as they were measured on one, else uncorrected, in bf16."""
    if not estimator.on_cpu:
        return replace(estimator, process=CONTEXT)
    bf16 = config.train.precision == "bf16" or config.model.device == "cpu"
    chunk = None if estimator.chunk is None else chunk_tokens("cuda", estimator.shape.vocabulary)
    return replace(estimator, on_cpu=False, bf16=bf16, chunk=chunk, process=CONTEXT, correction=1.0)


def _costs(
    model: Any, reference: DenseBase, config: RunConfig, train: AnyBlocks, held_out: Blocks, step: float, clock: Clock
) -> Costs:
    """What the run's parts take, from one batch of an evaluation and one block of the gates' first values."""
    rows = torch.arange(min(len(held_out), max(1, BATCH_TOKENS // held_out.seq_len)))
    was_training = model.training
    model.eval()
    evaluation = _timed(lambda: measure(model, held_out.take(rows), reference=reference)) * len(held_out) / len(rows)
    model.train(was_training)
    start = 0.0
    if starts_from_mass(config):
        ids = train.take(torch.arange(1)).input_ids.to(next(model.parameters()).device)
        start = _timed(lambda: bias_for_mass(model, ids, config.gate.initial_mass))
        start *= min(CALIBRATION_BLOCKS, len(train))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    sidecars = len(config.constraint.frontier) + 1
    checkpoint = (12 + 4 * sidecars) * trainable / DISK  # the state, Adam's two, and the best states
    return Costs(step, evaluation, checkpoint, clock.loading, start, sidecars)


def _timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _choose_steps(config: RunConfig, costs: Costs, clock: Clock) -> str:
    """Replace the run's time by a number of steps; returns what was chosen and why."""
    train, gone = config.train, time.monotonic() - clock.started
    asked = seconds(train.time or "")
    steps = steps_within(asked - gone, costs, train)
    train.time = None
    train.steps = steps
    return (
        f"time: {steps:,} steps in {duration(asked)}; {duration(gone)} are gone, evaluations take "
        f"{duration(costs.evaluation)} each, the export {duration(costs.ending)}, {100 * MARGIN:.0f} % are left free"
    )


def _text_notes(sources: tuple[Source, ...]) -> list[str]:
    """What was done to the rows of each source."""
    skipped = [f"{s.name}: {counted(s.empty_rows, 'empty row')} skipped" for s in sources if s.empty_rows]
    chats = [
        f"{s.name}: {counted(s.conversations, 'conversation')}, as the model's chat template writes them"
        for s in sources
        if s.conversations
    ]
    return [f"data: {note}" for note in skipped + chats + unknown_notes(sources)]
