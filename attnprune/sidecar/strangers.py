"""What may not lie beside a sparse model: files and JSON keys that make some loader run or fetch other code. No torch.

The rules are over relative names, so that a folder here and the listing of a repository are held to the same ones.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from attnprune.errors import InputError
from attnprune.files import reason
from attnprune.runs.folder import CHECKPOINTS
from attnprune.sidecar import format

# transformers calls what it finds here instead of its own `generate`, and installs what its requirements name.
_GENERATE_FOLDER = "custom_generate"
# Every token of a vocabulary is a key in these, and no loader looks for anything else in them.
_VOCABULARIES = frozenset({"tokenizer.json", "vocab.json", "added_tokens.json"})
_TOKENIZER_FILES = _VOCABULARIES | {
    "tokenizer_config.json", "special_tokens_map.json", "merges.txt", "vocab.txt", "tekken.json",
    "generation_config.json",
}  # fmt: skip
_TEMPLATES_FOLDER = "additional_chat_templates"
_CONFIG_CLASS = re.compile(r"AttnPrune[A-Za-z0-9]+Config")
_MODEL_CLASS = re.compile(r"AttnPrune[A-Za-z0-9]+")


def names_in(folder: Path) -> list[str]:
    """Every file and folder below `folder` by its relative name; a run's own checkpoints are not looked into.

    Raises:
        InputError: a part of it cannot be read, or is a link to a folder elsewhere.
    """
    names = []

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename or folder}: {reason(error)}") from None

    for place, folders, files in os.walk(folder, onerror=refuse):
        here = Path(place)
        if here == folder and CHECKPOINTS in folders:
            folders.remove(CHECKPOINTS)
        for name in folders:
            if (here / name).is_symlink() and not (here / name).resolve().is_relative_to(folder.resolve()):
                raise InputError(f"{here / name}: link leaves the folder")  # and nobody sees what lies behind it
        names += [(here / name).relative_to(folder).as_posix() for name in (*folders, *files)]
    return sorted(names)


def check_names(prefix: str, names: Iterable[str], *, merged: bool) -> None:
    """Refuse files by their names; `prefix` goes before a name in messages ("FOLDER/" or "USER/NAME: ").

    Raises:
        InputError: pickle or code other than a merged model's own, or an adapter at the root.
    """
    for name in sorted(names):
        path = PurePosixPath(name)
        ours = merged and name == format.CODE_FILE
        if path.suffix.lower() in format.CODE_SUFFIXES and not ours:
            raise InputError(f"{prefix}{name}: pickle or code beside a sparse model is refused")
        if any(part.lower() == _GENERATE_FOLDER for part in path.parts):
            raise InputError(f"{prefix}{name}: code for generate beside a sparse model is refused")
        if name.lower() == "adapter_config.json":
            loaded = "would hide the sparse model" if merged else "would be loaded without the gates"
            raise InputError(f"{prefix}{name}: an adapter at the root {loaded}")


def check_listed(prefix: str, names: Iterable[str], manifest: format.Manifest) -> None:
    """What transformers picks by its name is in a merged model's manifest: weights, and the tokenizer's files.

    Folders of older releases, which have no fingerprint of config.json, list no tokenizer.

    Raises:
        InputError: naming a file that the manifest does not list.
    """
    has_tokenizer = manifest.merged is not None and manifest.merged.config is not None
    for name in sorted(set(names) - set(manifest.files)):
        if "/" not in name and name.lower().endswith((".safetensors", ".safetensors.index.json", ".gguf")):
            raise InputError(f"{prefix}{name}: weights that the manifest does not list")
        if has_tokenizer and _is_of_tokenizer(name):
            raise InputError(f"{prefix}{name}: a tokenizer file that the manifest does not list")


def _is_of_tokenizer(name: str) -> bool:
    path = PurePosixPath(name)
    if path.parts[0] == _TEMPLATES_FOLDER:  # a template's name is free, and the manifest's are not
        return len(path.parts) == 2 and path.suffix == ".jinja" and format.NAME.fullmatch(path.name) is not None
    return "/" not in name and (name in _TOKENIZER_FILES or path.suffix in (".jinja", ".model", ".tiktoken"))


def check_configuration(name: str, values: Mapping[str, Any], manifest: format.Manifest) -> None:
    """config.json of a merged model says exactly how it is loaded: our code, our attention, nothing else.

    Raises:
        InputError: naming the key.
    """
    found, stem = values.get("auto_map"), format.CODE_FILE.removesuffix(".py")
    classes = {"AutoConfig": _CONFIG_CLASS, "AutoModelForCausalLM": _MODEL_CLASS}
    if not isinstance(found, dict) or set(found) != set(classes):
        raise InputError(f"{name}: auto_map is not that of a merged model")
    for key, pattern in classes.items():
        file, _, cls = found[key].partition(".") if isinstance(found[key], str) else ("", "", "")
        if file != stem or pattern.fullmatch(cls) is None:
            raise InputError(f"{name}: auto_map: {key} is not in {format.CODE_FILE}")
    wanted: dict[str, Any] = {
        "model_type": f"attnprune_{manifest.base.model_type}",
        "attn_implementation": "attnprune_portable",
        "vocab_size": 0,
    }
    if format.SIZES_HIDDEN in manifest.requires:
        width = "n_embd" if "attnprune_n_embd" in values else "hidden_size"
        wanted[width] = 2 * manifest.gate.heads[0]
    for key, value in wanted.items():
        if values.get(key) != value or isinstance(values[key], bool):
            raise InputError(f"{name}: {key} is not {value!r}, so other classes might load it without its gates")
    rest = {key: value for key, value in values.items() if key not in ("auto_map", format.MERGED_KEY)}
    _check_hooks(name, rest)


def check_other_json(folder: Path, names: Iterable[str]) -> None:
    """No JSON file of a merged folder but config.json, which `check_configuration` reads, names code.

    Raises:
        InputError: naming file and key, or a file that is not JSON.
    """
    for name in names:
        path = PurePosixPath(name)
        if path.suffix.lower() == ".json" and path.name not in _VOCABULARIES and name != "config.json":
            if (folder / name).is_dir():
                continue
            raw = format.read_regular(folder, name, format.MAX_LARGE_JSON_BYTES)
            _check_hooks(f"{folder / name}", format.parse_json(raw, f"{folder / name}", format.MAX_LARGE_JSON_BYTES))


def _check_hooks(name: str, values: Any) -> None:
    """Search nested objects and lists without recursion, which deep ones would exhaust."""
    waiting = [values]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            hooks = format.LOADER_HOOKS.intersection(value)
            if hooks:
                raise InputError(f"{name}: {min(hooks)} makes a loader run or load something else; it is refused")
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)
