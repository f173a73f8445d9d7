"""What trains: gates alone, adapters, the attention or everything; and the dense base beside it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from attnprune.attention.interface import GATE_ATTRIBUTE, attach, detach, gates_forced_open, gates_of
from attnprune.errors import not_installed
from attnprune.runs.config import RunConfig
from attnprune.sidecar.quantised import is_quantised, source_class
from attnprune.training.compiled import decoder_layers


def attach_gates(model: Any, config: RunConfig) -> None:
    """Attach gates with the run's temperatures and initial biases."""
    settings = config.gate
    gates = attach(model, bias=settings.bias_init)
    for gate in gates:
        gate.temperature, gate.slope_temperature = settings.temperature, settings.slope_temperature
        gate.deterministic = config.train.deterministic


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The attention modules that carry gates, in layer order."""
    found = [m for m in model.modules() if hasattr(m, GATE_ATTRIBUTE)]
    return sorted(found, key=lambda module: getattr(module, GATE_ATTRIBUTE).layer)


def projection_names(model: nn.Module, targets: str = "attention") -> list[str]:
    """Names of the linear layers that get adapters, in the model's order.

    Args:
        targets: "attention": q, k, v, o (or the fused qkv and o) of the attention modules; "all": every linear layer of
            every decoder layer.
    """
    inside = attention_modules(model) if targets == "attention" else decoder_layers(model)
    linear = {id(m) for parent in inside for m in parent.modules() if isinstance(m, (nn.Linear, Conv1D))}
    return [name for name, module in model.named_modules() if id(module) in linear]


class DenseBase:
    """The dense base beside the model that trains: a frozen copy, or the same model with adapters off and gates open.

    Calling it maps token ids [B, T] to logits [B, T, V], without gradient.
    """

    def __init__(self, model: Any):
        self.model = model
        self._adapters = [module for module in model.modules() if isinstance(module, _tuner_layer())]

    def __call__(self, ids: Tensor) -> Tensor:
        with self.active():
            return self.model(input_ids=ids, use_cache=False).logits

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make `model` the base inside the block, and compute no gradients.

        PEFT's own context looks through all parameters of the model every time, longer than a layer takes.
        """
        for layer in self._adapters:
            layer._disable_adapters = True
        try:
            with torch.no_grad(), gates_forced_open(self.model):
                yield
        finally:
            for layer in self._adapters:
                layer._disable_adapters = False


def _tuner_layer() -> tuple[type, ...]:
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:
        return ()
    return (BaseTunerLayer,)


def causal_lm(model: Any) -> Any:
    """The transformers model below PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def make_trainable(model: Any, config: RunConfig) -> tuple[Any, DenseBase]:
    """Freeze all but the scope's parameters and the gates; return (model to train, its dense base).

    With scope gates or lora the base is the same model; otherwise it is a frozen copy.
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
    elif is_quantised(model):
        model._hf_peft_config_loaded = True  # Trainer refuses a quantised model that has nothing of its own to train
    _switch_off_dropout(model)
    return model, DenseBase(causal_lm(model) if copied is None else copied)


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
        raise not_installed("peft", "lora") from None
    names = projection_names(model, config.train.lora_targets)
    modules = dict(model.named_modules())
    rank = config.train.lora_rank
    lora = LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, bias="none", target_modules=names,
        fan_in_fan_out=issubclass(source_class(modules[names[0]]), Conv1D), task_type="CAUSAL_LM",
    )  # fmt: skip
    wrapped = get_peft_model(model, lora)
    for gate in gates_of(wrapped):
        gate.bias.requires_grad_(True)
    return wrapped
