"""A result in a notebook: what the terminal shows of it, as HTML."""

from __future__ import annotations

from io import StringIO
from typing import Any

from rich.console import Console
from rich.terminal_theme import TerminalTheme

WIDTH = 110
# Read on white and on black: a notebook has either. What has no colour takes the notebook's own.
_GREY, _RED, _GREEN, _YELLOW = (128, 128, 128), (214, 69, 65), (46, 150, 90), (176, 125, 0)
_BLUE, _MAGENTA, _CYAN = (70, 120, 225), (170, 80, 190), (0, 140, 150)
_COLOURS = [_GREY, _RED, _GREEN, _YELLOW, _BLUE, _MAGENTA, _CYAN, _GREY]
_THEME = TerminalTheme((255, 255, 255), (0, 0, 0), _COLOURS, _COLOURS)
_PAGE = (
    "<pre style=\"white-space:pre;overflow-x:auto;line-height:1.25;font-family:Menlo,'DejaVu Sans Mono',consolas,"
    'monospace">{code}</pre>'
)


def html(thing: Any) -> str:
    """The HTML of a Sidecar, a Report, a CircuitResult, a Trace, an Atlas, an Index or a Difference."""
    console = Console(file=StringIO(), record=True, width=WIDTH, force_terminal=True, color_system="truecolor",
                      highlight=False, force_jupyter=False)  # fmt: skip
    for part in parts(thing):
        console.print(part, markup=False) if isinstance(part, str) else console.print(part)
    return console.export_html(theme=_THEME, inline_styles=True, code_format=_PAGE)


def parts(thing: Any) -> list[Any]:
    """What the command that makes such a thing prints."""
    from attnprune.circuit.result import CircuitResult
    from attnprune.heads.result import Atlas
    from attnprune.heads.store import Index
    from attnprune.measure import Report
    from attnprune.report import atlases, circuits, diff, edge_index, evaluation, sidecar, traces
    from attnprune.sidecar.diff import Difference
    from attnprune.sidecar.folder import Sidecar
    from attnprune.tracing.result import Trace

    drawn: dict[type, Any] = {
        Sidecar: sidecar.summary,
        Report: lambda report: [evaluation.report_table([report])],
        CircuitResult: circuits.summary,
        Trace: traces.summary,
        Atlas: atlases.summary,
        Index: lambda index: edge_index.render(edge_index.as_data(index, {}, "count", top=8)),
        Difference: lambda found: diff.render(found, limit=8),
    }
    return next(draw(thing) for kind, draw in drawn.items() if isinstance(thing, kind))
