"""The catalogue of bad sidecars (S) and bases (B) through the real command line, one subprocess per row.

Long because it is a table, a row for each bad input.
"""

import ctypes
import hashlib
import json
import os
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from attnprune.sidecar import bases, format, loading, merged
from tests.helpers.command import python
from tests.helpers.factory import refused, save_text, save_tiny_llama
from tests.helpers.formats import (
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
    replace_file,
    store_manifest,
    stored_manifest,
)
from tests.helpers.sidecars import save_sidecar, save_tiny_gpt2

LIBC = ctypes.CDLL(None)  # loaded here, because nothing may be loaded between fork and exec
CANARY = "hf_" + "canary" * 5
BIAS = "layers.1.gate.bias"


def listing(root):
    """Every path below `root` with its type, target or content hash."""
    found = {}
    for path in sorted(root.rglob("*")):
        if path.is_symlink():
            found[str(path)] = os.readlink(path)
        elif path.is_file() and os.access(path, os.R_OK):
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[str(path)] = "folder or special"
    return found


def bind_by_permissions():
    """Run in a child before it starts Python: file permissions then bind root like everybody else.

    Root stays root, because another user may not be able to read the interpreter.
    """
    drop_from_bounding_set = 24
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        if LIBC.prctl(drop_from_bounding_set, capability, 0, 0, 0):
            raise OSError("prctl")


def refuse_cli(root, arguments, *parts, code=2, program=("-m", "attnprune"), bound=False):
    """The command ends with `code`, says why in one line that holds the parts, writes nothing and leaks no token.

    bound: file permissions count even where root runs the tests.
    """
    before = listing(root)
    before_start = bind_by_permissions if bound and os.geteuid() == 0 else None
    environment = os.environ | {"HF_TOKEN": CANARY}
    done = python(*program, *arguments, cwd=root, env=environment, timeout=60, preexec_fn=before_start)
    output = done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("attnprune:")]
    assert done.returncode == code, output
    assert len(lines) == 1, output
    assert "Traceback" not in output
    assert CANARY not in output
    assert listing(root) == before
    assert parts
    assert all(parts)  # an empty one is part of any line
    for part in parts:
        assert part in lines[0]


def patched(source):
    """The real command line in a process in which something else happens first."""
    return "-c", source + "\nfrom attnprune.cli.app import main\nmain()\n"


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


ALL_LINEAR = ["gate:threshold", "weights:lora", "lora:all-linear"]


def rename_target(new):
    """Adapters of another module, which the adapter's configuration names as well."""

    def change(arrays):
        for key in list(arrays):
            arrays[key.replace("model.layers.0.self_attn.q_proj", new)] = arrays.pop(key)

    return both(adapter(target_modules=[new.rsplit(".", 1)[-1]]), tensors(ADAPTER, change))


def adapter(**changes):
    def mutate(folder):
        text = json.dumps(ADAPTER_CONFIG | changes).encode()
        replace_file(folder, format.ADAPTER_CONFIG_FILE, text)

    return mutate


def own_gates(change):
    """Other gate tensors in a sidecar that has its own, under a matching hash."""

    def mutate(folder):
        arrays = {k: v.copy() for k, v in format.read_arrays((folder / GATES).read_bytes(), GATES).items()}
        change(arrays)
        replace_file(folder, GATES, gates_bytes(arrays))

    return mutate


def both(*changes):
    return lambda folder: [change(folder) for change in changes]


