"""Gradient attribution of edges, as rankings of what exact patching should look at: EAP, EAP-IG, EAP inside a circuit.

The score of an edge u -> v is the change of what u writes times the gradient of the metric at what v reads, summed over
positions: (z_u corrupted - z_u clean) . dL/dx_v (edge attribution patching, Syed et al., arXiv 2310.10348). EAP-IG
(Hanna et al., arXiv 2403.17806) averages the gradient over points between corrupted and clean embeddings. As for the
exact effects, the sign is that of the metric when the edge is corrupted.

The scores of the edges out of `input` add up to the change of the metric as the points become dense, if the model is
smooth between the two runs. The gap is returned. Hard gates are not smooth: a gradient does not see one open or close,
so on a gated model the gap may stay and an edge that acts through a gate may score 0. Its size is then no effect size.

Inside a circuit the other edges carry corrupted values, and what a kept edge does depends on which others are kept:
`attribute_circuit` scores them inside it, once for every stage of a search that deletes.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from attnprune.attention.interface import straight_through as slopes_of_gates
from attnprune.circuit.model.activations import Activations, Hooks, attention_of, check_pair, forward, repeat_heads
from attnprune.circuit.model.adapters import Anatomy, Block
from attnprune.circuit.model.effects import Metric, scores_of
from attnprune.circuit.model.graph import ATTENTION_KINDS, Kind
from attnprune.circuit.model.patching import CircuitRun
from attnprune.errors import InputError

Rule = Literal["midpoint", "eap-ig", "eap"]
FIRST_STEPS = 4


class GateFlips(NamedTuple):
    """Attention edges (prompt, head, to, from) whose gate differs between two runs, and those open in either."""

    flipped: int
    open: int


@dataclass(frozen=True)
class Attribution:
    """Scores, averaged over the prompts.

    Attributes:
        edges: [U, V], or [U, V, S] per position of the stream.
        messages: attention messages [L, H, S (to), S (from)]; None for a model without gates.
        steps: points between the corrupted and the clean run.
        gap: |sum of the scores of the input's edges - change of the metric| over the mean |change| of a prompt.
        flips: gates that differ between the clean and the corrupted run; None for a model without gates.
    """

    edges: Tensor
    messages: Tensor | None
    steps: int
    gap: float
    flips: GateFlips | None


def gate_flips(one: Activations, other: Activations) -> GateFlips | None:
    """Count the gates that differ between two runs; None for a model without gates."""
    if one.patterns is None or other.patterns is None:
        return None
    first, second = one.patterns != 0, other.patterns != 0
    return GateFlips(int((first ^ second).sum()), int((first | second).sum()))


def attribute(
    anatomy: Anatomy,
    clean: Activations,
    corrupted: Activations,
    metric: Metric,
    *,
    rule: Rule = "midpoint",
    steps: int | None = None,
    tolerance: float = 0.05,
    max_steps: int = 64,
    per_position: bool = False,
    straight_through: bool = False,
) -> Attribution:
    """Score every edge, and with gates every attention message, by gradients.

    One step is a forward and a backward pass and a GEMM of U x V x N, N = B * S * D; in memory it holds U * N numbers
    besides the two runs, and the gradients at the inputs of all layers, about 4 L * N.

    Args:
        rule: points (0 corrupted, 1 clean): "midpoint" (k + 1/2) / m, "eap-ig" k / m as the package of that name, or
            "eap", the clean run alone.
        steps: number of points m; None doubles it from 4 until the gap is below `tolerance` or `max_steps` is reached.
        per_position: scores of the residual edges for every position.
        straight_through: use the slope that attached gates have in training, not that of a hard gate (which is 0).

    Raises:
        InputError: runs of different shape, a metric of another shape, no such rule, or less than one step.
    """
    check_pair(clean, corrupted)
    if rule not in ("midpoint", "eap-ig", "eap") or (steps is not None and steps < 1):
        raise InputError(
            f"attribution: expected a rule midpoint, eap-ig or eap and at least 1 step, got {rule}, {steps}"
        )
    change = scores_of(metric, corrupted.logits) - scores_of(metric, clean.logits)
    smallest = torch.finfo(change.dtype).tiny
    delta = corrupted.outputs - clean.outputs
    count = 1 if rule == "eap" else steps or FIRST_STEPS
    while True:
        sums = _Sums(anatomy, clean, corrupted, delta, per_position)
        for point in _points(rule, count):
            _add_point(sums, point, metric, straight_through)
        sums.divide(count * len(clean.ids))
        gap = ((sums.edges[0].sum() - change.mean()).abs() / change.abs().mean().clamp(min=smallest)).item()
        if rule == "eap" or steps is not None or gap < tolerance or 2 * count > max_steps:
            return Attribution(sums.edges, sums.messages, count, gap, gate_flips(clean, corrupted))
        count *= 2


def _points(rule: Rule, count: int) -> list[float]:
    if rule == "eap":
        return [1.0]
    return [(k + (0.5 if rule == "midpoint" else 0.0)) / count for k in range(count)]


class _Sums:
    """Scores as they add up over points."""

    def __init__(self, anatomy: Anatomy, clean: Activations, corrupted: Activations, delta: Tensor, per_position: bool):
        graph, length = anatomy.graph, clean.ids.shape[1]
        self.anatomy, self.clean, self.corrupted, self.delta = anatomy, clean, corrupted, delta
        self.per_position = per_position
        self.edges = delta.new_zeros(graph.sources, graph.destinations, *([length] if per_position else []))
        self.messages = None
        if clean.patterns is not None:
            whole = clean.patterns.shape[-1]
            self.messages = delta.new_zeros(graph.layers, graph.heads, whole, whole)

    def add_edges(self, upstream: int, readers: slice, gradients: Tensor) -> None:
        """Gradients [n, B, S, D] at what n destinations read."""
        if self.per_position:
            self.edges[:upstream, readers] += torch.einsum("ubsd,vbsd->uvs", self.delta[:upstream], gradients)
        else:
            self.edges[:upstream, readers] += self.delta[:upstream].flatten(1) @ gradients.flatten(1).t()

    def add_messages(self, layer: int, gradients: Tensor) -> None:
        """Gradients [B, H, S, width] at the heads' outputs: the message's change is P' v' - P v."""
        if self.messages is None:
            return
        for run, sign in ((self.corrupted, 1), (self.clean, -1)):
            pattern, value = attention_of(run, layer)
            along = gradients @ repeat_heads(value, gradients.shape[1]).transpose(-1, -2)
            self.messages[layer, :, -pattern.shape[2] :] += sign * (pattern * along).sum(0)

    def divide(self, count: int) -> None:
        self.edges /= count
        if self.messages is not None:
            self.messages /= count


def _add_point(sums: _Sums, point: float, metric: Metric, straight_through: bool) -> None:
    """One forward and backward pass at a point between corrupted (0) and clean (1) embeddings."""
    anatomy = sums.anatomy
    kept: dict[Any, Tensor] = {}  # what needs a gradient: by module, projections' outputs and others' inputs
    streams: list[Tensor] = []

    def keep_input(module: nn.Module, x: Tensor) -> Tensor:
        kept[module] = x.view_as(x)  # a view of its own, so that only this reader's gradient is seen
        return kept[module]

    def keep_output(module: nn.Module, _: Tensor, output: Tensor) -> None:
        kept[module] = output

    slopes = slopes_of_gates(anatomy.model, straight_through)
    with Hooks() as hooks, frozen(anatomy.model), slopes, torch.enable_grad():
        start = sums.corrupted.outputs[0].lerp(sums.clean.outputs[0], point).requires_grad_()
        hooks.before(anatomy.blocks[0].module, lambda _: start)
        for block in anatomy.blocks:
            hooks.before(block.module, lambda x: streams.append(x.detach()))
            for module in block.projections_by_module():
                hooks.after(module, partial(keep_output, module))
            for module in (block.output, block.mlp_start):
                hooks.before(module, partial(keep_input, module))
        hooks.before(anatomy.final_norm, partial(keep_input, anatomy.final_norm))
        total = scores_of(metric, forward(anatomy, sums.clean.ids, sums.clean.last, sums.clean.prefix)).sum()
        gradients = torch.autograd.grad(total, list(kept.values()), materialize_grads=True)
    _add_gradients(sums, dict(zip(kept, gradients, strict=True)), streams)


@torch.no_grad()
def _add_gradients(sums: _Sums, gradients: dict[Any, Tensor], streams: list[Tensor]) -> None:
    """After the backward pass: what leads from the gradients kept to those at each destination."""
    anatomy, graph = sums.anatomy, sums.anatomy.graph
    for layer, block in enumerate(anatomy.blocks):
        for kind in ATTENTION_KINDS:
            at_heads = _at_streams(block, kind, streams[layer], gradients[block.projections[kind].module])
            sums.add_edges(graph.upstream(layer, kind), graph.readers(layer, kind), at_heads)
        readers = graph.readers(layer, "mlp")
        sums.add_edges(graph.upstream(layer, "mlp"), readers, gradients[block.mlp_start][None])
        sums.add_messages(layer, gradients[block.output].unflatten(-1, (graph.heads, -1)).transpose(1, 2))
    logits = slice(graph.destinations - 1, graph.destinations)
    sums.add_edges(graph.sources, logits, gradients[anatomy.final_norm][None])


def _at_streams(block: Block, kind: Kind, stream: Tensor, gradient: Tensor) -> Tensor:
    """The gradient at the stream that each head reads, [heads, B, S, D], from that of the projection's module."""
    projection = block.projections[kind]
    per_head = projection.view(gradient).permute(2, 0, 1, 3)
    normed = torch.bmm(per_head.flatten(1, 2), projection.weight.transpose(1, 2)).unflatten(1, stream.shape[:2])
    if block.attention_norm is None:
        return normed
    with torch.enable_grad():
        x = stream.expand_as(normed).clone().requires_grad_()
        return torch.autograd.grad(block.normed(x), x, normed)[0]


