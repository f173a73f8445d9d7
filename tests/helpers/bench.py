"""A small case to time."""

from __future__ import annotations

import torch

from attnprune.bench.cases import gaussian_case

CPU = torch.device("cpu")

SHAPE = {
    "batch": 1,
    "heads": 4,
    "kv_heads": 2,
    "keys": 48,
    "width": 16,
    "dtype": torch.float32,
    "device": CPU,
    "seed": 0,
}


def case(suite="train", density=0.1, noise=False, **changes):
    return gaussian_case(suite, density=density, noise=noise, **SHAPE | changes)
