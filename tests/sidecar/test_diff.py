"""`attnprune diff`: every number against full matrices in torch, everything it cannot know said or refused.

Long because its sidecars and merged folders take seconds to make, and every test compares the same ones.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from attnprune.report.diff import as_data, render
from attnprune.sidecar import bases, diff, loading, merged
from attnprune.sidecar.folder import open_artefact
from attnprune.sidecar.weights import _rounded
from examples.write_vectors import VECTORS
from tests.helpers import command
from tests.helpers.factory import refused, save_tiny_llama
from tests.helpers.paths import ROOT
from tests.helpers.sidecars import save_sidecar, save_tiny_gpt2

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "80"}
BASES = ("gpt2", "llama-gqa", "llama-bf16")
every_base = pytest.mark.parametrize("base", BASES)
OPEN, CLOSED = 9000.0, -9000.0


def compare(a, b):
    return diff.compare(str(a), str(b))


def attnprune(*arguments):
    return command.attnprune(*arguments, cwd=ROOT, COLUMNS="80")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Bases `llama` (tied embeddings) and `gpt2`, two sidecars of each kind, and merged forms."""
    folder = tmp_path_factory.mktemp("diff")
    save_tiny_llama(folder / "llama", tie_word_embeddings=True)
    save_tiny_gpt2(folder / "gpt2")
    for base in ("llama", "gpt2"):
        for kind in ("none", "lora", "delta"):
            for seed in (1, 2):
                save_sidecar(folder / f"{base}-{kind}{seed}", folder / base, kind, seed)
        for kind in ("lora", "delta"):
            merge(folder / f"{base}-{kind}1", folder / base, folder / f"{base}-{kind}1-merged")
    merge(folder / "llama-lora1", folder / "llama", folder / "llama-half", torch.bfloat16)
    return folder


def merge(path, base, out, dtype=None):
    model, tokenizer = loading.load(path, str(base), dtype=dtype)
    merged.write_merged(model, tokenizer, open_artefact(path), out, same_dtype=dtype is None)


@pytest.fixture
def copied(tmp_path):
    """Copies of folders that a test may change."""

    def copy(folder, name="copy"):
        return shutil.copytree(folder, tmp_path / name)

    return copy


# --- the truth, from full matrices


def stored(folder):
    """The model tensors of a base or merged folder, without the gates."""
    tensors = {}
    for file in sorted(Path(folder).glob("model*.safetensors")):
        tensors |= load_file(file)
    return {name: tensor for name, tensor in tensors.items() if "attnprune_gate" not in name}


def updates(folder):
    """alpha / rank * B A of every LoRA target, [out, in], fp64."""
    entry = open_artefact(folder).manifest.weights
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    names = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    return {
        f"{name.removeprefix('base_model.model.')}.weight": entry.alpha / entry.rank
        * (tensors[f"{name}.lora_B.weight"].double() @ tensors[f"{name}.lora_A.weight"].double())
        for name in names
    }  # fmt: skip


def loaded(folder, base):
    """The model tensors of a sidecar on its base: changed in at least fp32, then cast to the base's dtype."""
    weights = stored(base)
    transposed = json.loads((base / "config.json").read_text())["model_type"] == "gpt2"
    if (folder / "adapter").exists():
        for name, update in updates(folder).items():
            w = weights[name]
            weights[name] = (w.double() + (update.T if transposed else update)).to(w.dtype)
    elif (folder / "delta.safetensors").exists():
        for name, tensor in load_file(folder / "delta.safetensors").items():
            weights[name] = tensor.to(weights[name].dtype)
    return weights


def norms(before, after):
    """{name: (||after - before||, that / ||before||)} of the tensors that differ."""
    assert before.keys() == after.keys()
    pairs = {name: ((after[name].double() - t.double()).norm().item(), t.double().norm().item())
             for name, t in before.items()}  # fmt: skip
    return {name: (change, change / size if size else None) for name, (change, size) in pairs.items() if change}


