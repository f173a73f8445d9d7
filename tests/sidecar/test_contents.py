"""Merged folders that are not what their manifest says: every way of opening one refuses them, with one line.

Long because every rule is tried through every way of opening the same folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import attnprune
from attnprune.cli.app import app
from attnprune.errors import AttnPruneError, InputError, VerificationError
from attnprune.publish.push import push
from attnprune.sidecar import format, hub, modeling_attnprune, remote, strangers
from attnprune.sidecar.diff import compare
from attnprune.sidecar.folder import open_merged
from attnprune.sidecar.verify import climb
from tests.helpers.factory import refused
from tests.helpers.sidecars import reseal, save_merged


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return save_merged(tmp_path_factory.mktemp("contents") / "merged")


@pytest.fixture
def folder(made, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(made, tmp_path / "merged")


def verify(folder):
    error = list(climb(folder))[-1].error
    if error is not None:
        raise error


def change_json(folder, name, change):
    values = json.loads((folder / name).read_text())
    change(values)
    (folder / name).write_text(json.dumps(values))


def change_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def inspect(folder):
    sidecar = open_merged(folder)
    return sidecar.biases()


def diff(folder):
    return compare(str(folder), str(folder))


LOADING = [attnprune.load, verify, diff, lambda folder: push(folder, "some/model", base_model="some/base")]
READING = [*LOADING, inspect]
LISTED = ["model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]


def commands(folder):
    """Exit codes of the commands that load or check a merged folder."""
    lines = [["verify", str(folder)], ["apply", str(folder)], ["inspect", str(folder)]]
    return {line[0]: CliRunner().invoke(app, line).exception for line in lines}


def test_a_whole_folder_passes_everywhere(folder):
    attnprune.load(folder)
    verify(folder)
    assert diff(folder).tensors == []
    assert commands(folder) == dict.fromkeys(("verify", "apply", "inspect"))


# --- sizes, hashes and values


def nan_row(tensors):
    tensors["model.embed_tokens.weight"][3] = float("nan")  # no token of the probe


@pytest.mark.parametrize("check", LOADING)
@pytest.mark.parametrize(
    "name", ["model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
def test_a_flipped_bit_of_any_listed_file_is_refused(folder, check, name):
    raw = bytearray((folder / name).read_bytes())
    raw[-3] ^= 1  # the last tensor's values, or a letter of JSON
    (folder / name).write_bytes(bytes(raw))
    if check is diff and name != "model.safetensors":
        return  # reads no other file
    error = refused(lambda: check(folder), name)
    assert "damaged" in error.message or "not valid JSON" in error.message


@pytest.mark.parametrize("check", LOADING)
def test_a_nan_row_is_refused_by_name_even_under_its_own_hash(folder, check):
    change_weights(folder, nan_row)
    refused(lambda: check(folder), "model.safetensors", "is damaged")
    reseal(folder)
    refused(lambda: check(folder), "non-finite value in model.embed_tokens.weight")


def test_load_without_the_probe_checks_as_much(folder):
    change_weights(folder, nan_row)
    refused(lambda: attnprune.load(folder, verify=False), "is damaged")


@pytest.mark.parametrize("key", ["rms_norm_eps", "tie_word_embeddings", "rope_parameters", "use_cache", "new"])
@pytest.mark.parametrize("check", READING)
def test_a_value_of_the_configuration_that_changed_is_refused(folder, check, key):
    change_json(folder, "config.json", lambda values: values.update({key: 1e-3}))
    refused(lambda: check(folder), "config.json: is damaged")


def test_a_folder_of_an_older_release_lists_less_and_loads(folder):
    def older(values):
        del values["attnprune"]["merged"]["config"]
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            del values["attnprune"]["files"][name]

    change_json(folder, "config.json", older)
    verify(folder)


def test_the_configuration_is_compared_whatever_its_layout(folder):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(dict(reversed(values.items())), indent=None))
    verify(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "gates.safetensors", "modeling_attnprune.py"])
@pytest.mark.parametrize("check", READING)
def test_what_is_not_listed_is_not_read(folder, check, name):
    change_json(folder, "config.json", lambda values: values["attnprune"]["files"].pop(name))
    refused(lambda: check(folder), f"files: {name} is not listed")


@pytest.mark.parametrize(
    "name", ["model.safetensors.index.json", "other.safetensors", "model.fp16.safetensors", "x.gguf"]
)
def test_weights_beside_the_listed_ones_are_refused(folder, name):
    """transformers picks weights by their names, `model.safetensors` before an index for example."""
    (folder / name).write_bytes(b"{}")
    refused(lambda: attnprune.load(folder), name, "weights that the manifest does not list")


@pytest.mark.parametrize(
    "name",
    ["chat_template.jinja", "added_tokens.json", "special_tokens_map.json", "tokenizer.model", "merges.txt",
     "x.tiktoken", "additional_chat_templates/tools.jinja"],
)  # fmt: skip
def test_tokenizer_files_beside_the_listed_ones_are_refused(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"{}")
    refused(lambda: attnprune.load(folder), name, "a tokenizer file that the manifest does not list")


@pytest.mark.parametrize("name", ["README.md", "LICENSE.txt", "results.json", "plots/a.png", "plots/vocab.txt"])
def test_what_no_loader_reads_may_lie_there(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"{}")
    verify(folder)


def shard(folder, change=lambda index: None):
    """The weights in two files and an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    places = {n: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, n in enumerate(names)}
    for file in set(places.values()):
        save_file({n: tensors[n] for n in names if places[n] == file}, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": dict(places)}
    change(index["weight_map"])
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    values = json.loads((folder / "config.json").read_text())
    files = values["attnprune"]["files"]
    entry = files.pop("model.safetensors")
    files |= dict.fromkeys([*set(places.values()), "model.safetensors.index.json"], entry)
    (folder / "config.json").write_text(json.dumps(values))
    reseal(folder)
    return folder


def test_shards_load(folder, made):
    ids = torch.tensor([open_merged(made).manifest.probe.input_ids])
    with torch.no_grad():
        expected = attnprune.load(made).model(ids).logits
        assert torch.equal(attnprune.load(shard(folder)).model(ids).logits, expected)


@pytest.mark.parametrize(
    "change",
    [lambda places: places.popitem(), lambda places: places.update(x="model-00001-of-00002.safetensors"),
     lambda places: places.update({"lm_head.weight": "../x.safetensors"})],
)  # fmt: skip
def test_an_index_that_is_not_that_of_the_shards_is_refused(folder, change):
    refused(lambda: attnprune.load(shard(folder, change)), "weight_map is not that of the files")


def test_a_file_that_changes_meanwhile_is_refused(folder, monkeypatch):
    from attnprune.sidecar import merged

    read = merged._read

    def slow(path, *arguments, **options):
        found = read(path, *arguments, **options)
        (path / "model.safetensors").touch()
        return found

    monkeypatch.setattr(merged, "_read", slow)
    refused(lambda: attnprune.load(folder), "changed while reading")


# --- gates.safetensors and the gates inside the weights


@pytest.mark.parametrize("check", READING)
@pytest.mark.parametrize("value", [1e4, -1e4, None])
def test_other_gates_inside_the_weights_are_refused(folder, check, value):
    """With redone hashes `inspect` would show gates that the model does not run."""

    def change(tensors):
        gate = tensors["model.layers.1.self_attn.attnprune_gate.bias"]
        if value is None:
            gate[2] = float(np.nextafter(np.float32(gate[2]), np.float32(1e4)))  # by one bit
        else:
            gate.fill_(value)

    change_weights(folder, change)
    reseal(folder)
    refused(lambda: check(folder), "model.layers.1.self_attn.attnprune_gate.bias differs from gates.safetensors")


@pytest.mark.parametrize("check", READING)
def test_other_gates_in_the_file_are_refused(folder, check):
    raw = (folder / "gates.safetensors").read_bytes()
    arrays = format.read_arrays(raw, "gates.safetensors")
    at = raw.index(arrays["layers.0.gate.bias"].tobytes())
    bias = np.full_like(arrays["layers.0.gate.bias"], 1e4)
    (folder / "gates.safetensors").write_bytes(raw[:at] + bias.tobytes() + raw[at + bias.nbytes :])
    reseal(folder)
    refused(lambda: check(folder), "differs from gates.safetensors")


@pytest.mark.parametrize(
    ("name", "problem"),
    [("model.layers.7.self_attn.attnprune_gate.bias", "is not the gate of a layer"),
     ("other.0.self_attn.attnprune_gate.bias", "the second one of its layer"),
     ("model.attnprune_gate.bias", "is not the gate of a layer")],
)  # fmt: skip
def test_gates_of_no_layer_are_refused(folder, name, problem):
    change_weights(folder, lambda tensors: tensors.update({name: torch.zeros(4)}))
    reseal(folder)
    refused(lambda: inspect(folder), problem)


# --- what a loader would run


OURS = {
    "AutoConfig": "modeling_attnprune.AttnPruneLlamaConfig",
    "AutoModelForCausalLM": "modeling_attnprune.AttnPruneLlamaForCausalLM",
}
MAPS = {
    "another repository": OURS | {"AutoModelForCausalLM": f"someone/else--{OURS['AutoModelForCausalLM']}"},
    "another file": OURS | {"AutoConfig": "other.AttnPruneLlamaConfig"},
    "another class": OURS | {"AutoModelForCausalLM": "modeling_attnprune.torch"},
    "another family": OURS | {"AutoModelForCausalLM": "modeling_attnprune.AttnPruneMistralForCausalLM"},
    "a file in a folder": OURS | {"AutoConfig": "x.modeling_attnprune.AttnPruneLlamaConfig"},
    "one more": OURS | {"AutoTokenizer": ["modeling_attnprune.AttnPruneTokenizer", None]},
    "one less": {"AutoConfig": OURS["AutoConfig"]},
    "no object": ["modeling_attnprune.AttnPruneLlamaConfig"],
    "a list": OURS | {"AutoConfig": [OURS["AutoConfig"]]},
    "nothing": None,
}


@pytest.mark.parametrize("case", MAPS)
@pytest.mark.parametrize("check", LOADING)
def test_any_other_auto_map_is_refused(folder, case, check):
    reseal(folder, lambda values: values.update(auto_map=MAPS[case]))
    if check is diff and case == "another family":
        return  # builds no model
    if case == "another family" and check not in (attnprune.load, verify):
        return  # push runs nothing; whoever loads what it sent does
    refused(lambda: check(folder), "config.json: auto_map")


HOOKS = {
    "tokenizer": ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["x--tok.Tok", None]}}),
    "list": ("tokenizer_config.json", {"auto_map": ["x--tok.Tok", None]}),
    "generation": ("generation_config.json", {"custom_generate": "someone/else"}),
    "processor": ("processor_config.json", {"auto_map": {"AutoProcessor": "someone/else--p.P"}}),
    "nested": ("preprocessor_config.json", {"a": [{"b": {"auto_map": {}}}]}),
    "folder": ("sub/config.json", {"auto_map": {"AutoConfig": "x.X"}}),
    "name": ("Tokenizer_Config.JSON", {"auto_map": {}}),
    "pipelines": ("config.json", {"custom_pipelines": {"text-generation": {"impl": "x.X"}}}),
    "weights": ("config.json", {"transformers_weights": "other.safetensors"}),
    "quantised": ("config.json", {"quantization_config": {"quant_method": "bitsandbytes"}}),
    "inner": ("config.json", {"text_config": {"auto_map": {"AutoConfig": "x.X"}}}),
}


