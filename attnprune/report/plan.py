"""What a run is about to do, as a table and as a JSON-ready dictionary."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.table import Table

from attnprune.report.tables import facts_table
from attnprune.training.constraint import constraint_text
from attnprune.units import counted, duration, percent, size

MANY_BLOCKS = 1000

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
        "memory_bytes": plan.memory.total,
        "memory": asdict(plan.memory),
        "evaluation_bytes": plan.evaluation_bytes,
        "export_bytes": plan.export_bytes,
        "memory_limit": plan.limit_bytes,
        "fits": plan.fits,
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
        ("trains", f"{_scope(config.train)}: {size(plan.trainable, '')} parameters"),
        ("learns", _signal(config)),
        (
            "data",
            f"{config.data.described}: {plan.train_tokens:,} tokens, {plan.eval_tokens:,} held out, "
            f"{plan.passes:.3g} passes",
        ),
        *_shares(plan),
        ("step", f"{plan.tokens_per_step:,} tokens, {config.train.precision}: {_batches(plan)}"),
        ("constraint", constraint_text(config.constraint.kind, _limit(config))),
        *_frontier(config.constraint),
        ("memory", f"about {size(plan.memory.total)}{_of_limit(plan)}: {_parts(plan)}"),
        (
            "",
            f"{size(plan.evaluation_bytes)} while it is evaluated, {size(plan.export_bytes)} while it is written",
        ),
        *_cards(plan),
        (
            "time",
            f"{duration(plan.seconds_per_1000_steps)} per 1,000 steps, {duration(total)} for {config.train.steps:,}",
        ),
        ("output", config.output.folder),
    ]
    return facts_table("Plan", rows + [("note", note) for note in plan.notes])


def _scope(train: Any) -> str:
    if train.scope != "lora":
        return train.scope
    return f"lora, rank {train.lora_rank}, {'attention' if train.lora_targets == 'attention' else 'all linear layers'}"


def _signal(config: Any) -> str:
    """What the weights learn from; under a KL constraint that is the KL, whatever `distill` says."""
    share = 1.0 if config.constraint.kind == "kl" else config.train.distill
    terms = [(share, "KL(base || sparse)"), (1 - share, "loss of the text")]
    terms.append((config.train.match, "relative error of the hidden states"))
    return " + ".join(name if weight == 1 else f"{weight:g} x {name}" for weight, name in terms if weight)


def _frontier(constraint: Any) -> list[tuple[str, str]]:
    """A row for the densities whose best states are kept as well."""
    if not constraint.frontier:
        return []
    return [("frontier", "on the way the best states at " + ", ".join(percent(mark) for mark in constraint.frontier))]


def _shares(plan: Plan) -> list[tuple[str, str]]:
    """A row for each of several sources."""
    total = sum(source.tokens for source in plan.sources)
    shares = [("", f"{s.name}: {counted(s.tokens, 'token')}, {percent(s.tokens / total)}") for s in plan.sources]
    return shares if len(shares) > 1 else []


def _batches(plan: Plan) -> str:
    """How a step's blocks go through the model."""
    train, length = plan.config.train, plan.config.data.seq_len
    micro = int(train.micro_batch_size) or train.batch_size
    at_once = "all at once" if micro == train.batch_size else f"{micro} at once"
    return f"{counted(train.batch_size, 'block')} of {length}, {at_once}"


def _of_limit(plan: Plan) -> str:
    return "" if plan.limit_bytes is None else f" of {size(plan.limit_bytes)} that can be had"


def _parts(plan: Plan) -> str:
    """What the memory is for, largest first."""
    names = {"copied": "copy of the base", "process": "libraries and text"}
    parts = sorted(asdict(plan.memory).items(), key=lambda part: -part[1])
    return ", ".join(
        f"{names.get(name, name)} {size(count)}" for name, count in parts if count >= 0.005 * plan.memory.total
    )


def _cards(plan: Plan) -> list[tuple[str, str]]:
    """A row about GPUs, for models that one can be too small for."""
    if min(plan.fits.values()) > MANY_BLOCKS:
        return []
    return [("", "on a GPU, blocks at once: " + ", ".join(f"{n:,} in {card} GB" for card, n in plan.fits.items()))]


def _limit(config: Any) -> float:
    c = config.constraint
    return c.target_density if c.kind == "density" else c.tolerance