def check_tensors(found, truth):
    """The same tensors with the same norms, the largest relative change first."""
    rows = {t.name: (t.change, t.relative) for t in found.tensors}
    assert rows.keys() == truth.keys()
    for name, (change, relative) in truth.items():
        assert rows[name][0] == pytest.approx(change, rel=1e-6)
        assert rows[name][1] == (None if relative is None else pytest.approx(relative, rel=1e-6))
    order = [math.inf if t.relative is None else t.relative for t in found.tensors]
    assert order == sorted(order, reverse=True)
    assert found.uncompared == []


def gates(folder):
    """(biases, densities) [layers][heads] as stored."""
    layers = len(open_artefact(folder).manifest.gate.heads)
    with safe_open(folder / "gates.safetensors", "np") as file:
        return tuple(
            [file.get_tensor(f"layers.{i}.{name}").tolist() for i in range(layers)]
            for name in ("gate.bias", "stats.density")
        )


def check_heads(found, a, b):
    biases, densities = gates(b)
    before = gates(a) if a is not None else ([[None] * 4] * len(biases), [[1.0] * 4] * len(biases))
    assert [
        (h.layer, h.head, h.bias_a, h.bias_b, h.density_a, h.density_b) for h in found.heads
    ] == [
        (layer, head, before[0][layer][head], bias, before[1][layer][head], densities[layer][head])
        for layer, row in enumerate(biases)
        for head, bias in enumerate(row)
    ]  # fmt: skip
    assert found.density_b == open_artefact(b).manifest.result.density
    assert found.density_a == (1.0 if a is None else open_artefact(a).manifest.result.density)


def check_equal(found):
    assert found.tensors == found.uncompared == found.notes == found.opened == found.closed == []
    assert found.same_text
    assert found.density_a == found.density_b
    assert all((h.bias_a, h.density_a) == (h.bias_b, h.density_b) for h in found.heads)


# --- base against sparse


@every_base
@pytest.mark.parametrize("kind", ["gates", "lora", "delta"])
def test_base_against_sidecar(base, kind):
    folder, dense = VECTORS / f"{base}-{kind}", VECTORS / "bases" / base
    found = compare(dense, folder)
    check_tensors(found, norms(stored(dense), loaded(folder, dense)))
    check_heads(found, None, folder)
    assert found.closed == [(1, 3)]
    assert found.opened == found.notes == []
    assert found.same_text


@every_base
def test_base_against_merged_is_base_against_its_sidecar(base):
    folder, dense = VECTORS / f"{base}-merged", VECTORS / "bases" / base
    found = compare(dense, folder)
    check_tensors(found, norms(stored(dense), stored(folder)))
    check_heads(found, None, folder)
    sidecar = compare(dense, VECTORS / f"{base}-lora")
    assert found.tensors == sidecar.tensors
    assert found.heads == sidecar.heads


@pytest.mark.parametrize("base", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["none", "lora", "delta"])
def test_base_against_sidecar_of_rounded_weights(place, base, kind):
    """Not multiples of a power of two like the vectors; for llama with tied embeddings."""
    folder = place / f"{base}-{kind}1"
    check_tensors(compare(place / base, folder), norms(stored(place / base), loaded(folder, place / base)))


def test_demo_as_base():
    demo, folder = bases.demo_folder(), VECTORS / "first-release"
    found = compare("demo", folder)
    check_tensors(found, norms(stored(demo), loaded(folder, demo)))
    check_heads(found, None, folder)


@pytest.mark.parametrize("name", ["some/model", "model.gguf"])
def test_base_by_other_names_is_loaded_as_the_sidecar_says(copied, monkeypatch, name):
    """Any name that is not a folder is a base; the Hub id that the sidecar names is loaded at its revision."""
    folder, revision = copied(VECTORS / "llama-bf16-lora"), "a" * 40
    edit_manifest(folder, lambda m: m["base"].update(kind="hub", repo_id="some/model", revision=revision))
    load_base, asked = bases.load_base, []

    def load(name, **options):
        asked.append((name, options))
        return load_base(str(VECTORS / "bases" / "llama-bf16"), dtype=options["dtype"])

    monkeypatch.setattr(loading, "load_base", load)
    assert len(compare(name, folder).tensors) == 8
    options = {"revision": revision if name == "some/model" else None, "dtype": torch.bfloat16}
    assert asked == [(name, options | {"device": "cpu", "quantise": None, "device_map": None})]


