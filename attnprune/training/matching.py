"""Matching inside: the sparse model's hidden states after each layer against the base's, on the same tokens.

The gradient of KL(base || sparse) reaches a layer through all the layers above it; the error of its own output says
directly what is missing there. What it saves in tokens: examples/results/README.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from attnprune.training.compiled import decoder_layers

FARTHEST = 10.0  # one token counts at most this much: a base state near 0 would own the average


@contextmanager
def layer_outputs(model: Any) -> Iterator[list[Tensor]]:
    """A list that fills with the decoder layers' outputs [B, T, D], in order, while `model` runs inside the block."""
    outputs: list[Tensor] = []

    def note(layer: Any, args: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(note) for layer in decoder_layers(model)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def relative_error(states: list[Tensor], base_states: list[Tensor]) -> Tensor:
    """||h - h_base||^2 / ||h_base||^2 of each token, averaged over tokens and layers (a scalar).

    Args:
        states, base_states: [B, T, D] of each layer; the gradient goes to `states`.
    """
    layers = []
    for ours, theirs in zip(states, base_states, strict=True):
        ours, theirs = ours.float(), theirs.float()
        size = theirs.square().sum(-1).clamp(min=1e-6)
        layers.append(((ours - theirs).square().sum(-1) / size).clamp(max=FARTHEST).mean())
    return torch.stack(layers).mean()
