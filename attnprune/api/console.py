"""Where progress goes."""

from __future__ import annotations

from rich.console import Console


def progress_console() -> Console:
    """stderr, or the cell of a notebook."""
    return Console(stderr=True, highlight=False, soft_wrap=True)
