"""Models whose circuit is known because it was put there: ground truth for every method that claims to find circuits.

The residual stream is cut into orthogonal subspaces: a slot for the tokens and one for every planted node, a flag of
the prompt, one large constant, and noise. A planted node reads chosen slots and writes its own; all other heads and
MLPs read and write noise alone; the logits read the slots that no node reads. So the edges of the circuit are the pairs
(writer of a slot, reader of it). The constant is so large that the norms are almost linear; the noise acts through them
alone, and edges outside the circuit have effects some hundred to some thousand times smaller.

A gated model has two more heads. `signal` copies the flag, and its slot is the query of the `switch`, whose key is the
constant. All scores of the switch are then equal, so its softmax does not depend on the query, while the query's sign
decides whether its gates open: in the clean run they do, in the corrupted run they do not. No gradient sees the edges
into the signal and from there to the query; patching one of them turns the switch off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from attnprune.attention.interface import attach
from attnprune.circuit.model.adapters import Anatomy, anatomy_of, weight_of
from attnprune.circuit.model.effects import Metric
from attnprune.circuit.model.graph import ATTENTION_KINDS, Graph
from attnprune.errors import InputError

VOCABULARY = 64
HEADS, HEAD_WIDTH, SLOT_WIDTH, NOISE_WIDTH = 4, 16, 4, 48
HEAD_GAIN = 2.0  # for what the average over positions takes away
SWITCH_SCORE = 2.0
ALWAYS_OPEN = 1e4  # gate bias
_SIZE = 1000.0  # of the constant
# A node's slot has the number of its source, so slot 0 holds the tokens. The others:
_FLAG, _CONSTANT, _NOISE = -1, -2, -3


@dataclass(frozen=True)
class Planted:
    """A model with a known circuit.

    Attributes:
        model: fp32, with gates if these were asked for.
        edges: the circuit, bool [U, V].
        hidden: those of its edges that act only through a gate, bool [U, V].
        clean, corrupted: token ids [B, S].
        metric: a difference of two logits at the last position.
    """

    model: PreTrainedModel
    edges: Tensor
    hidden: Tensor
    clean: Tensor
    corrupted: Tensor
    metric: Metric


class _Plan(NamedTuple):
    """Sources that write a slot of their own, and the slots that each destination reads; all others are noise."""

    writers: list[int]
    reads: dict[int, list[int]]


def plant(
    family: Literal["llama", "gpt2"] = "llama",
    *,
    layers: int = 3,
    nodes: int = 4,
    prompts: int = 4,
    length: int = 6,
    gated: bool = False,
    seed: int = 0,
) -> Planted:
    """Build a model of 4 heads per layer (Llama: on 2 key/value heads) with a random circuit of `nodes` heads and MLPs.

    Clean prompts are random tokens of the first half of the vocabulary, which has the flag +1; corrupted ones of the
    second half, -1.

    Raises:
        InputError: too few layers for the nodes (heads that share a key/value head cannot both be planted).
    """
    if family not in ("llama", "gpt2"):
        raise InputError(f"{family}: circuits can be planted in llama and gpt2")
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # the first weights are random, and none of them stays
        anatomy = anatomy_of(_model(family, layers, nodes, length))
    signal, switch = 1, anatomy.graph.head_sources(layers - 1).start  # the first heads of the first and the last layer
    taken = [signal, switch] if gated else []
    plan = _plan(anatomy.graph, nodes, taken, generator)
    space = _Space(anatomy.width, [0, *taken, *plan.writers], generator)
    if gated:
        _add_switch(anatomy.graph, plan, signal, switch)
    with torch.no_grad():
        _write_ends(anatomy, space, plan)
        _write_layers(anatomy, space, plan)
        if gated:
            _write_switch(anatomy, space, signal)
    edges = _edges(anatomy.graph, plan)
    hidden = edges & False
    if gated:
        only_through_gate = anatomy.graph.readers(0, "v").start
        hidden[:, only_through_gate], hidden[signal] = edges[:, only_through_gate], edges[signal]
        bias = torch.full((layers, HEADS), ALWAYS_OPEN)
        bias[-1, 0] = 0.0
        attach(anatomy.model, bias)
    size = (prompts, length)
    clean = torch.randint(0, VOCABULARY // 2, size, generator=generator)
    corrupted = torch.randint(VOCABULARY // 2, VOCABULARY, size, generator=generator)
    return Planted(anatomy.model, edges, hidden, clean, corrupted, lambda x: x[:, -1, 0] - x[:, -1, 1])


def _edges(graph: Graph, plan: _Plan) -> Tensor:
    """The mask of the plan: from the writer of each slot to its readers. Flag and tokens are written by the input."""
    edges = torch.zeros(graph.sources, graph.destinations, dtype=torch.bool)
    for destination, slots in plan.reads.items():
        edges[[max(slot, 0) for slot in slots if slot >= _FLAG], destination] = True
    return edges


def auroc(scores: Tensor, truth: Tensor) -> float:
    """Probability that an edge of the circuit has a higher score than another edge (ties count half); both [n]."""
    others = scores[~truth].sort().values
    found = scores[truth].contiguous()
    below, up_to = torch.searchsorted(others, found), torch.searchsorted(others, found, right=True)
    return ((below + up_to).double() / (2 * len(others))).mean().item()


def _model(family: str, layers: int, nodes: int, length: int) -> PreTrainedModel:
    """A model with norms of weight 1 and biases of 0, wide enough for the slots (and a multiple of the heads)."""
    width = SLOT_WIDTH * (nodes + 3) + NOISE_WIDTH
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "max_position_embeddings": length,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(**sizes, n_inner=width, attn_pdrop=0.0)).eval()
    # The last pair of a head's dimensions hardly turns with the position: the switch has its scores there.
    rope = {"rope_type": "default", "rope_theta": 1e12}
    heads: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": HEAD_WIDTH, "rope_parameters": rope}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, intermediate_size=width)).eval()


def _plan(graph: Graph, nodes: int, taken: list[int], generator: torch.Generator) -> _Plan:
    """Choose nodes that share no key/value head, and for each input a slot (an MLP: up to two) written upstream."""

    def draw(options: list[int], count: int = 1) -> list[int]:
        return [options[i] for i in torch.randperm(len(options), generator=generator)[:count].tolist()]

    shared = graph.heads // graph.kv_heads
    candidates = []
    for layer in range(graph.layers):
        heads = range(graph.head_sources(layer).start, graph.head_sources(layer).stop)
        groups = [list(heads[i : i + shared]) for i in range(0, graph.heads, shared)]
        candidates += [draw(group)[0] for group in groups if not set(group) & set(taken)] + [graph.mlp_source(layer)]
    if nodes < 1 or nodes > len(candidates) or (taken and graph.layers < 2):
        raise InputError(
            f"{graph.layers} layers hold 1 to {len(candidates)} planted nodes (with gates from 2 layers on)"
        )
    plan = _Plan(sorted(draw(candidates, nodes)), {})
    for source in plan.writers:
        layer = int(graph.layer_of_source(torch.tensor(source)))
        if source == graph.mlp_source(layer):
            upstream = graph.upstream(layer, "mlp")
            plan.reads[graph.readers(layer, "mlp").start] = draw([0, *(w for w in plan.writers if w < upstream)], 2)
            continue
        head = source - graph.head_sources(layer).start
        options = [0, *(w for w in plan.writers if w < graph.upstream(layer, "q"))]
        for kind in ATTENTION_KINDS:
            index = head if kind == "q" else head // shared
            plan.reads[graph.readers(layer, kind).start + index] = draw(options)
    read = {slot for slots in plan.reads.values() for slot in slots}
    plan.reads[graph.destinations - 1] = [source for source in plan.writers if source not in read]
    return plan


def _add_switch(graph: Graph, plan: _Plan, signal: int, switch: int) -> None:
    last = graph.layers - 1
    plan.writers.extend([signal, switch])
    plan.reads[graph.readers(0, "q").start] = plan.reads[graph.readers(0, "k").start] = []
    plan.reads[graph.readers(0, "v").start] = [_FLAG]
    plan.reads[graph.readers(last, "q").start] = [signal]
    plan.reads[graph.readers(last, "k").start] = [_CONSTANT]
    plan.reads[graph.readers(last, "v").start] = [0]
    plan.reads[graph.destinations - 1].append(switch)


class _Space:
    """Orthonormal directions, all orthogonal to (1, ..., 1), so that a LayerNorm subtracts nothing."""

    def __init__(self, width: int, slots: list[int], generator: torch.Generator):
        self._generator = generator
        ones = torch.ones(width, 1)
        basis = torch.linalg.qr(torch.cat([ones, self._normal(width, width - 1)], 1)).Q[:, 1:]
        self.part = {_FLAG: basis[:, :1], _CONSTANT: basis[:, 1:2]}
        for i, slot in enumerate(slots):
            self.part[slot] = basis[:, 2 + SLOT_WIDTH * i :][:, :SLOT_WIDTH]
        self.part[_NOISE] = basis[:, 2 + SLOT_WIDTH * len(slots) :]
        self.gain = _SIZE / width**0.5  # a norm divides the stream by this

    def _normal(self, *size: int) -> Tensor:
        return torch.randn(*size, generator=self._generator)

    def draw(self, slot: int, rows: int) -> Tensor:
        """Random vectors in a slot, [rows, D]."""
        return self._normal(rows, self.part[slot].shape[1]) @ self.part[slot].t()

    def read(self, slots: list[int], size: int) -> Tensor:
        """A random map from what lies in these slots behind a norm, [D, size]."""
        maps = [self.draw(slot, size).t() / self.part[slot].shape[1] ** 0.5 for slot in slots]
        return self.gain * torch.stack(maps).sum(0) if maps else torch.zeros(len(self.part[_NOISE]), size)

    def write(self, slot: int, size: int, gain: float) -> Tensor:
        """A random map into a slot, [size, D]; into the noise a weak one, so that it does not grow with the layers."""
        return self.draw(slot, size) * (0.2 if slot == _NOISE else gain) / size**0.5


def _write_ends(anatomy: Anatomy, space: _Space, plan: _Plan) -> None:
    """Embeddings: token, flag, constant and noise; the unembedding reads the slots that are left."""
    model: Any = anatomy.model
    flag = torch.ones(VOCABULARY, 1)
    flag[VOCABULARY // 2 :] = -1
    tokens = space.draw(0, VOCABULARY) + space.draw(_NOISE, VOCABULARY)
    tokens += flag @ space.part[_FLAG].t() + _SIZE * space.part[_CONSTANT].t()
    model.get_input_embeddings().weight.copy_(tokens)
    model.lm_head.weight.copy_(space.read(plan.reads[anatomy.graph.destinations - 1], VOCABULARY).t())
    if model.config.model_type == "gpt2":
        model.transformer.wpe.weight.zero_()


def _write_layers(anatomy: Anatomy, space: _Space, plan: _Plan) -> None:
    graph = anatomy.graph

    def slot(source: int) -> int:
        return source if source in plan.writers else _NOISE

    for layer, block in enumerate(anatomy.blocks):
        for kind in ATTENTION_KINDS:
            for head, weight in enumerate(block.projections[kind].weight):
                read = plan.reads.get(graph.readers(layer, kind).start + head, [_NOISE])
                weight.copy_(space.read(read, weight.shape[1]))
        for head, weight in enumerate(block.output_weight(graph.heads)):
            weight.copy_(space.write(slot(graph.head_sources(layer).start + head), len(weight), HEAD_GAIN))
        *inner, outer = [module for module in block.mlp.children() if hasattr(module, "weight")]
        for module in inner:
            read = plan.reads.get(graph.readers(layer, "mlp").start, [_NOISE])
            weight_of(module).copy_(space.read(read, weight_of(module).shape[1]))
        weight_of(outer).copy_(space.write(slot(graph.mlp_source(layer)), len(weight_of(outer)), 1.0))


def _write_switch(anatomy: Anatomy, space: _Space, signal: int) -> None:
    """Query and key of the switch in one dimension of the head, so that its score is flag * SWITCH_SCORE everywhere."""
    first, last = anatomy.blocks[0], anatomy.blocks[-1]
    value = first.projections["v"].weight[0].t() @ space.part[_FLAG][:, 0] / space.gain
    written = value @ first.output_weight(HEADS)[0]  # for a flag of 1
    query, key = last.projections["q"].weight[0], last.projections["k"].weight[0]
    query.zero_()[:, -1] = space.gain * SWITCH_SCORE * query.shape[1] ** 0.5 * written / written.square().sum()
    key.zero_()[:, -1] = space.gain / _SIZE * space.part[_CONSTANT][:, 0]
