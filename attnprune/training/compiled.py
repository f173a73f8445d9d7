"""Decoder layers compiled one by one (regional compilation): one compilation serves all layers of a kind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class CompiledLayers:
    """The compiled decoder layers of models, in place only inside `active`: evaluation has other shapes and dtypes."""

    def __init__(self, *models: Any):
        self._compiled: dict[nn.Module, Any] = {
            layer: torch.compile(layer.forward, fullgraph=True, dynamic=False)
            for model in models
            for layer in decoder_layers(model)
        }

    @contextmanager
    def active(self, model: Any) -> Iterator[None]:
        """Run the layers of `model`, one of those given, compiled inside the block."""
        layers = decoder_layers(model)
        for layer in layers:
            layer.forward = self._compiled[layer]
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward


def decoder_layers(model: Any) -> list[nn.Module]:
    """The decoder layers of a causal LM, in order.

    Raises:
        LookupError: it has no list of them.
    """
    count = model.config.get_text_config().num_hidden_layers
    for module in model.get_decoder().children():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    raise LookupError("this model has no list of decoder layers")
