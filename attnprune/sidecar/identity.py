"""Which base model a sidecar belongs to: fingerprints of a model's tensors, its configuration, and the check against a
manifest.

Equal weights are not an equal model: a window, a norm's epsilon, a rotation's base or an activation is a number in
config.json. Every key counts but those of which it is known that they cannot change what the model computes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from attnprune.errors import InputError
from attnprune.sidecar import format

if TYPE_CHECKING:
    from torch import Tensor, nn

log = logging.getLogger(__name__)

# Keys of a configuration that cannot change what a loaded model computes at rest (formats/attnprune-v1.md lists them):
# names and versions, other tools' marks among them; how it is stored or run, not what; labels of other heads; what it
# returns besides; settings of generate; how new weights are drawn. Dropout acts in training alone.
INERT_KEYS = frozenset(
    [
        *("name_or_path", "transformers_version", "tokenizer_class", "prefix"),
        *("unsloth_fixed", "unsloth_version", "transformers.js_config"),
        *("model_type", "architectures", "auto_map", "dtype", "torch_dtype", "quantization_config", "torchscript"),
        *("attn_implementation", "experts_implementation", "use_cache", "gradient_checkpointing", "return_dict"),
        *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params"),
        *("output_attentions", "output_hidden_states", "output_router_logits"),
        *("initializer_range", "initializer_factor"),
    ]
)
INERT_ENDINGS = ("_token_id", "_token_ids", "dropout", "pdrop")


def structure_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over the sorted (name, dtype, shape) list of a model's tensors."""
    lines = sorted(f"{name} {tensor.dtype} {tuple(tensor.shape)}" for name, tensor in tensors.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def content_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over up to 256 evenly strided values of every tensor, as little-endian fp32."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        flat = tensors[name].detach().flatten()
        sample = flat[:: max(1, flat.numel() // 256)][:256].float().cpu()
        digest.update(name.encode() + b"\0" + sample.numpy().astype("<f4").tobytes())
    return digest.hexdigest()


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that identify a base model: by name, tied ones once, gates left out."""
    return {name: p for name, p in model.named_parameters() if "attnprune_gate" not in name}


class Fingerprint(NamedTuple):
    """What identifies a base; `quantisation` is the manifest's entry of one whose layers are quantised."""

    structure: str
    content: str
    quantisation: dict[str, Any] | None = None


_NOTED = "_attnprune_fingerprint"


def note_fingerprint(model: nn.Module, found: Fingerprint) -> None:
    """Write down what identifies a model whose tensors do not say it later: quantised, or not all in memory."""
    model.__dict__[_NOTED] = found


def fingerprint(model: nn.Module) -> Fingerprint:
    """The fingerprint that was noted while the model was loaded, or that of its parameters."""
    if _NOTED in model.__dict__:
        return model.__dict__[_NOTED]
    return fingerprint_of(base_tensors(model))


def fingerprint_of(tensors: Mapping[str, Tensor], quantisation: dict[str, Any] | None = None) -> Fingerprint:
    """The fingerprint of these tensors by name."""
    return Fingerprint(structure_fingerprint(tensors), content_fingerprint(tensors), quantisation)


def config_values(config: Any) -> dict[str, Any]:
    """The keys of a transformers configuration that change what the model computes, as JSON values."""
    stock = config.stock_dict() if hasattr(config, "stock_dict") else config.to_dict()
    return _as_json({key: value for key, value in stock.items() if not _is_inert(key)})


def _is_inert(key: str) -> bool:
    return key in INERT_KEYS or key.startswith("_") or key.endswith(INERT_ENDINGS)


def _as_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _as_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_as_json(entry) for entry in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)


def config_difference(recorded: Mapping[str, Any], config: Any) -> str | None:
    """What differs between a recorded configuration and that of a model, "KEY is X, not Y"; None if nothing does.

    Another version of transformers may have written the record: the installed class completes it, nested keys and lists
    that it derives included. A key that the installed version does not know may only be off.
    """
    found = config_values(config)
    if found == recorded:
        return None
    completed = _completed(recorded, type(config))
    for key in sorted({*completed, *found}):
        then, now = completed.get(key), found.get(key)
        if key not in found and not then:
            continue
        if _in_single_precision(then) != _in_single_precision(now):
            return f"{key} is {json.dumps(now)[:80]}, not {json.dumps(then)[:80]}"
    return None


def _completed(recorded: Mapping[str, Any], config_class: type) -> dict[str, Any]:
    try:
        return config_values(config_class(**recorded))
    except Exception:  # what this version's class does not take is compared as it was written
        return {**config_values(config_class()), **recorded}


def _in_single_precision(value: Any) -> Any:
    """Numbers as a .gguf file holds them, 32 bits wide: the same model from another file has the same ones."""
    if isinstance(value, dict):
        return {key: _in_single_precision(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_in_single_precision(entry) for entry in value]
    return float(np.float32(value)) if isinstance(value, float) else value


def model_key(base: Mapping[str, Any]) -> str:
    """A name for what the base of a manifest's `base` entry computes: text that it writes itself is kept under it."""
    if base.get("config") is None:
        return base["content"]
    parts = [base["content"], base["config"]]
    if base.get("quantisation") is not None:
        parts.append(base["quantisation"])
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def check_base(manifest: format.Manifest, model: nn.Module, allow_mismatch: bool = False) -> None:
    """Refuse a base model that is not the one the sidecar was made for. One that has no configuration on record
    (format 1.0) is noted.

    Raises:
        InputError: other structure; or other content or another configuration, unless `allow_mismatch`.
    """
    structure, content, quantisation = fingerprint(model)
    base = manifest.base
    name = base.repo_id or f"a {base.model_type} model"
    expected = None if base.quantisation is None else base.quantisation.model_dump()
    if quantisation != expected:
        raise InputError(
            f"wrong base model: {_precision(quantisation)}; the sidecar was made for {name} {_precision(expected)}"
        )
    if structure != base.structure:
        layers, heads = len(manifest.gate.heads), manifest.gate.heads[0]
        raise InputError(f"wrong base model: the sidecar was made for {name} ({layers} layers, {heads} heads)")
    found = getattr(getattr(model, "config", None), "model_type", base.model_type)
    if found != base.model_type:
        raise InputError(f"wrong base model: a {found} model; the sidecar was made for {name} ({base.model_type})")
    if content != base.content and not allow_mismatch:
        raise InputError(
            f"wrong base model: same structure as {name}, but not the weights the sidecar was made for"
            + (f" (revision {base.revision})" if base.revision else ""),
            hint="--allow-base-mismatch loads it all the same",
        )
    if base.config is None:
        log.warning("this sidecar does not record its base's configuration (format 1.0): weights and probe are checked")
    elif not allow_mismatch and (difference := config_difference(base.config, model.config)):
        raise InputError(
            f"wrong base model: the weights of {name}, but {difference} as the sidecar was made for",
            hint="--allow-base-mismatch loads it all the same",
        )


def _precision(quantisation: Mapping[str, Any] | None) -> str:
    """How a base's weights are held, in words."""
    if quantisation is None:
        return "in full precision"
    rest = {key: value for key, value in quantisation.items() if key not in ("method", "bits", "stored")}
    how = "already in its files" if quantisation.get("stored") else "while it is loaded"
    parts = "".join(f", {key} {value}" for key, value in sorted(rest.items()))
    return f"quantised to {quantisation.get('bits')} bits {how} ({quantisation.get('method')}{parts})"
