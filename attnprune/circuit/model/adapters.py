"""Where a decoder keeps the parts of its graph: norms, projections, output projection and MLP of each family.

Exact patching needs to know what adds up to the residual stream. Families with other rules (scaled residuals, one norm
for attention and MLP, mixtures of experts) are refused instead of being patched wrongly.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from attnprune.attention.interface import GATE_ATTRIBUTE, attach, detach
from attnprune.circuit.model.graph import ATTENTION_KINDS, Graph, Kind
from attnprune.errors import UnsupportedModelError
from attnprune.sidecar.modeling_attnprune import FAMILIES


@dataclass(frozen=True)
class _Layout:
    """Names of the parts, relative to the model (`final_norm`), the attention (`projections`, `output`) or the layer.

    One projection is fused: its output is [..., q/k/v, heads, width], or [..., heads, q/k/v, width] with `heads_first`.
    """

    final_norm: str = "model.norm"
    projections: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    heads_first: bool = False
    output: str = "o_proj"
    attention_norm: str | None = "input_layernorm"
    attention_post_norm: str | None = None
    mlp_norm: str | None = "post_attention_layernorm"
    mlp: str = "mlp"
    mlp_post_norm: str | None = None


_LLAMA = _Layout()
_GEMMA2 = _Layout(
    attention_post_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
)
_OLMO2 = _Layout(
    attention_norm=None,
    attention_post_norm="post_attention_layernorm",
    mlp_norm=None,
    mlp_post_norm="post_feedforward_layernorm",
)
_LAYOUTS = {
    "gemma": _LLAMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "gpt2": _Layout("transformer.ln_f", ("c_attn",), False, "c_proj", "ln_1", None, "ln_2"),
    "gpt_neox": _Layout("gpt_neox.final_layer_norm", ("query_key_value",), True, "dense"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "olmo": _LLAMA,
    "olmo2": _OLMO2,
    "olmo3": _OLMO2,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "smollm3": _LLAMA,
    "starcoder2": _LLAMA,
}


def weight_of(linear: nn.Module) -> Tensor:
    """The weight of a Linear or Conv1D as a view [in, out]."""
    weight: Any = linear.weight
    return weight if isinstance(linear, Conv1D) else weight.t()


@dataclass(frozen=True)
class Projection:
    """The query, key or value projection of a layer: where its heads lie in the output of a (maybe fused) linear map.

    The last axis of the output is unflattened to `shape`; a fused one is then cut at `index` of its axis `axis`.
    """

    module: nn.Module
    shape: tuple[int, ...]
    axis: int = 0
    index: int | None = None

    def view(self, output: Tensor) -> Tensor:
        """The heads of this projection in the module's output [..., out], as a view [..., heads, width]."""
        output = output.unflatten(-1, self.shape)
        return output if self.index is None else output.select(self.axis, self.index)

    @property
    def weight(self) -> Tensor:
        """A view [heads, D, width]."""
        return self.view(weight_of(self.module)).transpose(0, 1)

    @property
    def bias(self) -> Tensor | None:
        """A view [heads, width], or None."""
        bias: Any = self.module.bias
        return None if bias is None else self.view(bias)

    def project(self, x: Tensor, heads: Tensor) -> Tensor:
        """One input per head, x [n, B, S, D], through the maps of `heads` [n]: [B, S, n, width]."""
        made = torch.bmm(x.flatten(1, 2), self.weight[heads]).unflatten(1, x.shape[1:3]).permute(1, 2, 0, 3)
        return made if self.bias is None else made + self.bias[heads]


@dataclass(frozen=True)
class Block:
    """The parts of one decoder layer. Norms that the family does not have are None."""

    module: nn.Module
    attention: nn.Module
    attention_norm: nn.Module | None
    projections: dict[Kind, Projection]
    output: nn.Module
    attention_post_norm: nn.Module | None
    mlp_norm: nn.Module | None
    mlp: nn.Module
    mlp_post_norm: nn.Module | None

    @property
    def gate(self) -> nn.Module | None:
        """The attention's gates, if the model has any."""
        return getattr(self.attention, GATE_ATTRIBUTE, None)

    @property
    def attention_end(self) -> nn.Module:
        """The module whose output attention adds to the stream."""
        return self.attention_post_norm or self.output

    @property
    def mlp_start(self) -> nn.Module:
        """The module that reads the stream for the MLP."""
        return self.mlp_norm or self.mlp

    @property
    def mlp_end(self) -> nn.Module:
        """The module whose output the MLP adds to the stream."""
        return self.mlp_post_norm or self.mlp

    def normed(self, x: Tensor) -> Tensor:
        """What the projections see of the streams x [..., D]. Calls no hooks."""
        return x if self.attention_norm is None else self.attention_norm.forward(x)

    def output_weight(self, heads: int) -> Tensor:
        """The output map as a view [heads, width, D]."""
        return weight_of(self.output).unflatten(0, (heads, -1))

    def projections_by_module(self) -> dict[nn.Module, list[Kind]]:
        """The linear maps of q, k and v, and what each of them computes."""
        modules: dict[nn.Module, list[Kind]] = {}
        for kind, projection in self.projections.items():
            modules.setdefault(projection.module, []).append(kind)
        return modules


