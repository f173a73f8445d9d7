"""Gate biases from a head's own scores: where to start, instead of one constant for heads of very different scale."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnprune.attention.interface import gates_forced_open, gates_of
from attnprune.data.blocks import AnyBlocks
from attnprune.runs.config import RunConfig
from attnprune.training.scope import causal_lm
from attnprune.training.sharding import assign, is_sharded

CALIBRATION_BLOCKS = 16
BIAS_LIMIT = 100.0
MARGIN = 1e-3  # below the last score that stays open: equal scores stay open together, however they are rounded


def starts_from_mass(config: RunConfig) -> bool:
    """Whether a new run takes the first biases from the scores of its text."""
    return bool(config.gate.initial_mass) and not config.model.init


@torch.no_grad()
def calibrate(model: Any, config: RunConfig, blocks: AnyBlocks) -> None:
    """Set the gates' first biases from the scores of a few blocks, evenly spread over the text."""
    rows = torch.linspace(0, len(blocks) - 1, min(CALIBRATION_BLOCKS, len(blocks))).long()
    gates = gates_of(model)
    ids = blocks.take(rows).input_ids.to(gates[0].bias.device)
    for gate, bias in zip(gates, bias_for_mass(model, ids, config.gate.initial_mass), strict=True):
        assign(gate.bias, bias)


@torch.no_grad()
def bias_for_mass(model: Any, input_ids: Tensor, mass: float) -> Tensor:
    """Per head, the bias under which open gates keep `mass` of the softmax probability of the dense model.

    One threshold per head over all queries: the pairs with the highest scores that together hold `mass` of the
    probability stay open. `input_ids` [B, T]; returns [layers, heads], within +-BIAS_LIMIT.
    """
    gates = gates_of(model)
    found: list[Tensor] = []

    def record(gate: nn.Module, args: tuple[Tensor, ...], options: dict[str, Any]) -> None:
        query, key, _, visible = args
        found.append(_threshold(query, key, visible, mass, options).neg().clamp(-BIAS_LIMIT, BIAS_LIMIT))

    hooks = [gate.register_forward_pre_hook(record, with_kwargs=True) for gate in gates]
    try:
        core = causal_lm(model)
        # Without the output layer: nobody needs the logits, which are large. A sharded model runs as a whole only.
        body = core if is_sharded(gates[0].bias) else core.base_model
        with gates_forced_open(model):
            body(input_ids=input_ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found)


def _threshold(query: Tensor, key: Tensor, visible: Tensor, mass: float, options: dict[str, Any]) -> Tensor:
    """[H] scores just below the lowest one that has to stay open; head by head, to hold one [B, Q, K] at a time."""
    thresholds = []
    group = query.shape[1] // key.shape[1]
    visible = visible.expand(query.shape[0], 1, *visible.shape[-2:])[:, 0]
    for head in range(query.shape[1]):
        scores = options["scaling"] * query[:, head].float() @ key[:, head // group].float().transpose(-1, -2)
        if options["softcap"] is not None:
            scores = options["softcap"] * torch.tanh(scores / options["softcap"])
        normaliser = scores.masked_fill(~visible, float("-inf")).logsumexp(-1, keepdim=True)
        if options["sinks"] is not None:
            normaliser = torch.logaddexp(normaliser, options["sinks"][head].float())
        kept, order = scores[visible].sort(descending=True)
        share = (scores - normaliser).exp()[visible][order].double().cumsum(0)
        last = int((share < mass * share[-1]).sum().clamp(max=len(kept) - 1))
        thresholds.append(kept[last] - MARGIN)
    return torch.stack(thresholds)
