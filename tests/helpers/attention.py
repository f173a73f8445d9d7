"""Random attention inputs and masks of every kind."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BATCH, HEADS, LENGTH, WIDTH = 2, 4, 13, 8

MASKS = ["causal", "left_pad", "right_pad", "window", "packed"]


def visible_mask(kind, batch=BATCH, length=LENGTH):
    """Bool [B, 1, T, T]; the padded cases hide 4 keys of the last row."""
    causal = torch.ones(length, length, dtype=torch.bool).tril().repeat(batch, 1, 1, 1)
    if kind == "left_pad":
        causal[-1, :, :, :4] = False
    if kind == "right_pad":
        causal[-1, :, :, -4:] = False
    if kind == "window":
        causal &= ~torch.ones(length, length, dtype=torch.bool).tril(-4)
    if kind == "packed":
        document = torch.tensor([0] * 5 + [1] * (length - 8) + [2] * 3)
        causal &= document[:, None] == document
    return causal


def inputs(batch=BATCH, heads=HEADS, kv_heads=2, queries=LENGTH, keys=LENGTH, width=WIDTH, dtype=torch.float64):
    """Leaf tensors (query, key, value, bias, sinks); scores have a spread of about one."""
    query = torch.randn(batch, heads, queries, width, dtype=dtype)
    key, value = torch.randn(2, batch, kv_heads, keys, width, dtype=dtype).unbind(0)
    bias = torch.linspace(-0.6, 1.0, heads, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    sinks = torch.randn(heads, dtype=dtype)
    return [x.detach().clone().requires_grad_() for x in (query, key, value, bias, sinks)]


def assert_relative(actual, expected, tolerance=1e-10):
    assert actual.shape == expected.shape
    assert actual.isfinite().all()
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def by_definition(query, key, value, bias, visible, softcap=None, sinks=None):
    """Loops over the definition in numpy: output [B, H, Q, D] and the open gates [B, H, Q, K]."""
    query, key, value, bias = (x.detach().double().numpy() for x in (query, key, value, bias))
    batch, heads, queries, width = query.shape
    groups, keys = heads // key.shape[1], key.shape[2]
    output, is_open = np.zeros((batch, heads, queries, value.shape[-1])), np.zeros((batch, heads, queries, keys), bool)
    for b, h, i in np.ndindex(batch, heads, queries):
        numerators, denominator = {}, math.exp(sinks[h]) if sinks is not None else 0.0
        for j in range(keys):
            if visible[b, 0, i, j]:
                score = float(query[b, h, i] @ key[b, h // groups, j]) / math.sqrt(width)
                score = softcap * math.tanh(score / softcap) if softcap else score
                numerators[j] = math.exp(score)
                denominator += numerators[j]
                is_open[b, h, i, j] = score + bias[h] > 0
        for j, numerator in numerators.items():
            if is_open[b, h, i, j]:
                output[b, h, i] += numerator / denominator * value[b, h // groups, j]
    return output, is_open


class LargestTensor(TorchDispatchMode):
    """Largest tensor that any operation returns, bool masks apart."""

    def __init__(self):
        super().__init__()
        self.numbers = self.masks = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.dtype == torch.bool:
                self.masks = max(self.masks, x.numel())
            elif isinstance(x, torch.Tensor):
                self.numbers = max(self.numbers, x.numel())
        return out
