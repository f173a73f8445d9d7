"""Sidecars, plans and reports as rich renderables and as JSON-ready dictionaries. No torch."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from attnprune import format, hub
from attnprune.errors import printable
from attnprune.sidecar import Sidecar, has_release_code

if TYPE_CHECKING:
    from attnprune.measure import Report
    from attnprune.push import Plan as PushPlan
    from attnprune.recipe import Plan

# Density of a head -> colour; each step is about a factor of three.
_SHADES = [(0.0, "grey35"), (0.003, "blue"), (0.01, "cyan"), (0.03, "green"), (0.1, "yellow"), (0.3, "red")]


def percent(share: float) -> str:
    """A share with three significant digits: 41 %, 2.66 %, 0.312 %."""
    return f"{100 * share:.3g} %"


def duration(seconds: float) -> str:
    """Seconds as 45 s, 12 min, 3 h 05 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: float, unit: str = "B") -> str:
    """A byte count with a decimal prefix."""
    for prefix in ("", "k", "M"):
        if count < 1000:
            return f"{count:.3g} {prefix}{unit}"
        count /= 1000
    return f"{count:.3g} G{unit}"


def facts_table(title: str, rows: list[tuple[str, str]]) -> Table:
    """Names and values in two columns."""
    table = Table(title=escape(printable(title)), show_header=False, box=None, title_justify="left", title_style="bold")
    table.add_column(style="dim")
    table.add_column()
    for name, value in rows:
        table.add_row(name, escape(printable(value)))
    return table


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


def constraint_text(kind: str, limit: float) -> str:
    """The optimisation problem in words."""
    return {
        "loss": f"fewest edges with loss <= base + {limit:g} nats",
        "kl": f"fewest edges with KL(base || sparse) <= {limit:g} nats",
        "density": f"lowest loss with density <= {percent(limit)}",
    }[kind]


_CARDS = {
    "written": "README.md, written last: it names the commit",
    "from the folder": "README.md of the folder",
    "kept": "README.md on the Hub was not written by attnprune and is kept",
}


def push_data(plan: PushPlan) -> dict[str, Any]:
    """A push plan for JSON."""
    return {
        "repo": plan.repo,
        "revision": plan.branch,
        "parent": plan.parent,
        "files": {file.name: {"size": file.size, "state": file.state} for file in plan.files},
        "deleted": plan.deletions,
        "card": plan.card,
    }


def push_table(plan: PushPlan) -> Table:
    """What a push is about to do."""
    where = f"{plan.repo}, {'new' if plan.parent is None else 'existing'} repository"
    if plan.private and plan.parent is None:
        where += ", private"
    rows = [("repository", where), ("revision", plan.branch + (", new branch" if plan.new_branch else ""))]
    if plan.create_pr:
        rows.append(("", "as a pull request"))
    rows += [(file.state, f"{file.name} ({size(file.size)})") for file in plan.files]
    rows += [("deleted", name) for name in plan.deletions]
    rows.append(("card", _CARDS[plan.card]))
    total = sum(file.size for file in plan.changes)
    return facts_table("Push", [*rows, ("to send", f"{len(plan.changes)} files, {size(total)}")])


def summary_data(sidecar: Sidecar) -> dict[str, Any]:
    """Everything `inspect` knows, for JSON."""
    return {
        "path": str(sidecar.path),
        "manifest": sidecar.manifest.model_dump(),
        "density": [layer.tolist() for layer in sidecar.density],
        "bias": [layer.tolist() for layer in sidecar.biases()],
        "closed_heads": int(sum((layer == 0).sum() for layer in sidecar.density)),
        "open_by_offset": _profile(sidecar).tolist(),
        "offset_edges": sidecar.gates["stats.offset_edges"].tolist(),
    }


def summary(sidecar: Sidecar) -> list[Any]:
    """The renderables of `inspect`."""
    return [_outcome(sidecar), "", grid(sidecar.density), "", _heads(sidecar), "", _distances(sidecar)]


