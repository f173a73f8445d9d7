"""The header of a .gguf file, read once.

It holds every token of the vocabulary. transformers reads it three times for one model (configuration, tokenizer,
weights), and makes the table of tensor names again for each module: more than half of the time that loading takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import RLock

_MADE_AGAIN = ("GGUFReader", "get_tensor_name_map")
_LOCK = RLock()  # the library is every thread's


@contextmanager
def read_once() -> Iterator[None]:
    """Inside, gguf's reader of a path and its table of tensor names are made once, and given again after that."""
    import gguf  # an extra, which the caller has asked for

    with _LOCK:
        made = {name: getattr(gguf, name) for name in _MADE_AGAIN}
        try:
            for name, function in made.items():
                setattr(gguf, name, cache(function))
            yield
        finally:
            for name, function in made.items():
                setattr(gguf, name, function)
