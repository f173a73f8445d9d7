"""What a run is about to do, as a table and as a JSON-ready dictionary."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

from attnprune.report.tables import facts_table
from attnprune.training.constraint import constraint_text
from attnprune.units import duration, size

if TYPE_CHECKING:
    from attnprune.training.plan import Plan


def plan_data(plan: Plan) -> dict[str, Any]:
    """A plan for JSON."""
    return {
        "config": plan.config.model_dump(),
        "trainable": plan.trainable,
        "total": plan.total,
        "tokens_per_step": plan.tokens_per_step,
        "train_tokens": plan.train_tokens,
        "eval_tokens": plan.eval_tokens,
        "seconds_per_1000_steps": plan.seconds_per_1000_steps,
        "memory_bytes": plan.memory_bytes,
        "notes": plan.notes,
    }


def plan_table(plan: Plan) -> Table:
    """What the run is about to do."""
    config = plan.config
    total = plan.seconds_per_1000_steps * config.train.steps / 1000
    passes = plan.tokens_per_step * config.train.steps / plan.train_tokens
    rows = [
        ("model", f"{config.model.name}, {size(plan.total, '')} parameters, on {config.model.device}"),
        ("trains", f"{config.train.scope}: {size(plan.trainable, '')} parameters"),
        (
            "data",
            f"{config.data.source}: {plan.train_tokens:,} tokens, {plan.eval_tokens:,} held out, {passes:.3g} passes",
        ),
        ("step", f"{plan.tokens_per_step:,} tokens, {config.data.seq_len} per block, {config.train.precision}"),
        ("constraint", constraint_text(config.constraint.kind, _limit(config))),
        ("memory", f"about {size(plan.memory_bytes)}"),
        (
            "time",
            f"{duration(plan.seconds_per_1000_steps)} per 1,000 steps, {duration(total)} for {config.train.steps:,}",
        ),
        ("output", config.output.folder),
    ]
    return facts_table("Plan", rows + [("note", note) for note in plan.notes])


def _limit(config: Any) -> float:
    c = config.constraint
    return c.target_density if c.kind == "density" else c.tolerance
