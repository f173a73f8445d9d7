"""The merged form: an ordinary Hugging Face folder with the gates inside (formats/attnprune-v1.md)."""

from __future__ import annotations

import json
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer

from attnprune.attention.interface import attach
from attnprune.errors import AttnPruneError, InputError
from attnprune.files import check_new_folder, fsync, reason, settle, sha256_of, temporary_folder, write_atomic
from attnprune.sidecar import format, modeling_attnprune
from attnprune.sidecar.contents import Headers, check_files, check_weights
from attnprune.sidecar.folder import Sidecar, open_merged
from attnprune.sidecar.precision import check_cast
from attnprune.sidecar.probe import check_probe, measure_again
from attnprune.sidecar.quiet import quiet
from attnprune.sidecar.tokenizer import save_tokenizer
from attnprune.sidecar.unreadable import failures_as

GATE_SUFFIX = "attnprune_gate.bias"
# Keys from which transformers makes one dictionary entry per label, however many they say there are.
_LABELS = frozenset({"num_labels"})


def load_merged(path: Path, *, verify: bool = True) -> tuple[Any, Any]:
    """(model, tokenizer) of a merged folder: the stock class with our gates, in the dtype of the files.

    Raises:
        InputError: damaged folder, a configuration of another model than the one whose weights are in it, or weights
            that are not finite in the dtype that it names.
        VerificationError: the folder's own probe is not reproduced.
    """
    sidecar = open_merged(path)
    before = _stamps(sidecar)
    check_files(sidecar)
    headers = check_weights(sidecar)
    with _explained(path):
        _check_structure(sidecar, headers)
        model, tokenizer = _read(path)
        dtype = str(model.dtype).removeprefix("torch.")
        if sidecar.manifest.merged is None or dtype != sidecar.manifest.merged.dtype:
            raise InputError(f"{path}: loads in {dtype}, which is not the dtype that it was merged in")
        tokenizer("text")  # a bad value of its configuration shows itself only now
        probe = measure_again(model, sidecar.manifest.probe) if verify else None
    if _stamps(sidecar) != before:
        raise InputError(f"{path}: changed while reading")
    if probe is not None:
        check_probe(probe, sidecar.manifest.probe)
    return model, tokenizer


def check_classes(sidecar: Sidecar) -> Any:
    """config.json of a merged folder names the very classes of its family; returns its model class.

    Raises:
        InputError: an unknown family, or another one's classes.
    """
    values = format.parse_json(format.read_regular(sidecar.path, "config.json"), "config.json")
    with _explained(sidecar.path):
        config_class, model_class = modeling_attnprune.classes_for(sidecar.manifest.base.model_type)
    if values["auto_map"] != _auto_map(config_class, model_class):
        raise InputError(f"{sidecar.path}/config.json: auto_map is not that of {values['model_type']}")
    return model_class


def _check_structure(sidecar: Sidecar, headers: Headers) -> None:
    """The model that config.json describes has the layers and heads of the manifest and the tensors of the files.

    Nothing of its size is built: layers are counted first, and tensors have no memory on the meta device.
    """
    model_class, heads = check_classes(sidecar), sidecar.manifest.gate.heads
    config_class = model_class.config_class
    values = format.parse_json(format.read_regular(sidecar.path, "config.json"), "config.json")
    for key in ("num_hidden_layers", config_class.attribute_map.get("num_hidden_layers")):
        if values.get(key, len(heads)) != len(heads):
            raise InputError(f"{sidecar.path}/config.json: {key} is not {len(heads)}, the manifest's number of layers")
    if values.keys() & _LABELS:
        raise InputError(f"{sidecar.path}/config.json: a language model has no {min(values.keys() & _LABELS)}")
    with quiet(), torch.device("meta"):
        config = config_class.from_dict(values)
        if [config.num_attention_heads] * config.num_hidden_layers != heads:
            raise InputError(f"{sidecar.path}/config.json: the layers and heads are not those of the manifest")
        model = model_class(config)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in model.all_tied_weights_keys:  # stored once, under another name
        wanted.pop(name, None)
    wrong = sorted(wanted.keys() ^ headers.keys())
    if wrong:
        problem = "is missing" if wrong[0] in wanted else "is not one of the model that config.json describes"
        raise InputError(f"{sidecar.path}: the tensor {wrong[0]} {problem}")
    for name, shape in wanted.items():
        if headers[name][1] != shape:
            found = list(headers[name][1])
            raise InputError(f"{sidecar.path}: {name} has shape {found}, config.json says {list(shape)}")


