"""A base model by any of its names: Hub id, folder, .gguf file or the bundled one."""

from __future__ import annotations

import copy
from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GgufConfig

from attnprune import files
from attnprune.attention.interface import GATE_ATTRIBUTE, check_family, gates_of
from attnprune.errors import InputError, UnsupportedModelError, not_installed
from attnprune.measure import Reference
from attnprune.runs.folder import DEMO
from attnprune.sidecar import format, hub
from attnprune.sidecar.folder import is_merged
from attnprune.sidecar.gguf_header import read_once
from attnprune.sidecar.identity import config_values, fingerprint, fingerprint_of, note_fingerprint
from attnprune.sidecar.precision import DTYPES, check_cast
from attnprune.sidecar.quantised import (
    bitsandbytes,
    entry_of,
    identifying_tensors,
    keep_as_stored,
    lacks_codes,
    let_go_of_files,
    settings,
    stored_settings,
)
from attnprune.sidecar.remote import check_repo_id
from attnprune.sidecar.spreading import DeviceMap, spread
from attnprune.sidecar.stored import fingerprint_of_files
from attnprune.sidecar.unreadable import explained


@dataclass(frozen=True)
class BaseModel:
    """A base model as it was loaded: `kind`, `repo_id` and `revision` as in the manifest."""

    model: Any
    tokenizer: Any
    kind: str
    repo_id: str | None = None
    revision: str | None = None


def demo_folder() -> Path:
    """The bundled addition model."""
    return Path(str(resources.files("attnprune"))) / "assets" / "demo"


def pick_device(name: str) -> Literal["cpu", "cuda"]:
    """The device to use: "auto" takes CUDA where there is one.

    Raises:
        InputError: CUDA asked for and not there, or another name.
    """
    available = torch.cuda.is_available()
    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"device {name}: is not auto, cpu or cuda")
    if name == "cuda" and not available:
        raise InputError("device cuda: no CUDA device here", hint="use --device cpu")
    return ("cuda" if available else "cpu") if name == "auto" else name


def context_length(model: Any) -> int | None:
    """The most tokens a model can read at once, or None where it does not say."""
    return getattr(model.config, "max_position_embeddings", None)


def torch_dtype(name: str) -> torch.dtype:
    """torch dtype by its short name ("bfloat16") or its str() form ("torch.bfloat16")."""
    return DTYPES[name.removeprefix("torch.")]


def load_base(
    name: str,
    *,
    revision: str | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    quantise: BitsAndBytesConfig | Literal["4bit", "8bit"] | None = None,
    device_map: DeviceMap | None = None,
) -> BaseModel:
    """Load a supported base model by Hub id, folder, .gguf file or "demo".

    One whose files hold it quantised by bitsandbytes is loaded as it is.

    Args:
        quantise: let bitsandbytes hold the linear layers in 4 or 8 bits. The model is then identified by its files in
            full precision and by this.
        device_map: where its parts are put, instead of `device`; see `spread` for a base in full precision.

    Raises:
        InputError: no such model, not a supported family, quantised by another library, no safetensors weights, weights
            that do not fit, values too large for `dtype` or not finite at all, unreadable file; `quantise` for a base
            that is quantised already or a .gguf file, or without bitsandbytes.
        AttnPruneError: the Hub cannot be reached.
    """
    try:
        kind, location, extra = _locate(name, revision)
    except (OSError, ValueError) as error:  # no permission, name too long, a NUL in the name
        raise InputError(f"{name}: {files.reason(error)}") from None
    with read_once() if kind == "gguf" else nullcontext():
        return _load(name, kind, location, extra, device, dtype, quantise, device_map)


