"""What a command line holds, and the refusal of options that would do nothing."""

from __future__ import annotations

from collections.abc import Collection

import typer

from attnprune.errors import InputError


def given(context: typer.Context) -> dict[str, str]:
    """The arguments and options that were typed: parameter -> how the option is written."""
    names = {parameter.name: parameter.opts[0] for parameter in context.command.params if parameter.name}
    sources = {name: context.get_parameter_source(name) for name in names}
    return {
        name: names[name] for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"
    }


def refuse(context: typer.Context, why: str, *names: str) -> None:
    """Refuse those of these parameters that were typed, since they do nothing: `why` is "without --text" or so.

    Raises:
        InputError: naming them.
    """
    idle = [option for name, option in given(context).items() if name in names]
    if idle:
        raise InputError(f"{', '.join(idle)}: {'does' if len(idle) == 1 else 'do'} nothing {why}")


def refuse_others(context: typer.Context, reason: str, besides: Collection[str]) -> None:
    """Refuse everything that was typed but `besides`, beside an option that decides everything.

    Raises:
        InputError: naming it.
    """
    others = [option for name, option in given(context).items() if name not in besides]
    if others:
        raise InputError(f"{reason}; leave out {', '.join(others)}")