TWO = "layers.0.gate.bias"
INSPECT, VERIFY = "inspect", "verify"
S = {
    "S1": (INSPECT, "none", shutil.rmtree, "no such file or folder"),
    "S2": (INSPECT, "none", lambda f: (shutil.rmtree(f), f.write_text("x")), "not a sidecar folder"),
    "S2-reverse": (INSPECT, "none", special(MANIFEST, Path.mkdir), "not a regular file"),
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
    **{
        f"S13-{version!r}": (INSPECT, "none", manifest(format_version=version), "format_version:")
        for version in ("0.1", "-1.0", "1", -1, 1, True, None)
    },
    "S13-missing": (INSPECT, "none", drop("format_version"), "format_version:"),
    "S14-feature": (INSPECT, "none", manifest(requires=["gate:quantum"]), "gate:quantum"),
    "S14-type": (INSPECT, "none", manifest(result__steps="ten"), "result.steps"),
    "S15": (INSPECT, "none", file("../x.safetensors"), "bad file name"),
    **{
        f"S16-{i}": (INSPECT, "none", file(name), "bad file name")
        for i, name in enumerate(["/x", "C:\\x", "\\\\host\\x", "~/x", "a\0b", ""])
    },
    "S17": (INSPECT, "none", move_out, "link leaves the folder"),
    "S18-pipe": (INSPECT, "none", special(GATES, os.mkfifo), "not a regular file"),
    "S18-device": (INSPECT, "none", special(GATES, lambda p: p.symlink_to("/dev/zero")), "link leaves the folder"),
    "S18-folder": (INSPECT, "none", special(GATES, Path.mkdir), "not a regular file"),
    "S18-socket": (INSPECT, "none", special(GATES, bind), f"{GATES}: no such device"),
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
        f"S26-{i}": (INSPECT, "none", raw_gates(encode(raw)), message)
        for i, (raw, message) in enumerate([
            (b"{nonsense}", "header: not valid JSON"), (b"[]  ", "bad header"), (b"null", "bad header"),
            (b"\xff\xff\xff\xff", "header: not UTF-8"),
        ])
    },
    **{
        f"S27-{i}": (INSPECT, "none", header({TWO: entry(offsets=o)} | more), f"bad offsets in {where}")
        for i, (o, more, where) in enumerate([
            ((0, 400), {}, TWO), ((4, 0), {}, TWO), ((4, 8), {}, TWO), ((0, 4), {BIAS: entry(offsets=(0, 4))}, BIAS),
        ])
    },
    "S28": (INSPECT, "none", header({TWO: entry()}, b"0000PK\x03\x04"), "data after the last tensor"),
    **{
        f"S29-{i}": (INSPECT, "none", header({TWO: entry(shape=shape)}), f"bad {what} in {TWO}")
        for i, (shape, what) in enumerate([
            ((2**31 - 1,) * 4, "offsets"), ((2**62, 4), "shape"), ((-1,), "shape"), ((1.5,), "shape"),
        ])
    },
    "S30": (INSPECT, "none", header({TWO: entry(shape=(0, 2**62, 2**62))}), "bad shape"),
    **{
        f"S31-{rank}": (INSPECT, "none", header({TWO: entry(shape=(1,) * rank)}), "too many dimensions")
        for rank in (65, 10_000)
    },
    "S32": (INSPECT, "none", header({f"t{i}": entry("U8", (1,), (i, i + 1)) for i in range(30_000)}, bytes(30_000)),
            "too many tensors"),
    "S32-200000": (INSPECT, "none", header({f"t{i}": entry("U8", (1,), (i, i + 1)) for i in range(200_000)}),
                   "header too large"),
    **{
        f"S33-{i}": (INSPECT, "none", header({name: entry()}), "bad tensor name")
        for i, name in enumerate(["a..b", "a\0b", "\x1b[31m", "a\nb", "", "x" * 10_000])
    },
    **{
        f"S34-{i}": (INSPECT, "none", raw_gates(encode(
            b'{"a":%b,"a":%b}' % (json.dumps(entry()).encode(), json.dumps(entry(offsets=span)).encode()), b"00000000",
        )), "'a' given twice")
        for i, span in enumerate([(0, 4), (4, 8)])
    },
    "S35-large": (INSPECT, "none", header({"__metadata__": {"x": "y" * 90_000_000}}), "header too large"),
    "S35-number": (INSPECT, "none", header({"__metadata__": {"x": 1}}, b""), "metadata is not text"),
    "S36-f8": (INSPECT, "none", header({TWO: entry("F8_E4M3", (4,))}), "dtype"),
    "S36-unknown": (INSPECT, "none", header({TWO: entry("Q4_0")}), "dtype"),
    "S36-i64": (INSPECT, "none", array(BIAS, np.zeros(3, np.int64)), f"{BIAS}: expected <f4"),
    "S36-f16": (INSPECT, "none", array(BIAS, np.zeros(3, np.float16)), f"{BIAS}: expected <f4"),
    "S36-bool": (INSPECT, "none", array(BIAS, np.zeros(3, bool)), "dtype"),
    "S37-nan": (INSPECT, "none", value(BIAS, 2, np.nan), f"{BIAS} is not finite"),
    "S37-inf": (INSPECT, "none", value(BIAS, 2, -np.inf), f"{BIAS} is not finite"),
    "S38": (INSPECT, "none", value(BIAS, 0, 1.1e4), "out of range"),
    **{
        f"S39-{i}": (INSPECT, "none", array(BIAS, np.zeros(shape, np.float32)), f"{BIAS}: expected")
        for i, shape in enumerate([2, (3, 1), 1])
    },
    "S40-missing": (INSPECT, "none", gates(lambda a: a.pop(BIAS)), f"{BIAS} is missing"),
    "S40-gap": (INSPECT, "none", gates(lambda a: a.update({BIAS.replace("1", "2"): a.pop(BIAS)})),
                f"{BIAS} is missing"),
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
        f"S43-{name}": (VERIFY, "lora", rename_target(name), f"target {name} is not allowed")
        for name in ("model.layers.0.mlp.q_proj", "model.embed_tokens", "lm_head", "model.layers.0.input_layernorm")
    },
    **{
        f"S43-all-{name}": (VERIFY, "lora", both(manifest(requires=ALL_LINEAR), rename_target(name)),
                            f"target {name} is not allowed")
        for name in ("model.embed_tokens", "lm_head")
    },
    "S44-delta": (VERIFY, "delta", tensors(DELTA, lambda a: a["model.w"].flat.__setitem__(0, np.nan)), "non-finite"),
    "S44-lora": (VERIFY, "lora", tensors(ADAPTER, lambda a: a[LORA_A].flat.__setitem__(0, np.inf)), "non-finite"),
    **{
        f"S46-{key}": (VERIFY, "lora", adapter(**{key: "os"}), f"{key}: key not allowed")
        for key in ("megatron_core", "auto_mapping", "trust_remote_code", "runtime_config")
    },
    "S47-above": (INSPECT, "none", value("layers.1.stats.density", 0, 1.5), "bad statistics"),
    "S47-below": (INSPECT, "none", value("layers.1.stats.open_by_offset", 0, -0.1), "bad statistics"),
    "S47-density": (INSPECT, "none", manifest(result__density=1.5), "result.density"),
    "S47-count": (INSPECT, "none", manifest(result__open_edges=-1), "result.open_edges"),
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


