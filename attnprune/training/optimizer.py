"""The optimiser: AdamW with one group of parameters for each rate and decay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from attnprune.attention.interface import gates_of
from attnprune.runs.config import TrainConfig
from attnprune.sidecar.quantised import bitsandbytes
from attnprune.training.scope import attention_modules


def make_optimizer(model: nn.Module, train: TrainConfig, device: str) -> torch.optim.Optimizer:
    """AdamW; matrices are decayed, and gate biases and weights outside of the attention have rates of their own."""
    options: dict[str, Any] = {"lr": train.learning_rate, "betas": (0.9, train.adam_beta2)}
    if train.optimizer == "adamw" and device == "cuda":
        options["fused"] = True  # one kernel for all parameters
    return _class_of(train.optimizer)(_groups(model, train), **options)


def _groups(model: nn.Module, train: TrainConfig) -> list[dict[str, Any]]:
    gates = [gate.bias for gate in gates_of(model)]
    elsewhere = {id(gate) for gate in gates}
    weights = [p for p in model.parameters() if p.requires_grad and id(p) not in elsewhere]
    rest: list[nn.Parameter] = []
    if train.rest_learning_rate is not None:
        inside = {id(p) for module in attention_modules(model) for p in module.parameters()}
        rest = [p for p in weights if id(p) not in inside]
        weights = [p for p in weights if id(p) in inside]
    groups = [
        *_by_decay(weights, train),
        *({**group, "lr": train.rest_learning_rate} for group in _by_decay(rest, train)),
        {"params": gates, "weight_decay": 0.0, "lr": train.gate_learning_rate},
    ]
    return [group for group in groups if group["params"]]


def _by_decay(parameters: list[nn.Parameter], train: TrainConfig) -> list[dict[str, Any]]:
    """Matrices, which are decayed, and vectors."""
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _class_of(name: str) -> Callable[..., torch.optim.Optimizer]:
    if name == "adamw":
        return torch.optim.AdamW
    classes = {"adamw8bit": "AdamW8bit", "paged_adamw": "PagedAdamW", "paged_adamw8bit": "PagedAdamW8bit"}
    return getattr(bitsandbytes().optim, classes[name])