def test_merged_in_another_dtype_than_the_base(place):
    """The numbers are those of the stored weights, and the rounding in them is pointed at."""
    found = compare(place / "llama", place / "llama-half")
    truth = norms(stored(place / "llama"), stored(place / "llama-half"))
    assert "model.embed_tokens.weight" in truth
    check_tensors(found, truth)
    [note] = found.notes
    assert "A holds float32 weights, B bfloat16" in note
    assert "A holds float32 weights, B bfloat16" in compare(place / "llama-delta1", place / "llama-half").notes[-2]
    [note] = compare(place / "llama-lora1", place / "llama-half").notes
    assert "not compared" in note
    whole = place / "llama-lora1-merged"
    check_tensors(compare(whole, place / "llama-half"), norms(stored(whole), stored(place / "llama-half")))


def test_merged_in_several_files(place, copied):
    whole = place / "llama-lora1-merged"
    folder = copied(whole)
    names = shard(folder)
    assert len(names) == 3
    check_tensors(compare(place / "llama", folder), norms(stored(place / "llama"), stored(whole)))
    check_equal(compare(whole, folder))
    (folder / names[1]).write_bytes((folder / names[2]).read_bytes())
    refused(lambda: compare(whole, folder), names[1], "is damaged")


def shard(folder):
    """Split the weights of a merged folder over three files and their index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-0000{i + 1}-of-00003.safetensors" for i in range(3)]
    places = {}
    for i, name in enumerate(names):
        places |= dict.fromkeys(sorted(tensors)[i::3], name)
        save_file({n: tensors[n] for n in sorted(tensors)[i::3]}, folder / name)
    index = "model.safetensors.index.json"
    (folder / index).write_text(json.dumps({"weight_map": places}))
    edit_manifest(folder, lambda m: m["files"].pop("model.safetensors"), [*names, index])
    return names


def edit_manifest(folder, change=lambda manifest: None, files=()):
    """Change the manifest of a sidecar or merged folder, and record `files` as they are now."""
    path = folder / ("attnprune.json" if (folder / "attnprune.json").exists() else "config.json")
    values = json.loads(path.read_text())
    manifest = values.get("attnprune", values)
    change(manifest)
    for name in files:
        raw = (folder / name).read_bytes()
        manifest["files"][name] = {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    path.write_text(json.dumps(values))


def rewrite(folder, file, change):
    """Change the tensors of a file, and the manifest with it; `change` may return new ones."""
    tensors = load_file(folder / file)
    save_file(change(tensors) or tensors, folder / file)
    count = len(load_file(folder / file))
    edit_manifest(folder, lambda m: m["weights"].update(tensors=count if m["weights"]["kind"] != "none" else 0), [file])
    return folder


# --- sparse against sparse


@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_lora_against_lora(place, base):
    a, b = place / f"{base}-lora1", place / f"{base}-lora2"
    found = compare(a, b)
    before, after = updates(a), updates(b)
    truth = {name: ((after[name] - before[name]).norm().item(), None) for name in before}
    check_tensors(found, truth)
    check_heads(found, a, b)
    changes = [t.change for t in found.tensors]
    assert changes == sorted(changes, reverse=True)  # no relative change to go by
    assert found.notes == []


@every_base
def test_lora_against_gates_alone_is_the_update(base):
    found = compare(VECTORS / f"{base}-gates", VECTORS / f"{base}-lora")
    check_tensors(found, {name: (u.norm().item(), None) for name, u in updates(VECTORS / f"{base}-lora").items()})
    assert any("before merging rounds the weights to bfloat16" in note for note in found.notes) == ("bf16" in base)
    back = compare(VECTORS / f"{base}-lora", VECTORS / f"{base}-gates")
    assert back.tensors == found.tensors
    others = [VECTORS / f"{base}-{kind}" for kind in ("merged", "delta")]
    assert not any("LoRA" in note for b in others for note in compare(VECTORS / f"{base}-lora", b).notes)


def test_lora_on_fewer_modules_counts_as_no_update(place, copied):
    a, b = place / "llama-lora1", copied(place / "llama-lora2")
    rewrite(
        b, "adapter/adapter_model.safetensors", lambda t: {n: v for n, v in t.items() if ".0.self_attn.q_proj" not in n}
    )
    before, after = updates(a), updates(b)
    truth = {name: ((after.get(name, 0 * u) - u).norm().item(), None) for name, u in before.items()}
    assert len(after) == len(before) - 1
    check_tensors(compare(a, b), truth)
    check_tensors(compare(b, a), truth)


@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_delta_against_delta(place, base):
    a, b = place / f"{base}-delta1", place / f"{base}-delta2"
    found = compare(a, b)
    check_tensors(found, norms(load_file(a / "delta.safetensors"), load_file(b / "delta.safetensors")))
    check_heads(found, a, b)


@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_merged_against_merged(place, base):
    a, b = place / f"{base}-lora1-merged", place / f"{base}-delta1-merged"
    found = compare(a, b)
    check_tensors(found, norms(stored(a), stored(b)))
    check_heads(found, place / f"{base}-lora1", place / f"{base}-delta1")


def test_what_takes_the_base_is_not_compared(place):
    lora, delta, none = (place / f"llama-{kind}1" for kind in ("lora", "delta", "none"))
    names = sorted(load_file(delta / "delta.safetensors"))
    for a, b in ((lora, delta), (delta, lora), (none, delta), (delta, none)):
        found = compare(a, b)
        assert (found.tensors, found.uncompared) == ([], names)
        [note] = found.notes
        assert note.startswith("what was not compared takes the weights of the base: name it with --base")
        assert "weights       8 tensors not compared" in text(found, 80)
    whole = place / "llama-lora1-merged"
    for a, b in ((lora, whole), (whole, lora), (none, whole)):
        found = compare(a, b)
        assert (found.tensors, found.uncompared) == ([], sorted(stored(whole)))


def test_delta_against_merged_compares_what_both_hold(place):
    a, b = place / "llama-delta1", place / "llama-lora1-merged"
    found, tensors = compare(a, b), load_file(a / "delta.safetensors")
    truth = norms(tensors, {name: stored(b)[name] for name in tensors})
    assert {t.name: t.change for t in found.tensors} == pytest.approx({n: c for n, (c, _) in truth.items()}, rel=1e-6)
    assert found.uncompared == sorted(set(stored(b)) - set(tensors))


@pytest.mark.parametrize("name", ["llama-none1", "llama-lora1", "llama-delta1", "llama-lora1-merged", "gpt2-lora1"])
def test_the_same_twice_has_no_difference(place, copied, name):
    check_equal(compare(place / name, place / name))
    check_equal(compare(place / name, copied(place / name)))


@pytest.mark.parametrize("kind", ["lora", "delta"])
def test_sidecar_and_its_merged_form_differ_alike_from_the_base(place, kind):
    sidecar, whole = (compare(place / "llama", place / f"llama-{kind}1{end}") for end in ("", "-merged"))
    assert sidecar.tensors == whole.tensors
    assert sidecar.heads == whole.heads


# --- heads


def test_heads_opened_and_closed(place, tmp_path):
    a = save_sidecar(tmp_path / "a", place / "llama", biases=[[CLOSED, OPEN, OPEN, CLOSED], [OPEN, 0.0, OPEN, OPEN]])
    b = save_sidecar(tmp_path / "b", place / "llama", biases=[[OPEN, CLOSED, OPEN, CLOSED], [OPEN, 0.0, OPEN, CLOSED]])
    found = compare(a.path, b.path)
    assert found.opened == [(0, 0)]
    assert found.closed == [(0, 1), (1, 3)]
    assert [h.density_a for h in found.heads[:4]] == [0, 1, 1, 0]
    back = compare(b.path, a.path)
    assert (back.opened, back.closed) == (found.closed, found.opened)
    assert compare(place / "llama", b.path).closed == [(0, 1), (0, 3), (1, 3)]
    shown = text(found, 80)
    assert "heads opened  1: 0.0" in shown
    assert "heads closed  2: 0.1 1.3" in shown
    # biases changed by 0 five times, by +18000 once and by -18000 twice
    assert "mean change -2250.000, largest" in shown
    rows = shown.split("heads that changed most")[1].splitlines()[2:]
    # 1.1 has the same bias but other inputs; the other heads are equal and not shown
    assert [row.split()[0] for row in rows if row.strip()] == ["0.0", "0.1", "1.3", "1.1"]


@pytest.mark.parametrize("key", ["data_sha256", "seq_len"])
def test_different_text_is_said(place, copied, key):
    folder = copied(place / "llama-lora1")
    edit_manifest(folder, lambda m: m["result"].update({key: "1" * 64 if key == "data_sha256" else 31}))
    found = compare(place / "llama-lora1", folder)
    assert not found.same_text
    [note] = found.notes
    assert "different texts or block lengths" in note
    assert "different texts" in text(found, 120)


# --- numbers at the edges


def test_delta_is_rounded_to_the_dtype_of_the_base(copied):
    """As loading does: an fp32 delta on a bf16 base."""
    dense, generator = VECTORS / "bases" / "llama-bf16", torch.Generator().manual_seed(0)

    def noise(tensors):
        return {n: t.float() + 1e-3 * torch.randn(t.shape, generator=generator) for n, t in tensors.items()}

    a, b = (rewrite(copied(VECTORS / "llama-bf16-delta", name), "delta.safetensors", noise) for name in "ab")
    check_tensors(compare(dense, a), norms(stored(dense), loaded(a, dense)))
    names = load_file(a / "delta.safetensors")
    truth = norms(*({n: t for n, t in loaded(side, dense).items() if n in names} for side in (a, b)))
    check_tensors(compare(a, b), truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_rounding_is_that_of_torch(dtype):
    bits = torch.randint(-(2**31), 2**31, (100_000,), dtype=torch.int64).to(torch.int32)
    values = bits.view(torch.float32)
    ties = (torch.arange(256, dtype=torch.int32) << 15).view(torch.float32)
    values = torch.cat([values[values.isfinite()], ties, -ties, torch.tensor([3.4e38, -3.4e38, 7e4])])
    rounded = _rounded(values.numpy(), str(dtype).removeprefix("torch."))
    assert np.array_equal(rounded.astype(np.float64), values.to(dtype).double().numpy())


def test_a_zero_tensor_has_no_relative_change_and_comes_first(copied):
    a = rewrite(copied(VECTORS / "gpt2-delta", "a"), "delta.safetensors", zero_first)
    found = compare(a, VECTORS / "gpt2-delta")
    [only] = found.tensors
    size = load_file(VECTORS / "gpt2-delta" / "delta.safetensors")[only.name].double().norm().item()
    assert only.relative is None
    assert only.change == pytest.approx(size, rel=1e-9)
    b = rewrite(copied(VECTORS / "gpt2-delta", "b"), "delta.safetensors", lambda t: {n: 9 * v for n, v in t.items()})
    assert [t.relative is None for t in compare(a, b).tensors] == [True, False, False, False]


def zero_first(tensors):
    tensors[min(tensors)].zero_()


def test_small_values_do_not_vanish_and_large_ones_do_not_overflow(copied):
    def filled(value):
        def change(tensors):
            return {n: torch.full_like(t, value) if n == min(tensors) else t for n, t in tensors.items()}

        return rewrite(copied(VECTORS / "gpt2-delta", str(value)), "delta.safetensors", change)

    zero = filled(0.0)
    count = load_file(zero / "delta.safetensors")["transformer.h.0.attn.c_attn.weight"].numel()
    for value in (1e-38, 1e30):
        [only] = compare(zero, filled(value)).tensors
        assert only.change == pytest.approx(float(np.float32(value)) * math.sqrt(count), rel=1e-9)


def test_values_beyond_the_dtype_of_the_base_are_refused(copied):
    folder = rewrite(
        copied(VECTORS / "gpt2-delta"), "delta.safetensors", lambda t: {n: 1e300 * v.double() for n, v in t.items()}
    )
    refused(lambda: compare(VECTORS / "gpt2-delta", folder), "c_attn.weight: values too large to compare")


# --- what does not fit, damaged, or no sparse model


MISFITS = {
    "unknown tensor": ("delta", lambda t: {**t, "h.0.attn.w": torch.zeros(2)}, "h.0.attn.w is not in both models"),
    "shape": ("delta", lambda t: {n: v.T.contiguous() for n, v in t.items()}, "has shape [48, 16], in"),
    "target": ("lora", lambda t: {n.replace(".h.1.", ".h.7."): v for n, v in t.items()}, "target transformer.h.7"),
    "lora shape": ("lora", lambda t: {n: v[:, :8].clone() if "_A" in n else v for n, v in t.items()}, "does not fit"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_sidecar_that_does_not_fit_its_base_is_refused(copied, case):
    kind, change, message = MISFITS[case]
    file = "delta.safetensors" if kind == "delta" else "adapter/adapter_model.safetensors"
    folder = rewrite(copied(VECTORS / f"gpt2-{kind}"), file, change)
    refused(lambda: compare(VECTORS / "bases" / "gpt2", folder), message)


def test_lora_of_another_shape_is_refused(copied):
    change = MISFITS["lora shape"][1]
    folder = rewrite(copied(VECTORS / "gpt2-lora"), "adapter/adapter_model.safetensors", change)
    refused(lambda: compare(VECTORS / "gpt2-lora", folder), "has another shape than in")


def test_merged_folder_without_a_tensor_is_refused(place, copied):
    folder = copied(place / "llama-lora1-merged")
    rewrite(folder, "model.safetensors", lambda t: {n: v for n, v in t.items() if n != "model.norm.weight"})
    for a in (place / "llama", place / "llama-lora1-merged"):
        refused(lambda a=a: compare(a, folder), "model.norm.weight is not in both models")


def test_another_base_is_refused(place, tmp_path):
    other = save_sidecar(tmp_path / "other", save_tiny_llama(tmp_path / "base", seed=1, tie_word_embeddings=True))
    refused(
        lambda: compare(place / "llama-none1", other.path), f"{other.path}: made from another base", "llama in float32"
    )
    refused(lambda: compare(place / "gpt2-lora1", place / "llama-lora1"), "another base (llama in", "gpt2 in")
    caught = refused(
        lambda: compare(tmp_path / "base", place / "llama-none1"), f"{tmp_path / 'base'}: wrong base model"
    )
    assert caught.hint is None  # diff has no --allow-base-mismatch
    refused(lambda: compare("demo", place / "llama-none1"), "demo: wrong base model")


def test_another_dtype_of_the_base_is_another_base():
    a, b = VECTORS / "llama-gqa-gates", VECTORS / "llama-bf16-gates"
    refused(lambda: compare(a, b), "(llama in bfloat16, 2 layers of 4 heads)", "(llama in float32")


def test_other_heads_on_the_same_tensors_are_refused(copied):
    """gpt2's tensors do not tell its number of heads."""
    folder = copied(VECTORS / "gpt2-gates")
    edit_manifest(folder, lambda m: m["gate"].update(heads=[4, 4, 4]))
    refused(lambda: compare(VECTORS / "gpt2-gates", folder), "3 layers of 4 heads")


