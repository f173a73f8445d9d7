"""Exact patching: what a model computes when some edges of its graph carry the values of another prompt.

The stream that a destination reads is the sum of what the sources upstream of it wrote. Patching an edge replaces one
term of one such sum: `x_v = stream of one run + sum over patched u of (z_u of the other run - z_u of the first)`. Only
inputs are changed, so any attention function and any MLP runs as it is, gates included. Behind a post-norm (Gemma 2,
OLMo 2) a head's share of the output is scaled by the norm's own factor, so the shares of all heads add up to it.

Exact means the model's arithmetic, not a gradient. What is recomputed is rounded differently, though (1e-6 in fp32),
and a gate whose score lies that close to its threshold may end up on its other side.

Prompts are batches of one length without padding. Clean and corrupted prompts often begin with the same tokens; there
the two runs are the same, whatever is patched, so `collect_pair` runs that prefix once and keeps its keys and values.

Sizes: N = B * S * D numbers (S without the prefix), `Activations` holds (U + 2 L) * N, in fp32 230 MB for SmolLM2-135M
(U = 301) on 16 prompts of 17 tokens; `run_circuit` needs U * N more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from attnprune.circuit.adapters import Anatomy, Block
from attnprune.circuit.graph import Kind
from attnprune.errors import InputError, SelfCheckError, UnsupportedModelError

Metric = Callable[[Tensor], Tensor]
"""Logits [B, S or `last`, V] of the prompts in their order -> one number per prompt [B]."""

SELF_CHECK_TOLERANCE = 1e-4  # relative to the largest logit (or to 1, if that is smaller)
FLIPPED_GATES = 1e-4  # of the gates: so many (or one) may flip because of rounding
_TINY = 1e-30


class Activations(NamedTuple):
    """One run over a batch of prompts, from position P on, where it may begin to differ from another run.

    ids [B, S]; last: for how many of the last positions logits were computed (0: all). outputs [U, B, S, D]: what each
    source wrote. streams [2 L + 1, B, S, D]: what the attention and the MLP of each layer read, and the final norm.
    patterns [L, B, H, S (to), P + S (from)] and values [L, B, H_kv, P + S, width] of the attention, None for a model
    without gates. prefix [L, 2, B, H_kv, P, width]: keys and values of the positions before, None if P is 0.
    """

    ids: Tensor
    last: int
    logits: Tensor
    outputs: Tensor
    streams: Tensor
    patterns: Tensor | None
    values: Tensor | None
    prefix: Tensor | None

    def take(self, rows: slice) -> Activations:
        """Some of the prompts, without the attention."""
        return Activations(
            self.ids[rows], self.last, self.logits[rows], self.outputs[:, rows], self.streams[:, rows], None, None,
            None if self.prefix is None else self.prefix[:, :, rows],
        )  # fmt: skip


class Hooks(AbstractContextManager):
    """Forward hooks that are removed together at the end of the block."""

    def __init__(self):
        self._handles: list[Any] = []

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def add(self, handle: Any) -> None:
        """Remove this handle as well."""
        self._handles.append(handle)

    def before(self, module: nn.Module, change: Callable[[Tensor], Tensor | None]) -> None:
        """Show the first input to `change`; a tensor that it returns takes its place."""

        def hook(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            changed = change(args[0] if args else kwargs["hidden_states"])
            if changed is None:
                return None
            return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": changed})

        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def after(self, module: nn.Module, change: Callable[[Tensor, Tensor], Tensor | None]) -> None:
        """Show first input and output to `change`; a tensor that it returns takes the output's place."""

        def hook(_: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            return change(args[0] if args else kwargs["hidden_states"], output)

        self._handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def gate(self, gate: nn.Module, change: Callable[[Tensor, Tensor], Tensor | None]) -> None:
        """Show values and pattern to `change`; a tensor that it returns takes the place of the gate's output."""

        def ask_for_pattern(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            # Attached gates are asked by name, those of merged models by position.
            return (args, {**kwargs, "return_pattern": True}) if kwargs else ((*args[:-1], True), kwargs)

        def hook(_: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor] | None:
            changed = change(args[2], output[1])
            return None if changed is None else (changed, output[1])

        self._handles.append(gate.register_forward_pre_hook(ask_for_pattern, with_kwargs=True))
        self._handles.append(gate.register_forward_hook(hook))


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """No dropout inside the block."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def forward(anatomy: Anatomy, ids: Tensor, last: int, prefix: Tensor | None = None) -> Tensor:
    """Logits of a plain call, behind the keys and values of a prefix [L, 2, B, H_kv, P, width]."""
    cache = None
    if prefix is not None:
        cache = DynamicCache(config=anatomy.model.config)
        for layer, (key, value) in enumerate(prefix):
            cache.update(key, value, layer)
    with evaluation_mode(anatomy.model):
        return anatomy.model(
            input_ids=ids, past_key_values=cache, use_cache=cache is not None, logits_to_keep=last
        ).logits


def repeat_heads(values: Tensor, heads: int) -> Tensor:
    """[B, H_kv, ...] -> [B, H, ...]: each key/value head for all heads that share it."""
    return values.repeat_interleave(heads // values.shape[1], 1)


def scores_of(metric: Metric, logits: Tensor) -> Tensor:
    """The metric [B], checked. Raises InputError for another shape."""
    found = metric(logits)
    if found.shape != logits.shape[:1]:
        raise InputError(f"metric: expected one number per prompt [{len(logits)}], got shape {tuple(found.shape)}")
    return found


def check_pair(one: Activations, other: Activations) -> None:
    """Refuse runs that cannot be patched into each other."""
    if one.ids.shape != other.ids.shape or one.last != other.last:
        shapes = f"{tuple(one.ids.shape)} and {tuple(other.ids.shape)}, logits of the last {one.last} and {other.last}"
        raise InputError(f"clean and corrupted runs differ in shape: {shapes}")


def collect_pair(anatomy: Anatomy, clean: Tensor, corrupted: Tensor, last: int) -> tuple[Activations, Activations]:
    """`collect` clean and corrupted prompts [B, S]; the tokens that all pairs begin with run once and are not kept.

    Logits are those of the `last` positions (at least 1).
    """
    same = int((clean == corrupted).all(0).long().cumprod(0).sum())
    length = max(0, min(same, clean.shape[1] - last))
    prefix = _prefix(anatomy, clean[:, :length]) if length else None
    first, second = (collect(anatomy, ids[:, length:], last, prefix) for ids in (clean, corrupted))
    return first, second


@torch.no_grad()
def _prefix(anatomy: Anatomy, ids: Tensor) -> Tensor:
    """Keys and values [L, 2, B, H_kv, P, width] of a plain run."""
    with evaluation_mode(anatomy.model):
        cache = anatomy.model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
    return torch.stack([torch.stack((layer.keys, layer.values)) for layer in cache.layers])


@torch.no_grad()
def collect(anatomy: Anatomy, ids: Tensor, last: int = 0, prefix: Tensor | None = None) -> Activations:
    """Run prompts [B, S] of one length, without padding, and keep what every source wrote, in the model's dtype.

    `last`: compute logits for this many of the last positions only (0: all); every later run does the same. `prefix`:
    keys and values [L, 2, B, H_kv, P, width] of positions before.

    Raises:
        InputError: ids of another shape.
    """
    if ids.ndim != 2 or not ids.numel():
        raise InputError(f"prompts: expected token ids [prompts, length], got shape {tuple(ids.shape)}")
    graph = anatomy.graph
    size = (*ids.shape, anatomy.width)
    outputs = torch.empty(graph.sources, *size, dtype=anatomy.model.dtype, device=ids.device)
    streams = torch.empty(2 * graph.layers + 1, *size, dtype=anatomy.model.dtype, device=ids.device)
    patterns: list[Tensor] = []
    values: list[Tensor] = []

    def keep_stream(index: int) -> Callable[[Tensor], None]:
        return lambda x: _ignore(streams[index].copy_(x))

    def keep_attention(value: Tensor, pattern: Tensor) -> None:
        values.append(value)
        patterns.append(pattern)

    with Hooks() as hooks:
        _on_outputs(hooks, anatomy, lambda sources, z: _ignore(outputs[sources].copy_(z)))
        for layer, block in enumerate(anatomy.blocks):
            hooks.before(block.module, keep_stream(2 * layer))
            hooks.before(block.mlp_start, keep_stream(2 * layer + 1))
            if anatomy.gated and block.gate is not None:
                hooks.gate(block.gate, keep_attention)
        hooks.before(anatomy.final_norm, keep_stream(2 * graph.layers))
        logits = forward(anatomy, ids, last, prefix)
    attention = (torch.stack(patterns), torch.stack(values)) if patterns else (None, None)
    return Activations(ids, last, logits, outputs, streams, *attention, prefix)


def _ignore(_: Tensor) -> None:
    """A hook that returns a tensor would replace what it was shown."""


def _on_outputs(hooks: Hooks, anatomy: Anatomy, use: Callable[[slice, Tensor], None]) -> None:
    """Call `use(sources, outputs [n, B, S, D])` as the sources of a run write."""
    graph = anatomy.graph

    def heads_of(layer: int, block: Block) -> Callable[[Tensor, Tensor], None]:
        return lambda x, total: use(graph.head_sources(layer), head_outputs(block, graph.heads, x, total))

    def single(source: int) -> Callable[..., None]:
        return lambda *tensors: use(slice(source, source + 1), tensors[-1][None])

    hooks.before(anatomy.blocks[0].module, single(0))
    for layer, block in enumerate(anatomy.blocks):
        hooks.after(block.output, heads_of(layer, block))
        hooks.after(block.mlp_end, single(graph.mlp_source(layer)))


def head_outputs(block: Block, heads: int, x: Tensor, total: Tensor) -> Tensor:
    """What each head adds to the stream, [H, B, S, D], from input [B, S, H * width] and output of the output map.

    A bias of the output map belongs to no head; it is the same in every run.
    """
    per_head = x.unflatten(-1, (heads, -1)).permute(2, 0, 1, 3).flatten(1, 2)
    made = torch.bmm(per_head, block.output_weight(heads)).unflatten(1, x.shape[:2])
    return made if block.attention_post_norm is None else made * _norm_factor(block.attention_post_norm, total)


def _norm_factor(norm: nn.Module, total: Tensor) -> Tensor:
    """The factor [B, S, D] by which an RMS norm multiplies `total`: its weight times one number per token."""
    weight = norm.forward(torch.full_like(total[0, 0], 1e3))  # so large that epsilon is nothing
    weighted = weight * total
    per_token = (norm.forward(total) * weighted).sum(-1, keepdim=True)
    return weight * (per_token / weighted.square().sum(-1, keepdim=True).clamp(min=_TINY))


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
    """The state of one circuit run: how far what each source writes is from its corrupted output."""

    def __init__(self, anatomy: Anatomy, corrupted: Activations, edges: Tensor):
        self.anatomy, self.corrupted = anatomy, corrupted
        edges = edges.to(corrupted.ids.device)
        real = anatomy.graph.mask().to(edges.device)
        self.kept = edges & (real if edges.ndim == 2 else real[..., None])
        self.weights = self.kept.to(corrupted.outputs)
        self.change = torch.empty_like(corrupted.outputs)  # source-major: what a reader sees is one GEMM
        self.readers = torch.empty(0)  # of the attention that runs, those that keep an edge
        self.normed = torch.empty(0)  # and what each of them reads, [n, B, S, D]

    def install(self, hooks: Hooks) -> None:
        """A reader that keeps no edge reads the corrupted stream: each layer is given it as its input."""
        graph = self.anatomy.graph
        _on_outputs(hooks, self.anatomy, self._write)
        for layer, block in enumerate(self.anatomy.blocks):
            hooks.before(block.module, self._attention(layer))
            for module, kinds in block.projections_by_module().items():
                hooks.after(module, self._heads(layer, kinds))
            hooks.before(block.mlp_start, self._single(2 * layer + 1, graph.upstream(layer, "mlp")))
        hooks.before(self.anatomy.final_norm, self._single(2 * graph.layers, graph.sources))

    def _write(self, sources: slice, z: Tensor) -> None:
        torch.sub(z, self.corrupted.outputs[sources], out=self.change[sources])

    def _read(self, stream: int, upstream: int, readers: Tensor) -> Tensor:
        """What each of n readers sees: the corrupted stream and what the edges kept add to it, [n, B, S, D]."""
        weights, changes = self.weights[:upstream, readers], self.change[:upstream]
        if weights.ndim == 3:
            added = torch.einsum("uvs,ubsd->vbsd", weights, changes)
        else:
            added = (weights.t() @ changes.flatten(1)).unflatten(1, changes.shape[1:])
        return added.add_(self.corrupted.streams[stream])

    def _keeping(self, upstream: int, readers: slice) -> Tensor:
        """Which of the readers keep an edge."""
        return self.kept[:upstream, readers].transpose(0, 1).flatten(1).any(1).nonzero()[:, 0] + readers.start

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


def attention_of(run: Activations, layer: int) -> tuple[Tensor, Tensor]:
    """(pattern [B, H, S, S], values [B, H_kv, S, width]) of a layer. Raises UnsupportedModelError without gates."""
    if run.patterns is None or run.values is None:
        raise UnsupportedModelError(
            "attention messages need a model with gates", hint="collect inside attnprune.circuit.adapters.open_gates"
        )
    return run.patterns[layer], run.values[layer]


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


def self_check(anatomy: Anatomy, clean: Activations, corrupted: Activations) -> None:
    """Check that the parts found add up: all edges give the clean logits and no edges the corrupted ones.

    Rounding may flip a gate whose score lies at its threshold, and the logits with it. Here such a row of the attention
    is held as it was, and the flips are counted.

    Raises:
        SelfCheckError: they do not (by more than 1e-4 of the largest logit, or more than 1 in 10,000 gates flip).
    """
    every, family = anatomy.graph.mask().to(clean.ids.device), anatomy.model.config.model_type
    for edges, expected, name in ((every, clean, "all edges"), (torch.zeros_like(every), corrupted, "no edges")):
        flips: list[Tensor] = []
        with Hooks() as hooks:
            for layer, block in enumerate(anatomy.blocks):
                if expected.patterns is not None and block.gate is not None:
                    hooks.gate(block.gate, _held(expected, layer, flips))
            found = run_circuit(anatomy, clean, corrupted, edges)
        difference = (found - expected.logits).abs().max().item()
        if not difference <= SELF_CHECK_TOLERANCE * max(1.0, expected.logits.abs().max().item()):
            raise SelfCheckError(f"{family}: a circuit of {name} is off by {difference:.2g} in the logits")
        share = torch.cat(flips).float().mean().item() if flips else 0.0
        if share * sum(map(len, flips)) > 1 and share > FLIPPED_GATES:
            raise SelfCheckError(f"{family}: a circuit of {name} flips {100 * share:.2g} % of the gates")


def _held(run: Activations, layer: int, flips: list[Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Attention of which the rows with a flipped gate are those of `run`; adds to `flips` whether each gate did."""
    patterns, values = attention_of(run, layer)

    def change(value: Tensor, pattern: Tensor) -> Tensor:
        flipped = (pattern != 0) != (patterns != 0)
        flips.append(flipped.flatten())
        held, own = (p @ repeat_heads(v, p.shape[1]) for p, v in ((patterns, values), (pattern, value)))
        return torch.where(flipped.any(-1, keepdim=True), held, own)

    return change


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
