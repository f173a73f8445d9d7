"""Attention dropout, which gated attention does not have: switched off while gates are attached.

Families spell it differently, in their configuration and on their attention modules. Dropout elsewhere (residual,
embedding, hidden) works with gates as without them and is left alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

from torch import nn

log = logging.getLogger(__name__)

CONFIG_KEYS = ("attention_dropout", "attn_pdrop", "attn_dropout", "attention_probs_dropout_prob")
MODULE_NAMES = ("attention_dropout", "attn_dropout", "dropout")  # of an attention module: a rate, or an nn.Dropout


class Rate(NamedTuple):
    """A dropout rate that was switched off: attribute `name` of `owner` had this `value`."""

    owner: Any
    name: str
    value: float


def switch_off(config: Any, modules: Iterable[nn.Module]) -> list[Rate]:
    """Set the attention dropout of a model to 0, in its configuration and its attention modules, and say so.

    Returns:
        What was changed, for `restore`.
    """
    places = [(config, key) for key in CONFIG_KEYS]
    for module in modules:
        parts = ((module, name, getattr(module, name, None)) for name in MODULE_NAMES)
        places += [(part, "p") if isinstance(part, nn.Dropout) else (module, name) for module, name, part in parts]
    found = [Rate(owner, name, getattr(owner, name)) for owner, name in places if getattr(owner, name, None)]
    for rate in found:
        setattr(rate.owner, rate.name, 0.0)
    if found:
        say(config.model_type, found[0].value)
    return found


@cache
def say(family: str, rate: float) -> None:
    """Warn once, however often the same model is attached."""
    log.warning("%s: attention dropout %g is set to 0 while gates are attached", family, rate)


def restore(rates: Iterable[Rate]) -> None:
    """Undo `switch_off`."""
    for rate in rates:
        setattr(rate.owner, rate.name, rate.value)