@pytest.mark.parametrize(
    "name",
    [
        MANIFEST,
        GATES,
        ".",
    ],
)
def test_s48_what_may_not_be_read_is_refused(tmp_path, name):
    folder = make(tmp_path / "sidecar")
    (folder / name).chmod(0)
    try:
        refuse_cli(tmp_path, ["inspect", folder], f"{folder / name}: permission denied", bound=True)
    finally:
        (folder / name).chmod(0o700)


CHANGING = """
import os
path = "sidecar/gates.safetensors"
size, fstat, calls = os.stat(path).st_size, os.fstat, []

def fstat_then_change(descriptor):
    info = fstat(descriptor)
    if os.path.samestat(info, os.stat(path)):
        calls.append(info)
        with open(path, "r+b") as file:
            CHANGE
    return info

os.fstat = fstat_then_change
"""


@pytest.mark.parametrize(
    "change",
    [
        "file.truncate(size + 1 if len(calls) == 1 else size)",  # longer just while it is read
        "first = file.read(1), file.seek(0); file.write(first[0])",  # the same bytes, but somebody wrote
    ],
    ids=["grows", "rewritten"],
)
def test_s49_a_file_that_changes_while_it_is_read_is_refused(tmp_path, change):
    folder = make(tmp_path / "sidecar")
    os.utime(folder / GATES, (0, 0))  # else a write within the clock's resolution could go unseen
    refuse_cli(
        tmp_path, ["inspect", folder], "changed while reading", program=patched(CHANGING.replace("CHANGE", change))
    )


