"""What is timed: one attention layer's inputs, drawn at random or captured from a real sparse model."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from attnprune.attention.dispatch import gated_attention
from attnprune.attention.interface import gates_of
from attnprune.errors import InputError

Suite = Literal["train", "prefill", "decode"]
SUITES: tuple[Suite, ...] = get_args(Suite)
NOISE_SEED = 1234


@dataclass(frozen=True)
class Case:
    """One configuration: query [B, H, Q, D], key and value [B, H_kv, K, D], bias [H], the last Q of K positions."""

    suite: Suite
    name: str
    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor
    noise: bool = False
    scale: float | None = None

    @property
    def visible(self) -> Tensor:
        """Causal mask, bool [1, 1, Q, K]."""
        queries, keys = self.query.shape[2], self.key.shape[2]
        rows = torch.arange(keys - queries, keys, device=self.query.device)[:, None]
        return (torch.arange(keys, device=self.query.device) <= rows)[None, None]

    @property
    def scaling(self) -> float:
        return self.query.shape[-1] ** -0.5 if self.scale is None else self.scale

    @property
    def scores(self) -> int:
        """Visible (query, key, head) triples."""
        return int(self.visible.sum()) * self.query.shape[0] * self.query.shape[1]

    def density(self) -> float:
        """Open / visible edges, in chunks of memory."""
        with torch.no_grad():
            made = gated_attention(
                self.query, self.key, self.value, self.bias, self.visible, scaling=self.scaling, backend="chunked"
            )
        return int(made.open_edges.sum()) / self.scores


def gaussian_case(
    suite: Suite, *, batch: int, heads: int, kv_heads: int, keys: int, width: int, dtype: torch.dtype,
    device: torch.device, density: float, noise: bool, seed: int,
) -> Case:  # fmt: skip
    """Gaussian q, k and v, with a bias per head that leaves about `density` of its edges open."""
    draw = torch.Generator().manual_seed(seed)
    queries = 1 if suite == "decode" else keys

    def normal(count: int, length: int) -> Tensor:
        return torch.randn(batch, count, length, width, generator=draw).to(device, dtype)

    query, key, value = normal(heads, queries), normal(kv_heads, keys), normal(kv_heads, keys)
    name = f"B{batch} H{heads}/{kv_heads} T{keys} d{width} {str(dtype)[6:]} {100 * density:g} %"
    case = Case(suite, name + (" noise" if noise else ""), query, key, value, torch.zeros(heads, device=device), noise)
    return replace(case, bias=bias_for_density(case, density))


def bias_for_density(case: Case, density: float) -> Tensor:
    """Per head the bias that leaves this share of the edges open, from the scores of up to 64 queries per sequence."""
    rows = torch.linspace(0, case.query.shape[2] - 1, min(64, case.query.shape[2]), device=case.query.device).long()
    seen = case.visible[0, 0, rows]
    group = case.query.shape[1] // case.key.shape[1]
    found = []
    for head in range(case.query.shape[1]):
        scores = case.query[:, head, rows].float() @ case.key[:, head // group].float().transpose(-1, -2)
        ordered = scores[:, seen].flatten().sort().values * case.scaling
        # halfway between two scores, so that none of them sits on the threshold
        closed = min(max(1, round((1 - density) * len(ordered))), len(ordered) - 1)
        found.append(-ordered[closed - 1 : closed + 1].mean())
    return torch.stack(found)


def captured_case(
    suite: Suite, model: torch.nn.Module, ids: Tensor, layer: int, name: str, dtype: torch.dtype
) -> Case:  # fmt: skip
    """The q, k, v, scaling and biases of one layer of a sparse model on a text: `ids` [1, T].

    Raises:
        InputError: no such layer, or one with more than causal softmax (capped scores, sinks, a window).
    """
    gates = gates_of(model)
    if not 0 <= layer < len(gates):
        raise InputError(f"--layer: {layer} is not within 0 and {len(gates) - 1}")
    calls: list[tuple[tuple[Tensor, ...], dict[str, Any]]] = []
    hook = gates[layer].register_forward_pre_hook(
        lambda gate, args, options: calls.append((args, options)), with_kwargs=True
    )
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    finally:
        hook.remove()
    [((query, key, value, visible), options)] = calls
    extra = [what for what, key_ in (("capped scores", "softcap"), ("sinks", "sinks")) if options[key_] is not None]
    query, key, value = (x.to(dtype).contiguous() for x in (query, key, value))
    case = Case(suite, name, query, key, value, gates[layer].bias.detach(), scale=options["scaling"])
    extra += [] if torch.equal(visible.expand_as(case.visible), case.visible) else ["a mask that is not just causal"]
    if extra:
        raise InputError(f"--layer: layer {layer} has {extra[0]}, which not every implementation here knows")
    if math.isclose(options["scaling"], query.shape[-1] ** -0.5):
        case = replace(case, scale=None)
    return replace(case, query=query[:, :, -1:].contiguous()) if suite == "decode" else case
