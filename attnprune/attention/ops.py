"""The kernels as PyTorch operators, so that autograd, torch.compile and selective checkpointing see one node; chunked
attention, whose blocks depend on the mask, as one too for torch.compile.

A checkpointing policy that keeps the results of `torch.ops.attnprune.gated_attention` keeps the output and the
log-sum-exp of each row, all that the backward pass needs besides the inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnprune.attention import chunked
from attnprune.attention.chunked import GateSettings
from attnprune.attention.spans import Spans, spans_of
from attnprune.errors import UnsupportedModelError


@torch.library.custom_op("attnprune::spans", mutates_args=())
def spans(visible: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """`spans_of` for use inside a compiled graph: (rows, columns); raises where eager code would take another path."""
    found = spans_of(visible, counted)
    if found is None:
        raise UnsupportedModelError(
            "backend triton: the attention mask is not made of intervals", hint="set ATTNPRUNE_BACKEND=chunked"
        )
    return found.rows, found.columns


@spans.register_fake
def _(visible: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    batch, _, queries, keys = visible.shape
    rows = visible.new_empty(batch, queries, 3, dtype=torch.int32)
    return rows, visible.new_empty(batch, keys, 2, dtype=torch.int32)


@torch.library.custom_op("attnprune::gated_attention", mutates_args=())
def gated_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, rows: Tensor, columns: Tensor, noise_seed: Tensor | None,
    scaling: float, temperature: float, slope_temperature: float, deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(output [B, H, Q, D], log-sum-exp [B, H, Q] of the scores in log2 units, penalty [H], open edges int64 [H]).

    Differentiable in query, key, value and bias through output and penalty. The sums over rows have a fixed order.
    """
    from attnprune.attention.kernels import training

    call = training.Call(scaling, temperature, slope_temperature, noise_seed)
    with torch.cuda.device_of(query):
        made = training.forward(query, key, value, bias, Spans(rows, columns), call)
    return made.output, made.lse, made.soft.sum((0, 2)), made.hard.sum((0, 2))


@gated_attention.register_fake
def _(query, key, value, bias, *others):
    batch, heads, queries, width = query.shape
    output = query.new_empty(batch, queries, heads, width).transpose(1, 2)
    lse = query.new_empty(batch, heads, queries, dtype=torch.float32)
    return output, lse, lse.new_empty(heads), lse.new_empty(heads, dtype=torch.int64)


@torch.library.custom_op("attnprune::gated_attention_backward", mutates_args=())
def gated_attention_backward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, rows: Tensor, columns: Tensor, noise_seed: Tensor | None,
    output: Tensor, lse: Tensor, grad_output: Tensor, grad_penalty: Tensor, scaling: float, temperature: float,
    slope_temperature: float, deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key, value and bias."""
    from attnprune.attention.kernels import training

    call = training.Call(scaling, temperature, slope_temperature, noise_seed)
    saved = (query, key, value, bias, Spans(rows, columns), output, lse)
    with torch.cuda.device_of(query):
        return training.backward(*saved, grad_output, grad_penalty, call, deterministic)


@gated_attention_backward.register_fake
def _(query, key, value, bias, *others):
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), torch.empty_like(bias)


def _setup(ctx, inputs, output):
    query, key, value, bias, rows, columns, noise_seed, *ctx.settings = inputs
    out, lse, _, open_edges = output
    ctx.save_for_backward(query, key, value, bias, rows, columns, noise_seed, out, lse)
    ctx.mark_non_differentiable(lse, open_edges)


def _backward(ctx, grad_output, grad_lse, grad_penalty, grad_open):
    saved = ctx.saved_tensors
    bias, output = saved[3], saved[7]
    grad_output = torch.zeros_like(output) if grad_output is None else grad_output
    grad_penalty = torch.zeros_like(bias) if grad_penalty is None else grad_penalty
    return *gated_attention_backward(*saved, grad_output, grad_penalty, *ctx.settings), *[None] * 7


gated_attention.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("attnprune::prefill", mutates_args=())
def prefill(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, rows: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """(output [B, H, Q, D], open edges int64 [H]) at run time, see `kernels.prefill`."""
    from attnprune.attention.kernels import prefill as kernels

    output, open_edges = kernels.prefill(query, key, value, bias, rows, scaling=scaling)
    return output, open_edges.sum((0, 2))


@torch.library.custom_op("attnprune::decode", mutates_args=())
def decode(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, visible: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """(output [B, H, 1, D], open edges int64 [H]) of one query, see `kernels.decode`."""
    from attnprune.attention.kernels import decode as kernels

    output, open_edges = kernels.decode(query, key, value, bias, visible, scaling=scaling)
    return output, open_edges.sum((0, 2))


@prefill.register_fake
@decode.register_fake
def _(query, key, value, bias, mask, scaling):
    batch, heads, queries, width = query.shape
    output = query.new_empty(batch, queries, heads, width).transpose(1, 2)
    return output, query.new_empty(heads, dtype=torch.int64)


@torch.library.custom_op("attnprune::chunked_attention", mutates_args=())
def chunked_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, sinks: Tensor | None, visible: Tensor, counted: Tensor,
    noise_seed: Tensor | None, scaling: float, softcap: float | None, temperature: float, slope_temperature: float,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(output [B, H, Q, D], penalty [H], open edges int64 [H], visible edges int64) of `chunked.gated_attention`.

    `training`: as where gradients are enabled; differentiable in query, key, value, bias and sinks.
    """
    settings = GateSettings(temperature, slope_temperature, noise_seed)
    with torch.set_grad_enabled(training):
        made = chunked.gated_attention(
            query.detach(), key.detach(), value.detach(), bias.detach(), visible, scaling=scaling, softcap=softcap,
            sinks=None if sinks is None else sinks.detach(), counted=counted, settings=settings,
        )  # fmt: skip
    return made.output, made.penalty, made.open_edges, made.visible_edges


