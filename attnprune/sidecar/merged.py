"""The merged form: an ordinary Hugging Face folder with the gates inside (formats/attnprune-v1.md)."""

from __future__ import annotations

import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from attnprune.attention.interface import attach
from attnprune.errors import InputError
from attnprune.files import fsync, sha256_of, write_atomic
from attnprune.sidecar import format, modeling_attnprune
from attnprune.sidecar.folder import Sidecar, open_merged
from attnprune.sidecar.identity import config_difference, config_values
from attnprune.sidecar.precision import check_cast
from attnprune.sidecar.probe import check_probe, measure_again
from attnprune.sidecar.quiet import quiet

GATE_SUFFIX = "attnprune_gate.bias"


def load_merged(path: Path, *, verify: bool = True) -> tuple[Any, Any]:
    """(model, tokenizer) of a merged folder: the stock class with our gates, in the dtype of the files.

    Raises:
        InputError: damaged folder, or weights that are not finite in the dtype that it names.
        VerificationError: the folder's own probe is not reproduced.
    """
    manifest = open_merged(path).manifest
    try:
        model, tokenizer = _read(path)
        _check_config(model, manifest)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"{path}: cannot load this merged model: {str(error).splitlines()[0]}") from error
    if verify:
        check_probe(measure_again(model, manifest.probe), manifest.probe)
    return model, tokenizer


def _read(path: Path) -> tuple[Any, Any]:
    """Load the portable class, which refuses bad gates, and move its weights into the stock class, which counts."""
    config_values = format.parse_json(format.read_regular(path, "config.json"), "config.json")
    family = str(config_values["model_type"]).removeprefix("attnprune_")
    config_class, model_class = modeling_attnprune.classes_for(family)
    with quiet():
        config = config_class.from_pretrained(path)
        read = partial(model_class.from_pretrained, path, config=config, use_safetensors=True)
        portable: Any = read(dtype="auto")
        check_cast(portable, lambda: read(dtype=torch.float64))
        tokenizer = AutoTokenizer.from_pretrained(path, config=config, trust_remote_code=False)
    state = portable.state_dict()
    biases = [state.pop(name) for name in list(state) if name.endswith(GATE_SUFFIX)]
    stock_class = model_class.__bases__[1]
    stock_config = stock_class.config_class(**config.stock_dict())
    with quiet():
        model = stock_class.from_pretrained(None, config=stock_config, state_dict=state, dtype=portable.dtype)
    model.generation_config = portable.generation_config
    attach(model, torch.stack(biases))
    return model.eval(), tokenizer


def write_merged(model: Any, tokenizer: Any, sidecar: Sidecar, folder: Path, *, same_dtype: bool) -> format.Manifest:
    """Write `model`, a loaded sparse model, as a merged folder; measure its probe on the files as loaded back.

    The folder appears at once, by a rename: a killed or failed run leaves nothing under its name.

    Args:
        same_dtype: the weights are those the sidecar was measured with, so its probe must be reproduced as well.

    Returns:
        The manifest written into config.json.

    Raises:
        InputError: the folder exists and is not empty, or a weight is not finite.
        VerificationError: the written files do not reproduce the sidecar's probe.
    """
    check_target(folder)
    check_cast(model, lambda: model)
    staging = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        _save(model, tokenizer, staging)
        gates = sidecar.gates  # checked against the sidecar's manifest
        shutil.copyfile(sidecar.path / format.GATES_FILE, staging / format.GATES_FILE)
        shutil.copyfile(str(modeling_attnprune.__file__), staging / format.CODE_FILE)
        written, _ = _read(staging)
        _check_gates(written, gates)
        probe = measure_again(written, sidecar.manifest.probe)
        if same_dtype:
            check_probe(probe, sidecar.manifest.probe)
        manifest = _manifest(sidecar.manifest, probe, written, staging)
        config = format.parse_json((staging / "config.json").read_bytes(), "config.json")
        config["attnprune"] = json.loads(manifest.to_json())
        write_atomic(staging / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
        os.umask(umask := os.umask(0))
        for file in staging.iterdir():
            os.chmod(file, 0o666 & ~umask)  # safetensors writes files that only their owner can read
            fsync(file)
        if folder.exists():
            folder.rmdir()
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return manifest


def check_target(folder: Path) -> None:
    """Refuse to write over anything but an empty folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: exists and is not empty")


def _save(model: Any, tokenizer: Any, staging: Path) -> None:
    """Weights, config and tokenizer through transformers, and `auto_map`."""
    config_class, model_class = modeling_attnprune.classes_for(model.config.model_type)
    values = model.config.to_dict()
    for key in ("model_type", "architectures", "auto_map", "transformers_version"):
        values.pop(key, None)
    config = config_class(**values)
    with torch.device("meta"):
        merged = model_class(config)
    merged.load_state_dict(model.state_dict(), assign=True)
    merged.tie_weights()
    if model.generation_config is not None:
        merged.generation_config = model.generation_config
    with quiet():
        merged.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
    config_file = staging / "config.json"
    values = format.parse_json(config_file.read_bytes(), "config.json")
    code = format.CODE_FILE.removesuffix(".py")
    values["auto_map"] = {
        "AutoConfig": f"{code}.{config_class.__name__}",
        "AutoModelForCausalLM": f"{code}.{model_class.__name__}",
    }
    config_file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check_gates(model: Any, gates: dict[str, np.ndarray]) -> None:
    biases = [value.numpy() for name, value in model.state_dict().items() if name.endswith(GATE_SUFFIX)]
    if not all(np.array_equal(gates[f"layers.{i}.gate.bias"], bias) for i, bias in enumerate(biases)):
        raise InputError(f"{format.GATES_FILE}: the gates differ from those of the model")


def _check_config(model: Any, manifest: format.Manifest) -> None:
    """Refuse a config.json that was changed after the folder was written; its weights have hashes, it has none."""
    recorded = manifest.base.config
    if recorded is not None and (difference := config_difference(recorded, model.config)):
        raise InputError(f"config.json: {difference} as this model was written")


def _manifest(sidecar: format.Manifest, probe: format.ProbeEntry, model: Any, folder: Path) -> format.Manifest:
    names = [format.GATES_FILE, format.CODE_FILE, *(file.name for file in sorted(folder.glob("model*.safetensors*")))]
    files = {n: {"size": (folder / n).stat().st_size, "sha256": sha256_of(folder / n)} for n in names}
    values = sidecar.model_dump(exclude_none=True)
    values["merged"] = {
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights": values["weights"],
        "probe": values["probe"],
    }
    values["format_version"] = format.FORMAT_VERSION
    values["requires"] = ["gate:threshold", "merged:sizes"]
    values["base"]["config"] = config_values(model.config)  # that of the base it was applied to
    values["weights"] = {"kind": "none", "tensors": 0}
    values["probe"] = probe.model_dump()
    values["files"] = files
    return format.Manifest.model_validate(values)