# Sidecars of a real base


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Bases `llama` and `gpt2`, their sidecars `none`, `lora` (llama) and `delta` (gpt2), `merged` and a text."""
    root = tmp_path_factory.mktemp("real")
    save_text(root / "text.txt")
    llama, gpt2 = save_tiny_llama(root / "llama"), save_tiny_gpt2(root / "gpt2")
    save_sidecar(root / "delta", gpt2, "delta")
    save_sidecar(root / "lora", llama, "lora")
    sidecar = save_sidecar(root / "none", llama)
    model, tokenizer = loading.load(sidecar.path, str(llama))
    merged.write_merged(model, tokenizer, sidecar, root / "merged", same_dtype=True)
    return root


@pytest.fixture
def copy(real, tmp_path):
    """A copy of one of the real folders that a test may damage."""
    return lambda name: shutil.copytree(real / name, tmp_path / name)


def transpose(arrays):
    name = "transformer.h.0.attn.c_attn.weight"
    arrays[name] = np.ascontiguousarray(arrays[name].T)


def test_s45_a_transposed_delta_is_refused(tmp_path, real, copy):
    sidecar = copy("delta")
    tensors(DELTA, transpose)(sidecar)
    refuse_cli(tmp_path, ["verify", sidecar, "--base", real / "gpt2"], "c_attn.weight (96, 32) does not fit")


def enlarge(arrays):
    for values in arrays.values():
        values *= np.float32(1e25)


def test_s44_adapters_whose_product_overflows_are_refused(tmp_path, real, copy):
    sidecar = copy("lora")
    tensors(ADAPTER, enlarge)(sidecar)
    refuse_cli(tmp_path, ["verify", sidecar, "--base", real / "llama"], "base:", "non-finite")


def bias_is_nan(arrays):
    arrays[BIAS][0] = np.nan


COMMANDS = {
    "apply": ["apply", "BASE", "SIDECAR"],
    "merge": ["apply", "BASE", "SIDECAR", "--merge", "out"],
    "eval": ["eval", "SIDECAR", "--base", "BASE", "--data", "TEXT"],
    "diff": ["diff", "BASE", "SIDECAR"],
}
SAME = {
    "S5": (manifest_text(lambda t: t[: len(t) // 2]), "not valid JSON (line"),
    "S12": (manifest(format_version="9.0"), "format 9.0 needs a newer attnprune"),
    "S22": (beside("pytorch_model.bin"), "is refused"),
    "S37": (own_gates(bias_is_nan), f"{BIAS} is not finite"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("row", SAME)
def test_every_command_refuses_the_same_sidecars(tmp_path, real, copy, row, command):
    mutate, part = SAME[row]
    sidecar = copy("none")
    mutate(sidecar)
    names = {"SIDECAR": sidecar, "BASE": real / "llama", "TEXT": real / "text.txt"}
    refuse_cli(tmp_path, [names.get(argument, argument) for argument in COMMANDS[command]], part)


# Bases


def edit_config(**changes):
    def mutate(base):
        path = base / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return mutate


def config_of(family, **options):
    """The configuration of another family in place of the llama's."""
    return lambda base: AutoConfig.for_model(family, **options).save_pretrained(base)


def another(**options):
    return lambda base: (shutil.rmtree(base), save_tiny_llama(base, **options))


def weights(change):
    def mutate(base):
        arrays = load_file(base / "model.safetensors")
        change(arrays)
        save_file(arrays, base / "model.safetensors", {"format": "pt"})

    return mutate


def pickle_only(base):
    (base / "model.safetensors").rename(base / "pytorch_model.bin")


def no_tokenizer(base):
    for path in base.glob("tokenizer*"):
        path.unlink()


def untied(arrays):
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"] + 1


def sharded(shard):
    def mutate(base):
        index = {"metadata": {"total_size": 1}, "weight_map": {"model.embed_tokens.weight": shard}}
        (base / "model.safetensors").rename(base / "model-00001-of-00002.safetensors")
        (base / "model.safetensors.index.json").write_text(json.dumps(index))

    return mutate


def text_of_gguf(text):
    return len(text).to_bytes(8, "little") + text.encode()


STRANGE_GGUF = (
    b"GGUF" + (3).to_bytes(4, "little") + bytes(8) + (1).to_bytes(8, "little")  # version, no tensors, one key
    + text_of_gguf("general.architecture") + (8).to_bytes(4, "little") + text_of_gguf("strange")
)  # fmt: skip
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
GPTQ = {"quant_method": "gptq", "bits": 4}
QUANTISED = "cannot merge into a quantised base (gptq)"

