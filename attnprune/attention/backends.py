"""Which implementation of gated attention a model runs on this machine: found by running it, not by predicting it."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch

from attnprune.attention.interface import gates_of

TOKENS = 8


class PhaseBackend(NamedTuple):
    """In `phase`, `layers` of the model's layers ran `backend`, for `reason`."""

    phase: str
    backend: str
    reason: str
    layers: int


def backends(model: Any) -> list[PhaseBackend]:
    """Run a few tokens in training, prefill and decode and say what computed the attention."""
    device = next(model.parameters()).device
    ids = torch.arange(TOKENS, device=device)[None] % model.config.vocab_size
    found: list[PhaseBackend] = []

    def note(phase: str) -> None:
        ran = Counter(gate.last.ran for gate in gates_of(model) if gate.last is not None and gate.last.ran)
        found.extend(PhaseBackend(phase, *choice, layers) for choice, layers in ran.items())

    with torch.enable_grad():
        model(input_ids=ids, use_cache=False)
    note("training")
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
        note("prefill")
        model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
        note("decode")
    return found
