"""The exceptions of attnprune and the exit code that each one means; the check of arguments that raises one.

Exit codes: 0 ok · 1 valid input but the work failed · 2 the input is wrong and nothing was changed ·
3 finished, but the constraint was not met · 4 verification failed · 130/143 interrupted.
"""

from __future__ import annotations

import functools
import inspect
import numbers
import operator
from bisect import bisect_right
from collections.abc import Callable
from itertools import accumulate
from pathlib import PurePath
from typing import Any, Self, TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., Any])

LARGEST_SEED = 2**32 - 1  # as of a run


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


def is_fault(error: BaseException) -> bool:
    """Whether something went wrong, rather than that the program is to end. A panic of Rust code is no Exception."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


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


def whole(value: Any) -> int:
    """A whole number as Python's.

    Raises:
        TypeError: something else, True and False among it.
    """
    if isinstance(value, bool):
        raise TypeError("a bool is no number here")
    return operator.index(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "None": ("None", lambda value: value is None),
    "bool": ("True or False", lambda value: isinstance(value, bool)),
    "int": ("a whole number", _is_whole),
    "float": ("a number", _is_number),
    "str": ("text", lambda value: isinstance(value, str)),
    "Path": ("a path", lambda value: isinstance(value, PurePath)),
    "list": ("a list", lambda value: isinstance(value, list)),
    "Callable": ("a function", callable),
    "Watch": ("a function", callable),
}
"""What an annotation allows: how people call it, and whether a value is one."""


def checked(**least: int) -> Callable[[Function], Function]:
    """Check arguments against plain annotations (numbers, text, paths, flags, functions); others take anything.

    Args:
        least: the smallest value of a number, by the argument's name.

    What is decorated raises InputError for a value of another kind, or below the smallest.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        kinds = {name: _kinds(parameter.annotation) for name, parameter in signature.parameters.items()}

        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            for name, value in signature.bind(*args, **options).arguments.items():
                _check(name, value, kinds[name], least.get(name))
            return function(*args, **options)

        return cast("Function", call)

    return decorate


def _check(name: str, value: Any, kinds: list[tuple[str, Callable[[Any], bool]]], least: int | None) -> None:
    if kinds and not any(is_one(value) for _, is_one in kinds):
        what = " or ".join(said for said, _ in kinds if said != "None")
        raise InputError(f"{name}: {shown(value)} is not {what}")
    if least is not None and value is not None and value < least:
        raise InputError(f"{name} {value}: is less than {least}")
    if name == "seed" and value is not None and value > LARGEST_SEED:
        raise InputError(f"seed {value}: is more than {LARGEST_SEED}")


def shown(value: Any) -> str:
    """A value in a message."""
    return printable(repr(value), 60)


def _kinds(annotation: Any) -> list[tuple[str, Callable[[Any], bool]]]:
    """The kinds that an annotation, as it is written, allows; none where it names another."""
    names = [part.partition("[")[0] for part in _alternatives(annotation)] if isinstance(annotation, str) else []
    return [_KINDS[name] for name in names] if all(name in _KINDS for name in names) else []


def _alternatives(annotation: str) -> list[str]:
    """The parts of `A | B[C | D]`: A and B[C | D]."""
    parts, depth = [""], 0
    for character in annotation:
        depth += (character == "[") - (character == "]")
        if character == "|" and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def unpacked(model: Any, tokenizer: Any) -> tuple[Any, Any]:
    """Model and tokenizer apart, where they may come as the pair that `attnprune.load` gives.

    Raises:
        InputError: another tuple, or two tokenizers.
    """
    if not isinstance(model, tuple):
        return model, tokenizer
    if len(model) != 2:
        raise InputError(f"model: a tuple is (model, tokenizer), as attnprune.load gives it (got {len(model)} things)")
    if tokenizer is not None:
        raise InputError("tokenizer: is given twice, beside the model and with it")
    return model
