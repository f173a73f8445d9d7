"""Exact patching: what a model computes when some edges of its graph carry the values of another prompt.

The stream that a destination reads is the sum of what the sources upstream of it wrote. Patching an edge replaces one
term of one such sum: `x_v = stream of one run + sum over patched u of (z_u of the other run - z_u of the first)`. Only
inputs are changed, so any attention function and any MLP runs as it is, gates included.

Exact means the model's arithmetic, not a gradient. What is recomputed is rounded differently, though (1e-6 in fp32),
and a gate whose score lies that close to its threshold may end up on its other side.

`run_circuit` needs U * B * S * D numbers besides the activations of the two runs, U the sources in the circuit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from attnprune.circuit.model.activations import (
    Activations,
    Hooks,
    attention_of,
    check_pair,
    forward,
    on_outputs,
    repeat_heads,
)
from attnprune.circuit.model.adapters import Anatomy
from attnprune.circuit.model.graph import Kind
from attnprune.errors import InputError, SelfCheckError

SELF_CHECK_TOLERANCE = 1e-4  # relative to the largest logit (or to 1, if that is smaller)
FLIPPED_GATES = 1e-4  # of the gates: so many (or one) may flip because of rounding


@torch.no_grad()
def run_circuit(
    anatomy: Anatomy,
    clean: Activations,
    corrupted: Activations,
    edges: Tensor,
    messages: Tensor | None = None,
) -> Tensor:
    """Logits of the clean prompts when only a circuit carries them: every other edge carries its corrupted value.

    All edges give the clean logits, none the corrupted ones.

    Args:
        edges: the edges kept, bool [U, V], or [U, V, S] with a choice for every position of the stream.
        messages: the attention messages kept, bool [L, H, S (to), S (from)], or [L, B, H, S, S] with a choice for every
            prompt; the others are those of the corrupted run.

    Raises:
        InputError: shapes that do not fit.
        UnsupportedModelError: messages for a model without gates.
    """
    check_pair(clean, corrupted)
    _check_masks(anatomy, clean, edges, messages)
    run = CircuitRun(anatomy, corrupted, edges)
    with Hooks() as hooks:
        run.install(hooks)
        for layer, block in enumerate(anatomy.blocks):
            if messages is not None and block.gate is not None:
                hooks.gate(block.gate, _mixed(corrupted, layer, messages[layer]))
        return forward(anatomy, clean.ids, clean.last, clean.prefix)


class CircuitRun:
    """The state of one circuit run: how far what each source writes is from its corrupted output.

    Only for the n sources in the circuit; `used` says which, bool [U]. kept, weights [n, V(, S)]; change [n, B, S, D].
    """

    def __init__(self, anatomy: Anatomy, corrupted: Activations, edges: Tensor):
        self.anatomy, self.corrupted = anatomy, corrupted
        edges = edges.to(corrupted.ids.device)
        real = anatomy.graph.mask().to(edges.device)
        edges = edges & (real if edges.ndim == 2 else real[..., None])
        self.used = anatomy.graph.used(edges if edges.ndim == 2 else edges.any(-1)).cpu()
        self._before = [0, *self.used.cumsum(0).tolist()]
        self.kept = edges[self.used.to(edges.device)]
        self.weights = self.kept.to(corrupted.outputs)
        self.change = corrupted.outputs.new_empty(len(self.kept), *corrupted.outputs.shape[1:])  # a reader is one GEMM
        self.readers = torch.empty(0)  # of the attention that runs, those that keep an edge
        self.normed = torch.empty(0)  # and what each of them reads, [n, B, S, D]

    def install(self, hooks: Hooks) -> None:
        """A reader that keeps no edge reads the corrupted stream: each layer is given it as its input."""
        graph = self.anatomy.graph
        on_outputs(hooks, self.anatomy, self._write, self.used)
        for layer, block in enumerate(self.anatomy.blocks):
            hooks.before(block.module, self._attention(layer))
            for module, kinds in block.projections_by_module().items():
                hooks.after(module, self._heads(layer, kinds))
            hooks.before(block.mlp_start, self._single(2 * layer + 1, graph.upstream(layer, "mlp")))
        hooks.before(self.anatomy.final_norm, self._single(2 * graph.layers, graph.sources))

    def rows(self, sources: slice) -> slice:
        """Where those of some sources are that are used."""
        return slice(self._before[sources.start], self._before[sources.stop])

    def _write(self, sources: slice, z: Tensor) -> None:
        """Sources of which those used write `z`."""
        corrupted = self.corrupted.outputs[sources][self.used[sources].to(z.device)]
        torch.sub(z, corrupted, out=self.change[self.rows(sources)])

    def _read(self, stream: int, upstream: int, readers: Tensor) -> Tensor:
        """What each of n readers sees: the corrupted stream and what the edges kept add to it, [n, B, S, D]."""
        before = self._before[upstream]
        weights, changes = self.weights[:before, readers], self.change[:before]
        if weights.ndim == 3:
            added = torch.einsum("uvs,ubsd->vbsd", weights, changes)
        else:
            added = (weights.t() @ changes.flatten(1)).unflatten(1, changes.shape[1:])
        return added.add_(self.corrupted.streams[stream])

    def _keeping(self, upstream: int, readers: slice) -> Tensor:
        """Which of the readers keep an edge."""
        kept = self.kept[: self._before[upstream], readers]
        return kept.transpose(0, 1).flatten(1).any(1).nonzero()[:, 0] + readers.start

    def _single(self, stream: int, upstream: int) -> Callable[[Tensor], Tensor]:
        """What an MLP or the final norm reads."""
        graph, layer = self.anatomy.graph, stream // 2
        reader = graph.destinations - 1 if layer == graph.layers else graph.readers(layer, "mlp").start
        read = self._keeping(upstream, slice(reader, reader + 1))

        def change(_: Tensor) -> Tensor:
            return self._read(stream, upstream, read)[0] if len(read) else self.corrupted.streams[stream]

        return change

    def _attention(self, layer: int) -> Callable[[Tensor], Tensor]:
        graph, block = self.anatomy.graph, self.anatomy.blocks[layer]
        upstream = graph.upstream(layer, "q")
        readers = self._keeping(upstream, slice(graph.readers(layer, "q").start, graph.readers(layer, "v").stop))

        def change(_: Tensor) -> Tensor:
            self.readers, self.normed = readers, block.normed(self._read(2 * layer, upstream, readers))
            return self.corrupted.streams[2 * layer]

        return change

    def _heads(self, layer: int, kinds: list[Kind]) -> Callable[[Tensor, Tensor], Tensor]:
        """Project again for the heads that keep an edge, each from its own stream."""
        graph, block = self.anatomy.graph, self.anatomy.blocks[layer]

        def change(_: Tensor, output: Tensor) -> Tensor:
            output = output.clone()
            for kind in kinds:
                readers, projection = graph.readers(layer, kind), block.projections[kind]
                mine = (self.readers >= readers.start) & (self.readers < readers.stop)
                if bool(mine.any()):
                    heads = self.readers[mine] - readers.start
                    projection.view(output)[:, :, heads] = projection.project(self.normed[mine], heads)
            return output

        return change


def _mixed(corrupted: Activations, layer: int, kept: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Attention whose messages outside `kept` [(B,) H, S, S] are those of the corrupted run."""
    patterns, values = attention_of(corrupted, layer)
    kept = kept.to(patterns.device)

    def change(value: Tensor, pattern: Tensor) -> Tensor:
        own = (pattern * kept) @ repeat_heads(value, kept.shape[-3])
        return own + (patterns * ~kept) @ repeat_heads(values, kept.shape[-3])

    return change


