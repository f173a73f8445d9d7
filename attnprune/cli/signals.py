"""SIGTERM and SIGHUP end a command as Ctrl-C does: by an exception, so that nothing half-made is left."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class EndedBySignal(SystemExit):
    """Raised where the signal arrives. No `except Exception` holds it up."""

    def __init__(self, number: int):
        self.number = number
        super().__init__(128 + number)


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into `EndedBySignal`. A signal that is ignored (as under nohup) stays ignored."""
    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, _end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _end(number: int, frame: Any) -> None:
    raise EndedBySignal(number)