def _load(
    name: str,
    kind: str,
    location: str,
    extra: dict[str, Any],
    device: str,
    dtype: torch.dtype,
    quantise: BitsAndBytesConfig | Literal["4bit", "8bit"] | None,
    device_map: DeviceMap | None,
) -> BaseModel:
    """What `_locate` found; the other arguments are those of `load_base`."""
    config = _read_config(name, kind, location, extra)
    stored = stored_settings(name, config, dtype)
    if quantise is not None:
        if stored is not None:
            raise InputError(f"{name}: is quantised already", hint="leave out --load-in")
        if kind == "gguf":
            raise InputError(
                f"{name}: a .gguf file cannot be loaded in 4 or 8 bits", hint="name the model that it was made from"
            )
        quantise = settings(quantise, dtype) if isinstance(quantise, str) else quantise
        extra["quantization_config"] = quantise
    tokenizer = _read_tokenizer(name, kind, location, {k: v for k, v in extra.items() if k != "quantization_config"})
    if kind == "gguf":
        extra["quantization_config"] = GgufConfig(dequantize=True)
    if quantise is not None or stored is not None:
        bitsandbytes()
        extra["device_map"] = device_map or {"": device}  # quantised ones are put there while they are read

    def read(dtype: torch.dtype, **instead: Any) -> Any:
        use_safetensors = None if kind == "gguf" else True
        with explained(name, kind, "this model"):
            # With its configuration, which takes seconds to read from a .gguf file.
            return AutoModelForCausalLM.from_pretrained(
                location, config=copy.deepcopy(config), dtype=dtype, use_safetensors=use_safetensors,
                output_loading_info=True, **extra | instead,
            )  # fmt: skip

    model, report = read(dtype)
    if kind == "gguf" and getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)  # the weights are plain tensors now
    _check_weights(name, model, report)
    try:
        check_cast(model, lambda: read(torch.float64)[0])
    except InputError as error:
        raise InputError(f"{name}: {error.message}", hint=error.hint) from None
    keep_as_stored(model)
    if quantise is not None:
        let_go_of_files(model)
    if stored is not None:
        if (layer := lacks_codes(model)) is not None:
            raise InputError(f"{name}: config.json says that the weights are quantised, and those of {layer} are not")
        note_fingerprint(model, fingerprint_of(identifying_tensors(model), entry_of(stored, stored=True)))
    elif quantise is not None:
        plain = fingerprint_of_files(location, extra.get("revision"), config, dtype)
        if plain is None:
            plain = fingerprint(read(dtype, quantization_config=None, device_map=None)[0])
        note_fingerprint(model, plain._replace(quantisation=entry_of(quantise, stored=False)))
    if "device_map" not in extra:
        if device_map is None:
            model = model.to(device)
        else:
            note_fingerprint(model, fingerprint(model))
            model = spread(model, device_map)
    return BaseModel(model.eval(), tokenizer, kind, name if kind == "hub" else None, extra.get("revision"))


def _locate(name: str, revision: str | None) -> tuple[str, str, dict[str, Any]]:
    """(kind, what transformers loads, its further arguments) of a base model."""
    path = Path(name)
    if name == DEMO:
        return "bundled", str(demo_folder()), {}
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise InputError(f"{name}: no such file")
        if find_spec("gguf") is None:
            raise not_installed("gguf", "gguf")
        return "gguf", str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        _check_folder(path)
        return "local", name, {}
    if path.exists():
        raise InputError(f"{name}: not a model folder or .gguf file")
    if name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1:
        raise InputError(f"{name}: no such folder")
    check_repo_id(name, owner=False)
    return "hub", name, {"revision": hub.base_commit(name, revision)}


def _check_folder(path: Path) -> None:
    if (path / format.MANIFEST_FILE).exists():
        raise InputError(f"{path}: this is a sidecar, not a base model", hint=f"attnprune inspect {path}")
    if is_merged(path):
        raise UnsupportedModelError(f"{path}: already sparsified", hint=f"load it with attnprune.load({str(path)!r})")
    for file in path.iterdir():
        if file.exists() and not file.is_file() and not file.is_dir():
            raise InputError(f"{file}: not a regular file")  # reading a pipe would hang
    if not (path / "config.json").is_file():
        raise InputError(f"{path}: no config.json, so not a model folder")
    (path / "config.json").open("rb").close()  # an unreadable one is said to be so by the caller
    if (path / "adapter_config.json").exists():
        raise InputError(f"{path}: adapter_config.json would load another base model", hint="merge the adapter first")
    if not list(path.glob("*.safetensors")):
        raise InputError(f"{path}: no safetensors weights")
    _check_shards(path)