@pytest.mark.parametrize("case", HOOKS)
@pytest.mark.parametrize("check", READING)
def test_keys_that_name_other_code_are_refused(folder, case, check):
    name, keys = HOOKS[case]
    file = folder / name
    file.parent.mkdir(exist_ok=True)
    values = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(values | keys))
    reseal(folder)
    refused(lambda: check(folder), "makes a loader run or load something else")


def test_an_escaped_key_is_the_same_key(folder):
    (folder / "x.json").write_text('{"auto\\u005fmap": 1}')
    refused(lambda: attnprune.load(folder), "auto_map makes a loader")


def test_a_token_of_that_name_is_no_key(folder):
    change_json(folder, "tokenizer.json", lambda values: values["model"]["vocab"].update(auto_map=257))
    reseal(folder)
    attnprune.load(folder)


@pytest.mark.parametrize(
    "name",
    ["generate.py", "custom_generate/generate.py", "custom_generate/requirements.txt", "Custom_Generate/x", "a/b/c.PY",
     "a/modeling_attnprune.py", "x.so", "a/pytorch_model.bin", "__pycache__/x.pyc", "adapter_config.json",
     "a/custom_generate/x.txt"],
)  # fmt: skip
@pytest.mark.parametrize("check", READING)
def test_code_anywhere_below_is_refused(folder, name, check):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("{}")
    part = "code for generate" if "custom_generate" in name.lower() else name
    refused(lambda: check(folder), part, "sparse model")


