"""The catalogue of bad sidecars (S) and bases (B) through the real command line, one subprocess per row."""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from attnprune import format
from tests.factory import refused, save_tiny_llama
from tests.sidecars import save_sidecar
from tests.test_format import (
    ADAPTER,
    ADAPTER_CONFIG,
    DELTA,
    GATES,
    LORA_A,
    LORA_B,
    MANIFEST,
    decode,
    encode,
    entry,
    gates_bytes,
    good_arrays,
    make,
    read_all,
    replace_file,
    store_manifest,
    stored_manifest,
)  # fmt: skip

CANARY = "hf_" + "canary" * 5
BIAS = "layers.1.gate.bias"


def listing(root):
    """Every path below `root` with its type, target or content hash."""
    found = {}
    for path in sorted(root.rglob("*")):
        if path.is_symlink():
            found[str(path)] = os.readlink(path)
        elif path.is_file():
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[str(path)] = "folder or special"
    return found


def refuse_cli(root, arguments, *parts, code=2):
    """The command ends with `code`, says why in one line that holds the parts, writes nothing and leaks no token."""
    before = listing(root)
    environment = os.environ | {"HF_TOKEN": CANARY, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "attnprune", *map(str, arguments)], capture_output=True, timeout=60, cwd=root,
        env=environment, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    output = (done.stdout + done.stderr).decode()
    lines = [line for line in done.stderr.decode().splitlines() if line.startswith("attnprune:")]
    assert done.returncode == code, output
    assert len(lines) == 1, output
    assert "Traceback" not in output
    assert CANARY not in output
    assert listing(root) == before
    for part in parts:
        assert part in lines[0]


def manifest(**changes):
    """Replace keys of the manifest; `a__b` names a nested one."""

    def mutate(folder):
        values = stored_manifest(folder)
        for path, value in changes.items():
            *parents, key = path.split("__")
            place = values
            for parent in parents:
                place = place[parent]
            place[key] = value
        store_manifest(folder, values)

    return mutate


def manifest_bytes(raw):
    return lambda folder: (folder / MANIFEST).write_bytes(raw)


def manifest_text(change):
    return lambda folder: (folder / MANIFEST).write_text(change((folder / MANIFEST).read_text()))


def drop(key):
    def mutate(folder):
        values = stored_manifest(folder)
        del values[key]
        store_manifest(folder, values)

    return mutate


def file(name):
    return manifest(files={name: {"size": 1, "sha256": "0" * 64}})


def gates(change):
    """Other gate tensors under a matching hash."""

    def mutate(folder):
        arrays = good_arrays()
        change(arrays)
        replace_file(folder, GATES, gates_bytes(arrays))

    return mutate


def value(name, index, number):
    return gates(lambda arrays: arrays[name].flat.__setitem__(index, number))


def array(name, values):
    return gates(lambda arrays: arrays.__setitem__(name, values))


def raw_gates(raw):
    return lambda folder: replace_file(folder, GATES, raw)


def header(tensors, data=b"0000"):
    return raw_gates(encode(tensors, data))


def special(name, create):
    def mutate(folder):
        (folder / name).unlink()
        create(folder / name)

    return mutate


def bind(path):
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path is short
    socket.socket(socket.AF_UNIX).bind(path.name)
    os.chdir(here)


def move_out(folder):
    (folder / GATES).rename(folder.parent / "outside")
    (folder / GATES).symlink_to("../outside")


def beside(name):
    return lambda folder: (folder / name).write_bytes(b"x")


def tensors(name, change):
    """Other adapter or delta tensors (float32) under a matching hash."""

    def mutate(folder):
        names, data = decode((folder / name).read_bytes())
        names.pop("__metadata__", None)
        arrays = {
            key: np.frombuffer(data[slice(*e["data_offsets"])], "<f4").reshape(e["shape"]).copy()
            for key, e in names.items()
        }
        change(arrays)
        replace_file(folder, name, gates_bytes(arrays))

    return mutate


def rename_target(new):
    def change(arrays):
        for key in list(arrays):
            arrays[key.replace("self_attn.q_proj", new)] = arrays.pop(key)

    return change


def adapter(**changes):
    def mutate(folder):
        text = json.dumps(ADAPTER_CONFIG | changes).encode()
        replace_file(folder, format.ADAPTER_CONFIG_FILE, text)

    return mutate


def both(*changes):
    return lambda folder: [change(folder) for change in changes]