def _outcome(sidecar: Sidecar) -> Table:
    manifest, result = sidecar.manifest, sidecar.manifest.result
    base = manifest.base.repo_id or f"{manifest.base.kind} {manifest.base.model_type}"
    if manifest.base.revision:
        base += f" @ {manifest.base.revision[:12]}"
    entry = manifest.weights if manifest.merged is None else manifest.merged.weights
    weights = entry.kind + (f" rank {entry.rank}" if entry.rank else "")
    if manifest.merged is not None:
        weights += f", merged into the base's weights ({manifest.merged.dtype})"
    stored = sum(entry.size for entry in manifest.files.values())
    control = "" if result.control_loss is None else f"{result.control_loss:.4f} with every gate open"
    verdict = "met" if result.feasible else "NOT met"
    rows = [
        ("base", base),
        ("weights", f"{weights}, {size(stored)} in all"),
        ("density", f"{percent(result.density)} of the edges at T = {result.seq_len}"),
        (
            "edges",
            f"{result.edges_per_query:.3g} per query and head, {result.open_edges:,} of {result.visible_edges:,}",
        ),
        ("loss", f"{result.loss:.4f}, base {result.base_loss:.4f} ({result.loss - result.base_loss:+.4f} nats)"),
        ("control", control),
        ("KL", f"{result.kl:.4f} nats from base to sparse"),
        ("constraint", f"{constraint_text(result.constraint, result.limit)}: {verdict}"),
        ("measured", f"{result.data}, {result.tokens:,} held-out tokens, seed {result.seed}, {result.steps:,} steps"),
    ]
    if manifest.merged is not None:
        same = has_release_code(sidecar.path)
        rows.append(("code", f"{format.CODE_FILE} {'matches this release' if same else 'DIFFERS from this release'}"))
    if manifest.base.kind == "bundled":
        rows.append(("exact", f"{percent(result.exact_match)} of the held-out sums are answered exactly"))
    return facts_table(hub.shown(sidecar.path), rows)


def shade(density: float) -> str:
    """Colour of a head by its density; a closed head is grey."""
    return [colour for limit, colour in _SHADES if density >= limit and (density > 0 or limit == 0.0)][-1]


def _cell(share: float) -> str:
    return f"{100 * share:.0f}" if share >= 0.1 else f"{100 * share:.2g}"


def grid(density: list[np.ndarray]) -> Table:
    """Layers x heads, each head as a coloured cell with its density in percent."""
    widest = max(len(layer) for layer in density)
    wide = widest <= 16
    table = Table(title="density of each head, %", box=None, padding=(0, 1 if wide else 0), title_justify="left")
    table.add_column("layer", justify="right", style="dim")
    for head in range(widest):
        table.add_column(str(head) if wide or head % 8 == 0 else "", justify="right", style=None, header_style="dim")
    for index, layer in enumerate(density):
        cells = []
        for value in layer:
            label = ("·" if value == 0 else _cell(value)) if wide else ("·" if value == 0 else "■")
            cells.append(Text(label, style=shade(float(value)) if value > 0 else "grey35"))
        table.add_row(str(index), *cells)
    legend = Text("· closed  ", style="grey35")
    for (low, colour), (high, _) in pairwise(_SHADES):
        if high:
            legend.append(f"■ < {100 * high:g} %  ", style=colour if low else "blue4")
    legend.append(f"■ >= {100 * _SHADES[-1][0]:g} %", style=_SHADES[-1][1])
    table.caption = legend
    table.caption_justify = "left"
    return table