def test_unknown_dtype_in_the_manifest_is_refused(copied):
    folder = copied(VECTORS / "gpt2-gates")
    edit_manifest(folder, lambda m: m["base"].update(dtype="int3"))
    for a in (VECTORS / "bases" / "gpt2", VECTORS / "gpt2-gates"):
        refused(lambda a=a: compare(a, folder), "base.dtype: 'int3' is not one of")


@pytest.mark.parametrize("name", ["demo", "some/model", "some.gguf", "nowhere", "llama", "x" * 5000])
def test_a_base_as_b_is_refused_with_the_order(place, monkeypatch, name):
    monkeypatch.chdir(place)
    caught = refused(lambda: compare("llama-lora1", name), "no sidecar or merged folder")
    assert caught.hint == "a base model goes first: attnprune diff BASE SIDECAR"


def test_unfinished_run_and_empty_folder_are_named(place, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for a, b in ((tmp_path, place / "llama-lora1"), (place / "llama-lora1", tmp_path)):
        caught = refused(lambda a=a, b=b: compare(a, b), "no attnprune.json")
        assert "--resume" in str(caught.hint)


FILES = [
    ("llama-lora1", "attnprune.json"),
    ("llama-lora1", "gates.safetensors"),
    ("llama-lora1", "adapter/adapter_model.safetensors"),
    ("llama-delta1", "delta.safetensors"),
    ("llama-lora1-merged", "config.json"),
    ("llama-lora1-merged", "gates.safetensors"),
    ("llama-lora1-merged", "model.safetensors"),
]


def flip(file):
    raw = bytearray(file.read_bytes())
    raw[-2] ^= 1
    file.write_bytes(raw)


DAMAGES = {
    "flipped": flip,
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-9]),
    "empty": lambda file: file.write_bytes(b""),
    "missing": lambda file: file.unlink(),
    "folder": lambda file: (file.unlink(), file.mkdir()),
    "pipe": lambda file: (file.unlink(), os.mkfifo(file)),
}


