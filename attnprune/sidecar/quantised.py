"""Bases whose linear layers bitsandbytes holds in 4 or 8 bits: how they are loaded, named and turned back.

4 bits are nf4 with double quantisation (QLoRA, arXiv:2305.14314), 8 bits are LLM.int8 (arXiv:2208.07339). Embeddings,
norms and the head stay as they are.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from attnprune.errors import InputError, UnsupportedModelError, first_line, not_installed
from attnprune.sidecar.precision import DTYPES


def bitsandbytes() -> Any:
    """The library.

    Raises:
        InputError: it is not installed, or cannot be imported.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError):
            raise not_installed("bitsandbytes") from None
        raise InputError(f"bitsandbytes cannot be imported: {first_line(error)}") from None
    warnings.filterwarnings("ignore", module="bitsandbytes")  # it says for every layer that inputs are cast
    return bitsandbytes


def settings(load_in: str, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """How `--load-in 4bit` or `8bit` loads a base: nf4 with double quantisation, or LLM.int8."""
    if load_in == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )  # fmt: skip


def stored_settings(name: str, config: Any, compute_dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """How the files of the base `name` hold it quantised, by its configuration, which is made to compute in this dtype;
    None for one in full precision.

    Raises:
        UnsupportedModelError: another library quantised it, or the configuration does not say how.
    """
    values = getattr(config, "quantization_config", None)
    if values is None:
        return None
    values = values if isinstance(values, dict) else values.to_dict()
    method = values.get("quant_method") or "unknown method"
    if method != "bitsandbytes" or not (values.get("load_in_4bit") or values.get("load_in_8bit")):
        raise UnsupportedModelError(
            f"{name}: cannot merge into a quantised base ({method})",
            hint="name the model it was quantised from, or a .gguf file",
        )
    try:
        stored: Any = BitsAndBytesConfig.from_dict(values)
    except (TypeError, ValueError, AttributeError) as error:
        raise UnsupportedModelError(f"{name}: config.json: quantization_config: {first_line(error)}") from None
    stored.bnb_4bit_compute_dtype = compute_dtype
    config.quantization_config = stored.to_dict()
    return stored


def entry_of(config: BitsAndBytesConfig, *, stored: bool) -> dict[str, Any]:
    """The manifest's `base.quantisation`: what decides the numbers. `stored`: the base's own files hold the codes."""
    skipped = {"skip_modules": sorted(config.llm_int8_skip_modules)} if config.llm_int8_skip_modules else {}
    common = {"method": "bitsandbytes", "stored": stored, **skipped}
    if config.load_in_8bit:
        return {**common, "bits": 8, "threshold": float(config.llm_int8_threshold)}
    return {
        **common,
        "bits": 4,
        "quant_type": config.bnb_4bit_quant_type,
        "double_quant": config.bnb_4bit_use_double_quant,
        "compute_dtype": str(config.bnb_4bit_compute_dtype).removeprefix("torch."),
    }


def config_of(entry: Any) -> BitsAndBytesConfig:
    """The way back: what loads a base as a manifest's `base.quantisation` says."""
    skipped = entry.skip_modules
    if entry.bits == 8:
        return BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_threshold=entry.threshold or 0.0, llm_int8_skip_modules=skipped
        )
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=entry.quant_type, bnb_4bit_use_double_quant=bool(entry.double_quant),
        bnb_4bit_compute_dtype=DTYPES[entry.compute_dtype], llm_int8_skip_modules=skipped,
    )  # fmt: skip


def is_quantised(model: Any) -> bool:
    """Whether bitsandbytes holds layers of this model."""
    return any(True for _ in quantised_layers(model))


def quantised_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, module) of the layers that bitsandbytes holds."""
    for name, module in model.named_modules():
        # An adapter around such a layer shows the layer's weight as its own.
        if type(module._parameters.get("weight")).__name__ in ("Params4bit", "Int8Params"):
            yield name, module


def parameter_count(model: nn.Module) -> int:
    """Numbers of a model, also where several of them share a byte."""
    packed = {id(module.weight): math.prod(features(module)) for _, module in quantised_layers(model)}
    return sum(packed.get(id(parameter), parameter.numel()) for parameter in model.parameters())


def features(module: Any) -> tuple[int, int]:
    """(out, in) of a linear layer, quantised or not."""
    if isinstance(module, Conv1D):
        inputs, outputs = module.weight.shape
        return outputs, inputs
    return module.out_features, module.in_features


def held_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters, with the scales of quantised ones."""
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    for _, module in quantised_layers(model):
        state = getattr(module.weight, "quant_state", None)
        if state is None:
            scales = [module.weight.SCB if module.weight.SCB is not None else module.state.SCB]
        else:
            scales = [state.absmax, *([state.state2.absmax] if state.nested else [])]
        total += sum(scale.numel() * scale.element_size() for scale in scales)
    return total