def test_links_to_code_are_refused(folder, tmp_path):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "generate.py").write_text("")
    (folder / "custom_generate").symlink_to(tmp_path / "code")
    refused(lambda: verify(folder), "custom_generate: link leaves the folder")
    (folder / "custom_generate").unlink()
    (folder / "x.py").symlink_to(tmp_path / "code" / "generate.py")
    refused(lambda: verify(folder), "x.py: pickle or code")
    (folder / "x.py").unlink()
    (tmp_path / "t.json").write_text("{}")
    (folder / "t.json").symlink_to(tmp_path / "t.json")
    refused(lambda: verify(folder), "t.json: link leaves the folder")


def test_an_empty_folder_for_generate_is_refused(folder):
    (folder / "custom_generate").mkdir()
    refused(lambda: attnprune.load(folder), "custom_generate")


def test_a_pipe_is_refused_at_once(folder):
    os.mkfifo(folder / "x.json")
    refused(lambda: attnprune.load(folder), "x.json: not a regular file")


@pytest.mark.parametrize(
    ("key", "value"),
    [("attn_implementation", "sdpa"), ("attn_implementation", None), ("vocab_size", 257), ("vocab_size", False),
     ("model_type", "llama")],
)  # fmt: skip
def test_a_configuration_that_another_class_would_load_is_refused(folder, key, value):
    reseal(folder, lambda values: values.update({key: value}))
    with pytest.raises(InputError):
        verify(folder)


