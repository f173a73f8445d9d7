"""The golden vectors of formats/vectors: read for ever by the package and by the small reader, remade without drift."""

from __future__ import annotations

import ast
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from attnprune.errors import VerificationError
from attnprune.sidecar import format, loading, masks
from attnprune.sidecar.folder import is_merged, open_artefact, open_sidecar
from examples import read_sidecar
from examples.write_vectors import BASES, KINDS, VECTORS, expected_mask, expected_merged, expected_sidecar, write_all
from tests.helpers import command
from tests.helpers.paths import ROOT

EXPECTED = {file.stem: json.loads(file.read_text()) for file in sorted((VECTORS / "expected").glob("*.json"))}
NAMES = {what: [name for name, values in EXPECTED.items() if values["what"] == what] for what in ("sidecar", "merged")}
MASKS = [name for name, values in EXPECTED.items() if values["what"] == "mask"]
FOLDERS = NAMES["sidecar"] + NAMES["merged"]


def python(*arguments, **environment):
    return command.python(*arguments, cwd=ROOT, env=command.ENVIRONMENT | environment)


def base_of(name):
    base = EXPECTED[name]["base"]
    return VECTORS / "bases" / base if base in BASES else base


def manifest_of(folder):
    return open_artefact(folder).manifest


def differences(found, stored, tolerance, where=""):
    """Paths at which two JSON values differ; numbers may differ by `tolerance`, relative or absolute."""
    if isinstance(found, dict) and isinstance(stored, dict) and found.keys() == stored.keys():
        return [d for key in found for d in differences(found[key], stored[key], tolerance, f"{where}.{key}")]
    if isinstance(found, list) and isinstance(stored, list) and len(found) == len(stored):
        pairs = enumerate(zip(found, stored, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, tolerance, f"{where}.{i}")]
    if isinstance(found, float) and isinstance(stored, float):
        return [] if math.isclose(found, stored, rel_tol=tolerance, abs_tol=tolerance) else [where]
    return [] if found == stored else [where]


def compare(name, found, stored):
    """Equal up to rounding, which also moves a score across its gate now and then, in 16 bits more often."""
    found, stored = json.loads(json.dumps(found)), json.loads(json.dumps(stored))
    if "probe" in stored:
        edges = found["probe"].pop("open_edges") - stored["probe"].pop("open_edges")
        assert abs(edges) <= manifest_of(VECTORS / name).probe.edge_tolerance
    assert differences(found, stored, 5e-2 if "bf16" in name else 1e-4) == []


def test_every_kind_of_every_base_is_there():
    kinds = [*KINDS, "merged"]
    assert set(MASKS) == {"gpt2-mask", "llama-gqa-mask"}
    assert set(EXPECTED) == {f"{base}-{kind}" for base in BASES for kind in kinds} | {"first-release", *MASKS}
    stored = {f.name.removesuffix(".safetensors") for f in VECTORS.iterdir()} - {"bases", "expected"}
    assert stored == set(EXPECTED)


@pytest.mark.parametrize("name", NAMES["sidecar"])
def test_a_golden_sidecar_loads_and_gives_what_it_gave(name):
    compare(name, expected_sidecar(VECTORS / name, base_of(name)), EXPECTED[name])


@pytest.mark.parametrize("name", NAMES["merged"])
def test_a_golden_merged_model_loads_and_gives_what_it_gave(name):
    compare(name, expected_merged(VECTORS / name, EXPECTED[name]["base"]), EXPECTED[name])
    lora = EXPECTED[name.replace("merged", "lora")]["merged_weights_sha256"]
    assert lora.items() <= EXPECTED[name]["weights_sha256"].items()


@pytest.mark.parametrize("name", MASKS)
def test_a_golden_mask_is_read(name):
    assert expected_mask(VECTORS / f"{name}.safetensors", EXPECTED[name]["source"]) == EXPECTED[name]


@pytest.mark.parametrize("name", FOLDERS)
def test_a_golden_manifest_is_written_again_as_it_was(name):
    folder = VECTORS / name
    text = manifest_of(folder).to_json()
    if is_merged(folder):
        assert json.loads(text) == json.loads((folder / "config.json").read_text())["attnprune"]
    else:
        assert text == (folder / format.MANIFEST_FILE).read_text()


def test_the_first_release_is_verified_and_applied(tmp_path):
    folder = VECTORS / "first-release"
    manifest = open_sidecar(folder).manifest
    assert (manifest.created_by, manifest.weights.kind) == ("attnprune 0.1.0", "lora")
    for name in ("verify", "apply"):
        done = python("-m", "attnprune", name, folder, "--json")
        assert done.returncode == 0, done.stderr
    shutil.copytree(folder, tmp_path / "changed")
    values = json.loads((folder / format.MANIFEST_FILE).read_text())
    values["probe"]["open_edges"] += 50
    (tmp_path / "changed" / format.MANIFEST_FILE).write_text(json.dumps(values))
    with pytest.raises(VerificationError):  # the probe was really run
        loading.load(tmp_path / "changed")


