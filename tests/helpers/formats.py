"""Sidecars as plain bytes and dictionaries, good ones to damage: for every test of the format."""

from __future__ import annotations

import copy
import hashlib
import json

import numpy as np
import torch

from attnprune.sidecar import format
from attnprune.sidecar.folder import file_entries, open_sidecar, publish, save_files

HEADS = (2, 3)

MANIFEST, GATES, DELTA, ADAPTER = format.MANIFEST_FILE, format.GATES_FILE, format.DELTA_FILE, format.ADAPTER_FILE


def good_arrays():
    arrays = {"stats.offset_edges": np.array([0, 1, 8], dtype=np.int32)}
    for layer, heads in enumerate(HEADS):
        arrays[f"layers.{layer}.gate.bias"] = np.linspace(-4, 4, heads, dtype=np.float32)
        arrays[f"layers.{layer}.gate.closed"] = (np.arange(heads) == 1).astype(np.uint8)
        is_open = (np.arange(heads) != 1).astype(np.float32)
        arrays[f"layers.{layer}.stats.density"] = is_open * np.float32(0.25)
        arrays[f"layers.{layer}.stats.open_by_offset"] = np.outer(is_open, [0.25, 0.25]).astype(np.float32)
        arrays[f"layers.{layer}.stats.sink"] = is_open * np.float32(0.5)
    return arrays


def good_manifest(kind="none"):
    return {
        "format": "attnprune",
        "format_version": "1.0",
        "requires": ["gate:threshold"] + ([] if kind == "none" else [f"weights:{kind}"]),
        "created_by": "attnprune 0.1.0",
        "base": {
            "kind": "hub",
            "repo_id": "some/model",
            "revision": "0" * 40,
            "model_type": "llama",
            "dtype": "float32",
            "structure": "1" * 64,
            "content": "2" * 64,
        },
        "gate": {"logit": "score+bias", "threshold": 0, "heads": list(HEADS)},
        "weights": {"kind": kind, "tensors": 0 if kind == "none" else 2}
        | ({"rank": 2, "alpha": 4.0} if kind == "lora" else {}),
        "result": {
            "loss": 3.25,
            "base_loss": 3.2,
            "control_loss": 3.19,
            "kl": 0.04,
            "density": 0.01,
            "edges_per_query": 1.5,
            "open_edges": 10,
            "visible_edges": 1000,
            "exact_match": 0.5,
            "seq_len": 64,
            "tokens": 4096,
            "data": "some text",
            "data_sha256": "3" * 64,
            "steps": 100,
            "seed": 0,
            "constraint": "kl",
            "limit": 0.05,
            "feasible": True,
        },
        "probe": {"input_ids": [1, 2, 3], "loss": 3.3, "open_edges": 5, "tolerance": 0.001, "edge_tolerance": 0},
        "files": {},
    }


LORA_A, LORA_B = (f"base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.weight" for side in "AB")

ADAPTER_CONFIG = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


def good_weights(kind, dtype=torch.float32):
    if kind == "lora":
        return {LORA_A: torch.arange(6, dtype=dtype).reshape(2, 3), LORA_B: torch.ones(3, 2, dtype=dtype)}
    values = {"model.w": torch.arange(6, dtype=dtype).reshape(2, 3), "model.b": torch.ones(1, dtype=dtype)}
    return {} if kind == "none" else values


def make(folder, kind="none", weights=None):
    """A valid sidecar in `folder`, written by the package's own functions."""
    staging = folder.parent / f"staging-{folder.name}"
    weights = weights or good_weights(kind)
    save_files(staging, good_arrays(), weights, dict(ADAPTER_CONFIG) if kind == "lora" else None)
    values = good_manifest(kind) | {"files": file_entries(staging)}
    publish(staging, folder, format.Manifest.model_validate(values))
    return folder


def read_all(folder):
    opened = open_sidecar(folder)
    return opened, opened.gates, opened.weights()


def stored_manifest(folder):
    return json.loads((folder / MANIFEST).read_text())


def store_manifest(folder, values):
    (folder / MANIFEST).write_text(json.dumps(values))


def replace_file(folder, name, raw):
    """Put other bytes into a listed file and bring the manifest's size and hash in line, as an attacker would."""
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(raw)
    values = stored_manifest(folder)
    values["files"][name] = {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    store_manifest(folder, values)


def encode(header, data=b"", length=None):
    """A safetensors file from a header (object or raw bytes) and its data."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def decode(raw):
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def gates_bytes(arrays):
    """The same file from arrays, written by hand so that it can hold what the library refuses to write."""
    names = {
        "float32": "F32",
        "float64": "F64",
        "float16": "F16",
        "int32": "I32",
        "int64": "I64",
        "uint8": "U8",
        "bool": "BOOL",
    }
    header, data = {}, b""
    for name, array in arrays.items():
        raw = array.tobytes()
        entry = {"dtype": names[array.dtype.name], "shape": list(array.shape)}
        header[name] = entry | {"data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    return encode(header, data)


def changed(values, path, change):
    """A copy of `values` where `change(parent, key)` was applied at `path`."""
    values = copy.deepcopy(values)
    parent = values
    for key in path[:-1]:
        parent = parent[key]
    change(parent, path[-1])
    return values


# Headers of safetensors files


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def damage(raw, generator):
    """Bit flips, a cut, an insertion or a repeated stretch."""
    raw = bytearray(raw)
    kind = generator.randrange(5)
    if kind <= 1:
        for _ in range(generator.choice([1, 1, 2, 8])):
            raw[generator.randrange(len(raw))] ^= 1 << generator.randrange(8)
    elif kind == 2:
        del raw[generator.randrange(len(raw)) :]
    elif kind == 3:
        at = generator.randrange(len(raw))
        raw[at:at] = generator.randbytes(generator.randint(1, 9))
    else:
        at, length = generator.randrange(len(raw)), generator.randint(1, 40)
        raw[at : at + length] = raw[at : at + length] * 2
    return bytes(raw)


STRANGE = [
    None, True, False, 0, -1, 1, 2, 2**31, 2**63, 10**400, 0.0, -0.0, 1.5, 1e308, "", "x", "\0", "a\nb", "\x1b[31m",
    "\ud800", "²", "1.0", "../x", "F32", "9" * 5000, [], [0], [[]], {}, {"x": 1}, {"\n": None}, [None] * 50,
]  # fmt: skip


def places(value, path=()):
    """Paths of everything inside nested dictionaries and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def swap(values, generator):
    """Replace, delete, add or rename something somewhere."""

    def change(parent, key):
        kind = generator.randrange(6)
        if kind == 0:
            del parent[key]
        elif kind == 1 and isinstance(parent, dict):
            parent[str(generator.choice(STRANGE))] = parent.pop(key)
        elif kind == 2 and isinstance(parent, dict):
            parent[str(generator.choice(STRANGE))] = copy.deepcopy(generator.choice(STRANGE))
        else:
            parent[key] = copy.deepcopy(generator.choice(STRANGE))

    return changed(values, generator.choice(list(places(values))), change)
