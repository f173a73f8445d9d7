"""The exceptions of attnprune and the exit code that each one means.

Exit codes: 0 ok · 1 valid input but the work failed · 2 the input is wrong and nothing was changed ·
3 finished, but the constraint was not met · 4 verification failed · 130/143 interrupted.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from typing import Self


def printable(text: object, limit: int | None = None) -> str:
    """Text on one line, control characters escaped so that no name can drive the terminal, at most `limit` long: what
    is cut off are whole characters, with their escapes."""
    shown = list(map(_visible, str(text)))
    if limit is None or sum(map(len, shown)) <= limit:
        return "".join(shown)
    ends = list(accumulate(map(len, shown)))
    return "".join(shown[: bisect_right(ends, limit - 1)]) + "…"


def _visible(character: str) -> str:
    """Lone surrogates of undecodable paths are escaped too."""
    return character if character.isprintable() else character.encode("unicode_escape").decode()


def first_line(error: BaseException) -> str:
    """The first line of what an exception says; the name of its type where it says nothing."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def first_line_with_type(error: BaseException) -> str:
    """As `first_line`, behind the name of the type."""
    name, line = type(error).__name__, first_line(error)
    return name if line == name else f"{name}: {line}"


class AttnPruneError(Exception):
    """Base class: valid input, but the work failed (exit code 1).

    `message` is one line, "what: why"; `hint` is the next command or option to try.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None):
        self.message = printable(message)
        self.hint = hint
        self.everywhere = False
        super().__init__(self.message)

    def of_all(self) -> Self:
        """Mark it as raised in every process of the run, so that one of them says it."""
        self.everywhere = True
        return self

    def __str__(self) -> str:
        return self.message  # whoever passes an error on may have said more in it


class InputError(AttnPruneError):
    """An option, file or model is wrong; nothing was changed (exit code 2)."""

    exit_code = 2


def not_installed(package: str, extra: str | None = None) -> InputError:
    """The refusal of what needs a package that is not here; `extra` of attnprune brings it, if it is not its own."""
    return InputError(
        f"{package} is not installed", hint=f'pip install "attnprune[{extra}]"' if extra else f"pip install {package}"
    )


class UnsupportedModelError(InputError):
    """The model's family, shape or attention cannot be gated (exit code 2)."""


class SelfCheckError(AttnPruneError):
    """A supported model whose gated attention does not reproduce its eager attention (exit code 1)."""


class ConstraintNotMetError(AttnPruneError):
    """The run finished and was saved, but no checkpoint satisfies the constraint (exit code 3)."""

    exit_code = 3


class VerificationError(AttnPruneError):
    """A sidecar's stored probe is not reproduced (exit code 4)."""

    exit_code = 4


class InterruptedRunError(AttnPruneError):
    """A run was stopped by a signal after its state was saved (exit code 128 + signal)."""

    def __init__(self, message: str, signal_number: int, hint: str | None = None):
        super().__init__(message, hint)
        self.exit_code = 128 + signal_number
