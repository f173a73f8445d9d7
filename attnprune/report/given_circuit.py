"""A circuit from a file, on the terminal. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from attnprune.errors import printable
from attnprune.units import number, percent

if TYPE_CHECKING:
    from attnprune.circuit.given import GivenCircuit, GivenCircuits


def summary(found: GivenCircuit | GivenCircuits) -> list[Any]:
    """What it computes, what it is worth, and what was not asked."""
    return [
        *([_one(found)] if found.schema_id == "attnprune-given-circuit-1" else _several(found)),
        f"{found.prompts} test prompts; ablation: {found.ablation}; no nonsense control: it was not searched",
        *(f"note: {note}" for note in found.notes),
    ]


def _several(found: GivenCircuits) -> list[Any]:
    table = _titled(found)
    table.add_column(escape(printable(found.model, 40)))
    for column in ("edges", f"of {found.of:,}", "faithfulness", "95 %", "random"):
        table.add_column(column, justify="right", header_style="dim", no_wrap=True)
    for one in found.circuits:
        value = one.test.faithfulness
        table.add_row(
            escape(printable(one.name)), f"{one.edges:,}", percent(one.edges / found.of), f"{value.value:.3f}",
            f"{value.low:.2f} to {value.high:.2f}", number(one.random.faithfulness),
        )  # fmt: skip
    if found.cpr is None:
        return [table]
    return [table, f"MIB's areas: CPR {found.cpr:.3f}, CMD {found.cmd:.3f}"]


def _titled(found: GivenCircuit | GivenCircuits) -> Table:
    return Table(title=escape(printable(f"{found.file} on {found.task}")), title_justify="left", box=None)


def _one(found: GivenCircuit) -> Table:
    table = _titled(found)
    table.add_column("", style="dim")
    table.add_column(escape(printable(found.model, 40)), justify="right")
    test, worst = found.test, found.stress.worst_trial
    rows = {
        "edges": f"{found.edges:,} of {found.of:,}",
        "  in the file": f"{found.given:,}",
        "heads": f"{found.heads:,}",
        "MLPs": f"{found.mlps:,}",
        "faithfulness": f"{test.faithfulness.value:.3f}",
        "  95 %": f"{test.faithfulness.low:.2f} to {test.faithfulness.high:.2f}",
        "  one-sided 95 %": f"{number(test.lower)} to {number(test.upper)}",
        "accuracy": percent(test.accuracy),
        "  model": percent(found.accuracy),
        "KL to model": number(test.kl),
        "all other edges": number(found.complement),
        "random circuits": f"{number(found.random.faithfulness)} in {found.random.draws} draws",
        "worst other ablation": ""
        if worst is None
        else f"{number(worst.faithfulness)}, {100 * worst.share:g} % {worst.ablation}",
    }
    for name, cell in rows.items():
        table.add_row(name, cell)
    return table
