"""What every part of a model wrote and read in one run over a batch of prompts, and the hooks that tell.

Behind a post-norm (Gemma 2, OLMo 2) a head's share of the output is scaled by the norm's own factor, so the shares of
all heads add up to it.

Prompts are batches of one length without padding. Clean and corrupted prompts often begin with the same tokens; there
the two runs are the same, whatever is patched, so `collect_pair` runs that prefix once and keeps its keys and values:
those of every layer and position, whatever a sliding window will still see of them, from a run of whole prompts, since
the angles of some rotary embeddings depend on how long a sequence is.

Sizes: N = B * S * D numbers (S without the prefix), `Activations` holds (U + 2 L) * N, in fp32 230 MB for SmolLM2-135M
(U = 301) on 16 prompts of 17 tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from attnprune.circuit.model.adapters import Anatomy, Block
from attnprune.errors import InputError, UnsupportedModelError

_TINY = 1e-30


class Activations(NamedTuple):
    """One run over a batch of prompts, from position P on, where it may begin to differ from another run.

    prompts [B, P + S]: all token ids. last: for how many of the last positions logits were computed (0: all of `ids`).
    outputs [U, B, S, D]: what each source wrote. streams [2 L + 1, B, S, D]: what the attention and the MLP of each
    layer read, and the final norm. patterns [L, B, H, S (to), P + S (from)] and values [L, B, H_kv, P + S, width] of
    the attention, None for a model without gates. prefix [L, 2, B, H_kv, P, width]: keys and values of the positions
    before, None if P is 0.
    """

    prompts: Tensor
    last: int
    logits: Tensor
    outputs: Tensor
    streams: Tensor
    patterns: Tensor | None
    values: Tensor | None
    prefix: Tensor | None

    @property
    def ids(self) -> Tensor:
        """The token ids that ran [B, S]."""
        return behind(self.prompts, self.prefix)

    def take(self, rows: slice) -> Activations:
        """Some of the prompts, without the attention."""
        return Activations(
            self.prompts[rows], self.last, self.logits[rows], self.outputs[:, rows], self.streams[:, rows], None, None,
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
        cache = DynamicCache()  # without the config, or layers with a window would drop what they get
        for layer, (key, value) in enumerate(prefix):
            cache.update(key, value, layer)
    with evaluation_mode(anatomy.model):
        return anatomy.model(
            input_ids=ids, past_key_values=cache, use_cache=cache is not None, logits_to_keep=last
        ).logits


def behind(prompts: Tensor, prefix: Tensor | None) -> Tensor:
    """Token ids [B, S] of prompts [B, P + S] behind a prefix [L, 2, B, H_kv, P, width]."""
    return prompts if prefix is None else prompts[:, prefix.shape[-2] :]


def repeat_heads(values: Tensor, heads: int) -> Tensor:
    """[B, H_kv, ...] -> [B, H, ...]: each key/value head for all heads that share it."""
    return values.repeat_interleave(heads // values.shape[1], 1)


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
    prefix = _prefix(anatomy, clean, length) if length else None
    return collect(anatomy, clean, last, prefix), collect(anatomy, corrupted, last, prefix)


@torch.no_grad()
def _prefix(anatomy: Anatomy, prompts: Tensor, length: int) -> Tensor:
    """Keys and values [L, 2, B, H_kv, P, width] of the first P = `length` positions in a plain run of whole prompts."""
    cache = DynamicCache()
    with evaluation_mode(anatomy.model):
        anatomy.model(input_ids=prompts, past_key_values=cache, use_cache=True, logits_to_keep=1)
    layers: list[Any] = cache.layers
    return torch.stack([torch.stack((layer.keys, layer.values))[..., :length, :] for layer in layers])


@torch.no_grad()
def collect(anatomy: Anatomy, prompts: Tensor, last: int = 0, prefix: Tensor | None = None) -> Activations:
    """Run prompts of one length, without padding, and keep what every source wrote, in the model's dtype.

    `prefix`: keys and values [L, 2, B, H_kv, P, width] of the first P positions of the prompts [B, P + S], which then
    do not run again. `last`: compute logits for this many of the last positions only (0: all that run); every later
    run does the same.

    Raises:
        InputError: prompts of another shape.
    """
    ids = behind(prompts, prefix) if prompts.ndim == 2 else prompts
    if ids.ndim != 2 or not ids.numel():
        raise InputError(f"prompts: expected token ids [prompts, length], got shape {tuple(prompts.shape)}")
    graph = anatomy.graph
    size = (*ids.shape, anatomy.width)
    outputs = torch.empty(graph.sources, *size, dtype=anatomy.model.dtype, device=ids.device)
    streams = torch.empty(2 * graph.layers + 1, *size, dtype=anatomy.model.dtype, device=ids.device)
    patterns: list[Tensor] = []
    values: list[Tensor] = []

    def keep_stream(index: int) -> Callable[[Tensor], None]:
        return lambda x: ignore(streams[index].copy_(x))

    def keep_attention(value: Tensor, pattern: Tensor) -> None:
        values.append(value)
        patterns.append(pattern)

    with Hooks() as hooks:
        on_outputs(hooks, anatomy, lambda sources, z: ignore(outputs[sources].copy_(z)))
        for layer, block in enumerate(anatomy.blocks):
            hooks.before(block.module, keep_stream(2 * layer))
            hooks.before(block.mlp_start, keep_stream(2 * layer + 1))
            if anatomy.gated and block.gate is not None:
                hooks.gate(block.gate, keep_attention)
        hooks.before(anatomy.final_norm, keep_stream(2 * graph.layers))
        logits = forward(anatomy, ids, last, prefix)
    attention = (torch.stack(patterns), torch.stack(values)) if patterns else (None, None)
    return Activations(prompts, last, logits, outputs, streams, *attention, prefix)


def ignore(_: Tensor) -> None:
    """A hook that returns a tensor would replace what it was shown."""


def on_outputs(
    hooks: Hooks, anatomy: Anatomy, use: Callable[[slice, Tensor], None], wanted: Tensor | None = None
) -> None:
    """Call `use(sources, outputs [n, B, S, D])` as the sources of a run write; outputs are of those `wanted`, bool [U],
    of these sources, all by default."""
    graph = anatomy.graph

    def heads_of(layer: int, block: Block, some: Tensor | None) -> Callable[[Tensor, Tensor], None]:
        return lambda x, total: use(graph.head_sources(layer), head_outputs(block, graph.heads, x, total, some))

    def single(source: int) -> Callable[..., None]:
        return lambda *tensors: use(slice(source, source + 1), tensors[-1][None])

    hooks.before(anatomy.blocks[0].module, single(0))
    for layer, block in enumerate(anatomy.blocks):
        heads, mlp = graph.head_sources(layer), graph.mlp_source(layer)
        some = None if wanted is None else wanted[heads].nonzero()[:, 0]
        if some is None or len(some):
            hooks.after(block.output, heads_of(layer, block, some))
        if wanted is None or wanted[mlp]:
            hooks.after(block.mlp_end, single(mlp))


def head_outputs(block: Block, heads: int, x: Tensor, total: Tensor, some: Tensor | None = None) -> Tensor:
    """What each head adds to the stream, [H, B, S, D], from input [B, S, H * width] and output of the output map.

    A bias of the output map belongs to no head; it is the same in every run. `some`: only these heads.
    """
    per_head, weight = x.unflatten(-1, (heads, -1)).permute(2, 0, 1, 3), block.output_weight(heads)
    if some is not None and len(some) < heads:
        per_head, weight = per_head[some], weight[some]
    made = torch.bmm(per_head.flatten(1, 2), weight).unflatten(1, x.shape[:2])
    return made if block.attention_post_norm is None else made * norm_factor(block.attention_post_norm, total)


def norm_factor(norm: nn.Module, total: Tensor) -> Tensor:
    """The factor [B, S, D] by which an RMS norm multiplies `total`: its weight times one number per token."""
    weight = norm.forward(torch.full_like(total[0, 0], 1e3))  # so large that epsilon is nothing
    weighted = weight * total
    per_token = (norm.forward(total) * weighted).sum(-1, keepdim=True)
    return weight * (per_token / weighted.square().sum(-1, keepdim=True).clamp(min=_TINY))


def norm_scale(norm: nn.Module, stream: Tensor) -> tuple[Tensor, bool]:
    """What a norm multiplies the stream [T, D] by, [T, D], and whether it subtracts the mean before (a LayerNorm)."""
    shifted = norm.forward(stream + stream.abs().max())
    centred = torch.allclose(shifted, norm.forward(stream), rtol=1e-2, atol=1e-2)
    if not centred:
        return norm_factor(norm, stream[None])[0], False
    weight = getattr(norm, "weight", None)
    weight = torch.ones_like(stream[0]) if weight is None else weight
    weighted = weight * (stream - stream.mean(-1, keepdim=True))
    made = norm.forward(stream) - norm.forward(torch.zeros_like(stream))
    per_token = (made * weighted).sum(-1, keepdim=True) / weighted.square().sum(-1, keepdim=True).clamp(min=1e-30)
    return weight * per_token, True


def attention_of(run: Activations, layer: int) -> tuple[Tensor, Tensor]:
    """(pattern [B, H, S, S], values [B, H_kv, S, width]) of a layer. Raises UnsupportedModelError without gates."""
    if run.patterns is None or run.values is None:
        raise UnsupportedModelError(
            "attention messages need a model with gates",
            hint="collect inside attnprune.circuit.model.adapters.open_gates",
        )
    return run.patterns[layer], run.values[layer]
