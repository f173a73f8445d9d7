"""LoRA adapters as PEFT stores them, by our own list of keys, names and targets."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from attnprune.errors import InputError
from attnprune.sidecar.format.manifest import Manifest, Positive
from attnprune.sidecar.format.names import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    ATTENTION_MODULES,
    LORA_ALL,
    MANIFEST_FILE,
    MAX_TENSORS,
)
from attnprune.sidecar.format.reading import parse_json
from attnprune.sidecar.format.tensors import parse_safetensors

_LORA = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


class AdapterConfig(BaseModel):
    """adapter/adapter_config.json: the keys of PEFT that we understand; every other key is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    peft_type: Literal["LORA"]
    task_type: Literal["CAUSAL_LM"]
    base_model_name_or_path: str | None = None
    revision: str | None = None
    r: Positive
    lora_alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    target_modules: list[str] = Field(min_length=1, max_length=MAX_TENSORS)
    fan_in_fan_out: bool = False
    bias: Literal["none"] = "none"
    inference_mode: Literal[True] = True


def parse_adapter_config(raw: bytes, manifest: Manifest) -> AdapterConfig:
    """Check adapter/adapter_config.json by our own list of keys, and that it says what the manifest says.

    Raises:
        InputError: an unknown key (PEFT has keys that import modules), a wrong value, or another rank or alpha.
    """
    values = parse_json(raw, ADAPTER_CONFIG_FILE)
    if not isinstance(values, dict):
        raise InputError(f"{ADAPTER_CONFIG_FILE}: expected an object")
    try:
        config = AdapterConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        message = "key not allowed" if first["type"] == "extra_forbidden" else first["msg"]
        raise InputError(f"{ADAPTER_CONFIG_FILE}: {where}: {message}") from None
    if (config.r, config.lora_alpha) != (manifest.weights.rank, manifest.weights.alpha):
        raise InputError(f"{ADAPTER_CONFIG_FILE}: rank or alpha differs from {MANIFEST_FILE}")
    return config


def check_lora(raw: bytes, manifest: Manifest, config: AdapterConfig) -> None:
    """Names, pairs, ranks and targets of adapter_model.safetensors, from its header.

    Names follow PEFT: `base_model.model.MODULE.lora_A.weight` [rank, in] and `...lora_B.weight` [out, rank].

    Raises:
        InputError: naming the tensor.
    """
    tensors = parse_safetensors(raw, ADAPTER_FILE)
    seen = set()
    for tensor, (_, shape, _, _) in tensors.items():
        match = _LORA.fullmatch(tensor)
        if match is None:
            raise InputError(f"{ADAPTER_FILE}: {tensor} is not a lora tensor")
        target, side = match.groups()
        suffixes = [wanted for wanted in config.target_modules if f".{target}".endswith(f".{wanted}")]
        if not suffixes or not _may_change(target, manifest):
            raise InputError(f"{ADAPTER_FILE}: target {target} is not allowed")
        seen.update(suffixes)
        if f"base_model.model.{target}.lora_{'B' if side == 'A' else 'A'}.weight" not in tensors:
            raise InputError(f"{ADAPTER_FILE}: lora tensor {tensor} has no partner")
        if len(shape) != 2 or shape[0 if side == "A" else 1] != manifest.weights.rank:
            raise InputError(f"{ADAPTER_FILE}: {tensor}: shape {list(shape)} is not of rank {manifest.weights.rank}")
    unused = sorted(set(config.target_modules) - seen)
    if unused:
        raise InputError(f"{ADAPTER_CONFIG_FILE}: target_modules: no tensors for {unused[0]!r}")


def _may_change(target: str, manifest: Manifest) -> bool:
    """Whether adapters may change a module: those of a layer's attention, or with LORA_ALL of a numbered layer, so that
    embeddings and the output layer stay those of the base."""
    parts = target.split(".")
    inside = LORA_ALL in manifest.requires and any(part.isdecimal() for part in parts)
    return inside or bool(ATTENTION_MODULES.intersection(parts))
