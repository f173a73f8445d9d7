"""Read and check any attnprune artefact with numpy and JSON alone: python examples/read_sidecar.py PATH

A sidecar folder, a merged model folder or a mask file. Written from formats/attnprune-v1.md, without attnprune.
"""

import hashlib
import json
import re
import sys
from pathlib import Path

import numpy as np

TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "U8": "u1"}


def check(holds, why):
    if not holds:
        raise ValueError(why)


def strict_json(raw):
    def unique(pairs):
        check(len(dict(pairs)) == len(pairs), "a key is given twice")
        return dict(pairs)

    def finite(text):
        check(np.isfinite(float(text)), "a number is not finite")
        return float(text)

    return json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=finite, parse_float=finite)


def tensors(raw):
    """(arrays by name, metadata) of a safetensors file; BF16 is widened to float32."""
    length = int.from_bytes(raw[:8], "little")
    check(length <= min(8 << 20, len(raw) - 8), "the header is too large")
    header, end, arrays = strict_json(raw[8 : 8 + length]), 8 + length, {}
    metadata = header.pop("__metadata__", {})
    check(len(header) <= 20_000, "too many tensors")
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, stop = (8 + length + offset for offset in entry["data_offsets"])
        check(begin == end <= stop <= len(raw) and len(entry["shape"]) <= 4, f"{name}: bad offsets or shape")
        array, end = np.frombuffer(raw[begin:stop], TYPES[entry["dtype"]]).reshape(entry["shape"]), stop
        arrays[name] = (array.astype("<u4") << 16).view("<f4") if entry["dtype"] == "BF16" else array
        check(np.isfinite(arrays[name]).all(), f"{name}: a value is not finite")
    check(end == len(raw), "bytes after the last tensor")
    return arrays, metadata


def read(path):
    """Manifest, gates, statistics and other tensors of a sidecar or merged folder, hashes checked."""
    merged = not (path / "attnprune.json").is_file()
    about = strict_json((path / ("config.json" if merged else "attnprune.json")).read_bytes())
    manifest = about["attnprune"] if merged else about
    check(manifest["format"] == "attnprune" and manifest["format_version"].split(".")[0] == "1", "another format")
    opened, known = {}, {"gate:threshold", "weights:lora", "weights:delta", "merged:sizes"}
    check({*manifest["requires"]} <= known, "an unknown feature")
    for name, entry in manifest["files"].items():
        check(re.fullmatch(r"([A-Za-z0-9_-][A-Za-z0-9._-]*(/|$))+(?<!/)", name), f"{name}: bad file name")
        raw = (path / name).read_bytes()
        check((len(raw), hashlib.sha256(raw).hexdigest()) == (entry["size"], entry["sha256"]), f"{name}: is damaged")
        if name.endswith(".safetensors"):
            opened[name] = tensors(raw)[0]
    gates, heads = opened.pop("gates.safetensors"), manifest["gate"]["heads"]
    out = {"merged": merged, "manifest": manifest, "offset_edges": gates.pop("stats.offset_edges").tolist()}
    for key in ("gate.bias", "gate.closed", "stats.density", "stats.open_by_offset", "stats.sink"):
        layers = [gates.pop(f"layers.{i}.{key}") for i in range(len(heads))]
        check([len(layer) for layer in layers] == heads, f"{key}: does not fit the heads")
        out[key.split(".")[1]] = [layer.tolist() for layer in layers]
    check(not gates, f"unexpected tensors {sorted(gates)}")
    return out | {"weights": {name: array for arrays in opened.values() for name, array in arrays.items()}}


def read_mask(raw):
    """The open edges of one text: `open` counts [layers][heads] and `is_open` bool [layers, heads, query, key]."""
    arrays, about = tensors(raw)
    check(about["format"] == "attnprune-mask" and about["format_version"].split(".")[0] == "1", "another format")
    tokens, bits = arrays["input_ids"], np.unpackbits(arrays["mask"], axis=-1, bitorder="little").astype(bool)
    check(not (bits & ~np.tri(len(tokens), bits.shape[-1], dtype=bool)).any(), "an open edge to a later token")
    return {"input_ids": tokens.tolist(), "open": bits.sum((2, 3)).tolist(), "is_open": bits[..., : len(tokens)]}


def show(path):
    """Lines like those of `attnprune inspect`."""
    if path.is_file():
        return ["open edges of each head, by layer:", *map(str, read_mask(path.read_bytes())["open"])]
    found = read(path)
    manifest, result = found["manifest"], found["manifest"]["result"]
    return [
        f"sparse {manifest['base']['model_type']}, weights {manifest['weights']['kind']}, merged: {found['merged']}",
        f"density {result['density']:.4%} at T = {result['seq_len']}, {result['edges_per_query']:.3g} per query",
        f"loss {result['loss']:.4f}, base {result['base_loss']:.4f}, KL {result['kl']:.4f} nats",
        *(" ".join(f"{100 * share:6.2f}" for share in layer) for layer in found["density"]),
    ]


if __name__ == "__main__":
    print(*show(Path(sys.argv[1])), sep="\n")
