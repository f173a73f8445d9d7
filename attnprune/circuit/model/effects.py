"""Exact effects on a task's metric of single edges, sources and attention messages, patched one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from attnprune.circuit.model.activations import Activations, Hooks, attention_of, check_pair, forward, repeat_heads
from attnprune.circuit.model.adapters import Anatomy, Block
from attnprune.circuit.model.graph import Kind
from attnprune.errors import InputError

Metric = Callable[[Tensor], Tensor]
"""Logits [B, S or `last`, V] of the prompts in their order -> one number per prompt [B]."""


def scores_of(metric: Metric, logits: Tensor) -> Tensor:
    """The metric [B], checked. Raises InputError for another shape."""
    found = metric(logits)
    if found.shape != logits.shape[:1]:
        raise InputError(f"metric: expected one number per prompt [{len(logits)}], got shape {tuple(found.shape)}")
    return found


def edge_effects(
    anatomy: Anatomy, base: Activations, other: Activations, edges: Tensor, metric: Metric, pairs: int = 64
) -> Tensor:
    """Exact effect on the metric of each single edge: it alone carries its value of the `other` run.

    With base clean and other corrupted this corrupts each edge, the other way round it restores it.

    Args:
        edges: [n, 2] (source, destination), or a bool mask [U, V] for its edges in row order.
        pairs: (edge, prompt) pairs in one forward, which starts at the layer that reads.

    Returns:
        [n, B]: metric of the patched run less metric of the base run.

    Raises:
        InputError: an edge that the graph does not have.
    """
    edges = (edges.nonzero() if edges.dtype == torch.bool else edges).to(base.ids.device)
    graph = anatomy.graph
    if not bool(graph.mask().to(edges.device)[edges[:, 0], edges[:, 1]].all()):
        raise InputError("edges: not all of them are edges of this model")
    order = edges[:, 1].argsort(stable=True)  # neighbours share a destination, so they share its weights
    edges = edges[order]
    layers = graph.layer_of_destination(edges[:, 1])

    def patch(hooks: Hooks, layer: int, chosen: Tensor) -> None:
        sources, destinations = edges[chosen].unbind(1)
        moved = other.outputs[sources] - base.outputs[sources]
        if layer == graph.layers:
            hooks.before(anatomy.final_norm, _adding(slice(None), moved))
            return
        block = anatomy.blocks[layer]
        for module, kinds in block.projections_by_module().items():
            readers: dict[Kind, Tensor] = {kind: destinations - graph.readers(layer, kind).start for kind in kinds}
            hooks.after(module, _single_heads(block, base.streams[2 * layer], readers, moved))
        hooks.before(block.mlp_start, _adding(destinations == graph.readers(layer, "mlp").start, moved))

    effects = _effects(anatomy, base, other, layers, patch, metric, pairs)
    return torch.empty_like(effects).index_copy_(0, order, effects)


def _single_heads(
    block: Block, stream: Tensor, readers: dict[Kind, Tensor], moved: Tensor
) -> Callable[[Tensor, Tensor], Tensor]:
    """Recompute one head's projection for each patch: `readers` are heads [n], outside its range for other kinds."""

    def change(_: Tensor, output: Tensor) -> Tensor:
        output = output.clone()
        for kind, wanted in readers.items():
            projection = block.projections[kind]
            heads = projection.view(output).unflatten(0, (len(moved), -1))  # [n, B, S, heads, width]
            for head in wanted.unique().tolist():
                if 0 <= head < heads.shape[3]:
                    rows = (wanted == head).nonzero()[:, 0]
                    x = block.normed(stream + moved[rows])
                    made = projection.project(x.flatten(0, 1)[None], wanted.new_tensor([head]))
                    heads.select(3, head)[rows] = made.squeeze(2).unflatten(0, (len(rows), -1))
        return output

    return change