@pytest.mark.parametrize(("name", "file"), FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_file_is_refused_on_either_side(place, copied, name, file, damage):
    folder = copied(place / name)
    DAMAGES[damage](folder / file)
    sides = [(place / name, folder), (folder, place / name), (place / "llama", folder)]
    for a, b in sides:
        refused(lambda a=a, b=b: compare(a, b))


@pytest.mark.parametrize(("name", "file"), [FILES[i] for i in (2, 3, 6)])
def test_values_that_are_not_finite_are_refused(place, copied, name, file):
    folder = rewrite(copied(place / name), file, lambda t: t | {max(t): t[max(t)] * math.nan})
    refused(lambda: compare(folder, place / name), "non-finite value in")


# --- what is shown


def text(found, width, limit=8):
    console = Console(width=width, soft_wrap=True, highlight=False)
    with console.capture() as capture:
        for part in render(found, limit):
            console.print(part)
    return capture.get()


@pytest.mark.parametrize("width", [80, 120])
def test_lines_fit_the_terminal(place, width):
    for a, b in (("llama", "llama-half"), ("llama-lora1", "llama-delta2"), ("llama-lora1", "llama-lora2")):
        shown = text(compare(place / a, place / b), width)
        assert max(map(len, shown.splitlines())) <= width


def test_long_names_are_folded_not_cut(place, copied):
    folder = copied(place / "gpt2-delta1", "long" * 40)
    shown = text(compare(place / "gpt2", folder), 50)
    assert "…" not in shown
    assert str(folder) in "".join(line[14:].strip() for line in shown.splitlines())


def test_shown_numbers_are_those_found(place):
    found = compare(place / "gpt2", place / "gpt2-delta1")
    shown = text(found, 120, limit=2)
    assert f"density       100 % -> {100 * found.density_b:.3g} %" in shown
    assert f"weights       {len(found.tensors)} tensors differ" in shown
    rows = [line.split() for line in shown.splitlines()[-2:]]
    assert rows == [
        [t.name, f"{t.change:.4g}", f"{100 * t.relative:.3g}", "%"] for t in found.tensors[:2] if t.relative is not None
    ]
    heads = sorted(found.heads, key=lambda h: h.density_b)[:2]
    start = shown.splitlines().index("heads that changed most") + 2
    assert [line.split() for line in shown.splitlines()[start : start + 3]] == [
        [f"{h.layer}.{h.head}", "100", "%", f"{100 * h.density_b:.3g}", "%", f"{h.bias_b:.3f}"] for h in heads
    ] + [[]]


def test_nothing_to_show_is_short(place):
    shown = text(compare(place / "llama-lora1", place / "llama-lora1"), 80)
    assert [line.split()[-1] for line in shown.splitlines()[-2:]] == ["equal", "equal"]


def test_names_of_folders_cannot_drive_the_terminal(place, copied):
    folder = copied(place / "llama-none1", "[red]a\x1b[31mb")
    shown = text(compare(folder, folder), 200)
    assert "\x1b" not in shown
    assert "[red]a\\x1b[31mb" in shown


def test_json_is_one_object_with_the_same_numbers(place):
    a, b = place / "llama", place / "llama-lora1"
    done = attnprune("diff", a, b, "--json", "--limit", 1)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    data, found = json.loads(done.stdout), compare(a, b)
    assert data == json.loads(json.dumps(as_data(found)))
    assert data["heads_closed"] == [list(head) for head in found.closed]
    assert [(t["name"], t["change"], t["relative"]) for t in data["tensors"]] == [
        (t.name, t.change, t.relative) for t in found.tensors
    ]
    assert [h["bias_b"] for h in data["heads"]] == [h.bias_b for h in found.heads]


def test_the_command_shows_and_refuses(place, copied):
    shown = attnprune("diff", place / "llama-lora1", place / "llama-lora2", "--limit", 3)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.count(".self_attn.") == 3
    assert attnprune("diff", place / "llama-lora1", place / "llama-lora2", "-q").stdout == ""
    damaged = copied(place / "llama-lora2")
    flip(damaged / "gates.safetensors")
    cases = [
        (place / "gpt2-lora1", "another base"), (damaged, "is damaged"), (place / "llama", "a base model goes first"),
        ("nowhere", "no sidecar or merged folder"),
    ]  # fmt: skip
    for b, message in cases:
        done = attnprune("diff", place / "llama-lora1", b)
        assert done.returncode == 2
        assert done.stdout == ""
        [line] = done.stderr.splitlines()
        assert line.startswith("attnprune: ")
        assert message in line
    done = attnprune("diff", place / "llama-lora1", damaged, "--json")
    assert json.loads(done.stdout)["error"]["exit_code"] == done.returncode == 2


@pytest.mark.parametrize(("a", "b"), [("llama-lora1", "llama-lora2"), ("llama-lora1-merged", "llama-half")])
def test_neither_torch_nor_transformers_is_imported(place, a, b):
    program = (
        "import sys; from attnprune.cli.app import run; sys.argv = ['attnprune', *sys.argv[1:]]; code = run(); "
        "sys.exit(code or int(any(name in sys.modules for name in ('torch', 'transformers'))) * 9)"
    )
    command = [sys.executable, "-c", program, "diff", str(place / a), str(place / b)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_merged_model_need_not_fit_in_memory(place, copied):
    """48 MB of tensors on each side; in memory are a few pieces of one pair."""

    def grown(tensors):
        return tensors | {f"large.{i}": torch.full((2000, 2000), float(i)) for i in range(3)}

    a, b = (rewrite(copied(place / "llama-lora1-merged", name), "model.safetensors", grown) for name in "ab")
    tracemalloc.start()
    try:
        check_equal(compare(a, b))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20e6


@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_a_base_completes_what_could_not_be_compared(place, base):
    """LoRA against delta by way of their merged forms, tensor by tensor."""
    a, b = (place / f"{base}-{kind}1" for kind in ("lora", "delta"))
    found = diff.compare(str(a), str(b), str(place / base))
    models = [loading.load(side, str(place / base)).model for side in (a, b)]
    before, after = (dict(model.named_parameters()) for model in models)
    moved = {n: (after[n] - before[n]).norm().item() for n in before if "attnprune" not in n}
    expected = {n: value for n, value in moved.items() if value > 0}
    assert {t.name: t.change for t in found.tensors} == pytest.approx(expected, rel=1e-5)
    assert {t.name: t.relative for t in found.tensors} == pytest.approx(
        {n: value / before[n].norm().item() for n, value in expected.items()}, rel=1e-5
    )
    assert len(expected) >= 4
    assert (found.uncompared, found.notes) == ([], [])
    assert compare(a, b).uncompared
    shown = attnprune("diff", a, b, "--base", place / base, "--json")
    assert json.loads(shown.stdout)["uncompared"] == []


def test_a_base_that_is_no_base_of_both_is_refused(place):
    a, b = place / "llama-lora1", place / "llama-delta1"
    refused(lambda: diff.compare(str(a), str(b), str(place / "gpt2")), "wrong base")
    refused(lambda: diff.compare(str(place / "llama"), str(b), str(place / "llama")), "is a base model itself")
