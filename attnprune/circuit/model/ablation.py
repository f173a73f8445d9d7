"""A run that nothing is known of: what edges carry that are ablated to zero, or to what their sources write on average.

Such a run has the same outputs of every source for all prompts, and its streams are their sums, so exact patching takes
it as it takes the corrupted run. The attention of a layer is that of its ablated stream.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnprune.circuit.model.activations import Activations, Hooks, forward
from attnprune.circuit.model.adapters import Anatomy


@torch.no_grad()
def ablated(anatomy: Anatomy, run: Activations, outputs: Tensor) -> Activations:
    """The run in which every source writes `outputs` [U, D] at every position of whole prompts (no prefix).

    Its logits are those of a circuit without edges: what the unembedding makes of the ablated stream.
    """
    graph = anatomy.graph
    written = outputs.to(run.outputs)[:, None, None].expand_as(run.outputs)
    streams, change, done = run.streams.clone(), torch.zeros_like(run.streams[0]), 0
    for index in range(len(streams)):
        layer, is_mlp = divmod(index, 2)
        upstream = graph.sources if layer == graph.layers else graph.upstream(layer, "mlp" if is_mlp else "q")
        change += (written[done:upstream] - run.outputs[done:upstream]).sum(0)
        streams[index] += change
        done = upstream
    patterns: list[Tensor] = []
    values: list[Tensor] = []

    def keep(value: Tensor, pattern: Tensor) -> None:
        values.append(value)
        patterns.append(pattern)

    with Hooks() as hooks:
        for layer, block in enumerate(anatomy.blocks):
            hooks.before(block.module, lambda _, x=streams[2 * layer]: x)
            hooks.before(block.mlp_start, lambda _, x=streams[2 * layer + 1]: x)
            if anatomy.gated and block.gate is not None:
                hooks.gate(block.gate, keep)
        hooks.before(anatomy.final_norm, lambda _: streams[-1])
        logits = forward(anatomy, run.ids, run.last)
    attention = (torch.stack(patterns), torch.stack(values)) if patterns else (None, None)
    return Activations(run.prompts, run.last, logits, written.contiguous(), streams, *attention, None)


def rows_in_turn(runs: list[Activations]) -> Activations:
    """One run of which prompt i is that of run i modulo their number. All of them have whole prompts."""
    first = runs[0]
    turn = torch.arange(len(first.prompts), device=first.prompts.device) % len(runs)

    def mixed(name: str, axis: int) -> Tensor | None:
        tensors = [getattr(run, name) for run in runs]
        if tensors[0] is None:
            return None
        made = tensors[0].clone()
        for index, tensor in enumerate(tensors):
            rows = (turn == index).nonzero()[:, 0]
            made.index_copy_(axis, rows, tensor.index_select(axis, rows))
        return made

    return first._replace(
        prompts=mixed("prompts", 0), logits=mixed("logits", 0), outputs=mixed("outputs", 1),
        streams=mixed("streams", 1), patterns=mixed("patterns", 1), values=mixed("values", 1),
    )  # fmt: skip