def test_names_of_a_repository_and_of_a_folder_are_held_to_one_rule(folder):
    names = strangers.names_in(folder)
    strangers.check_names("some/model: ", names, merged=True)
    refused(lambda: strangers.check_names("some/model: ", names, merged=False), "modeling_attnprune.py: pickle or code")
    for name in ("a/x.py", "custom_generate/x", "adapter_config.json", "Adapter_Config.json"):
        refused(lambda name=name: strangers.check_names("some/model: ", [name], merged=True), f"some/model: {name}")


def test_a_run_that_keeps_its_checkpoints_is_a_sidecar(made):
    sidecar = made.with_name("merged-sidecar")
    (sidecar / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    (sidecar / "checkpoints" / "checkpoint-1" / "optimizer.pt").write_bytes(b"")
    try:
        attnprune.open_sidecar(sidecar)
        (sidecar / "deep" / "er").mkdir(parents=True)
        (sidecar / "deep" / "er" / "x.py").write_text("")
        refused(lambda: attnprune.open_sidecar(sidecar), "deep/er/x.py: pickle or code")
    finally:
        shutil.rmtree(sidecar / "checkpoints")
        shutil.rmtree(sidecar / "deep", ignore_errors=True)


def test_what_the_base_brings_along_stays_behind(made, tmp_path):
    """A base whose tokenizer names code of its own gives a merged folder that names none."""
    from attnprune.sidecar import loading, merged

    model, tokenizer = loading.load(made.with_name("merged-sidecar"), str(made.with_name("merged-base")))
    tokenizer.init_kwargs["auto_map"] = {"AutoTokenizer": "x.X"}
    tokenizer._auto_map = {"AutoTokenizer": "x.X"}
    model.config.custom_pipelines = {"x": {"impl": "x.X"}}
    model.config.transformers_weights = "x.safetensors"
    sidecar = attnprune.open_sidecar(made.with_name("merged-sidecar"))
    merged.write_merged(model, tokenizer, sidecar, tmp_path / "out", same_dtype=True)
    verify(tmp_path / "out")


# --- structure before anything is built

STRUCTURE = {
    "num_hidden_layers": [10**6, 1, 3, "2", None, True, 2.5, [2]],
    "num_attention_heads": [10**6, 2, 8, 0, -4, "4", None],
    "num_key_value_heads": [10**6, 1, 4, 0, 3],
    "hidden_size": [10**9, 16, 32, 0, -1, "x"],
    "attnprune_hidden_size": [10**9, 16, 0, -1, "x"],
    "intermediate_size": [10**12, 47, 0, None],
    "attnprune_vocab_size": [10**12, 256, 0, None, "257"],
    "head_dim": [10**6, 4, "8"],
    "hidden_act": ["nothing", 1, None, "../x"],
    "num_labels": [10**9],
    "rope_parameters": [1, "x", {"rope_type": "x"}, {"rope_type": "yarn"}, {"rope_theta": "x", "rope_type": "default"}],
    "tie_word_embeddings": [True],
    "layer_types": [["x"] * 2, 1],
    "dtype": ["float1", 7, "float16", "bfloat16", "int8"],
}


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, values in STRUCTURE.items() for v in values], ids=str)
def test_another_structure_than_that_of_the_files_is_refused_at_once(folder, key, value):
    reseal(folder, lambda values: values.update({key: value}))
    with pytest.raises((InputError, VerificationError)) as caught:
        attnprune.load(folder)
    assert len(caught.value.message.splitlines()) == 1


