"""What a run is about to do: sizes, time and memory, measured on one real step."""

from __future__ import annotations

import math
import resource
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch

from attnprune.attention.interface import gates_of
from attnprune.data.blocks import Blocks, Source
from attnprune.measure import Reference, token_losses
from attnprune.runs.config import RunConfig
from attnprune.training.step import compares_with_base

MAX_PASSES = 20  # over the training text, without a warning


@dataclass(frozen=True)
class Plan:
    """What a run is about to do, measured on one real forward and backward pass.

    Attributes:
        trainable, total: numbers of parameters (gate biases count as trainable).
        tokens_per_step, train_tokens, eval_tokens: sizes in tokens.
        seconds_per_1000_steps: one micro-batch's time times the micro-batches of a step, times 1000.
        memory_bytes: peak memory of that pass plus optimiser state.
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
    memory_bytes: int
    sources: tuple[Source, ...]
    notes: list[str]

    @property
    def passes(self) -> float:
        """How often the run reads its training text."""
        return self.tokens_per_step * self.config.train.steps / self.train_tokens


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
    plan = Plan(
        config=config,
        trainable=trainable,
        total=sum(p.numel() for p in model.parameters()),
        tokens_per_step=settings.batch_size * train.seq_len,
        train_tokens=train.input_ids.numel(),
        eval_tokens=held_out.input_ids.numel(),
        seconds_per_1000_steps=1000 * seconds * math.ceil(settings.batch_size / micro),
        memory_bytes=peak + 8 * trainable,
        sources=train.sources,
        notes=notes + _text_notes(train.sources),
    )
    if plan.passes > MAX_PASSES and plan.sources:
        plan.notes.append(
            f"warning: {plan.passes:.0f} passes over the text; beyond {MAX_PASSES} a model learns it by heart: "
            "give more text (--data, several times if need be) or fewer --steps"
        )
    return plan


def _text_notes(sources: tuple[Source, ...]) -> list[str]:
    """What was done to the rows of each source."""
    skipped = [f"{s.name}: {s.empty_rows:,} empty rows skipped" for s in sources if s.empty_rows]
    chats = [
        f"{s.name}: {s.conversations:,} conversations, as the model's chat template writes them"
        for s in sources
        if s.conversations
    ]
    return [f"data: {note}" for note in skipped + chats]
