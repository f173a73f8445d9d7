"""Exact patching of attention messages alone: every edge carries the clean run, some messages their corrupted value.

With all edges kept a circuit run is a plain forward, so this costs no more than one, and autograd sees through it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attnprune.circuit.model.activations import Activations, Hooks, attention_of, check_pair, forward, repeat_heads
from attnprune.circuit.model.adapters import Anatomy
from attnprune.circuit.model.attribution import frozen
from attnprune.circuit.model.effects import Metric, scores_of


def run_messages(anatomy: Anatomy, clean: Activations, corrupted: Activations, kept: Tensor) -> Tensor:
    """Logits of the clean prompts with only the messages `kept` [L, B, H, S (to), P + S (from)] (bool, or weights from
    0 to 1); the others are those of the corrupted run. The same as `patching.run_circuit` with all edges.

    Raises:
        UnsupportedModelError: a model without gates.
    """
    check_pair(clean, corrupted)
    weights = kept.to(anatomy.model.dtype)
    with Hooks() as hooks:
        for layer, block in enumerate(anatomy.blocks):
            pattern, value = attention_of(corrupted, layer)  # refuses a model without gates
            assert block.gate is not None
            hooks.gate(block.gate, _mixing(weights[layer], pattern, value))
        return forward(anatomy, clean.ids, clean.last, clean.prefix)


def message_gradients(
    anatomy: Anatomy, clean: Activations, corrupted: Activations, kept: Tensor, metric: Metric
) -> Tensor:
    """Gradient of the metric, summed over the prompts, by how much of each message is kept: like `kept`.

    Those that are not kept have one too. A gate's decision has none.
    """
    with frozen(anatomy.model), torch.enable_grad():
        weights = kept.to(anatomy.model.dtype).requires_grad_()
        total = scores_of(metric, run_messages(anatomy, clean, corrupted, weights)).sum()
        return torch.autograd.grad(total, weights)[0]


def _mixing(weights: Tensor, pattern: Tensor, value: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    def change(own_value: Tensor, own_pattern: Tensor) -> Tensor:
        heads = own_pattern.shape[1]
        own = (own_pattern * weights) @ repeat_heads(own_value, heads)
        return own + (pattern * (1 - weights)) @ repeat_heads(value, heads)

    return change