B = {
    "B1-layers": (another(num_hidden_layers=1), "made for a llama model (2 layers, 4 heads)"),
    "B1-hidden": (another(hidden_size=64), "made for a llama model (2 layers, 4 heads)"),
    # The same matrices, cut into twice as many heads.
    "B1-heads": (edit_config(num_attention_heads=8, num_key_value_heads=4, head_dim=4), "head_dim is 4, not 8"),
    "B2": (another(seed=1), "not the weights", "--allow-base-mismatch"),
    "B4-bloom": (config_of("bloom"), "bloom: this model family is not supported"),
    "B4-falcon": (config_of("falcon"), "falcon: this model family is not supported"),
    "B4-mamba": (config_of("mamba"), "mamba: this model family is not supported"),
    "B6-encoder": (config_of("t5"), "t5: only causal decoders are supported"),
    "B6-cross": (config_of("gpt2", add_cross_attention=True), "gpt2: only causal decoders are supported"),
    "B6-causal": (edit_config(is_causal=False), "llama: only causal decoders are supported"),
    "B6-bidirectional": (
        config_of("gemma3_text", use_bidirectional_attention=True),
        "gemma3_text: only causal decoders are supported",
    ),
    "B7": (edit_config(model_type="attnprune_llama"), "already sparsified"),
    "B8": (pickle_only, "no safetensors weights"),
    "B9": (edit_config(model_type="strange", auto_map={"AutoConfig": "x.X"}), "custom code"),
    "B11-missing": (sharded("model-00002-of-00002.safetensors"), "shard model-00002-of-00002.safetensors is missing"),
    "B11-name": (sharded("../x.safetensors"), "bad shard name '../x.safetensors'"),
    "B12": (both(another(tie_word_embeddings=True), weights(untied)), "tied weights differ"),
    "B13-none": (no_tokenizer, "cannot load its tokenizer"),
    "S48": (lambda base: (base / "config.json").chmod(0), "permission denied"),
}


@pytest.mark.parametrize("row", B)
def test_a_bad_base_is_refused(tmp_path, real, copy, row):
    mutate, *parts = B[row]
    base = copy("llama")
    mutate(base)
    refuse_cli(tmp_path, ["verify", real / "none", "--base", base], "base:", *parts, bound=row == "S48")


OVERFLOWING = weights(
    lambda arrays: [arrays[name].mul_(1e25) for name in arrays if name.endswith(("q_proj.weight", "k_proj.weight"))]
)
WITHOUT_ITS_ATTENTION = """
from transformers.models.llama import modeling_llama
modeling_llama.ALL_ATTENTION_FUNCTIONS = type("Eager", (), {"get_interface": lambda self, name, eager: eager})()
"""


def test_b5_a_base_whose_scores_overflow_is_refused(tmp_path, real, copy):
    base = copy("llama")
    OVERFLOWING(base)
    line = ["sparsify", base, "--data", real / "text.txt", "--steps", 1, "--seq-len", 16, "--out", "out", "-q"]
    refuse_cli(tmp_path, line, "llama: the model's own logits are not finite")


def test_b5_a_family_that_does_not_call_its_attention_function_fails_the_self_check(tmp_path, real):
    line = ["verify", real / "none", "--base", real / "llama"]
    refuse_cli(tmp_path, line, "ran 0 times for 2 layers", code=1, program=patched(WITHOUT_ITS_ATTENTION))


def test_b10_a_quantised_base_is_not_merged_into(tmp_path, real, copy):
    base = copy("llama")
    edit_config(quantization_config=GPTQ)(base)
    refuse_cli(tmp_path, ["apply", base, real / "none", "--merge", "out"], QUANTISED)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (STRANGE_GGUF[:13], "cannot read this GGUF file"),
        (STRANGE_GGUF, "cannot read this GGUF file: GGUF model with architecture strange"),
    ],
    ids=["truncated", "strange"],
)
def test_b14_a_bad_gguf_file_is_refused(tmp_path, real, raw, message):
    (tmp_path / "model.gguf").write_bytes(raw)
    refuse_cli(tmp_path, ["verify", real / "none", "--base", tmp_path / "model.gguf"], "base:", message)


# Bases that are wrong in further ways. One process for all: what is at stake is that no row is an internal error.