def _heads(sidecar: Sidecar) -> Table:
    density = sidecar.density
    heads = [(float(d), layer, head) for layer, row in enumerate(density) for head, d in enumerate(row)]
    closed = sum(d == 0 for d, _, _ in heads)
    total = sum(d for d, _, _ in heads)
    table = Table(title=f"{len(heads) - closed} of {len(heads)} heads have open edges", title_justify="left", box=None)
    for name in ("head", "density", "share of all edges", "bias", "at first token"):
        table.add_column(name, justify="right", header_style="dim")
    for d, layer, head in sorted(heads, reverse=True)[:8]:
        if d > 0:
            bias = sidecar.gates[f"layers.{layer}.gate.bias"][head]
            sink = sidecar.gates[f"layers.{layer}.stats.sink"][head]
            table.add_row(f"{layer}.{head}", percent(d), percent(d / total), f"{bias:.2f}", percent(float(sink)))
    return table


def _profile(sidecar: Sidecar) -> np.ndarray:
    """Open share by distance, mean over all heads, [buckets]."""
    layers = range(len(sidecar.manifest.gate.heads))
    return np.concatenate([sidecar.gates[f"layers.{i}.stats.open_by_offset"] for i in layers]).mean(0)


def _distances(sidecar: Sidecar) -> Table:
    edges = sidecar.gates["stats.offset_edges"]
    profile = _profile(sidecar)
    table = Table(title="open share by distance (query - key)", title_justify="left", box=None)
    table.add_column("tokens back", justify="right", header_style="dim")
    table.add_column("open", justify="right", header_style="dim")
    table.add_column("")
    for low, high, share in zip(edges[:-1], edges[1:], profile, strict=True):
        label = str(low) if high == low + 1 else f"{low}-{high - 1}"
        table.add_row(label, percent(float(share)), Text(bar(float(share / max(profile.max(), 1e-12))), style="cyan"))
    return table


def bar(share: float, width: int = 30) -> str:
    """A horizontal bar of up to `width` cells."""
    eighths = round(share * width * 8)
    tail = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"][eighths % 8]
    return "█" * (eighths // 8) + tail


def next_commands(sidecar: Sidecar, model: str) -> Text:
    """What to type after a run on `model`."""
    path = printable(sidecar.path)
    named = "" if sidecar.manifest.base.kind in ("hub", "bundled") else f", base={printable(model)!r}"
    option = f" --base {printable(model)}" if named else ""
    return Text(
        f"\nlook at it:  attnprune inspect {path}\nmeasure it:  attnprune eval {path}{option}\n"
        f"load it:     model, tokenizer = attnprune.load({path!r}{named})",
        style="dim",
    )


def report_data(report: Report) -> dict[str, Any]:
    """A measurement for JSON."""
    from dataclasses import asdict

    return asdict(report)


def report_table(reports: list[Report]) -> Table:
    """Measurements side by side, one column per text."""
    table = Table(box=None)
    table.add_column("", style="dim")
    for report in reports:
        table.add_column(escape(printable(report.data)), justify="right")

    def row(name: str, cell: Any) -> None:
        cells = [cell(r) for r in reports]
        if any(cells):
            table.add_row(name, *cells)

    row("loss", lambda r: f"{r.loss:.6f}")
    row("base loss", lambda r: "" if r.base_loss is None else f"{r.base_loss:.6f}")
    row("loss - base", lambda r: "" if r.base_loss is None else f"{r.loss_gap:+.6f}")
    row("open-gate control", lambda r: "" if r.control_loss is None else f"{r.control_loss:.6f}")
    row("KL(base || sparse)", lambda r: "" if r.kl is None else f"{r.kl:.6f}")
    row("same next token", lambda r: "" if r.agreement is None else percent(r.agreement))
    row("density", lambda r: "" if r.density is None else percent(r.density))
    row("edges per query", lambda r: "" if r.edges_per_query is None else f"{r.edges_per_query:.4g}")
    row("open edges", lambda r: "" if r.density is None else f"{r.open_edges:,}")
    row("visible edges", lambda r: "" if r.density is None else f"{r.visible_edges:,}")
    row("exact answers", lambda r: percent(r.exact_match) if r.data == "two-digit addition" else "")
    row("T", lambda r: str(r.seq_len))
    row("tokens", lambda r: f"{r.tokens:,}")
    return table
