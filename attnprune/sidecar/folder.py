"""Sidecar and merged folders: write atomically, open and check with numpy alone. Never imports transformers."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from attnprune.errors import InputError, checked
from attnprune.files import fsync, reason, sha256_of, write_atomic
from attnprune.late import Shown
from attnprune.sidecar import format, strangers
from attnprune.units import percent

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, repr=False)
class Sidecar(Shown):
    """An opened sidecar. `manifest` and `gates` are checked; the weights are read and checked on first use."""

    path: Path
    manifest: format.Manifest

    def __repr__(self) -> str:
        result = self.manifest.result
        verdict = "met" if result.feasible else "NOT met"
        return (
            f"Sidecar({str(self.path)!r}: {percent(result.density)} of the edges open at T = {result.seq_len}, "
            f"loss {result.loss - result.base_loss:+.4f}, KL {result.kl:.4f}, constraint {verdict})"
        )

    @cached_property
    def gates(self) -> dict[str, np.ndarray]:
        """Tensors of gates.safetensors (see formats/attnprune-v1.md).

        Of a merged folder whose weights are here, the biases are those inside the weights.
        """
        arrays = format.read_arrays(self.read(format.GATES_FILE), format.GATES_FILE)
        format.check_gates(arrays, self.manifest)
        files = self.weight_files
        if files and all((self.path / name).exists() for name in files):
            format.check_gates_inside(
                {name: format.map_regular(self.path, name) for name in files}, arrays, self.manifest
            )
        return arrays

    @property
    def weight_files(self) -> list[str]:
        """Names of the files that hold a merged folder's weights; a sidecar has none."""
        if self.manifest.merged is None:
            return []
        return sorted({n for n in self.manifest.files if n.endswith(".safetensors")} - {format.GATES_FILE})

    @cached_property
    def mapped(self) -> dict[str, Any]:
        """The weight files of a merged folder, mapped instead of read; sizes and hashes are checked, once.

        Raises:
            InputError: naming a file that is missing or damaged.
        """
        maps = {}
        for name in self.weight_files:
            entry = self.manifest.files[name]
            maps[name] = format.map_regular(self.path, name, entry.size)
            if hashlib.sha256(maps[name]).hexdigest() != entry.sha256:
                raise InputError(f"{self.path / name}: is damaged (sha256 differs from the manifest)")
        return maps

    @property
    def density(self) -> list[np.ndarray]:
        """Open share of each head on calibration text, one array [heads] per layer."""
        return [self.gates[f"layers.{i}.stats.density"] for i in range(len(self.manifest.gate.heads))]

    def biases(self) -> list[np.ndarray]:
        """Gate bias of each head, one array [heads] per layer."""
        return [self.gates[f"layers.{i}.gate.bias"] for i in range(len(self.manifest.gate.heads))]

    def weights(self) -> dict[str, Tensor]:
        """The tensors of the delta or of the adapter (empty for kind none).

        Raises:
            InputError: damaged file or a non-finite value.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        raw = self.weight_bytes()
        try:
            return load(raw) if raw else {}
        except SafetensorError as error:
            raise InputError(f"{self.path}: not a safetensors file: {error}") from None

    def weight_bytes(self) -> bytes:
        """The checked bytes of the delta or adapter file (empty for kind none), read without torch.

        Raises:
            InputError: damaged file, a non-finite value, or adapters other than the manifest says.
        """
        kind = self.manifest.weights.kind
        format.check_weights_entry(self.manifest)
        if kind == "none":
            return b""
        name = format.DELTA_FILE if kind == "delta" else format.ADAPTER_FILE
        raw = self.read(name)
        format.check_finite(raw, name)
        count, entry = len(format.parse_safetensors(raw, name)), self.manifest.weights
        if "tensors" in entry.model_fields_set and count != entry.tensors:
            raise InputError(f"{name}: holds {count} tensors, the manifest says {entry.tensors}")
        if kind == "lora":
            config = format.parse_adapter_config(self.read(format.ADAPTER_CONFIG_FILE), self.manifest)
            format.check_lora(raw, self.manifest, config)
        return raw

    @checked()
    def read(self, name: str) -> bytes:
        """A listed file, its size and hash checked on the bytes that are used."""
        entry = self.manifest.files.get(name)
        if entry is None:
            raise InputError(f"{self.path / name}: not listed in {format.MANIFEST_FILE}")
        limit = format.MAX_GATES_BYTES if name == format.GATES_FILE else None
        raw = format.read_regular(self.path, name, limit, entry.size)
        if hashlib.sha256(raw).hexdigest() != entry.sha256:
            raise InputError(f"{self.path / name}: is damaged (sha256 differs from the manifest)")
        return raw


@checked()
def open_sidecar(path: str | Path) -> Sidecar:
    """Open and check the manifest of a local sidecar folder.

    Raises:
        InputError: no such folder, no manifest, or a manifest that does not pass.
    """
    folder = Path(path)
    try:
        names = {file.name for file in folder.iterdir()}
    except FileNotFoundError:
        raise InputError(f"{path}: no such file or folder") from None
    except NotADirectoryError:
        raise InputError(f"{path}: not a sidecar folder") from None
    except (OSError, ValueError) as error:  # no permission, name too long, a NUL in the name
        raise InputError(f"{path}: {reason(error)}") from None
    if format.MANIFEST_FILE not in names:
        hint = None
        if "checkpoints" in names:
            hint = f"this run has not finished: attnprune sparsify --resume {path}"
        elif "config.json" in names:
            hint = "this is a model folder; load a merged one with attnprune.load"
        raise InputError(f"{path}: no {format.MANIFEST_FILE}", hint=hint)
    strangers.check_names(f"{folder}/", strangers.names_in(folder), merged=False)
    return Sidecar(folder, read_manifest(folder))


def read_manifest(folder: Path) -> format.Manifest:
    """The manifest of a local sidecar folder.

    Raises:
        InputError: no manifest, or one that does not pass.
    """
    raw = format.read_regular(folder, format.MANIFEST_FILE, format.MAX_JSON_BYTES)
    return format.parse_manifest(raw, str(folder / format.MANIFEST_FILE))


def is_merged(folder: Path) -> bool:
    """Whether a folder is a merged model: the `model_type` in its config.json is one of ours.

    A config.json that cannot be read says nothing; then the code that only a merged folder has decides, so that
    whoever opens a damaged one says what is wrong with it.
    """
    config = folder / "config.json"
    try:
        if not config.is_file() or (folder / format.MANIFEST_FILE).exists():
            return False
        with config.open("rb") as file:
            values = format.parse_json(file.read(format.MAX_JSON_BYTES + 1), str(config))
    except OSError:  # whoever opens it says why
        return False
    except InputError:
        return (folder / format.CODE_FILE).exists()
    family = values.get("model_type") if isinstance(values, dict) else None
    return isinstance(family, str) and family.startswith("attnprune_")


def open_merged(folder: Path) -> Sidecar:
    """Open a merged folder: its manifest is the `attnprune` block of config.json.

    Raises:
        InputError: no block, one that does not pass, or files and keys that make a loader run or load something else.
    """
    names = strangers.names_in(folder)
    strangers.check_names(f"{folder}/", names, merged=True)
    name = f"{folder}/config.json"
    values = format.parse_json(format.read_regular(folder, "config.json", format.MAX_JSON_BYTES), name)
    manifest = format.parse_merged_config(values, name)
    strangers.check_configuration(name, values, manifest)
    strangers.check_listed(f"{folder}/", names, manifest)
    strangers.check_other_json(folder, names)
    return Sidecar(folder, manifest)


def has_release_code(folder: Path) -> bool:
    """Whether the code in a merged folder is this release's, byte for byte."""
    ours = Path(__file__).with_name(format.CODE_FILE)
    return format.read_regular(folder, format.CODE_FILE, format.MAX_JSON_BYTES) == ours.read_bytes()


