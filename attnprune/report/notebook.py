"""A result in a notebook: what the terminal shows of it, as HTML."""

from __future__ import annotations

from io import StringIO
from typing import Any

from rich.console import Console

WIDTH = 110
_PAGE = (
    "<pre style=\"white-space:pre;overflow-x:auto;line-height:1.25;font-family:Menlo,'DejaVu Sans Mono',consolas,"
    'monospace">{code}</pre>'
)


def html(thing: Any) -> str:
    """The HTML of a Sidecar, a Report, a CircuitResult, a Trace or a Difference."""
    console = Console(file=StringIO(), record=True, width=WIDTH, force_terminal=True, color_system="truecolor",
                      highlight=False, force_jupyter=False)  # fmt: skip
    for part in parts(thing):
        console.print(part, markup=False) if isinstance(part, str) else console.print(part)
    return console.export_html(inline_styles=True, code_format=_PAGE)


def parts(thing: Any) -> list[Any]:
    """What the command that makes such a thing prints."""
    from attnprune.circuit.result import CircuitResult
    from attnprune.measure import Report
    from attnprune.report import circuits, diff, evaluation, sidecar, traces
    from attnprune.sidecar.diff import Difference
    from attnprune.sidecar.folder import Sidecar
    from attnprune.tracing.result import Trace

    drawn: dict[type, Any] = {
        Sidecar: sidecar.summary,
        Report: lambda report: [evaluation.report_table([report])],
        CircuitResult: circuits.summary,
        Trace: traces.summary,
        Difference: lambda found: diff.render(found, limit=8),
    }
    return next(draw(thing) for kind, draw in drawn.items() if isinstance(thing, kind))
