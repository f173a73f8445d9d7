"""Arguments of the public functions: a wrong one is one line that names it, before anything is done with it."""

from __future__ import annotations

import functools
import inspect
import numbers
from collections.abc import Callable
from pathlib import PurePath
from typing import Any, ParamSpec, TypeVar

from attnprune.errors import InputError, printable

P, R = ParamSpec("P"), TypeVar("R")

LARGEST_SEED = 2**32 - 1  # as of a run


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


def checked(**least: int) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Check arguments against plain annotations (numbers, text, paths, flags, functions); others take anything.

    Args:
        least: the smallest value of a number, by the argument's name.

    What is decorated raises InputError for a value of another kind, or below the smallest.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        kinds = {name: _kinds(parameter.annotation) for name, parameter in signature.parameters.items()}

        @functools.wraps(function)
        def call(*args: P.args, **options: P.kwargs) -> R:
            for name, value in signature.bind(*args, **options).arguments.items():
                _check(name, value, kinds[name], least.get(name))
            return function(*args, **options)

        return call

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