def attribute_circuit(
    anatomy: Anatomy, clean: Activations, corrupted: Activations, edges: Tensor, metric: Metric
) -> Tensor:
    """Predicted change of a circuit's metric, mean over the prompts, when one more of its edges is corrupted.

    Args:
        edges: the circuit, bool [U, V], pruned.

    Returns:
        [U, V], 0 outside the circuit.
    """
    gradients = edge_gradients(anatomy, clean, corrupted, edges, metric)
    return -gradients * edges.to(gradients)


def edge_gradients(
    anatomy: Anatomy, clean: Activations, corrupted: Activations, edges: Tensor, metric: Metric
) -> Tensor:
    """Gradient of a circuit's metric, mean over the prompts, by how much of its own run an edge carries (0 or 1).

    `(change of what u writes) . dL/dx_v` at the circuit itself: one forward and one backward pass. Edges outside have
    one too; it is left out (0) where all that u writes is corrupted or nothing that v reads is kept.

    Args:
        edges: the circuit, bool [U, V].

    Returns:
        [U, V].
    """
    check_pair(clean, corrupted)
    run = _CircuitGradients(anatomy, corrupted, edges)
    with Hooks() as hooks, frozen(anatomy.model), slopes_of_gates(anatomy.model, False), torch.enable_grad():
        run.install(hooks)
        total = scores_of(metric, forward(anatomy, clean.ids, clean.last, clean.prefix)).sum()
        if total.requires_grad:  # without any edge nothing is read
            torch.autograd.grad(total, run.start)
    scores = torch.zeros_like(edges, dtype=run.scores.dtype, device=run.scores.device)
    scores[run.used.to(scores.device)] = run.scores / len(clean.ids)
    return scores