TWO = "layers.0.gate.bias"
INSPECT, VERIFY = "inspect", "verify"
S = {
    "S1": (INSPECT, "none", shutil.rmtree, "no such file or folder"),
    "S2": (INSPECT, "none", lambda f: (shutil.rmtree(f), f.write_text("x")), "not a sidecar folder"),
    "S3": (INSPECT, "none", lambda f: (f / MANIFEST).unlink(), "no attnprune.json"),
    "S4-empty": (INSPECT, "none", manifest_bytes(b""), "not valid JSON"),
    "S4-blank": (INSPECT, "none", manifest_bytes(b" \n"), "not valid JSON"),
    "S5": (INSPECT, "none", manifest_text(lambda t: t[: len(t) // 2]), "not valid JSON (line"),
    "S6-list": (INSPECT, "none", manifest_bytes(b"[]"), "expected an object"),
    "S6-null": (INSPECT, "none", manifest_bytes(b"null"), "expected an object"),
    "S7": (INSPECT, "none", manifest_bytes(b" " * 50_000_000), "larger than 1 MiB"),
    "S8": (INSPECT, "none", manifest_bytes(b"[" * 100_000), "nested too deeply"),
    "S9-nan": (INSPECT, "none", manifest_text(lambda t: t.replace("3.25", "NaN")), "bad number"),
    "S9-inf": (INSPECT, "none", manifest_text(lambda t: t.replace("3.25", "1e999")), "bad number"),
    "S9-digits": (INSPECT, "none", manifest_text(lambda t: t.replace("4096", "9" * 5000)), "bad number"),
    "S10": (INSPECT, "none", manifest_text(lambda t: '{"format": "attnprune",' + t[1:]), "'format' given twice"),
    "S11-bytes": (INSPECT, "none", manifest_bytes(b'{"format": "\xff"}'), "not UTF-8"),
    "S11-utf16": (INSPECT, "none", manifest_bytes("{}".encode("utf-16")), "not UTF-8"),
    "S12": (INSPECT, "none", manifest(format_version="9.0"), "format 9.0 needs a newer attnprune"),
    "S13-zero": (INSPECT, "none", manifest(format_version="0.1"), "format_version"),
    "S13-true": (INSPECT, "none", manifest(format_version=True), "format_version"),
    "S13-missing": (INSPECT, "none", drop("format_version"), "format_version"),
    "S14-feature": (INSPECT, "none", manifest(requires=["gate:quantum"]), "gate:quantum"),
    "S14-type": (INSPECT, "none", manifest(result__steps="ten"), "result.steps"),
    "S15": (INSPECT, "none", file("../x.safetensors"), "bad file name"),
    **{
        f"S16-{i}": (INSPECT, "none", file(name), "bad file name")
        for i, name in enumerate(["/x", "C:\\x", "\\\\host\\x", "~/x", "a\0b", ""])
    },
    "S17": (INSPECT, "none", move_out, "link leaves the folder"),
    "S18-pipe": (INSPECT, "none", special(GATES, os.mkfifo), "not a regular file"),
    "S18-folder": (INSPECT, "none", special(GATES, Path.mkdir), "not a regular file"),
    "S18-socket": (INSPECT, "none", special(GATES, bind), GATES),
    "S19": (INSPECT, "none", special(GATES, lambda p: p.symlink_to(p.name)), "too many"),
    "S20": (VERIFY, "delta", lambda f: (f / DELTA).unlink(), "files:", "is missing"),
    "S21-hash": (VERIFY, "delta", lambda f: (f / DELTA).write_bytes(bytes((f / DELTA).stat().st_size)), "is damaged"),
    "S21-size": (INSPECT, "none", lambda f: (f / GATES).write_bytes(b""), "is damaged"),
    **{
        f"S22-{name}": (INSPECT, "lora", beside(name), "is refused")
        for name in ("x.pt", "pytorch_model.bin", "x.PKL", "modeling.py", "adapter/adapter_model.bin")
    },
    "S23": (INSPECT, "none", raw_gates(b"\x80\x02}q\x00." * 9), "not a safetensors file"),
    **{
        f"S24-{n}": (INSPECT, "none", raw_gates(raw), "too short")
        for n, raw in {0: b"", 7: b"1234567", 8: (2).to_bytes(8, "little")}.items()
    },
    **{
        f"S25-{n}": (INSPECT, "none", raw_gates(encode({}, b"", length)), "header too large")
        for n, length in {"2^63": 2**63, "file": 1000, "100MB": 10**8}.items()
    },
    **{
        f"S26-{i}": (INSPECT, "none", raw_gates(encode(raw)), "header")
        for i, raw in enumerate([b"{nonsense}", b"[]  ", b"null", b"\xff\xff\xff\xff"])
    },
    **{
        f"S27-{i}": (INSPECT, "none", header({TWO: entry(offsets=o)} | more), "")
        for i, (o, more) in enumerate([
            ((0, 400), {}), ((4, 0), {}), ((4, 8), {}), ((0, 4), {BIAS: entry(offsets=(0, 4))}),
        ])
    },
    "S28": (INSPECT, "none", header({TWO: entry()}, b"0000PK\x03\x04"), "data after the last tensor"),
    **{
        f"S29-{i}": (INSPECT, "none", header({TWO: entry(shape=shape)}), "")
        for i, shape in enumerate([(2**31 - 1,) * 4, (-1,), (1.5,)])
    },
    "S30": (INSPECT, "none", header({TWO: entry(shape=(0, 2**62, 2**62))}), "bad shape"),
    "S31": (INSPECT, "none", header({TWO: entry(shape=(1,) * 10_000)}), "too many dimensions"),
    "S32": (INSPECT, "none", header({f"t{i}": entry("U8", (1,), (i, i + 1)) for i in range(30_000)}, bytes(30_000)),
            "too many tensors"),
    "S32-200000": (INSPECT, "none", header({f"t{i}": entry("U8", (1,), (i, i + 1)) for i in range(200_000)}), "too"),
    **{
        f"S33-{i}": (INSPECT, "none", header({name: entry()}), "bad tensor name")
        for i, name in enumerate(["a..b", "a\0b", "\x1b[31m", "a\nb", "", "x" * 10_000])
    },
    "S34": (INSPECT, "none",
            raw_gates(encode(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2), b"0000")), "given twice"),
    "S35-large": (INSPECT, "none", header({"__metadata__": {"x": "y" * 90_000_000}}), "header too large"),
    "S35-number": (INSPECT, "none", header({"__metadata__": {"x": 1}}, b""), "metadata is not text"),
    "S36-f8": (INSPECT, "none", header({TWO: entry("F8_E4M3", (4,))}), "dtype"),
    "S36-i64": (INSPECT, "none", array(BIAS, np.zeros(3, np.int64)), BIAS),
    "S36-f16": (INSPECT, "none", array(BIAS, np.zeros(3, np.float16)), BIAS),
    "S36-bool": (INSPECT, "none", array(BIAS, np.zeros(3, bool)), "dtype"),
    "S37-nan": (INSPECT, "none", value(BIAS, 2, np.nan), f"{BIAS} is not finite"),
    "S37-inf": (INSPECT, "none", value(BIAS, 2, -np.inf), f"{BIAS} is not finite"),
    "S38": (INSPECT, "none", value(BIAS, 0, 1.1e4), "out of range"),
    **{
        f"S39-{i}": (INSPECT, "none", array(BIAS, np.zeros(shape, np.float32)), f"{BIAS}: expected")
        for i, shape in enumerate([2, (3, 1), 1])
    },
    "S40-missing": (INSPECT, "none", gates(lambda a: a.pop(BIAS)), f"{BIAS} is missing"),
    "S40-999": (INSPECT, "none", array("layers.999.gate.bias", np.zeros(2, np.float32)), "unexpected"),
    "S40-01": (INSPECT, "none", array("layers.01.gate.bias", np.zeros(2, np.float32)), "unexpected"),
    "S41-pair": (VERIFY, "lora", both(manifest(weights__tensors=1), tensors(ADAPTER, lambda a: a.pop(LORA_B))),
                 "has no partner"),
    "S41-rank": (VERIFY, "lora", tensors(ADAPTER, lambda a: a.update({LORA_A: np.ones((3, 3), np.float32)})), "rank 2"),
    "S41-alpha-0": (VERIFY, "lora", manifest(weights__alpha=0.0), "alpha"),
    "S41-alpha-nan": (VERIFY, "lora", manifest_text(lambda t: t.replace('"alpha": 4.0', '"alpha": NaN')), "bad number"),
    "S41-differs": (VERIFY, "lora", adapter(lora_alpha=8), "differs from attnprune.json"),
    "S42": (VERIFY, "lora", manifest(weights__rank=100_000), "weights.rank"),
    **{
        f"S43-{name}": (VERIFY, "lora", tensors(ADAPTER, rename_target(name)), "is not allowed")
        for name in ("mlp.q_proj", "embed_tokens", "input_layernorm")
    },
    "S44-delta": (VERIFY, "delta", tensors(DELTA, lambda a: a["model.w"].flat.__setitem__(0, np.nan)), "non-finite"),
    "S44-lora": (VERIFY, "lora", tensors(ADAPTER, lambda a: a[LORA_A].flat.__setitem__(0, np.inf)), "non-finite"),
    **{
        f"S46-{key}": (VERIFY, "lora", adapter(**{key: "os"}), f"{key}: key not allowed")
        for key in ("megatron_core", "auto_mapping", "trust_remote_code", "runtime_config")
    },
    "S47-above": (INSPECT, "none", value("layers.1.stats.density", 0, 1.5), "bad statistics"),
    "S47-below": (INSPECT, "none", value("layers.1.stats.open_by_offset", 0, -0.1), "bad statistics"),
    "S47-closed": (INSPECT, "none", value("layers.1.gate.closed", 0, 1), "contradicts the density"),
    "S47-profile": (INSPECT, "none", value("layers.1.stats.open_by_offset", 0, 0.9), "exceeds the density"),
}  # fmt: skip


@pytest.mark.parametrize("row", S)
def test_a_bad_sidecar_is_refused(tmp_path, row):
    command, kind, mutate, *parts = S[row]
    folder = make(tmp_path / "sidecar", kind)
    shutil.rmtree(tmp_path / "staging-sidecar", ignore_errors=True)
    mutate(folder)
    refuse_cli(tmp_path, [command, folder], *parts)


def test_s49_a_file_that_grows_while_it_is_read_is_refused(tmp_path, monkeypatch):
    folder = make(tmp_path / "sidecar")
    fstat = os.fstat

    def grow(descriptor):
        info = fstat(descriptor)
        with open(folder / GATES, "ab") as gate_file:
            gate_file.write(b"x")
        return info

    opened = read_all(folder)[0]
    monkeypatch.setattr(os, "fstat", grow)
    refused(lambda: opened.read(GATES), "changed while reading")


# Bases


@pytest.fixture(scope="module")
def gated(tmp_path_factory):
    """(base folder, sidecar folder) of a tiny llama."""
    root = tmp_path_factory.mktemp("gated")
    base = save_tiny_llama(root / "base")
    return base, save_sidecar(root / "sidecar", base).path


def edit_config(**changes):
    def mutate(base):
        path = base / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return mutate


def pickle_only(base):
    (base / "model.safetensors").rename(base / "pytorch_model.bin")


def no_tokenizer(base):
    for path in base.glob("tokenizer*"):
        path.unlink()


def truncated_gguf(base):
    (base / "model.gguf").write_bytes(b"GGUF\x03\0\0\0" + bytes(5))


def sharded(shard):
    def mutate(base):
        names = {"model.embed_tokens.weight": shard}
        index = {"metadata": {"total_size": 1}, "weight_map": names}
        (base / "model.safetensors").rename(base / "model-00001-of-00002.safetensors")
        (base / "model.safetensors.index.json").write_text(json.dumps(index))

    return mutate


B = {
    "B1": (lambda base: (shutil.rmtree(base), save_tiny_llama(base, num_hidden_layers=1)), "2 layers, 4 heads"),
    "B2": (
        lambda base: (shutil.rmtree(base), save_tiny_llama(base, seed=1)),
        "not the weights",
        "--allow-base-mismatch",
    ),
    "B4": (edit_config(model_type="bloom"), "bloom"),
    "B7": (edit_config(model_type="attnprune_llama"), "already sparsified"),
    "B8": (pickle_only, "no safetensors weights"),
    "B9": (edit_config(model_type="strange", auto_map={"AutoConfig": "x.X"}), "custom code"),
    "B11-missing": (sharded("model-00002-of-00002.safetensors"), ""),
    "B11-name": (sharded("../x.safetensors"), ""),
    "B13": (no_tokenizer, ""),
    "B14": (truncated_gguf, "cannot read this GGUF file"),
}


@pytest.mark.parametrize("row", B)
def test_a_bad_base_is_refused(tmp_path, gated, row):
    mutate, *parts = B[row]
    base = shutil.copytree(gated[0], tmp_path / "base")
    mutate(base)
    name = base / "model.gguf" if row == "B14" else base
    refuse_cli(tmp_path, ["verify", gated[1], "--base", name], "base:", *parts)
