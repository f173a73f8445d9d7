"""What trains: gates alone, adapters, the attention or everything; and the dense base beside it."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from attnprune.attention.interface import GATE_ATTRIBUTE, detach, gates_forced_open, gates_of
from attnprune.errors import AttnPruneError
from attnprune.measure import Reference
from attnprune.runs.config import RunConfig


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The attention modules that carry gates, in layer order."""
    found = [m for m in model.modules() if hasattr(m, GATE_ATTRIBUTE)]
    return sorted(found, key=lambda module: getattr(module, GATE_ATTRIBUTE).layer)


def projection_names(model: nn.Module) -> list[str]:
    """Names of the linear projections inside the attention modules (q, k, v, o; or the fused qkv and o)."""
    gated = {id(module) for module in attention_modules(model)}
    return [
        f"{name}.{child}"
        for name, module in model.named_modules()
        if id(module) in gated
        for child, layer in module.named_children()
        if isinstance(layer, (nn.Linear, Conv1D))
    ]


def make_trainable(model: Any, config: RunConfig) -> tuple[Any, Reference]:
    """Freeze all but the scope's parameters and the gates; return (model to train, dense base as a function).

    With scope gates or lora the base is the same model with adapters off and gates open; otherwise a frozen copy.
    """
    scope = config.train.scope
    copied = None
    if scope in ("attn", "full"):
        copied = copy.deepcopy(model).requires_grad_(False).eval()
        detach(copied)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(scope == "full" or GATE_ATTRIBUTE in name)
    if scope == "attn":
        for module in attention_modules(model):
            module.requires_grad_(True)
    if scope == "lora":
        model = _add_lora(model, config)
    _switch_off_dropout(model)

    def reference(ids: Tensor) -> Tensor:
        target = copied if copied is not None else model
        adapters_off = model.disable_adapter() if scope == "lora" else nullcontext()
        with torch.no_grad(), adapters_off, gates_forced_open(target):
            return target(input_ids=ids, use_cache=False).logits

    return model, reference


def _switch_off_dropout(model: nn.Module) -> None:
    """Dropout would be noise on the constraint. Families keep the rate in nn.Dropout or in floats of many names."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name):
                setattr(module, name, 0.0)


def _add_lora(model: Any, config: RunConfig) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise AttnPruneError("scope lora needs peft", hint="pip install 'attnprune[lora]'") from None
    names = projection_names(model)
    modules = dict(model.named_modules())
    rank = config.train.lora_rank
    lora = LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, bias="none", target_modules=names,
        fan_in_fan_out=isinstance(modules[names[0]], Conv1D), task_type="CAUSAL_LM",
    )  # fmt: skip
    wrapped = get_peft_model(model, lora)
    for gate in gates_of(wrapped):
        gate.bias.requires_grad_(True)
    return wrapped
