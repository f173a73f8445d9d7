"""Circuits of other tools: the graphs of the EAP-IG package, which MIB takes and gives, as .json and .pt.

Both name or number edges as attnprune.circuit.model.graph does, with keys and values of its own for every head. Where
heads share them here, each of them is written with what they share, and an edge into any of them is read as one into
what they share. Files are data: a .pt is read with `weights_only`, so nothing in it is run.
"""

from __future__ import annotations

import json
import math
import pickle
import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnprune.circuit.model.graph import Graph
from attnprune.errors import InputError
from attnprune.sidecar import format

MAX_BYTES = 1 << 30


def graph_json(graph: Graph, width: int, edges: Tensor, scores: Tensor) -> dict[str, Any]:
    """A circuit, bool [U, V], and scores [U, V] as `Graph.from_json` of EAP-IG reads them. `width`: of the stream."""
    kept, score = (ungrouped(graph, x) for x in (edges, scores))
    names, real = _destinations(graph), ungrouped(graph, graph.mask())
    heads, mlps = graph.touched(edges)
    nodes = {"input": {"in_graph": True}}
    for layer in range(graph.layers):
        nodes |= {f"a{layer}.h{head}": {"in_graph": bool(heads[layer, head])} for head in range(graph.heads)}
        nodes[f"m{layer}"] = {"in_graph": bool(mlps[layer])}
    nodes["logits"] = {"in_graph": True}
    listed = {
        f"{graph.source_names[u]}->{names[v]}": {"score": score[u, v].item(), "in_graph": bool(kept[u, v])}
        for u, v in real.nonzero().tolist()
    }
    return {"cfg": _sizes(graph, width), "nodes": nodes, "edges": listed}


def graph_pt(graph: Graph, width: int, edges: Tensor, scores: Tensor) -> bytes:
    """The same as a file that `Graph.from_pt` of EAP-IG reads."""
    heads, mlps = graph.touched(edges)
    nodes = torch.cat([torch.ones(1, dtype=torch.bool), torch.cat([heads, mlps[:, None]], 1).flatten()])
    data = {
        "cfg": _sizes(graph, width), "src_nodes": list(graph.source_names), "dst_nodes": _destinations(graph),
        "edges_scores": ungrouped(graph, scores).float(), "edges_in_graph": ungrouped(graph, edges),
        "nodes_in_graph": nodes,
    }  # fmt: skip
    file = BytesIO()
    torch.save(data, file)
    return file.getvalue()


def read_edges(file: Path, graph: Graph) -> Tensor:
    """The circuit in a file for a model of this graph, bool [U, V].

    Raises:
        InputError: as `read_graph`, or no edge of it is in_graph.
    """
    kept = grouped(graph, read_graph(file, graph)[0])
    if not kept.any():
        raise InputError(f"{file}: no edge in it is in_graph")
    return kept


def read_graph(file: Path, graph: Graph) -> tuple[Tensor, Tensor | None]:
    """(circuit, scores) in a file for a model of this graph: bool and fp32 [U, L * (3 H + 1) + 1]; None: it has none.

    Raises:
        InputError: no such file, another format, damaged, of a model of another size, an edge that this model does not
            have, or a score that is no number.
    """
    if file.suffix.lower() not in (".json", ".pt"):
        raise InputError(f"{file}: a circuit is a .json or .pt file")
    raw = format.read_regular(file.parent, file.name, MAX_BYTES)
    data = _json(raw, file) if file.suffix.lower() == ".json" else _pt(raw, file)
    _check_sizes(data.get("cfg"), graph, file)
    return _named(data, graph, file) if file.suffix.lower() == ".json" else _numbered(data, graph, file)


