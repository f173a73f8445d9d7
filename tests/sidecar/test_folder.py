"""Sidecar folders: read as written, published whole, refused where something is missing, links and special files."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import stat
from pathlib import Path

import numpy as np
import pytest
import torch

from attnprune.attention.interface import gates_of
from attnprune.files import sha256_of
from attnprune.sidecar import folder as folder_module
from attnprune.sidecar import format
from attnprune.sidecar.folder import is_merged, open_sidecar
from attnprune.sidecar.loading import load
from tests.helpers.factory import refused, save_tiny_llama
from tests.helpers.formats import (
    ADAPTER,
    DELTA,
    GATES,
    MANIFEST,
    good_arrays,
    good_manifest,
    good_weights,
    make,
    read_all,
    store_manifest,
    stored_manifest,
)
from tests.helpers.sidecars import save_sidecar


@pytest.fixture
def no_hang():
    """Fail instead of waiting for ever, for instance on a pipe."""

    def stop(number, frame):
        pytest.fail("still waiting after 5 s")  # no OSError, which would count as a refusal

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(5)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


# A valid sidecar


def test_a_sidecar_is_read_as_it_was_written(folder):
    opened, gates, weights = read_all(folder)
    assert weights == {}
    assert set(gates) == set(good_arrays())
    for name, array in good_arrays().items():
        assert gates[name].dtype == array.dtype
        assert np.array_equal(gates[name], array)
    assert [bias.tolist() for bias in opened.biases()] == [[-4, 4], [-4, 0, 4]]
    assert [density.tolist() for density in opened.density] == [[0.25, 0], [0.25, 0, 0.25]]
    values = good_manifest()
    values["files"] = stored_manifest(folder)["files"]
    assert opened.manifest.model_dump(exclude_none=True) == values | {"weights": {"kind": "none", "tensors": 0}}


def test_the_manifest_is_canonical_and_lists_every_file(folder):
    text = (folder / MANIFEST).read_text()
    assert text == json.dumps(json.loads(text), sort_keys=True, indent=2) + "\n"
    assert open_sidecar(folder).manifest.to_json() == text
    assert {path.name for path in folder.iterdir()} == {MANIFEST, GATES}
    raw = (folder / GATES).read_bytes()
    assert stored_manifest(folder)["files"] == {GATES: {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}}


def test_publishing_leaves_no_staging_folder(folder):
    assert {path.name for path in folder.parent.iterdir()} == {folder.name}


def test_a_publication_killed_before_the_manifest_is_no_sidecar(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_module, "write_atomic", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make(tmp_path / "sidecar")
    refused(lambda: open_sidecar(tmp_path / "sidecar"), f"no {MANIFEST}")


@pytest.mark.parametrize("kind", ["delta", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_read_as_they_were_written(tmp_path, kind, dtype):
    weights = good_weights(kind, dtype)
    folder = make(tmp_path / "sidecar", kind, weights)
    read = read_all(folder)[2]
    assert set(read) == set(weights)
    for name, tensor in weights.items():
        assert read[name].dtype == dtype
        assert torch.equal(read[name], tensor)
    listed = {MANIFEST, GATES} | ({DELTA} if kind == "delta" else {ADAPTER, format.ADAPTER_CONFIG_FILE})
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == listed


@pytest.mark.parametrize("kind", ["delta", "lora"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_weight_is_refused(tmp_path, kind, bad):
    weights = good_weights(kind)
    name = next(iter(weights))
    weights[name][0, 0] = bad
    folder = make(tmp_path / "sidecar", kind, weights)
    refused(lambda: read_all(folder), name, "non-finite")


@pytest.mark.parametrize("kind", ["delta", "lora"])
def test_weights_the_manifest_does_not_list_are_refused(folder, kind):
    store_manifest(folder, stored_manifest(folder) | {"weights": {"kind": kind}})
    refused(lambda: read_all(folder), "not listed")


# The folder


def test_a_missing_folder_is_refused(tmp_path):
    refused(lambda: open_sidecar(tmp_path / "missing"), "no such file or folder")


def test_a_file_instead_of_a_folder_is_refused(folder):
    refused(lambda: open_sidecar(folder / GATES), "not a sidecar folder")


def test_a_folder_without_manifest_is_refused(tmp_path):
    error = refused(lambda: open_sidecar(tmp_path), f"no {MANIFEST}")
    assert error.hint is None


def test_an_unfinished_run_is_refused_with_the_way_to_finish_it(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    assert f"--resume {tmp_path}" in refused(lambda: open_sidecar(tmp_path)).hint


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", ""])
def test_an_impossible_path_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    refused(lambda: open_sidecar(name))


# Listed files on the disk


@pytest.mark.parametrize("position", [0, 8, 30, -1])
def test_one_flipped_byte_is_noticed(folder, position):
    raw = bytearray((folder / GATES).read_bytes())
    raw[position] ^= 1
    (folder / GATES).write_bytes(raw)
    refused(lambda: read_all(folder), GATES, "is damaged")


@pytest.mark.parametrize("change", [lambda raw: raw[:-1], lambda raw: raw + b"\0", lambda raw: b""])
def test_another_size_is_noticed(folder, change):
    (folder / GATES).write_bytes(change((folder / GATES).read_bytes()))
    refused(lambda: read_all(folder), GATES, "is damaged")


@pytest.mark.parametrize("key", ["size", "sha256"])
def test_both_size_and_hash_count(folder, key):
    values = stored_manifest(folder)
    values["files"][GATES][key] = {"size": 1, "sha256": "0" * 64}[key]
    store_manifest(folder, values)
    refused(lambda: read_all(folder), GATES, "is damaged")


def test_a_listed_file_that_is_missing_is_refused(folder):
    (folder / GATES).unlink()
    refused(lambda: read_all(folder), GATES, "is missing")


def test_a_file_that_is_not_listed_is_refused(folder):
    store_manifest(folder, stored_manifest(folder) | {"files": {}})
    refused(lambda: read_all(folder), GATES, "not listed")


@pytest.mark.parametrize("name", [GATES, MANIFEST])
@pytest.mark.parametrize("absolute", [True, False])
def test_a_link_out_of_the_folder_is_refused(folder, name, absolute):
    outside = folder.parent / "outside"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside if absolute else "../outside")
    refused(lambda: read_all(folder), name, "link leaves the folder")


def test_a_folder_link_out_of_the_folder_is_refused(tmp_path):
    folder = make(tmp_path / "sidecar", "lora")
    (folder / "adapter").rename(tmp_path / "outside")
    (folder / "adapter").symlink_to(tmp_path / "outside")
    refused(lambda: read_all(folder), "link leaves the folder")


def test_a_link_to_a_sibling_with_the_same_prefix_is_refused(folder):
    sibling = folder.with_name(folder.name + "-evil")
    sibling.mkdir()
    (folder / GATES).rename(sibling / GATES)
    (folder / GATES).symlink_to(sibling / GATES)
    refused(lambda: read_all(folder), "link leaves the folder")


def test_links_within_the_folder_and_to_the_folder_are_followed(folder, tmp_path):
    (folder / GATES).rename(folder / "blob")
    (folder / GATES).symlink_to("blob")
    (tmp_path / "link").symlink_to(folder)
    assert len(read_all(tmp_path / "link")[1]) == len(good_arrays())


@pytest.mark.parametrize("name", [GATES, MANIFEST])
def test_a_loop_of_links_is_refused(folder, name):
    (folder / name).unlink()
    (folder / name).symlink_to("other")
    (folder / "other").symlink_to(name)
    refused(lambda: read_all(folder), name)


@pytest.mark.parametrize("name", [GATES, MANIFEST])
@pytest.mark.parametrize("special", ["pipe", "folder", "socket"])
@pytest.mark.usefixtures("no_hang")
def test_a_file_that_is_not_regular_is_refused_at_once(folder, name, special):
    (folder / name).unlink()
    if special == "pipe":
        os.mkfifo(folder / name)
    elif special == "folder":
        (folder / name).mkdir()
    else:
        os.mknod(folder / name, stat.S_IFSOCK | 0o600)
    refused(lambda: read_all(folder), name)


@pytest.mark.parametrize("closed", ["sidecar/gates.safetensors", "sidecar/attnprune.json", "sidecar", "."])
def test_a_file_without_permission_is_refused(as_nobody, closed):
    public, switch = as_nobody
    folder = make(public / "sidecar")
    for path in (folder, folder / GATES, folder / MANIFEST):
        path.chmod(0o755)
    (public / closed).chmod(0)
    switch()
    refused(lambda: read_all(folder), "permission denied")


def hub_cache(root, kind="none"):
    """A sidecar as huggingface_hub caches it: models--x/snapshots/SHA/FILE -> ../../blobs/HASH."""
    repository = root / "models--some--sidecar"
    snapshot = make(root / "plain", kind)
    target = repository / "snapshots" / ("a" * 40)
    blobs = repository / "blobs"
    blobs.mkdir(parents=True)
    for file in [path for path in snapshot.rglob("*") if path.is_file()]:
        name = file.relative_to(snapshot)
        blob = blobs / sha256_of(file)
        file.rename(blob)
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).symlink_to(Path(*[".."] * (len(name.parts) + 1), "blobs", blob.name))
    return target


@pytest.mark.parametrize("kind", ["none", "delta", "lora"])
def test_a_hub_cache_is_read_through_its_links(tmp_path, kind):
    snapshot = hub_cache(tmp_path, kind)
    assert (snapshot / MANIFEST).is_symlink()
    _, gates, weights = read_all(snapshot)
    assert len(gates) == len(good_arrays())
    assert bool(weights) == (kind != "none")


@pytest.mark.parametrize("place", ["models--some--sidecar/secret", "models--other--model/blobs/secret", "secret"])
def test_a_hub_cache_link_to_anywhere_else_is_refused(tmp_path, place):
    snapshot = hub_cache(tmp_path)
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).write_bytes((snapshot / GATES).read_bytes())
    (snapshot / GATES).unlink()
    (snapshot / GATES).symlink_to(tmp_path / place)
    refused(lambda: read_all(snapshot), "link leaves the folder")


@pytest.mark.parametrize(
    ("config", "has_code", "expected"),
    [
        ('{"model_type": "llama", "_name_or_path": "attnprune_x"}', False, False),
        ('{"model_type": "llama", "attnprune_note": {"model_type": "attnprune_llama"}}', False, False),
        ('{"model_type": "llama", "architectures": ["attnprune_llama"], "attnprune_": "attnprune_"}', True, False),
        ('{"model_type": "llama", "limit": Infinity, "name": "attnprune_x"}', False, False),
        ('{"model_type": ["attnprune_llama"]}', False, False),
        ('["attnprune_llama"]', False, False),
        ('{"model_type" : "attnprune_llama"}', False, True),
        ('{"model_type": "attnprune\\u005fllama"}', False, True),
        ('{"model_type": "attnprune_llama", ', False, False),
        ('{"model_type": "attnprune_llama", ', True, True),  # a damaged merged folder, and its reader says so
        ("", True, True),
    ],
)
def test_only_the_model_type_makes_a_folder_a_merged_model(tmp_path, config, has_code, expected):
    (tmp_path / "config.json").write_text(config)
    if has_code:
        (tmp_path / "modeling_attnprune.py").touch()
    assert is_merged(tmp_path) is expected


def test_a_base_that_mentions_attnprune_in_its_configuration_is_a_base(tmp_path):
    base = save_tiny_llama(tmp_path / "attnprune_tiny")
    values = json.loads((base / "config.json").read_bytes())
    values |= {"_name_or_path": "attnprune_tiny", "note": ["attnprune_llama", {"model_type": "attnprune_llama"}]}
    (base / "config.json").write_text(json.dumps(values))
    sidecar = save_sidecar(tmp_path / "sidecar", base)
    model, _ = load(sidecar.path, str(base))
    assert len(gates_of(model)) == 2
