"""What a run is about to do, as a table and as a JSON-ready dictionary."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.table import Table

from attnprune.report.tables import facts_table
from attnprune.training.constraint import constraint_text
from attnprune.units import duration, percent, size

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
        "passes": plan.passes,
        "sources": [asdict(source) for source in plan.sources],
        "notes": plan.notes,
    }


def plan_table(plan: Plan) -> Table:
    """What the run is about to do."""
    config = plan.config
    total = plan.seconds_per_1000_steps * config.train.steps / 1000
    rows = [
        ("model", f"{config.model.name}, {size(plan.total, '')} parameters, on {config.model.device}"),
        ("trains", f"{config.train.scope}: {size(plan.trainable, '')} parameters"),
        (
            "data",
            f"{config.data.described}: {plan.train_tokens:,} tokens, {plan.eval_tokens:,} held out, "
            f"{plan.passes:.3g} passes",
        ),
        *_shares(plan),
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


def _shares(plan: Plan) -> list[tuple[str, str]]:
    """A row for each of several sources."""
    total = sum(source.tokens for source in plan.sources)
    shares = [("", f"{s.name}: {s.tokens:,} tokens, {percent(s.tokens / total)}") for s in plan.sources]
    return shares if len(shares) > 1 else []


def _limit(config: Any) -> float:
    c = config.constraint
    return c.target_density if c.kind == "density" else c.tolerance
