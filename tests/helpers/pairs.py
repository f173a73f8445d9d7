"""Pairs of prompts on tiny models of every family, collected for patching."""

from __future__ import annotations

import pytest
import torch

from attnprune.circuit.model.activations import collect
from attnprune.circuit.model.adapters import _LAYOUTS, anatomy_of
from attnprune.circuit.model.patching import run_circuit
from tests.helpers.families import ids

FAMILIES = sorted(_LAYOUTS)

PARTS = ["gemma2", "gpt2", "gpt_neox", "llama", "olmo2", "qwen3"]  # every kind of layout, and one with q/k norms

PROMPTS, LENGTH = 2, 8

WEIGHTS = torch.randn(97, generator=torch.Generator().manual_seed(3)) / 10


def metric(logits):
    return logits[:, -1] @ WEIGHTS.to(logits.dtype)


class Pair:
    """A model with a clean and a corrupted run."""

    def __init__(self, model, clean=None, corrupted=None, last=0):
        self.anatomy = anatomy_of(model)
        self.graph = self.anatomy.graph
        self.clean = collect(self.anatomy, ids(PROMPTS, LENGTH) if clean is None else clean, last)
        self.corrupted = collect(self.anatomy, ids(PROMPTS, LENGTH, seed=2) if corrupted is None else corrupted, last)
        self.runs = (self.anatomy, self.clean, self.corrupted)
        self.every = self.graph.mask()

    def without(self, *edge):
        kept = self.every.clone()
        kept[edge] = False
        return kept

    def change(self, edges, messages=None):
        """The metric of a circuit, less that of the clean run [B]."""
        return metric(run_circuit(*self.runs, edges, messages)) - metric(self.clean.logits)

    def some_edges(self, count):
        """Random edges that reach every kind of destination."""
        edges = self.every.nonzero()
        return edges[torch.randperm(len(edges), generator=torch.Generator().manual_seed(4))[:count]]


def assert_close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


every_family = pytest.mark.parametrize("family", FAMILIES)

dense_and_gated = pytest.mark.parametrize("gated", [False, True], ids=["dense", "gated"])
