"""Submissions to the circuit track of the Mechanistic Interpretability Benchmark: a folder TASK_MODEL for each pair.

A folder holds either one .json or .pt graph with a score for every edge, of which the benchmark runs the largest 0.1 to
50 %, or one graph for each of these sizes, which says what is in it (README.md of hannamw/MIB-circuit-track).

Its two areas are trapezoids over these shares, of the faithfulness (CPR, circuit performance ratio) and of how far it
is from 1 (CMD, circuit-model distance): Mueller et al., arXiv 2504.13151.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from attnprune.circuit.exchange import graph_pt, grouped, read_edges, read_graph, ungrouped
from attnprune.circuit.model.graph import Graph
from attnprune.errors import InputError
from attnprune.files import unusable

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)  # of all edges; the whole model ends its curve
NAMES = tuple(f"{100 * share:g} %" for share in SHARES)
IMPORTANCES = "importances.pt"
# What the benchmark looks for in a folder's name.
_MODELS = {"gpt2-small": "gpt2", "qwen2.5-0.5b": "qwen2.5", "gemma-2-2b": "gemma2", "llama-3.1-8b": "llama3"}


class Named(NamedTuple):
    """A circuit, bool [U, V], by its size or its file."""

    name: str
    kept: Tensor


def folder_name(task: str, model: str) -> str:
    """TASK_MODEL: `ioi_gpt2`, with the benchmark's own name of a model that it has."""
    model = Path(model).name.lower().removesuffix(".gguf")
    task = task if ":" in task else Path(task).stem
    return f"{task.replace(':', '-').replace('_', '-')}_{_MODELS.get(model, model)}"


def importances(graph: Graph, width: int, edges: Tensor, scores: Tensor) -> bytes:
    """A circuit, bool [U, V], and scores as importances: 1 to 1.5 in the circuit, up to 0.5 outside of it.

    So as many of the largest as the circuit has are the circuit, which a mask or deletion found, not the scores alone.
    """
    size = scores.abs().masked_fill(~graph.mask(), 0.0)
    return graph_pt(graph, width, torch.zeros_like(edges), size / (2 * size.max().clamp(min=1e-30)) + edges)


def read_submission(path: Path, graph: Graph) -> list[Named]:
    """The circuits of a file or of a folder TASK_MODEL.

    A graph in which no edge or every edge is in_graph, and which has scores, is importances: its circuits are the
    largest by size, whatever their sign.

    Raises:
        InputError: as `attnprune.circuit.exchange.read_graph`, or a folder without such a file.
    """
    files = [path]
    if path.is_dir():
        try:
            files = sorted(file for file in path.iterdir() if file.suffix.lower() in (".json", ".pt"))
        except OSError as error:
            raise unusable(path, error) from None
        if not files:
            raise InputError(f"{path}: holds no .json and no .pt file", hint="name the folder of one task and model")
    if len(files) > 1:
        return [Named(file.name, read_edges(file, graph)) for file in files]
    kept, scores = read_graph(files[0], graph)
    real = ungrouped(graph, graph.mask())
    if scores is None or (kept.any() and not bool((kept == real).all())):
        return [Named(files[0].name, read_edges(files[0], graph))]
    return _largest(graph, scores, real)


def areas(faithfulness: list[float]) -> tuple[float, float]:
    """(CPR, CMD) of circuits of the sizes `SHARES`, and of the whole model, which is faithful."""
    shares = torch.tensor([*SHARES, 1.0], dtype=torch.double)
    curve = torch.tensor([*faithfulness, 1.0], dtype=torch.double)
    return torch.trapezoid(curve, shares).item(), torch.trapezoid((1 - curve).abs(), shares).item()


def _largest(graph: Graph, scores: Tensor, real: Tensor) -> list[Named]:
    """The circuits of importances [U, L * (3 H + 1) + 1], at the benchmark's sizes."""
    order = scores.abs().masked_fill(~real, -1.0).flatten().argsort(descending=True, stable=True)
    found = []
    for name, share in zip(NAMES, SHARES, strict=True):
        kept = torch.zeros_like(real).flatten()
        kept[order[: int(share * int(real.sum()))]] = True
        found.append(Named(name, grouped(graph, kept.view_as(real))))
    return found