def source_class(module: nn.Module) -> type:
    """The class of a linear layer, or the one that it had before it was quantised."""
    return getattr(module, "source_cls", type(module))


def let_go_of_files(model: nn.Module) -> None:
    """Copy what is not quantised out of the mapped files, which one tensor keeps in memory with all that was read."""
    quantised = {id(module.weight) for _, module in quantised_layers(model)}
    for parameter in model.parameters():
        if id(parameter) not in quantised and parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def keep_as_stored(model: nn.Module) -> None:
    """Switch off that a forward on a CPU with bf16 instructions repacks 4-bit weights in place and rounds their scales:
    the model would compute one thing before and another thing after it, and a processor without them a third.
    """
    for _, module in quantised_layers(model):
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def identifying_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that identify a model which is quantised in its files: codes and scales of the quantised layers,
    whatever type stores the codes, and every other parameter. As loaded, before any forward.
    """
    tensors: dict[str, Any] = {name: p for name, p in model.named_parameters() if "attnprune_gate" not in name}
    for name, module in quantised_layers(model):
        weight = tensors.pop(f"{name}.weight")
        if type(weight).__name__ == "Int8Params":
            parts: dict[str, Any] = {"weight": weight.data, "SCB": module.weight.SCB}
        else:
            state = weight.quant_state
            parts = {"weight": weight.data.view(torch.uint8).flatten(), "absmax": state.absmax}
            if state.nested:
                parts |= {"nested_absmax": state.state2.absmax, "offset": torch.as_tensor(state.offset).reshape(1)}
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    return tensors


def lacks_codes(model: nn.Module) -> str | None:
    """The name of a layer that should be quantised and has plain weights, or no scales; None if there is none."""
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind == "Linear4bit" and getattr(module.weight, "quant_state", None) is None:
            return name
        if kind == "Linear8bitLt" and (
            module.weight.dtype != torch.int8 or getattr(module.weight, "SCB", None) is None
        ):
            return name
    return None


def plain_weight(module: Any) -> Tensor:
    """The weight [out, in] of a quantised layer in fp32."""
    functional, weight = bitsandbytes().functional, module.weight
    if type(weight).__name__ == "Int8Params":
        scales = weight.SCB if weight.SCB is not None else module.state.SCB
        return functional.int8_vectorwise_dequant(weight.data, scales).float()
    return functional.dequantize_4bit(weight.data, weight.quant_state).float()


@torch.no_grad()
def dequantise(model: Any) -> Any:
    """Turn a quantised model, with its unmerged adapters, into a plain one of the same dtype, in place; returns it.

    The sum of weight and update is formed in fp32 and cast once. It is not the quantised model to the last bit: its
    layers multiply by rounded weights and add the adapter's product afterwards.
    """
    for name, module in list(model.named_modules()):
        layer = module.base_layer if hasattr(module, "base_layer") else module
        if type(getattr(layer, "weight", None)).__name__ not in ("Params4bit", "Int8Params") or ".base_layer" in name:
            continue
        weight = plain_weight(layer)
        if layer is not module:
            weight += module.get_delta_weight("default").float()
        model.set_submodule(name, _plain_layer(layer, weight.to(model.dtype)))
    model.hf_quantizer.remove_quantization_config(model)
    for mark in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        model.__dict__.pop(mark, None)
    return model


def _plain_layer(layer: Any, weight: Tensor) -> nn.Module:
    """The layer that stood there before it was quantised."""
    outputs, inputs = weight.shape
    bias = layer.bias
    with torch.device("meta"):
        if issubclass(source_class(layer), Conv1D):
            plain: nn.Module = Conv1D(outputs, inputs)
            weight = weight.T.contiguous()
        else:
            plain = nn.Linear(inputs, outputs, bias=bias is not None)
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=False)
    return plain