REMOTE = """
import json, sys, torch, transformers
sys.modules["attnprune"] = None  # not installed
from pathlib import Path
for folder in map(Path, sys.argv[1:]):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    ids = torch.tensor([json.loads((folder / "config.json").read_text())["attnprune"]["probe"]["input_ids"]])
    print(json.dumps(model(ids).logits[0, -1].float().tolist()))
"""


def test_golden_merged_models_run_with_the_code_they_carry(tmp_path):
    folders = [VECTORS / name for name in NAMES["merged"]]
    done = python("-c", REMOTE, *folders, HF_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    for name, line in zip(NAMES["merged"], done.stdout.splitlines(), strict=True):
        tolerance = 0.1 if "bf16" in name else 1e-4
        assert differences(json.loads(line), EXPECTED[name]["probe"]["last_logits"], tolerance) == []


def test_vectors_are_remade_without_drift(tmp_path):
    write_all(tmp_path)
    for name in set(EXPECTED) - {"first-release"}:
        found = json.loads((tmp_path / "expected" / f"{name}.json").read_text())
        # Hashes differ where a loss is rounded otherwise, and safetensors writes metadata in any order.
        stored = {key: value for key, value in EXPECTED[name].items() if key not in ("files", "sha256")}
        assert found.pop("files", {}).keys() == EXPECTED[name].get("files", {}).keys()
        found.pop("sha256", None)
        compare(name, found, stored)
    for base in BASES:
        made, stored = ((place / "bases" / base / "model.safetensors").read_bytes() for place in (tmp_path, VECTORS))
        assert read_sidecar.tensors(made)[0].keys() == read_sidecar.tensors(stored)[0].keys()
        for key, array in read_sidecar.tensors(stored)[0].items():
            assert np.array_equal(array, read_sidecar.tensors(made)[0][key])


# The reader of examples/: written from the specification, without the package


def test_the_small_reader_is_small_and_needs_numpy_alone():
    source = Path(read_sidecar.__file__).read_text()
    assert len(source.splitlines()) < 100
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {getattr(node, "module", None) or node.names[0].name for node in imports}
    assert names == {"hashlib", "json", "re", "sys", "pathlib", "numpy"}


@pytest.mark.parametrize("name", FOLDERS)
def test_the_small_reader_finds_what_the_package_finds(name):
    folder = VECTORS / name
    found, manifest = read_sidecar.read(folder), manifest_of(folder)
    assert found["merged"] == is_merged(folder)
    assert found["manifest"] == manifest.model_dump(exclude_none=True)
    gates = format.read_arrays((folder / format.GATES_FILE).read_bytes(), format.GATES_FILE)
    for layer in range(len(manifest.gate.heads)):
        for key in ("gate.bias", "gate.closed", "stats.density", "stats.open_by_offset", "stats.sink"):
            assert found[key.split(".")[1]][layer] == gates[f"layers.{layer}.{key}"].tolist()
    assert found["offset_edges"] == gates["stats.offset_edges"].tolist()
    if not found["merged"]:
        weights = open_sidecar(folder).weights()
        assert found["weights"].keys() == weights.keys()
        for key, values in weights.items():
            assert np.array_equal(found["weights"][key], values.float().numpy())


@pytest.mark.parametrize("name", MASKS)
def test_the_small_reader_finds_the_edges_the_package_finds(name):
    file = VECTORS / f"{name}.safetensors"
    found, mask = read_sidecar.read_mask(file.read_bytes()), masks.read(file)
    assert found["input_ids"] == EXPECTED[name]["input_ids"]
    assert found["open"] == EXPECTED[name]["open"]
    for layer, is_open in enumerate(found["is_open"]):
        assert np.array_equal(is_open, mask.layer(layer))


@pytest.mark.parametrize("name", ["gpt2-delta", "llama-gqa-merged", "first-release"])
def test_the_small_reader_refuses_a_flipped_bit(tmp_path, name):
    shutil.copytree(VECTORS / name, tmp_path / "copy")
    for file in read_sidecar.read(tmp_path / "copy")["manifest"]["files"]:
        good = (tmp_path / "copy" / file).read_bytes()
        (tmp_path / "copy" / file).write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(ValueError, match="is damaged"):
            read_sidecar.read(tmp_path / "copy")
        (tmp_path / "copy" / file).write_bytes(good)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("first-release", " 37.46  58.41  55.56  46.91"),
        ("gpt2-merged", "sparse gpt2, weights none, merged: True"),
        ("llama-gqa-mask.safetensors", str(EXPECTED["llama-gqa-mask"]["open"][1])),
    ],
)
def test_the_small_reader_prints_what_it_read(name, line):
    done = python("examples/read_sidecar.py", VECTORS / name)
    assert done.returncode == 0, done.stderr
    assert line in done.stdout.splitlines()
