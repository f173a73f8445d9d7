"""`--recover`: more steps for the layers of a sidecar that lost most. Everything else stays as it is, all gates too.

Which layers, damage.json says; where it has not been measured yet it is measured first. Held are the gates' biases and
the density (a density-first run at the sidecar's own density): with the weights of a layer its scores change, and with
them which edges a fixed bias lets through.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from attnprune.attention.interface import gates_of
from attnprune.data.blocks import Blocks
from attnprune.errors import InputError
from attnprune.runs.config import RunConfig
from attnprune.runs.folder import DAMAGE_FILE
from attnprune.sidecar import loading
from attnprune.sidecar.damage import Damage, fingerprints, read_damage
from attnprune.sidecar.folder import Sidecar
from attnprune.training.compiled import decoder_layers
from attnprune.training.damage import TOKENS, measure_damage, some_of
from attnprune.training.scope import causal_lm
from attnprune.units import percent

_STILL = "attnprune_still"  # mark of a parameter that the scope trains and this run does not
_LEAST_DENSITY = 1e-6  # what the settings can say


def choose_layers(
    config: RunConfig, sidecar: Sidecar, base: Any, held_out: Blocks, on_note: Callable[[str], None]
) -> list[str]:
    """Put the layers that lost most into `config.train.recover`, and the sidecar's density into the constraint.

    Args:
        base: the base model without gates; it stays as it is.
        held_out: text to measure on where there is no damage.json.

    Returns:
        The plan's notes.

    Raises:
        InputError: a damaged damage.json or another sidecar's; no layer wins anything back; nothing but gates trains.
    """
    if config.train.scope == "gates":
        raise InputError("--recover: holds the gates, and scope gates trains nothing else", hint="--scope lora")
    damage, source = _damage(sidecar, base, held_out, on_note)
    worst = damage.worst_layers()
    if not worst:
        raise InputError(f"{sidecar.path}: putting no single layer right wins KL back, so none is worth more steps")
    config.train.recover = sorted(worst)
    winning = sum(max(0.0, damage.won(layer)) for layer in range(len(damage.layers)))
    share = sum(map(damage.won, worst)) / winning
    notes = [f"recover: these layers hold {percent(share)} of the KL that single layers win back ({source})"]
    constraint = config.constraint
    if constraint.kind == "density" and "target_density" not in constraint.model_fields_set:
        constraint.target_density = max(_LEAST_DENSITY, sidecar.manifest.result.density)
        notes.append(f"recover: the density is held at the sidecar's {percent(constraint.target_density)}")
    return notes


def _damage(sidecar: Sidecar, base: Any, held_out: Blocks, on_note: Callable[[str], None]) -> tuple[Damage, str]:
    """(what each layer lost, where that comes from): damage.json, or measured here."""
    if (sidecar.path / DAMAGE_FILE).exists():
        damage = read_damage(sidecar)
        return damage, f"{DAMAGE_FILE}: {damage.data}, {damage.tokens:,} tokens"
    on_note(f"finding the layers that lost most: {sidecar.path} has no {DAMAGE_FILE}")
    sparse = copy.deepcopy(base)
    loading.apply_sidecar(sparse, sidecar)
    blocks = some_of(held_out, TOKENS)
    damage = measure_damage(sparse, copy.deepcopy(base), blocks, fingerprints(sidecar), heads=0, on_note=on_note)
    return damage, f"measured on {damage.tokens:,} held-out tokens"


def hold_still(model: Any, config: RunConfig) -> list[str]:
    """Freeze the gates' biases and every weight outside the layers of `config.train.recover`; returns the plan's notes.

    Raises:
        InputError: the model has no such layer.
    """
    if not config.train.recover:
        return []
    layers = decoder_layers(causal_lm(model))
    last = max(int(layer) for layer in config.train.recover)
    if last >= len(layers):
        raise InputError(f"train.recover: layer {last} is not within 0 and {len(layers) - 1}")
    moving = {id(p) for layer in config.train.recover for p in layers[int(layer)].parameters()}
    moving -= {id(gate.bias) for gate in gates_of(model)}
    for parameter in model.parameters():
        if parameter.requires_grad and id(parameter) not in moving:
            parameter.requires_grad_(False)
            setattr(parameter, _STILL, True)
    chosen = ", ".join(map(str, config.train.recover))
    return [f"recover: only layers {chosen} of {len(layers)} train; all gates and all other weights are held"]


def is_state(parameter: nn.Parameter) -> bool:
    """Whether a parameter is part of a run's state: what trains, and what would if it were not held still."""
    return parameter.requires_grad or getattr(parameter, _STILL, False)