@chunked_attention.register_fake
def _(query, key, value, bias, *others):
    output = query.new_empty(*query.shape[:3], value.shape[-1])
    open_edges = torch.empty_like(bias, dtype=torch.int64)
    return output, torch.empty_like(bias), open_edges, open_edges.new_empty(())


@torch.library.custom_op("attnprune::chunked_attention_backward", mutates_args=())
def chunked_attention_backward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, sinks: Tensor | None, visible: Tensor, counted: Tensor,
    noise_seed: Tensor | None, output: Tensor, grad_output: Tensor, grad_penalty: Tensor, scaling: float,
    softcap: float | None, temperature: float, slope_temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key, value, bias and sinks (zeros [H] where there are none)."""
    visible = visible.expand(query.shape[0], 1, query.shape[2], key.shape[2])
    inputs = (query, key, value, bias, sinks, visible, chunked.counted_where_it_matters(visible, counted)[0])
    settings = GateSettings(temperature, slope_temperature, noise_seed)
    blocks = list(chunked.blocks_of(visible, len(bias)))
    with torch.autocast(query.device.type, enabled=False):
        *grads, grad_sinks = chunked.backward(
            inputs, output, grad_output, grad_penalty, blocks, scaling, softcap, settings
        )
    dense = [grad.contiguous() for grad in grads]  # the strides that the fake promises
    return dense[0], dense[1], dense[2], dense[3], torch.zeros_like(bias) if grad_sinks is None else grad_sinks


@chunked_attention_backward.register_fake
def _(query, key, value, bias, sinks, *others):
    like = (query, key, value, bias, bias if sinks is None else sinks)
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in like)


def _chunked_setup(ctx, inputs, output):
    *tensors, scaling, softcap, temperature, slope_temperature, _ = inputs
    ctx.settings = (scaling, softcap, temperature, slope_temperature)
    ctx.has_sinks = tensors[4] is not None
    ctx.save_for_backward(*tensors, output[0])
    ctx.mark_non_differentiable(*output[2:])


def _chunked_backward(ctx, grad_output, grad_penalty, *_):
    saved = ctx.saved_tensors
    grad_output = torch.zeros_like(saved[-1]) if grad_output is None else grad_output
    grad_penalty = torch.zeros_like(saved[3]) if grad_penalty is None else grad_penalty
    *grads, grad_sinks = chunked_attention_backward(*saved, grad_output, grad_penalty, *ctx.settings)
    return *grads, grad_sinks if ctx.has_sinks else None, *[None] * 8


chunked_attention.register_autograd(_chunked_backward, setup_context=_chunked_setup)
