"""Which edges stay open on one text, per layer and head, as token pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnprune.attention.interface import gates_of
from attnprune.attention.interventions import Recorder, recording
from attnprune.data.vocabulary import ids_of
from attnprune.errors import InputError
from attnprune.sidecar.masks import pack

MAX_TOKENS = 1024


@dataclass(frozen=True)
class Edge:
    """One open edge: `query` reads from `key` (token positions) with attention weight P_ij."""

    layer: int
    head: int
    query: int
    key: int
    weight: float


@dataclass(frozen=True)
class TextEdges:
    """The open edges of a text. `visible` counts all pairs of all heads."""

    input_ids: list[int]
    tokens: list[str]
    edges: list[Edge]
    visible: int

    def mask(self, heads: list[int]) -> np.ndarray:
        """The edges packed as u8 [layers, heads, T, ceil(T / 8)] (see attnprune.sidecar.masks); `heads` of each layer.

        Raises:
            InputError: layers that differ in their number of heads, which the format cannot hold.
        """
        if len(set(heads)) != 1:
            raise InputError("--save-mask: the layers differ in their number of heads")
        length = len(self.input_ids)
        where = np.array([(e.layer, e.head, e.query, e.key) for e in self.edges], np.int64).reshape(-1, 4)
        packed = []
        for layer in range(len(heads)):
            is_open = np.zeros((heads[0], length, length), bool)
            is_open[tuple(where[where[:, 0] == layer, 1:].T)] = True
            packed.append(pack(is_open))
        return np.stack(packed)


@torch.no_grad()
def open_edges(model: Any, tokenizer: Any, text: str) -> TextEdges:
    """Run `text` through a sparse model and list its open edges.

    Raises:
        InputError: no tokens, more than MAX_TOKENS, or one that the model or the tokenizer does not know; no UTF-8.
    """
    ids = ids_of(text, tokenizer, model.config.vocab_size, "--text")
    if ids.shape[1] == 0:
        raise InputError("--text: is empty")
    longest = min(MAX_TOKENS, getattr(model.config, "max_position_embeddings", None) or MAX_TOKENS)
    if ids.shape[1] > longest:
        raise InputError(f"--text: {ids.shape[1]} tokens are more than the {longest} that can be shown")
    found: list[tuple[int, Tensor]] = []
    gates = gates_of(model)

    def recorder(layer: int) -> Recorder:
        return lambda rows, cols, is_open: found.append(
            (layer, is_open[0].nonzero() + torch.tensor([0, rows.start, cols.start]))
        )

    with recording(gates, [recorder(gate.layer) for gate in gates]):
        attentions = model(input_ids=ids, use_cache=False, output_attentions=True).attentions
    edges = [
        Edge(layer, head, query, key, float(attentions[layer][0, head, query, key]))
        for layer, rows in found
        for head, query, key in rows.tolist()
    ]
    visible = sum(int(gate.last.visible_edges) * len(gate.bias) for gate in gates if gate.last is not None)
    input_ids = ids[0].tolist()
    tokens = [tokenizer.decode([token]) for token in input_ids]
    return TextEdges(input_ids, tokens, sorted(edges, key=lambda e: (e.layer, e.head, e.query, e.key)), visible)
