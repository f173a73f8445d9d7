"""The one place that prints: data on stdout, everything else on stderr; human, JSON or quiet."""

from __future__ import annotations

import json
import os
import shlex
import sys
from typing import Any

from rich.console import Console
from rich.markup import escape

from attnprune.errors import printable

MAX_LINE = 300


class Output:
    """How this invocation talks. Set once from `--json` and `--quiet`."""

    def __init__(self) -> None:
        self.json = False
        self.quiet = False
        self.answered = False
        self.stdout = Console(highlight=False, soft_wrap=True)
        self.stderr = Console(stderr=True, highlight=False, soft_wrap=True)
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]

    def configure(self, *, json: bool, quiet: bool) -> None:
        """Choose the mode."""
        self.json, self.quiet = json, quiet
        if not self.live and not debugging():
            os.environ["TQDM_DISABLE"] = "1"  # bars of transformers, gguf, datasets; tqdm reads it once, on import

    @property
    def live(self) -> bool:
        """Whether a moving display is welcome: a person at a terminal."""
        return self.stderr.is_terminal and not self.quiet and not self.json

    def result(self, data: dict[str, Any], *renderables: Any) -> None:
        """The command's answer: one JSON object, or the renderables for a person."""
        self.answered = True
        if self.json:
            self.stdout.file.write(json.dumps(data, indent=2, sort_keys=True, allow_nan=False) + "\n")
            return
        if not self.quiet:
            for renderable in renderables:
                self.stdout.print(escape(renderable) if isinstance(renderable, str) else renderable)

    def note(self, text: str) -> None:
        """A line for the person watching."""
        if not self.quiet:
            self.stderr.print(escape(printable(text)), style="dim")

    def show(self, renderable: Any) -> None:
        """A table or panel for the person watching (stderr)."""
        if not self.quiet:
            self.stderr.print(renderable)

    def error(self, message: str, hint: str | None, code: int) -> None:
        """One line on stderr; with --json also one object on stdout, unless the result is there already."""
        line = f"attnprune: {printable(message, MAX_LINE)}" + (f" ({printable(hint, MAX_LINE)})" if hint else "")
        sys.stderr.write(line + "\n")
        if self.json and not self.answered:
            payload = {"error": {"message": printable(message), "hint": hint, "exit_code": code}}
            sys.stdout.write(json.dumps(payload) + "\n")


def command_line() -> str:
    """The command as it was typed, for records; bytes that are no UTF-8 are escaped."""
    return f"attnprune {shlex.join(sys.argv[1:])}".encode("utf-8", "backslashreplace").decode()


def debugging() -> bool:
    """Whether tracebacks are wanted (ATTNPRUNE_DEBUG=1)."""
    return os.environ.get("ATTNPRUNE_DEBUG") == "1"


out = Output()
