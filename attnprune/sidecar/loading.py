"""Loading a sparse model: a sidecar onto its base, or a merged folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from attnprune.attention.interface import attach
from attnprune.errors import InputError, checked, not_installed, shown
from attnprune.runs.folder import DEMO, remembered_model
from attnprune.sidecar import format, hub
from attnprune.sidecar.bases import BaseModel, load_base, pick_device, torch_dtype
from attnprune.sidecar.folder import Sidecar, is_merged, open_sidecar
from attnprune.sidecar.identity import check_base, fingerprint, note_fingerprint
from attnprune.sidecar.merged import load_merged
from attnprune.sidecar.precision import any_dtype, cast
from attnprune.sidecar.probe import check_probe, measure_again
from attnprune.sidecar.quantised import config_of, dequantise, features, is_quantised
from attnprune.sidecar.spreading import DeviceMap, spread

_PEFT = "base_model.model."  # in front of the names of adapters


class LoadedModel(NamedTuple):
    """A sparse model ready to run, and its tokenizer."""

    model: Any
    tokenizer: Any

    def __repr__(self) -> str:
        config, parameters = self.model.config, sum(parameter.numel() for parameter in self.model.parameters())
        return (
            f"LoadedModel({type(self.model).__name__}: {config.num_hidden_layers} layers of "
            f"{config.num_attention_heads} heads, {parameters:,} parameters, {self.model.dtype} on "
            f"{self.model.device}; {type(self.tokenizer).__name__})"
        )


def default_base(sidecar: Sidecar) -> tuple[str, str | None]:
    """(name, revision) of the base that a sidecar names, or that run.toml beside it remembers.

    Raises:
        InputError: it was made from a local folder or file that is not where it was; only its user can name that.
    """
    base = sidecar.manifest.base
    if base.kind == "bundled":
        return DEMO, None
    if base.kind in ("hub", "local") and base.repo_id:
        return base.repo_id, base.revision
    remembered = remembered_model(sidecar.path)
    if remembered is not None and os.path.exists(remembered):
        return str(remembered), None
    what = "a local .gguf file" if base.kind == "gguf" else "a local folder"
    gone = "" if remembered is None else f", {remembered}, which is not there"
    raise InputError(f"{sidecar.path}: made from {what} ({base.model_type}){gone}; name it", hint="use --base MODEL")


def which_base(sidecar: Sidecar, base: str | None) -> tuple[str, str | None]:
    """(name, revision) of the base: the one that a user names, else `default_base`."""
    return default_base(sidecar) if base is None else (base, None)


def load_dense(
    sidecar: Sidecar,
    base: str | None = None,
    device: str = "cpu",
    *,
    quantise: BitsAndBytesConfig | None = None,
    device_map: DeviceMap | None = None,
) -> BaseModel:
    """The base that a sparse model was made from, in that base's dtype, and quantised where the sidecar requires it.

    Args:
        base: Hub id, folder or .gguf file; default: see `default_base`.
        quantise, device_map: as `load_base` takes them.

    Raises:
        InputError, AttnPruneError: as `default_base` and `load_base`.
    """
    name, revision = which_base(sidecar, base)
    return load_named_base(sidecar, name, revision, device, quantise=quantise, device_map=device_map)


def load_named_base(
    sidecar: Sidecar,
    name: str,
    revision: str | None,
    device: str = "cpu",
    *,
    quantise: BitsAndBytesConfig | None = None,
    device_map: DeviceMap | None = None,
) -> BaseModel:
    """A base by name in the dtype that a sidecar was made in, and quantised if the sidecar requires that."""
    entry = sidecar.manifest.base
    if entry.quantisation is not None and not entry.quantisation.stored:
        quantise = config_of(entry.quantisation)
    dtype = torch_dtype(entry.dtype)
    return load_base(name, revision=revision, device=device, dtype=dtype, quantise=quantise, device_map=device_map)


@checked()
def load(
    path: str | Path,
    base: str | Path | None = None,
    *,
    revision: str | None = None,
    device: str = "cpu",
    dtype: torch.dtype | str | None = None,
    allow_base_mismatch: bool = False,
    verify: bool = True,
    device_map: DeviceMap | None = None,
    quantization_config: BitsAndBytesConfig | None = None,
) -> LoadedModel:
    """Load a sparse model: the base, its changed weights and its gates, ready for `generate`.

    Args:
        path: a sidecar or merged folder, or a Hub repository USER/NAME that holds one.
        base: Hub id, folder or .gguf file of the base model; default: the one that the sidecar names, or a local one
            that is still where the run found it.
        revision: branch, tag or commit of the repository.
        device: "cpu", "cuda", "cuda:1", ...; "auto": cuda where there is one.
        dtype: cast to this dtype, or the one of this name, at the end (gates stay fp32); default: the dtype the base
            was loaded in. Another dtype moves scores that sit on their threshold, so a few edges differ.
        allow_base_mismatch: accept a base of equal structure with other weights (the probe is then not run).
        verify: run the stored probe (64 tokens, and 256 where the context allows) before returning.
        device_map: "auto", or a device for each part, as transformers has it; instead of `device`. The weights are
            changed in the host's memory and then spread, and the probe is run where they are.
        quantization_config: hold the linear layers in 4 or 8 bits (bitsandbytes). Adapters stay beside them, and the
            probe is not run: these are other weights than those that it was measured with. A sidecar for a quantised
            base needs no such setting.

    Raises:
        VerificationError: the stored probe is not reproduced.
        InputError: damaged sidecar, a base that is not the one it was made for, a value too large for `dtype`, or
            options that do not go together.
        AttnPruneError: the Hub cannot be reached.
    """
    device, base = _place_of(device), None if base is None else str(base)
    dtype = None if dtype is None else any_dtype(dtype)
    if not isinstance(device_map, str | dict | None):
        raise InputError(f'device_map: {shown(device_map)} is neither "auto" nor a dict of parts and their devices')
    if not isinstance(quantization_config, BitsAndBytesConfig | None):
        raise InputError(f"quantization_config: {type(quantization_config).__name__} is not a BitsAndBytesConfig")
    folder = hub.locate(path, revision)
    if dtype is not None and (device_map is not None or quantization_config is not None):
        raise InputError("dtype: casts a model in one place; leave out device_map and quantization_config")
    if is_merged(folder) and (device_map is not None or quantization_config is not None):
        raise InputError(
            f"{path}: is a merged model",
            hint="AutoModelForCausalLM.from_pretrained takes it, trust_remote_code=True, with these options",
        )
    if is_merged(folder):
        model, tokenizer = load_merged(folder, verify=verify)
        return LoadedModel((cast(model, dtype) if dtype else model).to(device).eval(), tokenizer)
    sidecar = open_sidecar(folder)
    if quantization_config is not None and sidecar.manifest.base.quantisation is not None:
        raise InputError(f"{path}: says itself how its base is quantised; leave out quantization_config")
    where = None if quantization_config is None else device_map or {"": device}
    loaded = load_dense(sidecar, base, quantise=quantization_config, device_map=where)
    if quantization_config is not None:
        note_fingerprint(loaded.model, fingerprint(loaded.model)._replace(quantisation=None))
        verify = False
    elif device_map is not None and is_quantised(loaded.model):
        raise InputError("device_map: a quantised base is put in one place; leave it out")
    spread_to = device_map if where is None else None
    apply_sidecar(loaded.model, sidecar, allow_base_mismatch=allow_base_mismatch, device_map=spread_to)
    if verify and not allow_base_mismatch:
        verify_probe(loaded.model, sidecar.manifest)
    model = cast(loaded.model, dtype) if dtype else loaded.model
    if device_map is None and not is_quantised(model):
        model = model.to(device)
    return LoadedModel(model.eval(), loaded.tokenizer)


def _place_of(device: str) -> str:
    """As `pick_device`, which also knows one of several ("cuda:1").

    Raises:
        InputError: there is no such device.
    """
    kind, _, number = device.partition(":")
    found = pick_device(kind)
    if number and (found != "cuda" or not number.isdecimal() or int(number) >= torch.cuda.device_count()):
        raise InputError(f"device {device}: there is none")
    return device if number else found


def load_for_merge(
    folder: Path, base: str | None, *, dtype: str | None = None, allow_base_mismatch: bool = False
) -> tuple[LoadedModel, bool]:
    """A sparse model with plain weights in `dtype` (default: its base's), as `write_merged` takes it, and whether they
    are those that its sidecar was measured with. A quantised base is dequantised; its probe is run before.

    Raises:
        As `load`.
    """
    loaded = load(folder, base, allow_base_mismatch=allow_base_mismatch)
    same = dtype in (None, str(loaded.model.dtype).removeprefix("torch."))
    model, quantised = loaded.model, is_quantised(loaded.model)
    if quantised:
        model = dequantise(model)
    if dtype is not None:
        model = cast(model, torch_dtype(dtype))
    return LoadedModel(model, loaded.tokenizer), same and not (quantised or allow_base_mismatch)


def apply_sidecar(
    model: Any, sidecar: Sidecar, *, allow_base_mismatch: bool = False, device_map: DeviceMap | None = None
) -> None:
    """Change a freshly loaded base model into the sparse one, in place, and spread it over devices."""
    check_base(sidecar.manifest, model, allow_base_mismatch)
    install(model, sidecar.biases(), sidecar.weights(), sidecar.manifest.weights, device_map)


def install(
    model: Any,
    biases: Sequence[np.ndarray],
    weights: dict[str, Tensor],
    entry: format.WeightsEntry,
    device_map: DeviceMap | None = None,
) -> None:
    """Merge changed weights into a base model and attach gates with the given biases (one array [heads] per layer).

    In a quantised base adapters stay beside the weights, as they were trained: merged, they would be rounded to codes.
    """
    if entry.kind != "none" and is_quantised(model):
        if entry.kind == "delta":
            raise InputError(f"{format.DELTA_FILE}: whole weights cannot be changed in a quantised base")
        _add_lora(model, weights, entry)
    elif entry.kind == "lora":
        merge_lora(model, weights, entry)
    elif entry.kind == "delta":
        _copy_delta(model, weights)
    if device_map is not None:
        spread(model, device_map)
    gates = attach(model)
    if [len(gate.bias) for gate in gates] != [len(bias) for bias in biases]:
        raise InputError(f"{format.GATES_FILE}: the gates do not fit the model's layers and heads")
    with torch.no_grad():
        for gate, bias in zip(gates, biases, strict=True):
            gate.bias.copy_(torch.from_numpy(bias.copy()))


def _copy_delta(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for name, values in tensors.items():
        if name not in parameters or parameters[name].shape != values.shape:
            raise InputError(f"{format.DELTA_FILE}: {name} {tuple(values.shape)} does not fit the base model")
        if not bool(values.to(parameters[name].dtype).isfinite().all()):
            raise InputError(f"{format.DELTA_FILE}: {name} is not finite in the base's {parameters[name].dtype}")
    with torch.no_grad():
        for name, values in tensors.items():
            parameters[name].copy_(values)


def _add_lora(model: nn.Module, tensors: dict[str, Tensor], entry: format.WeightsEntry) -> None:
    """Put adapters beside the layers that they change, through PEFT.

    Raises:
        InputError: PEFT is not installed; or as `merge_lora`.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
    except ImportError:
        raise not_installed("peft", "lora") from None
    targets = _targets(model, tensors, entry)
    assert entry.rank is not None
    assert entry.alpha is not None
    alpha: Any = entry.alpha  # PEFT declares an int
    inject_adapter_in_model(LoraConfig(r=entry.rank, lora_alpha=alpha, target_modules=list(targets)), model)
    set_peft_model_state_dict(model, {name.removeprefix(_PEFT): tensor for name, tensor in tensors.items()})
    model.requires_grad_(False)


def merge_lora(model: nn.Module, tensors: dict[str, Tensor], entry: format.WeightsEntry) -> None:
    """Add `alpha / rank * B A` to the base weights, computed in fp32 and cast last.

    Names follow PEFT: `base_model.model.MODULE.lora_A.weight` [rank, in] and `...lora_B.weight` [out, rank].

    Raises:
        InputError: A without B, a rank that differs from the manifest, or a target that does not fit, or is quantised.
    """
    if is_quantised(model):
        raise InputError(f"{format.ADAPTER_FILE}: cannot be merged into quantised weights: dequantise them first")
    for target, module in _targets(model, tensors, entry).items():
        update = _update(module, tensors, target, entry)
        weight = module.weight
        with torch.no_grad():
            merged = (weight.float() + update.to(weight.device)).to(weight.dtype)
            if not bool(merged.isfinite().all()):
                raise InputError(f"{format.ADAPTER_FILE}: non-finite value in {target} after merging")
            weight.copy_(merged)


def _targets(model: nn.Module, tensors: dict[str, Tensor], entry: format.WeightsEntry) -> dict[str, Any]:
    """The layers that adapters change, by name.

    Raises:
        InputError: as `merge_lora`.
    """
    modules = dict(model.named_modules())
    targets = sorted({n.removeprefix(_PEFT).rsplit(".lora_", 1)[0] for n in tensors})
    expected = {f"{_PEFT}{target}.lora_{side}.weight" for target in targets for side in "AB"}
    if expected != set(tensors):
        raise InputError(f"{format.ADAPTER_FILE}: {sorted(expected ^ set(tensors))[0]} has no partner")
    if entry.rank is None or entry.alpha is None:
        raise InputError(f"{format.MANIFEST_FILE}: weights: lora needs rank and alpha")
    for target in targets:
        module = modules.get(target)
        if not isinstance(module, (nn.Linear, Conv1D)) or getattr(module, "weight", None) is None:
            raise InputError(f"{format.ADAPTER_FILE}: target {target} is not allowed")
        a, b = (tuple(tensors[f"{_PEFT}{target}.lora_{side}.weight"].shape) for side in "AB")
        if (a, b) != ((entry.rank, features(module)[1]), (features(module)[0], entry.rank)):
            raise InputError(f"{format.ADAPTER_FILE}: {target}: shape or rank does not fit the base model")
    return {target: modules[target] for target in targets}


def _update(module: nn.Module, tensors: dict[str, Tensor], target: str, entry: format.WeightsEntry) -> Tensor:
    """`alpha / rank * B A` in fp32, laid out as the layer's weight."""
    assert entry.alpha is not None
    assert entry.rank is not None
    a, b = (tensors[f"{_PEFT}{target}.lora_{side}.weight"].float() for side in "AB")
    update = entry.alpha / entry.rank * (b @ a)
    return update.T if isinstance(module, Conv1D) else update


def verify_probe(model: Any, manifest: format.Manifest) -> None:
    """Run the stored probe.

    Raises:
        VerificationError: loss or open-edge count differ.
    """
    check_probe(measure_again(model, manifest.probe), manifest.probe)
