"""Activation patching of many heads at once: the corrupted run with the clean outputs of some heads put back."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attnprune.circuit.model.activations import Activations, Hooks, check_pair, forward, head_outputs
from attnprune.circuit.model.adapters import Anatomy


@torch.no_grad()
def restored(anatomy: Anatomy, clean: Activations, corrupted: Activations, heads: Tensor) -> Tensor:
    """Logits of the corrupted prompts in which `heads`, bool [L, H], write what they wrote in the clean run.

    Everything else runs on what it then sees. (In a circuit run it is the other way round: what is outside stays as it
    was.)
    """
    check_pair(clean, corrupted)
    graph = anatomy.graph
    added: list[Tensor] = []

    def keep(layer: int, chosen: Tensor) -> Callable[[Tensor, Tensor], None]:
        def change(x: Tensor, total: Tensor) -> None:
            own = head_outputs(anatomy.blocks[layer], graph.heads, x, total)[chosen]
            added.append((clean.outputs[graph.head_sources(layer)][chosen] - own).sum(0))

        return change

    with Hooks() as hooks:
        for layer, block in enumerate(anatomy.blocks):
            chosen = heads[layer].nonzero()[:, 0].to(clean.ids.device)
            if len(chosen):
                hooks.after(block.output, keep(layer, chosen))
                hooks.after(block.attention_end, lambda _, output: output + added.pop())
        return forward(anatomy, corrupted.ids, corrupted.last, corrupted.prefix)
