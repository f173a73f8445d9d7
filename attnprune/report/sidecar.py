"""A sidecar for a person: outcome, density of every head, distances; and what to type next. No torch."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from attnprune.errors import printable
from attnprune.report.evaluation import extreme
from attnprune.report.grid import HeadGrid
from attnprune.report.tables import bar, facts_table
from attnprune.sidecar import format, hub
from attnprune.sidecar.folder import Sidecar, has_release_code
from attnprune.training.constraint import constraint_text
from attnprune.units import percent, size


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
    tables = (HeadGrid(sidecar.density), _heads(sidecar), _distances(sidecar))
    return [*_loud(sidecar), _outcome(sidecar), *(part for table in tables for part in ("", table))]


def verdict_lines(result: format.ResultEntry) -> list[str]:
    """What nobody may overlook: nothing or everything is open, the constraint does not hold."""
    lines = [line for line in [extreme(result.open_edges, result.visible_edges)] if line]
    if not result.feasible:
        lines.append(f"NOT MET: {constraint_text(result.constraint, result.limit)}")
    return lines


def _loud(sidecar: Sidecar) -> list[Text]:
    result = sidecar.manifest.result
    found = extreme(result.open_edges, result.visible_edges)
    return [Text(found, style="bold red"), Text()] if found else []


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
        *_quantised(manifest.train),
        ("constraint", f"{constraint_text(result.constraint, result.limit)}: {verdict}"),
        ("measured", f"{result.data}, {result.tokens:,} held-out tokens, seed {result.seed}, {result.steps:,} steps"),
    ]
    if manifest.merged is not None:
        same = has_release_code(sidecar.path)
        rows.append(("code", f"{format.CODE_FILE} {'matches this release' if same else 'DIFFERS from this release'}"))
    if manifest.base.kind == "bundled":
        rows.append(("exact", f"{percent(result.exact_match)} of the held-out sums are answered exactly"))
    return facts_table(hub.shown(sidecar.path), rows)


def _quantised(train: format.TrainEntry | None) -> list[tuple[str, str]]:
    """The other side of a run on a quantised base."""
    if train is None:
        return []
    numbers = f"KL {train.kl:.4f}, loss {train.loss:.4f}, base {train.base_loss:.4f}, density {percent(train.density)}"
    if train.against == "full":
        return [("", f"from the base in full precision: {numbers}")]
    return [(f"in {train.load_in}", f"as it trained, from the quantised base: {numbers}")]


def _heads(sidecar: Sidecar) -> Table:
    density = sidecar.density
    heads = [(float(d), layer, head) for layer, row in enumerate(density) for head, d in enumerate(row)]
    closed = sum(d == 0 for d, _, _ in heads)
    total = sum(d for d, _, _ in heads)
    table = Table(title=f"heads with open edges: {len(heads) - closed} of {len(heads)}", title_justify="left", box=None)
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


def next_commands(sidecar: Sidecar) -> Text:
    """What to type after a run; a local base is found again where run.toml says it was."""
    path = printable(sidecar.path)
    return Text(
        f"\nlook at it:  attnprune inspect {path}\nmeasure it:  attnprune eval {path}\n"
        f"load it:     model, tokenizer = attnprune.load({path!r})",
        style="dim",
    )