def _check_masks(anatomy: Anatomy, run: Activations, edges: Tensor, messages: Tensor | None) -> None:
    graph, length = anatomy.graph, run.ids.shape[1]
    shapes = [(graph.sources, graph.destinations), (graph.sources, graph.destinations, length)]
    if tuple(edges.shape) not in shapes or edges.dtype != torch.bool:
        raise InputError(f"edges: expected a bool mask {shapes[0]} or {shapes[1]}, got {tuple(edges.shape)}")
    if messages is None:
        return
    ends = tuple(attention_of(run, 0)[0].shape[1:])
    shapes = [(graph.layers, *ends), (graph.layers, len(run.ids), *ends)]
    if tuple(messages.shape) not in shapes or messages.dtype != torch.bool:
        raise InputError(f"messages: expected a bool mask {shapes[0]} or {shapes[1]}, got {tuple(messages.shape)}")


@torch.no_grad()
def self_check(anatomy: Anatomy, clean: Activations, corrupted: Activations) -> None:
    """Check that the parts found add up: all edges give the clean logits and no edges the corrupted ones.

    All of these runs share a cached prefix, and what is wrong with it. So whole prompts in one plain forward, without
    any cache, must give these logits too.

    Rounding may flip a gate whose score lies at its threshold, and the logits with it. Here such a row of the attention
    is held as it was, and the flips are counted.

    Raises:
        SelfCheckError: they do not (by more than 1e-4 of the largest logit, or more than 1 in 10,000 gates flip).
    """
    every = anatomy.graph.mask().to(clean.ids.device)
    for edges, expected, name, part in (
        (every, clean, "clean", "all"),
        (torch.zeros_like(every), corrupted, "corrupted", "no"),
    ):
        circuit = partial(run_circuit, anatomy, clean, corrupted, edges)
        _check_run(anatomy, expected, circuit, f"a circuit of {part} edges")
        whole = partial(forward, anatomy, expected.prompts, expected.last)
        _check_run(anatomy, expected, whole, f"a plain forward of the whole {name} prompts")


def _check_run(anatomy: Anatomy, expected: Activations, run: Callable[[], Tensor], name: str) -> None:
    """Compare logits [B, at least those of `expected`, V] and gates with those of a run."""
    flips: list[Tensor] = []
    with Hooks() as hooks:
        for layer, block in enumerate(anatomy.blocks):
            if expected.patterns is not None and block.gate is not None:
                hooks.gate(block.gate, _held(expected, layer, flips))
        found = run()[:, -expected.logits.shape[1] :]
    family = anatomy.model.config.model_type
    difference = (found - expected.logits).abs().max().item()
    if not difference <= SELF_CHECK_TOLERANCE * max(1.0, expected.logits.abs().max().item()):
        raise SelfCheckError(f"{family}: {name} is off by {difference:.2g} in the logits")
    share = torch.cat(flips).float().mean().item() if flips else 0.0
    if share * sum(map(len, flips)) > 1 and share > FLIPPED_GATES:
        raise SelfCheckError(f"{family}: {name} flips {100 * share:.2g} % of the gates")


def _held(run: Activations, layer: int, flips: list[Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Attention of which the rows with a flipped gate are those of `run`; adds to `flips` whether each gate did.

    Rows before those of `run` are as they are.
    """
    patterns, values = attention_of(run, layer)

    def change(value: Tensor, pattern: Tensor) -> Tensor:
        before = pattern.shape[2] - patterns.shape[2]
        flipped = (pattern[:, :, before:] != 0) != (patterns != 0)
        flips.append(flipped.flatten())
        held, own = (p @ repeat_heads(v, p.shape[1]) for p, v in ((patterns, values), (pattern, value)))
        kept = torch.where(flipped.any(-1, keepdim=True), held, own[:, :, before:])
        return torch.cat((own[:, :, :before], kept), 2)

    return change
