"""Pieces that several reports are made of."""

from __future__ import annotations

from textwrap import fill

from rich.markup import escape
from rich.table import Table

from attnprune.errors import printable


def facts_table(title: str, rows: list[tuple[str, str]]) -> Table:
    """Names and values in two columns."""
    table = Table(title=escape(printable(title)), show_header=False, box=None, title_justify="left", title_style="bold")
    table.add_column(style="dim")
    table.add_column(overflow="fold")  # a long path is shown whole
    for name, value in rows:
        table.add_row(name, escape(printable(value)))
    return table


def filled(text: str) -> str:
    """A sentence in lines of at most 80 columns, which no terminal breaks inside a word."""
    return fill(text, 80, subsequent_indent="  ", break_on_hyphens=False)


def bar(share: float, width: int = 30) -> str:
    """A horizontal bar of up to `width` cells."""
    eighths = round(share * width * 8)
    tail = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"][eighths % 8]
    return "█" * (eighths // 8) + tail
