"""Why an attention edge is open: its score as a sum over what earlier heads and MLPs wrote.

The score of a head from a query to a key position is q . k. With the norm's factor held as it was in the run, the query
is a linear map of the stream, so of what each source wrote into it: these terms and a remainder (biases of the maps,
of the norm and of the rotation's start) add up to the score. The same holds for the key. Norms of queries and keys
themselves (Qwen 3, OLMo 2) are held as they were too.

To hold a norm is not to remove a term: without it the norm would be another one. So the largest terms are also removed,
one by one, from what this head alone reads at this position, and the score is computed again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from attnprune.circuit.model.activations import Hooks, collect, forward, norm_factor, norm_scale
from attnprune.circuit.model.adapters import Anatomy, Block
from attnprune.circuit.model.attribution import frozen
from attnprune.circuit.model.graph import Kind
from attnprune.errors import InputError, UnsupportedModelError

Side = Literal["query", "key"]


class Term(NamedTuple):
    """What a source adds to the score through one side; the score without it, None where it was not removed."""

    source: str
    value: float
    without: float | None


class Explanation(NamedTuple):
    """An edge (layer, head, query, key) of one prompt: open if score + bias > 0 (bias None: a dense model's)."""

    score: float
    bias: float | None
    query: list[Term]
    key: list[Term]
    query_remainder: float
    key_remainder: float

    @property
    def is_open(self) -> bool:
        """Whether the gate lets the edge through; a dense model's always do."""
        return self.bias is None or self.score + self.bias > 0


def explain(
    anatomy: Anatomy, ids: Tensor, edge: tuple[int, int, int, int], *, dense: bool = False, removed: int = 5
) -> Explanation:
    """Explain the edge (layer, head, query, key) in a prompt of token ids [1, S].

    The model must have gates; `dense`: they were put there only to see its attention. The `removed` largest terms of
    either side are removed and run.

    Raises:
        InputError: no such edge.
        UnsupportedModelError: scores with a soft cap, which are no sum.
    """
    layer, head, query, key = edge
    graph, length = anatomy.graph, ids.shape[1]
    if not (0 <= layer < graph.layers and 0 <= head < graph.heads and 0 <= key <= query < length):
        raise InputError(
            f"a{layer}.h{head}:{query}<-{key}: no such edge",
            hint=f"{graph.layers} layers of {graph.heads} heads, {length} tokens, key not behind query",
        )
    block = anatomy.blocks[layer]
    run = collect(anatomy, ids)
    score, gradients = _score_and_gradients(anatomy, ids, edge)
    upstream = graph.upstream(layer, "q")
    stream, outputs = run.streams[2 * layer], run.outputs[:upstream]
    scale, centred = (torch.ones_like(stream[0]), False)
    if block.attention_norm is not None:
        scale, centred = norm_scale(block.attention_norm, stream[0])
    sides: dict[Side, list[Term]] = {}
    for side, place in _places(query, key):
        kind, index = _reader(anatomy, side, head)
        written = outputs[:, 0, place]
        written = (written - written.mean(-1, keepdim=True)) if centred else written
        values = ((written * scale[place]) @ block.projections[kind].weight[index]) @ gradients[side]
        largest = set(values.abs().topk(min(removed, len(values))).indices.tolist())
        terms = []
        for source in values.abs().argsort(descending=True).tolist():
            without = None
            if source in largest:
                x = stream[:, place] - outputs[source, :, place]
                without = _score_with(anatomy, ids, edge, side, block.normed(x))
            terms.append(Term(graph.source_names[source], values[source].item(), without))
        sides[side] = terms
    bias = None if dense else _gate(block).applied_bias()[head].item()
    bias = None if bias == math.inf else bias  # forced open: as in a dense model
    rest = [score - sum(term.value for term in sides[side]) for side in ("query", "key")]
    return Explanation(score, bias, sides["query"], sides["key"], *rest)


def _places(query: int, key: int) -> list[tuple[Side, int]]:
    return [("query", query), ("key", key)]


def _reader(anatomy: Anatomy, side: Side, head: int) -> tuple[Kind, int]:
    """Which projection, and which of its heads."""
    graph = anatomy.graph
    return ("q", head) if side == "query" else ("k", head // (graph.heads // graph.kv_heads))


def _gate(block: Block) -> Any:
    assert block.gate is not None
    return block.gate


@contextmanager
def _watched(anatomy: Anatomy, layer: int) -> Iterator[dict[str, Any]]:
    """Inside the block: queries [1, H, S, width], keys and scaling of a layer, as they come to the gates."""
    seen: dict[str, Any] = {}

    def hook(_: nn.Module, args: Any, options: dict[str, Any]) -> None:
        names = ("query", "key", "value", "visible")
        given = dict(zip(names, args, strict=False)) | options
        if given.get("softcap") is not None:
            raise UnsupportedModelError("scores with a soft cap are no sum over what was written")
        seen.update(given)

    with Hooks() as hooks:
        hooks.add(_gate(anatomy.blocks[layer]).register_forward_pre_hook(hook, with_kwargs=True))
        yield seen


def _score(anatomy: Anatomy, seen: dict[str, Any], edge: tuple[int, int, int, int]) -> Tensor:
    _, head, query, key = edge
    _, index = _reader(anatomy, "key", head)
    return (seen["query"][0, head, query] * seen["key"][0, index, key]).sum() * seen["scaling"]


def _score_and_gradients(
    anatomy: Anatomy, ids: Tensor, edge: tuple[int, int, int, int]
) -> tuple[float, dict[Side, Tensor]]:
    """The score, and its gradients at what the two projections gave for the two positions [width]."""
    layer, head, query, key = edge
    block, kept = anatomy.blocks[layer], {}

    def leaf(module: nn.Module, output: Tensor) -> Tensor:
        kept[module] = output.detach().requires_grad_()
        return kept[module]

    with ExitStack() as stack:
        stack.enter_context(frozen(anatomy.model))
        stack.enter_context(torch.enable_grad())
        for name in ("q_norm", "k_norm"):
            norm = getattr(block.attention, name, None)
            if norm is not None:
                stack.enter_context(_held(norm))
        seen = stack.enter_context(_watched(anatomy, layer))
        hooks = stack.enter_context(Hooks())
        for module in {block.projections[kind].module for kind in ("q", "k")}:
            hooks.after(module, lambda _, output, module=module: leaf(module, output))
        forward(anatomy, ids, 1)
        score = _score(anatomy, seen, edge)
        made = dict(zip(kept, torch.autograd.grad(score, list(kept.values())), strict=True))
    found: dict[Side, Tensor] = {}
    for side, place in _places(query, key):
        kind, index = _reader(anatomy, side, head)
        projection = block.projections[kind]
        found[side] = projection.view(made[projection.module])[0, place, index]
    return score.item(), found


@contextmanager
def _held(norm: nn.Module) -> Iterator[None]:
    """Inside the block an RMS norm multiplies by what it multiplies by, as a constant."""
    own = norm.forward

    def linear(x: Tensor) -> Tensor:
        with torch.no_grad():
            norm.forward = own
            factor = norm_factor(norm, x)
            norm.forward = linear
        return x * factor

    norm.forward = linear
    try:
        yield
    finally:
        del norm.forward


@torch.no_grad()
def _score_with(anatomy: Anatomy, ids: Tensor, edge: tuple[int, int, int, int], side: Side, normed: Tensor) -> float:
    """The score when one side of this head reads `normed` [1, D] at its position."""
    layer, head, query, key = edge
    block = anatomy.blocks[layer]
    kind, index = _reader(anatomy, side, head)
    projection, place = block.projections[kind], query if side == "query" else key

    def change(_: Tensor, output: Tensor) -> Tensor:
        output = output.clone()
        made = projection.project(normed[None, None], torch.tensor([index], device=output.device))
        projection.view(output)[0, place, index] = made[0, 0, 0]
        return output

    with _watched(anatomy, layer) as seen, Hooks() as hooks:
        hooks.after(projection.module, change)
        forward(anatomy, ids, 1)
        return _score(anatomy, seen, edge).item()