@dataclass(frozen=True)
class Anatomy:
    """A model and its parts. `width` is the size D of the residual stream."""

    model: PreTrainedModel
    graph: Graph
    blocks: tuple[Block, ...]
    final_norm: nn.Module
    width: int

    @property
    def gated(self) -> bool:
        """Whether every attention layer has gates, which show the attention pattern."""
        return all(block.gate is not None for block in self.blocks)


def graph_of(config: Any) -> Graph:
    """The graph of a model by its config alone. Raises UnsupportedModelError for a family without an adapter."""
    family = _family(config)
    heads = config.num_attention_heads
    parallel = family == "gpt_neox" and config.use_parallel_residual
    return Graph(config.num_hidden_layers, heads, getattr(config, "num_key_value_heads", None) or heads, parallel)


def anatomy_of(model: PreTrainedModel) -> Anatomy:
    """Find the parts of a causal LM, dense or gated.

    Raises:
        UnsupportedModelError: no adapter for the family, or a part is missing or of another type than expected
            (quantised, or wrapped by an adapter that has not been merged); its weights are not all on one device.
    """
    graph = graph_of(model.config)
    family = _family(model.config)
    devices = {str(parameter.device) for parameter in model.parameters()}
    if len(devices) > 1 or "meta" in devices:
        raise UnsupportedModelError(
            f"{family}: is spread over {', '.join(sorted(devices))}; its parts are added up on one device",
            hint="load it without device_map",
        )
    layout = _LAYOUTS[family]
    _, path, attention = FAMILIES[family]
    layers: Any = _part(model, path, family)
    blocks = tuple(_block(f"{family}: layer {i}", layer, attention, layout, graph) for i, layer in enumerate(layers))
    return Anatomy(model, graph, blocks, _part(model, layout.final_norm, family), model.config.hidden_size)


def _family(config: Any) -> str:
    family = config.model_type.removeprefix("attnprune_")
    if family not in _LAYOUTS:
        raise UnsupportedModelError(
            f"{family}: no circuit adapter (which norms, projections and MLP its layers add up from)",
            hint=f"supported: {', '.join(sorted(_LAYOUTS))}",
        )
    return family


def _part(parent: nn.Module, path: str, where: str) -> nn.Module:
    try:
        return parent.get_submodule(path)
    except AttributeError:
        raise UnsupportedModelError(f"{where}: no {path}") from None


def _linear(parent: nn.Module, path: str, where: str) -> nn.Module:
    module = _part(parent, path, where)
    if type(module) not in (nn.Linear, Conv1D):
        raise UnsupportedModelError(
            f"{where}: {path} is a {type(module).__module__}.{type(module).__name__}, not a plain linear map",
            hint="merge adapters and load the model unquantised",
        )
    return module


def _block(where: str, layer: nn.Module, attention_name: str, layout: _Layout, graph: Graph) -> Block:
    def norm(path: str | None) -> nn.Module | None:
        return None if path is None else _part(layer, path, where)

    attention = _part(layer, attention_name, where)
    modules = [_linear(attention, path, where) for path in layout.projections]
    output = _linear(attention, layout.output, where)
    if layout.attention_post_norm is not None and getattr(output, "bias", None) is not None:
        raise UnsupportedModelError(f"{where}: {layout.output} has a bias under a norm, which belongs to no head")
    width = weight_of(output).shape[0] // graph.heads
    projections: dict[Kind, Projection] = {}
    for i, kind in enumerate(ATTENTION_KINDS):
        heads = graph.heads if kind == "q" else graph.kv_heads
        if len(modules) > 1:
            projections[kind] = Projection(modules[i], (heads, width))
        elif layout.heads_first:
            projections[kind] = Projection(modules[0], (heads, 3, width), -2, i)
        else:
            projections[kind] = Projection(modules[0], (3, heads, width), -3, i)
    return Block(
        layer,
        attention,
        norm(layout.attention_norm),
        projections,
        output,
        norm(layout.attention_post_norm),
        norm(layout.mlp_norm),
        _part(layer, layout.mlp, where),
        norm(layout.mlp_post_norm),
    )


@contextmanager
def open_gates(model: PreTrainedModel) -> Iterator[None]:
    """Run a dense model through gated attention with every gate open inside the block, so that its pattern is seen.

    Raises:
        UnsupportedModelError, SelfCheckError: as `attnprune.attach`.
    """
    gates = attach(model)
    for gate in gates:
        gate.forced_open = True
    try:
        yield
    finally:
        detach(model)