def check_release_code(folder: Path) -> None:
    """Refuse a merged folder whose code is not this release's, byte for byte.

    Raises:
        InputError: other code, also that of an earlier release.
    """
    if not has_release_code(folder):
        raise InputError(
            f"{folder / format.CODE_FILE}: code differs from the release",
            hint="to merge with this release's: attnprune apply SIDECAR --merge OUT",
        )


def open_artefact(path: str | Path) -> Sidecar:
    """Open a local sidecar or merged folder.

    Raises:
        InputError: as `open_sidecar` and `open_merged`.
    """
    return open_merged(Path(path)) if is_merged(Path(path)) else open_sidecar(path)


def save_files(
    staging: Path, gates: Mapping[str, np.ndarray], weights: Mapping[str, Tensor], adapter_config: dict[str, Any] | None
) -> None:
    """Write the tensor files of a sidecar into `staging` (without the manifest, which is written last)."""
    import safetensors.numpy
    import safetensors.torch

    staging.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(dict(gates), staging / format.GATES_FILE)
    if adapter_config is not None:
        (staging / "adapter").mkdir(exist_ok=True)
        text = json.dumps(adapter_config, indent=2, sort_keys=True) + "\n"
        (staging / format.ADAPTER_CONFIG_FILE).write_text(text, encoding="utf-8")
    if weights:
        name = format.DELTA_FILE if adapter_config is None else format.ADAPTER_FILE
        safetensors.torch.save_file(dict(weights), staging / name)


def file_entries(folder: Path) -> dict[str, dict[str, Any]]:
    """Manifest entries (size, sha256) of all tensor and adapter files present in `folder`."""
    names = (format.GATES_FILE, format.DELTA_FILE, format.ADAPTER_CONFIG_FILE, format.ADAPTER_FILE)
    present = [name for name in names if (folder / name).exists()]
    return {name: {"size": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)} for name in present}


def publish(staging: Path, folder: Path, manifest: format.Manifest) -> Sidecar:
    """Move the staged files into `folder` and write the manifest last: it is what makes the folder a sidecar.

    `staging` belongs to the caller alone; it is used up.
    """
    folder.mkdir(parents=True, exist_ok=True)
    os.umask(umask := os.umask(0))
    for name in manifest.files:
        (folder / name).parent.mkdir(exist_ok=True)
        fsync(staging / name)
        os.chmod(staging / name, 0o666 & ~umask)  # safetensors writes files that only their owner can read
        os.replace(staging / name, folder / name)
    write_atomic(folder / format.MANIFEST_FILE, manifest.to_json())
    shutil.rmtree(staging, ignore_errors=True)
    return open_sidecar(folder)