class _CircuitGradients(CircuitRun):
    """A circuit run with a backward pass of its own between readers and sources, as scores come to lie there.

    `written` stands for the changes in autograd's graph, so that readers are differentiated before the sources that
    they read; the changes and their gradients are kept source-major in two tensors.
    """

    def __init__(self, anatomy: Anatomy, corrupted: Activations, edges: Tensor):
        super().__init__(anatomy, corrupted, edges)
        self.gradient = torch.zeros_like(self.change)
        self.scores = torch.zeros_like(self.weights)
        self.start = self.weights.new_zeros((), requires_grad=True)
        self.written = self.start

    def _write(self, sources: slice, z: Tensor) -> None:
        super()._write(sources, z.detach())
        self.written = self.written + _Source.apply(z, self, self.rows(sources))

    def _read(self, stream: int, upstream: int, readers: Tensor) -> Tensor:
        x = super()._read(stream, upstream, readers)
        return cast(Tensor, _Reader.apply(self.written, x, self, self._before[upstream], readers))


class _Source(torch.autograd.Function):
    """Where a source's output leaves autograd's sight; its gradient is what all readers have left."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, run: _CircuitGradients, rows: slice) -> Tensor:
        # The run holds its graph: gigabytes, if the graph held it too.
        ctx.run, ctx.rows = weakref.proxy(run), rows
        return z.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        return ctx.run.gradient[ctx.rows], None, None


class _Reader(torch.autograd.Function):
    """Where what n readers see comes back, [n, B, S, D]; its gradient makes the scores of their edges."""

    @staticmethod
    def forward(ctx: Any, written: Tensor, x: Tensor, run: _CircuitGradients, before: int, readers: Tensor) -> Tensor:
        ctx.run, ctx.before, ctx.readers = weakref.proxy(run), before, readers
        return x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        run, before, readers = ctx.run, ctx.before, ctx.readers
        gradient = gradients[0].flatten(1)
        run.scores[:before, readers] = run.change[:before].flatten(1) @ gradient.t()
        run.gradient[:before].flatten(1).addmm_(run.weights[:before, readers], gradient)
        return run.start.new_zeros(()), None, None, None, None


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient inside the block."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