def ungrouped(graph: Graph, values: Tensor) -> Tensor:
    """[U, V] -> [U, L * (3 H + 1) + 1]: keys and values for every head."""
    parts = []
    for layer in range(graph.layers):
        for kind in ("q", "k", "v", "mlp"):
            mine = values[:, graph.readers(layer, kind)]
            parts.append(mine.repeat_interleave(graph.heads // graph.kv_heads, 1) if kind in ("k", "v") else mine)
    return torch.cat([*parts, values[:, -1:]], 1)


def grouped(graph: Graph, kept: Tensor) -> Tensor:
    """bool [U, L * (3 H + 1) + 1] -> [U, V]: an edge into any head's key or value is one into what it shares."""
    found = torch.zeros(graph.shape, dtype=torch.bool)
    start = 0
    for layer in range(graph.layers):
        for kind in ("q", "k", "v", "mlp"):
            count = 1 if kind == "mlp" else graph.heads
            mine, start = kept[:, start : start + count], start + count
            shared = mine.unflatten(1, (graph.kv_heads, -1)).any(2) if kind in ("k", "v") else mine
            found[:, graph.readers(layer, kind)] = shared
    found[:, -1] = kept[:, -1]
    return found


def _destinations(graph: Graph) -> list[str]:
    names = []
    for layer in range(graph.layers):
        names += [f"a{layer}.h{head}<{kind}>" for kind in "qkv" for head in range(graph.heads)] + [f"m{layer}"]
    return [*names, "logits"]


def _sizes(graph: Graph, width: int) -> dict[str, Any]:
    sizes = {"n_layers": graph.layers, "n_heads": graph.heads, "parallel_attn_mlp": graph.parallel}
    return sizes | {"d_model": width}


def _json(raw: bytes, file: Path) -> dict[str, Any]:
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict) or not isinstance(data.get("edges"), dict):
        raise InputError(f"{file}: not a circuit of EAP-IG: no JSON object with edges")
    return data


def _pt(raw: bytes, file: Path) -> dict[str, Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols, before a refusal
            data = torch.load(BytesIO(raw), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError):
        raise InputError(f"{file}: damaged, or holds more than tensors and text") from None
    kept = data.get("edges_in_graph") if isinstance(data, dict) else None
    if not isinstance(kept, Tensor) or kept.dtype != torch.bool:
        raise InputError(f"{file}: not a circuit of EAP-IG: no mask edges_in_graph")
    return data


def _check_sizes(sizes: Any, graph: Graph, file: Path) -> None:
    wanted = _sizes(graph, 0)
    for name in ("n_layers", "n_heads", "parallel_attn_mlp"):
        if not isinstance(sizes, dict) or sizes.get(name) != wanted[name]:
            found = sizes.get(name) if isinstance(sizes, dict) else None
            raise InputError(f"{file}: a circuit of another model: {name} is {found}, here {wanted[name]}")


def _named(data: dict[str, Any], graph: Graph, file: Path) -> tuple[Tensor, Tensor | None]:
    columns = {name: column for column, name in enumerate(_destinations(graph))}
    rows = {name: row for row, name in enumerate(graph.source_names)}
    real, kept = ungrouped(graph, graph.mask()), torch.zeros(graph.sources, len(columns), dtype=torch.bool)
    scores, scored = torch.zeros(kept.shape), False
    for name, facts in data["edges"].items():
        source, _, destination = name.partition("->")
        place = rows.get(source), columns.get(destination)
        if place[0] is None or place[1] is None or not real[place]:
            raise InputError(f"{file}: {name!r}: no such edge in this model")
        if not isinstance(facts, dict) or not isinstance(facts.get("in_graph"), bool):
            raise InputError(f"{file}: {name!r}: does not say whether it is in_graph")
        kept[place] = facts["in_graph"]
        if facts.get("score") is not None:
            scores[place], scored = _number(facts["score"], f"{file}: {name!r}"), True
    return kept, scores if scored else None


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{where}: its score is not a finite number")
    return float(value)


def _numbered(data: dict[str, Any], graph: Graph, file: Path) -> tuple[Tensor, Tensor | None]:
    kept, real = data["edges_in_graph"], ungrouped(graph, graph.mask())
    if kept.shape != real.shape:
        raise InputError(f"{file}: edges_in_graph is {tuple(kept.shape)}, here {tuple(real.shape)}")
    if bool((kept & ~real).any()):
        raise InputError(f"{file}: edges_in_graph holds an edge that this model does not have")
    scores = data.get("edges_scores")
    if scores is None:
        return kept, None
    if not isinstance(scores, Tensor) or not scores.is_floating_point() or scores.shape != real.shape:
        raise InputError(f"{file}: edges_scores are not real numbers {tuple(real.shape)}")
    scores = scores.float().masked_fill(~real, 0.0)
    if not bool(scores.isfinite().all()):
        raise InputError(f"{file}: edges_scores hold a number that is not finite")
    return kept, scores