def mismatched_index(base):
    sharded("x.safetensors")(base)
    (base / "model.safetensors.index.json").write_text('{"weight_map": ["x"]}')


MORE = {
    "not JSON": (lambda base: (base / "config.json").write_text("{"), "not a valid JSON"),
    "list": (lambda base: (base / "config.json").write_text("[]"), "cannot load this model"),
    "no config": (lambda base: (base / "config.json").unlink(), "no config.json"),
    "type of a key": (edit_config(hidden_size="x"), "cannot load this model", "'hidden_size'"),
    "contradicting keys": (edit_config(model_type="falcon"), "cannot load this model"),  # AttributeError
    "quantised": (edit_config(quantization_config=GPTQ), QUANTISED),
    "quantised by name only": (edit_config(quantization_config=NF4), "says that the weights are quantised, and those"),
    "pipe": (special("config.json", os.mkfifo), "config.json: not a regular file"),
    "adapter": (lambda base: (base / "adapter_config.json").write_text("{}"), "would load another base model"),
    "tokenizer": (lambda base: (base / "tokenizer.json").write_text("{"), "cannot load its tokenizer"),
    "truncated weights": (lambda base: os.truncate(base / "model.safetensors", 5000), "damaged safetensors weights"),
    "no safetensors": (lambda base: (base / "model.safetensors").write_bytes(b"x" * 99), "damaged safetensors weights"),
    "shapes": (edit_config(vocab_size=300), "do not have the shapes that config.json says"),
    "tensor missing": (weights(lambda arrays: arrays.pop("model.norm.weight")), "no weights for model.norm.weight"),
    "more layers": (edit_config(num_hidden_layers=3), "no weights for model.layers.2.", "and others"),
    "index": (mismatched_index, "no weight_map"),
    "index not JSON": (
        both(sharded("x"), lambda base: (base / "model.safetensors.index.json").write_bytes(b"\xff")),
        "not UTF-8",
    ),
    **{
        f"shard {name!r}": (sharded(name), f"bad shard name {name!r}")
        for name in ("/x.safetensors", "a/x.safetensors", "..", "", "x.bin", "a\\x.safetensors", "a\0.safetensors")
    },
}


@pytest.mark.parametrize("row", MORE)
def test_a_base_that_is_wrong_otherwise_is_refused_too(copy, row):
    mutate, *parts = MORE[row]
    base = copy("llama")
    mutate(base)
    refused(lambda: bases.load_base(str(base)), *parts)


@pytest.mark.parametrize("name", ["x" * 5000, "/" + "x" * 300], ids=["name", "path"])
def test_a_name_of_a_base_that_is_too_long_is_refused(name):
    refused(lambda: bases.load_base(name), "file name too long")


@pytest.mark.parametrize(
    ("name", "part"), [("nosuch/", "no such folder"), ("a/b/", "no such folder"), ("a b", "bad repo")]
)
def test_a_name_that_the_hub_cannot_have_is_refused_before_it_is_asked(monkeypatch, name, part):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    error = refused(lambda: bases.load_base(name), name, part)
    assert "Hub" not in error.message


# Merged folders


def edit_code(folder):
    with (folder / "modeling_attnprune.py").open("a") as file:
        file.write("# edited\n")


def store_its_hash(folder):
    raw = (folder / "modeling_attnprune.py").read_bytes()
    values = json.loads((folder / "config.json").read_text())
    entry = {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    values["attnprune"]["files"]["modeling_attnprune.py"] = entry
    (folder / "config.json").write_text(json.dumps(values))


def without_block(folder):
    values = json.loads((folder / "config.json").read_text())
    del values["attnprune"]
    (folder / "config.json").write_text(json.dumps(values))


MERGED = {
    "B15": (without_block, "schema:", "no attnprune block"),
    "B16-hash": (edit_code, "files:", "is damaged"),
    "B16": (both(edit_code, store_its_hash), "code:", "code differs from the release"),
    "B17": (lambda folder: (folder / "adapter_config.json").write_text("{}"), "schema:", "would hide the sparse model"),
}


@pytest.mark.parametrize("row", MERGED)
def test_a_bad_merged_folder_is_refused(tmp_path, copy, row):
    mutate, *parts = MERGED[row]
    folder = copy("merged")
    mutate(folder)
    refuse_cli(tmp_path, ["verify", folder], *parts)