def node_effects(
    anatomy: Anatomy, base: Activations, other: Activations, nodes: Tensor, metric: Metric, pairs: int = 64
) -> Tensor:
    """Exact effect on the metric of each single source [n]: all its edges carry their values of the `other` run.

    Arguments and result [n, B] as in `edge_effects`.
    """
    graph = anatomy.graph
    if nodes.numel() and not 0 <= int(nodes.min()) <= int(nodes.max()) < graph.sources:
        raise InputError(f"nodes: expected sources 0 to {graph.sources - 1}")
    nodes = nodes.to(base.ids.device)

    def patch(hooks: Hooks, layer: int, chosen: Tensor) -> None:
        block, sources = anatomy.blocks[layer], nodes[chosen]
        moved = other.outputs[sources] - base.outputs[sources]
        is_input, is_mlp = sources == 0, sources == graph.mlp_source(layer)
        hooks.before(block.module, _adding(is_input, moved))
        hooks.after(block.attention_end, _adding(~is_input & ~is_mlp, moved))
        hooks.after(block.mlp_end, _adding(is_mlp, moved))

    return _effects(anatomy, base, other, graph.layer_of_source(nodes), patch, metric, pairs)


def message_effects(
    anatomy: Anatomy, base: Activations, other: Activations, messages: Tensor, metric: Metric, pairs: int = 64
) -> Tensor:
    """Exact effect on the metric of each single attention message [n, 4] (layer, head, to, from).

    The message is the pattern's entry times the value: what head writes at `to` because of `from`, before the output
    map. Other arguments and result [n, B] as in `edge_effects`.

    Raises:
        UnsupportedModelError: a model without gates.
    """
    messages, heads = messages.to(base.ids.device), anatomy.graph.heads

    def patch(hooks: Hooks, layer: int, chosen: Tensor) -> None:
        _, head, to, source = messages[chosen].unbind(1)

        def sent(run: Activations) -> Tensor:
            pattern, value = attention_of(run, layer)
            return pattern[:, head, to, source, None] * repeat_heads(value, heads)[:, head, source]

        moved = (sent(other) - sent(base)).transpose(0, 1)  # [n, B, width]

        def change(x: Tensor) -> Tensor:
            x = x.clone()
            x.unflatten(-1, (heads, -1)).unflatten(0, (len(chosen), -1))[
                torch.arange(len(chosen), device=x.device), :, to, head
            ] += moved
            return x

        hooks.before(anatomy.blocks[layer].output, change)

    return _effects(anatomy, base, other, messages[:, 0], patch, metric, pairs)


def _adding(rows: Any, moved: Tensor) -> Callable[..., Tensor | None]:
    """A hook that adds `moved[rows]` [n, B, S, D] to the rows [n * B, S, D] of these patches."""

    def change(*tensors: Tensor) -> Tensor:
        x = tensors[-1].clone()
        x.unflatten(0, (len(moved), -1))[rows] += moved[rows]
        return x

    return change


@torch.no_grad()
def _effects(
    anatomy: Anatomy,
    base: Activations,
    other: Activations,
    layers: Tensor,
    patch: Callable[[Hooks, int, Tensor], None],
    metric: Metric,
    pairs: int,
) -> Tensor:
    """Run each patch [n] from its layer on, many at a time; rows of a forward are patches x prompts."""
    check_pair(base, other)
    prompts = len(base.ids)
    before = scores_of(metric, base.logits)
    effects = before.new_empty(len(layers), prompts)
    for layer in layers.unique().tolist():
        for chosen in (layers == layer).nonzero()[:, 0].split(max(1, pairs // prompts)):
            stream = base.streams[2 * layer].repeat(len(chosen), 1, 1)
            prefix = None if base.prefix is None else base.prefix.repeat(1, 1, len(chosen), 1, 1, 1)
            with _resumed(anatomy, layer, stream), Hooks() as hooks:
                patch(hooks, layer, chosen)
                logits = forward(anatomy, base.ids.repeat(len(chosen), 1), base.last, prefix)
            found = [scores_of(metric, part) for part in logits.split(prompts)]
            effects[chosen] = torch.stack(found) - before
    return effects


@contextmanager
def _resumed(anatomy: Anatomy, layer: int, stream: Tensor) -> Iterator[None]:
    """Start at `layer`: the layers before it hand on `stream` [rows, S, D] and do nothing else."""
    skipped: list[Any] = [block.module for block in anatomy.blocks[:layer]]
    own = [vars(module).get("forward") for module in skipped]
    try:
        for module in skipped:
            module.forward = lambda *args, **kwargs: stream
        yield
    finally:
        for module, previous in zip(skipped, own, strict=True):
            if previous is None:
                vars(module).pop("forward", None)
            else:
                module.forward = previous