def _stamps(sidecar: Sidecar) -> list[tuple[int, int, int]]:
    """What changes with a file: transformers opens the files again after their hashes were checked."""
    try:
        stats = [(sidecar.path / name).stat() for name in ("config.json", *sidecar.manifest.files)]
    except OSError as error:
        raise InputError(f"{error.filename}: {reason(error)}") from None
    return [(stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats]


def _explained(path: Path) -> AbstractContextManager[None]:
    """Whatever a bad file makes transformers or tokenizers raise becomes one line."""
    return failures_as(lambda _, reason: InputError(f"{path}: cannot load this merged model: {reason}"))


def _read(path: Path) -> tuple[Any, Any]:
    """Load the portable class, which refuses bad tensors, and move its weights into the stock class, which counts."""
    config_values = format.parse_json(format.read_regular(path, "config.json"), "config.json")
    family = str(config_values["model_type"]).removeprefix("attnprune_")
    config_class, model_class = modeling_attnprune.classes_for(family)
    with quiet():
        config = config_class.from_pretrained(path)
        portable: Any = model_class.from_pretrained(path, config=config, dtype="auto", use_safetensors=True)
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
        InputError: the folder exists and is not empty, or is another place that cannot be written; a weight that is not
            finite.
        AttnPruneError: no space, or another fault while writing.
        VerificationError: the written files do not reproduce the sidecar's probe.
    """
    check_new_folder(folder)
    check_cast(model, lambda: model)
    try:
        with temporary_folder(folder.parent) as staging:
            manifest = _write(model, tokenizer, sidecar, staging, same_dtype=same_dtype)
            settle(staging)
            staging.rename(folder)  # over an empty folder, but over nothing else
            fsync(folder.parent)
    except (OSError, SafetensorError) as error:
        why = reason(error) if isinstance(error, OSError) else str(error)
        raise AttnPruneError(f"{folder}: cannot write: {why}") from error
    return manifest


def _write(model: Any, tokenizer: Any, sidecar: Sidecar, staging: Path, *, same_dtype: bool) -> format.Manifest:
    """`write_merged` into a folder that has no name yet."""
    _save(model, tokenizer, staging)
    _without_hooks(staging)
    gates = sidecar.gates  # checked against the sidecar's manifest
    shutil.copyfile(sidecar.path / format.GATES_FILE, staging / format.GATES_FILE)
    shutil.copyfile(str(modeling_attnprune.__file__), staging / format.CODE_FILE)
    written, _ = _read(staging)
    _check_gates(written, gates)
    probe = measure_again(written, sidecar.manifest.probe)
    if same_dtype:
        check_probe(probe, sidecar.manifest.probe)
    manifest = _manifest(sidecar.manifest, probe, written.dtype, staging)
    config = format.parse_json((staging / "config.json").read_bytes(), "config.json")
    config["attnprune"] = json.loads(manifest.to_json())
    write_atomic(staging / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    return manifest


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
    save_tokenizer(tokenizer, staging)
    config_file = staging / "config.json"
    values = format.parse_json(config_file.read_bytes(), "config.json")
    values["auto_map"] = _auto_map(config_class, model_class)
    config_file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _auto_map(config_class: Any, model_class: Any) -> dict[str, str]:
    """`auto_map` of config.json: both classes are in the folder's own code."""
    code = format.CODE_FILE.removesuffix(".py")
    return {
        "AutoConfig": f"{code}.{config_class.__name__}",
        "AutoModelForCausalLM": f"{code}.{model_class.__name__}",
    }


def _without_hooks(staging: Path) -> None:
    """What base and tokenizer bring along that would run other code, or say where a file lay, stays behind."""
    for file in staging.glob("*config.json"):
        raw = file.read_bytes()  # written a moment ago: of any size
        values = format.parse_json(raw, file.name, len(raw))
        dropped = {*format.LOADER_HOOKS, *format.LOCAL_PATHS} - ({"auto_map"} if file.name == "config.json" else set())
        if dropped.intersection(values):
            kept = {key: value for key, value in values.items() if key not in dropped}
            file.write_text(json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _check_gates(model: Any, gates: dict[str, np.ndarray]) -> None:
    biases = [value.numpy() for name, value in model.state_dict().items() if name.endswith(GATE_SUFFIX)]
    if not all(np.array_equal(gates[f"layers.{i}.gate.bias"], bias) for i, bias in enumerate(biases)):
        raise InputError(f"{format.GATES_FILE}: the gates differ from those of the model")


def _manifest(sidecar: format.Manifest, probe: format.ProbeEntry, dtype: torch.dtype, folder: Path) -> format.Manifest:
    present = [file.relative_to(folder) for file in sorted(folder.rglob("*")) if file.is_file()]
    names = [path.as_posix() for path in present if all(map(format.NAME.fullmatch, path.parts))]
    names.remove("config.json")  # the manifest lies in it, with the fingerprint of the rest
    files = {n: {"size": (folder / n).stat().st_size, "sha256": sha256_of(folder / n)} for n in names}
    config = format.parse_json((folder / "config.json").read_bytes(), "config.json")
    values = sidecar.model_dump(exclude_none=True)
    values["merged"] = {
        "dtype": str(dtype).removeprefix("torch."),
        "config": format.config_fingerprint(config),
        "weights": values["weights"],
        "probe": values["probe"],
    }
    values["format_version"] = format.FORMAT_VERSION
    values["requires"] = ["gate:threshold", format.SIZES_HIDDEN]
    values["weights"] = {"kind": "none", "tensors": 0}
    values["probe"] = probe.model_dump()
    values["files"] = files
    return format.Manifest.model_validate(values)
