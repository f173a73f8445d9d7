"""Which implementation of gated attention runs, by device, dtype and mask; and the one function that calls it.

Three compute the same: `triton` (kernels, CUDA), `chunked` (plain PyTorch, any device) and `reference` (the definition,
dense). `ATTNPRUNE_BACKEND` forces one; a forced one that cannot do what is asked raises instead of another running.
"""

from __future__ import annotations

import importlib.util
import os
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from attnprune.attention import chunked, ops
from attnprune.attention.chunked import GatedOutput, GateSettings
from attnprune.attention.gates import logistic_noise, seed_tensor
from attnprune.attention.reference import gated_attention_reference, open_edges_reference
from attnprune.attention.spans import Spans, spans_of
from attnprune.errors import InputError, UnsupportedModelError

BACKENDS = ("triton", "chunked", "reference")
VARIABLE = "ATTNPRUNE_BACKEND"
WIDEST_HEAD = 128
DEFAULT = GateSettings()
NO_INTERVALS = "the attention mask is not made of intervals"

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_spans = WeakTensorKeyDictionary()


class Choice(NamedTuple):
    """A backend and why it was chosen."""

    backend: str
    reason: str


def forced() -> str | None:
    """The backend that `ATTNPRUNE_BACKEND` asks for. Raises InputError for a name that is none."""
    name = os.environ.get(VARIABLE, "auto")
    if name not in (*BACKENDS, "auto"):
        raise InputError(f"{VARIABLE}: {name!r} is not one of {', '.join(BACKENDS)}, auto")
    return None if name == "auto" else name


def choose(
    device: torch.device, dtype: torch.dtype, width: int, *, softcap: bool = False, sinks: bool = False,
    statistics: bool = False, backend: str | None = None,
) -> Choice:  # fmt: skip
    """The backend for attention with heads of `width` on this device; `backend` or `ATTNPRUNE_BACKEND` force one.

    Raises:
        UnsupportedModelError: the forced backend cannot run this.
    """
    wanted = backend or forced()
    interpreted = wanted == "triton" and os.environ.get("TRITON_INTERPRET") == "1"  # kernels on a CPU, for tests
    obstacle = "" if device.type == "cuda" or interpreted else f"no CUDA device ({device.type})"
    obstacle = obstacle or _obstacle(dtype, width, softcap, sinks, statistics)
    if wanted == "triton" and obstacle:
        raise UnsupportedModelError(f"backend triton: {obstacle}")
    if wanted:
        return Choice(wanted, f"forced by {VARIABLE}" if backend is None else "asked for")
    return Choice("chunked", obstacle) if obstacle else Choice("triton", f"{device.type}, {str(dtype)[6:]}")


def _obstacle(dtype: torch.dtype, width: int, softcap: bool, sinks: bool, statistics: bool) -> str:
    """What the kernels lack for this, or nothing."""
    if not _HAS_TRITON:
        return "triton is not installed"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"no kernel for {str(dtype)[6:]}"
    if width > WIDEST_HEAD:
        return f"heads of width {width}, kernels go up to {WIDEST_HEAD}"
    named = {"capped scores": softcap, "attention sinks": sinks, "a statistics hook": statistics}
    return next((f"{what} are not in the kernels" for what, asked in named.items() if asked), "")


def counted_pairs(visible: Tensor) -> Tensor:
    """The pairs that count: both tokens real. A right-padded query still sees real keys, but never itself."""
    if visible.shape[-2] != visible.shape[-1]:
        return visible
    return visible & visible.diagonal(dim1=-2, dim2=-1)[..., None]


def spans_for(visible: Tensor, batch: int) -> Spans | None:
    """`visible` [batch or 1, 1, Q, K] as intervals, or None if it is not made of them.

    Found once for a mask that all layers share, since it waits for the device.
    """
    expanded = visible.expand(batch, *visible.shape[1:])
    if torch.compiler.is_compiling():
        return Spans(*ops.spans(expanded, counted_pairs(expanded)))
    state = (batch, visible._version)  # a mask may serve batches of several sizes, or be written to
    if visible not in _spans or _spans[visible][0] != state:
        _spans[visible] = (state, spans_of(expanded, counted_pairs(expanded)))
    return _spans[visible][1]