def _check_shards(path: Path) -> None:
    """The shards that the index names are there; transformers names none of them in its own message."""
    index = path / "model.safetensors.index.json"
    if (path / "model.safetensors").exists() or not index.is_file():
        return  # transformers reads the index only where there is no single file
    values = format.parse_json(index.read_bytes(), str(index), format.MAX_LARGE_JSON_BYTES)
    shards = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise InputError(f"{index}: no weight_map of tensor names to shard names")
    for shard in sorted(set(shards.values())):
        if Path(shard).name != shard or not shard.endswith(".safetensors") or "\\" in shard or "\0" in shard:
            raise InputError(f"{index}: bad shard name {shard!r}")
        if not (path / shard).is_file():
            raise InputError(f"{path}: shard {shard} is missing")


def _read_config(name: str, kind: str, location: str, extra: dict[str, Any]) -> Any:
    """The configuration, of a supported model: a wrong one is refused before any weights are read."""
    with explained(name, kind, "this model"):
        config = AutoConfig.from_pretrained(location, trust_remote_code=False, **extra)
    if config.model_type.startswith("attnprune_"):
        raise UnsupportedModelError(f"{name}: already sparsified")
    check_family(config)
    if (context := getattr(config, "max_position_embeddings", None)) is not None and not context > 0:
        raise InputError(f"{name}: its configuration says that it reads {context} tokens")
    return config


def _read_tokenizer(name: str, kind: str, location: str, extra: dict[str, Any]) -> Any:
    with explained(name, kind, "its tokenizer"):
        # It may have more tokens than the model: they are refused where a text uses them.
        tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=False, **extra)
        tokenizer("1")  # much that is wrong with a tokenizer shows itself only now
    if kind == "gguf":
        tokenizer.name_or_path = name  # and not its folder, whose other files may be of other models
    tokenizer._commit_hash = extra.get("revision")  # as transformers calls it on configurations; see save_tokenizer
    return tokenizer


def _check_weights(name: str, model: Any, report: dict[str, Collection[str]]) -> None:
    """Refuse weights that transformers only warns about: tensors that it fills at random, tensors that it leaves out
    (other than those that the model's class declares ignorable), a tie that does not hold.
    """
    if missing := report["missing_keys"]:
        raise InputError(f"{name}: no weights for {_first_of(missing)}")
    if unused := report["unexpected_keys"]:
        has_gates = any(GATE_ATTRIBUTE in key for key in unused)
        hint = "these are the gates of a sparse model, saved without them: attnprune apply SIDECAR --merge OUT"
        raise InputError(
            f"{name}: a {model.config.model_type} model has no place for {_first_of(unused)} of its weights",
            hint=hint if has_gates else "the weights are of another architecture, or of another version of this one",
        )
    output = model.get_output_embeddings()
    if model.config.tie_word_embeddings and output.weight is not model.get_input_embeddings().weight:
        raise InputError(f"{name}: tied weights differ: config.json ties the head to the embeddings, the file does not")


def _first_of(names: Collection[str]) -> str:
    return min(names) + (" and others" if len(names) > 1 else "")


def dense(model: Any) -> Reference:
    """A base model without gates as a function from token ids to logits."""

    def reference(ids: Tensor) -> Tensor:
        return model(input_ids=ids, use_cache=False).logits

    return reference


def identity(base: BaseModel) -> dict[str, Any]:
    """The manifest's `base` entry of a loaded base model; call it before any weight changes."""
    if gates_of(base.model):
        raise UnsupportedModelError("the base model already has gates")
    structure, content, quantisation = fingerprint(base.model)
    return {
        "kind": base.kind,
        "repo_id": base.repo_id,
        "revision": base.revision,
        "model_type": base.model.config.model_type,
        "dtype": str(base.model.dtype).removeprefix("torch."),
        "structure": structure,
        "content": content,
        "config": config_values(base.model.config),
        "quantisation": quantisation,
    }