def test_a_tokenizer_of_garbage_is_one_line(folder):
    for text in ("", "{}", "[]", "null", '{"version": "1.0", "model": {"type": "BPE"}}', "\0" * 100, '"' + "x" * 10**6):
        (folder / "tokenizer.json").write_text(text)
        reseal(folder)
        refused(lambda: attnprune.load(folder), "merged")


def test_the_attention_is_named_as_in_the_portable_code(folder):
    assert json.loads((folder / "config.json").read_text())["attn_implementation"] == modeling_attnprune.ATTENTION


# --- the Hub's listing and cache


@pytest.fixture
def fetched(folder, monkeypatch):
    """A function that fetches `folder` as a repository, and the names that it has downloaded."""
    names = []

    def download(listing, name, limit=None):
        names.append(name)
        return folder / name

    def fetch(weights=True):
        files = {n: (folder / n).read_bytes() for n in strangers.names_in(folder) if (folder / n).is_file()}
        present = {n: remote.RemoteFile(n, len(r), hashlib.sha256(r).hexdigest()) for n, r in files.items()}
        return hub._fetched(remote.Listing("some/model", "0" * 40, present), weights=weights)

    monkeypatch.setattr(hub, "_download", download)
    return fetch, names


def test_a_repository_is_fetched_whole_and_looked_at_without_weights(fetched, folder):
    fetch, names = fetched
    assert fetch() == folder
    assert set(names) == set(strangers.names_in(folder))
    names.clear()
    fetch(weights=False)
    assert set(names) == {"config.json", "gates.safetensors", "modeling_attnprune.py"}


@pytest.mark.parametrize("name", ["x.py", "a/b.pkl", "custom_generate/x", "adapter_config.json"])
def test_code_in_a_repository_of_a_merged_model_is_refused_before_anything_is_fetched(fetched, folder, name):
    fetch, names = fetched
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("{}")
    refused(fetch, "some/model: ", "sparse model")
    assert names == []


def test_other_weights_in_a_repository_are_refused_by_name(fetched, folder):
    (folder / "x.safetensors").write_bytes(b"")
    refused(fetched[0], "x.safetensors: weights that the manifest does not list")
    assert fetched[1] in ([], ["config.json"])


def test_json_anywhere_in_a_repository_is_fetched_and_read(fetched, folder):
    (folder / "sub").mkdir()
    (folder / "sub" / "config.json").write_text("{}")
    fetched[0]()
    assert "sub/config.json" in fetched[1]


def test_a_large_file_that_was_damaged_in_the_cache_is_fetched_again(tmp_path, monkeypatch):
    import huggingface_hub

    cached = tmp_path / "models--some--model" / "snapshots" / ("0" * 40) / "model.safetensors"
    cached.parent.mkdir(parents=True)
    with cached.open("wb") as file:
        file.truncate(65 << 20)  # more than was hashed before
        good = remote.RemoteFile("model.safetensors", 65 << 20, "0" * 64)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *arguments, **options: str(cached))
    listing = remote.Listing("some/model", "0" * 40, {"model.safetensors": good})
    with pytest.raises(AttnPruneError, match=r"damaged download of model\.safetensors"):
        hub._download(listing, "model.safetensors")
    assert not cached.exists()