def gated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    visible: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    settings: GateSettings = DEFAULT,
    backend: str | None = None,
) -> GatedOutput:
    """Gated attention by the backend that `choose` names; arguments as in `chunked.gated_attention`.

    Density and penalty count the pairs of two real tokens.
    """
    choice = choose(
        query.device, value.dtype, query.shape[-1], softcap=softcap is not None, sinks=sinks is not None,
        statistics=settings.on_chunk is not None, backend=backend,
    )  # fmt: skip
    made = None
    if choice.backend == "triton":
        made = _kernels(query, key, value, bias, visible, scaling, settings)
        if made is None and "triton" in (backend, forced()):
            raise UnsupportedModelError(f"backend triton: {NO_INTERVALS}")
        choice = choice if made is not None else Choice("chunked", NO_INTERVALS)
    options = {"scaling": scaling, "softcap": softcap, "sinks": sinks}
    if choice.backend == "reference":
        made = _reference(query, key, value, bias, visible, settings, options)
    elif made is None and torch.compiler.is_compiling() and settings.on_chunk is None:
        made = GatedOutput(*ops.chunked_attention(
            query, key, value, bias, sinks, visible, counted_pairs(visible),
            seed_tensor(settings.noise_seed, query.device), scaling, softcap, settings.temperature,
            settings.slope_temperature, torch.is_grad_enabled(),
        ))  # fmt: skip
    elif made is None:
        made = chunked.gated_attention(
            query, key, value, bias, visible, counted=counted_pairs(visible), settings=settings, **options
        )
    return made._replace(ran=tuple(choice))


def _kernels(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, visible: Tensor, scaling: float, settings: GateSettings
) -> GatedOutput | None:
    """The kernels for training, for one query and for many; None for a mask that is not made of intervals."""
    # Under autocast an fp32 model's rotary embedding widens query and key again; the matrix units take one dtype.
    query, key = query.to(value.dtype), key.to(value.dtype)
    training = torch.is_grad_enabled() or settings.noise_seed is not None
    if not training and query.shape[2] == 1:  # any mask, and no look at it: fit for CUDA graphs
        visible = visible.expand(query.shape[0], *visible.shape[1:])
        output, open_edges = ops.decode(query, key, value, bias, visible, scaling)
        return GatedOutput(output, torch.zeros_like(bias), open_edges, visible.sum())
    known = settings.mask
    spans = spans_for(visible, query.shape[0]) if known is None else known.spans
    if spans is None:
        return None
    visible_edges = spans.visible_edges if known is None else known.visible_edges
    if not training:
        output, open_edges = ops.prefill(query, key, value, bias, spans.rows, scaling)
        return GatedOutput(output, torch.zeros_like(bias), open_edges, visible_edges)
    output, _, penalty, open_edges = ops.gated_attention(
        query, key, value, bias, *spans, seed_tensor(settings.noise_seed, query.device), scaling, settings.temperature,
        settings.slope_temperature, settings.deterministic,
    )  # fmt: skip
    return GatedOutput(output, penalty, open_edges, visible_edges)


def _reference(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, visible: Tensor, settings: GateSettings, options: dict
) -> GatedOutput:
    """The definition in the bias's dtype."""
    batch, heads, queries, _ = query.shape
    wide = (query.to(bias.dtype), key.to(bias.dtype), value.to(bias.dtype), bias)
    counted = counted_pairs(visible).expand(batch, 1, queries, key.shape[2])
    noise = None
    if settings.noise_seed is not None:
        lanes, rows, columns = (torch.arange(n, device=query.device) for n in (batch * heads, queries, key.shape[2]))
        noise = logistic_noise(settings.noise_seed, lanes, rows, columns, bias.dtype).view(batch, heads, queries, -1)
    output, _, penalty = gated_attention_reference(
        *wide, visible, counted=counted, noise=noise, temperature=settings.temperature,
        slope_temperature=settings.slope_temperature, **options,
    )  # fmt: skip
    is_open = open_edges_reference(*wide[:2], bias, counted, options["scaling"], options["softcap"])
    if settings.on_chunk is not None:
        settings.on_chunk(slice(0, queries), slice(0, key.shape[2]), is_open)
    return GatedOutput(output.to(query.dtype), penalty, is_open.sum((0, 2, 3)), counted.sum())
