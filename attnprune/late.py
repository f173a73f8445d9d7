"""What something low says of something above it, found by name when it is asked for.

Imports go down. Two things cannot: a result draws itself in a notebook, as `report/` has it, and `attnprune.circuit` is
a package with modules and the function of the same name in `attnprune.api.commands`.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from types import ModuleType
from typing import Any


class Shown:
    """A result that a notebook shows as the terminal does and that prints as its repr; goes before a pydantic base."""

    def __str__(self) -> str:
        return repr(self)

    def _repr_html_(self) -> str:
        return importlib.import_module("attnprune.report.notebook").html(self)


class _CallablePackage(ModuleType):
    """A package that can be called as the function of its name in `attnprune.api.commands`."""

    @property
    def _function(self) -> Any:
        return getattr(importlib.import_module("attnprune.api.commands"), self.__name__.rpartition(".")[2])

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._function)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._function(*args, **options)


def callable_package(name: str) -> None:
    """Let the package `name` be called; importing a module of it would otherwise hide the function."""
    sys.modules[name].__class__ = _CallablePackage
