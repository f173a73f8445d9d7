"""Starting from a finished run (`--init`): its sidecar, whether it fits, its gates and weights."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from attnprune.attention.interface import gates_of
from attnprune.errors import InputError
from attnprune.runs.config import RunConfig
from attnprune.sidecar import hub
from attnprune.sidecar.folder import Sidecar, is_merged, open_sidecar
from attnprune.sidecar.format import LORA_ALL
from attnprune.sidecar.identity import check_base


def sidecar_to_start_from(config: RunConfig) -> Sidecar:
    """The sidecar that `config.model.init` names.

    Raises:
        InputError: it is no sidecar, but a merged model for example.
    """
    assert config.model.init is not None
    folder = hub.locate(config.model.init, weights=False)
    if is_merged(folder):
        raise InputError(
            f"{config.model.init}: is a merged model", hint="--init takes the sidecar that it was made from"
        )
    return open_sidecar(hub.locate(config.model.init))


def check_start(sidecar: Sidecar, model: nn.Module) -> None:
    """Refuse a sidecar that was made on another base than `model`, which has no gates yet.

    Raises:
        InputError: another data type, other structure or other weights.
    """
    dtype, made_on = str(model.dtype).removeprefix("torch."), sidecar.manifest.base.dtype
    if dtype != made_on:
        raise InputError(f"{sidecar.path}: made on a {made_on} base, not {dtype}", hint=f"--dtype {made_on}")
    try:
        check_base(sidecar.manifest, model)
    except InputError as error:  # its hint is for loading
        raise InputError(f"{sidecar.path}: {error.message}") from None


def start_from(model: Any, sidecar: Sidecar, config: RunConfig) -> None:
    """Put a sidecar's gate biases and weights into the gated model that is about to train.

    Raises:
        InputError: what the sidecar changed is not what this run trains (scope, rank or alpha of the adapters), or it
            does not fit the model.
    """
    gates = gates_of(model)
    if [len(gate.bias) for gate in gates] != sidecar.manifest.gate.heads:
        raise InputError(f"{sidecar.path}: the gates do not fit the model's layers and heads")
    entry, trains = sidecar.manifest.weights, {n: p for n, p in model.named_parameters() if p.requires_grad}
    # PEFT stores an adapter's tensors without the name ("default") that they have in the model.
    weights = {re.sub(r"\.lora_([AB])\.", r".lora_\1.default.", name): t for name, t in sidecar.weights().items()}
    fits = all(name in trains and trains[name].shape == tensor.shape for name, tensor in weights.items())
    if not fits or (entry.kind == "lora" and entry.alpha != model.peft_config["default"].lora_alpha):
        what, scope = "weights", "full"
        if entry.kind == "lora":
            what, scope = f"adapters of rank {entry.rank} (alpha {entry.alpha:g})", f"lora --lora-rank {entry.rank}"
            if LORA_ALL in sidecar.manifest.requires:
                what, scope = f"{what} on all linear layers", f"{scope} --lora-targets all"
        raise InputError(
            f"{sidecar.path}: its {what} do not fit a run with scope {config.train.scope}", hint=f"--scope {scope}"
        )
    with torch.no_grad():
        for name, tensor in weights.items():
            if not bool(trains[name].copy_(tensor).isfinite().all()):
                raise InputError(f"{sidecar.path}: {name} is not finite in {trains[name].dtype}")
        for gate, bias in zip(gates, sidecar.biases(), strict=True):
            gate.bias.copy_(torch.from_numpy(bias.copy()))
