"""Which base a sidecar belongs to: structure, weights, and what the fingerprints do not depend on."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoConfig, MistralConfig, MistralForCausalLM

from attnprune.attention.interface import SUPPORTED_FAMILIES
from attnprune.errors import VerificationError
from attnprune.sidecar import bases, format, loading, merged
from attnprune.sidecar.identity import (
    base_tensors,
    check_base,
    config_difference,
    config_values,
    content_fingerprint,
    model_key,
    structure_fingerprint,
)
from attnprune.sidecar.verify import climb
from tests.helpers.factory import byte_tokenizer, refused, save_tiny_llama
from tests.helpers.formats import good_manifest
from tests.helpers.sidecars import save_sidecar


def edit_json(file, change):
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


# The base model's fingerprints


class Base(torch.nn.Module):
    def __init__(self, width=4):
        super().__init__()
        torch.manual_seed(0)
        self.inner = torch.nn.Linear(width, 3)
        self.register_parameter("attnprune_gate_bias", torch.nn.Parameter(torch.zeros(2)))


def manifest_for(model):
    values = good_manifest()
    tensors = base_tensors(model)
    values["base"]["structure"] = structure_fingerprint(tensors)
    values["base"]["content"] = content_fingerprint(tensors)
    return format.Manifest.model_validate(values)


def test_the_base_itself_passes_whatever_its_gates_are():
    manifest, model = manifest_for(Base()), Base()
    torch.nn.init.ones_(model.attnprune_gate_bias)
    check_base(manifest, model)


def test_another_structure_is_refused_always():
    manifest = manifest_for(Base())
    refused(lambda: check_base(manifest, Base(width=5)), "some/model", "2 layers", "2 heads")
    refused(lambda: check_base(manifest, Base(width=5), True), "wrong base model")
    refused(lambda: check_base(manifest, Base().double(), True), "wrong base model")


def test_other_weights_are_refused_unless_allowed():
    manifest, model = manifest_for(Base()), Base()
    with torch.no_grad():
        model.inner.weight[0, 0] += 1e-3
    error = refused(lambda: check_base(manifest, model), "not the weights")
    assert "--allow-base-mismatch" in error.hint
    check_base(manifest, model, allow_mismatch=True)


def test_fingerprints_do_not_depend_on_the_order_or_layout_of_the_tensors():
    first = {"a": torch.arange(1000.0).reshape(10, 100), "b": torch.ones(3)}
    second = {"b": torch.ones(3), "a": torch.arange(1000.0).reshape(10, 100).t().contiguous().t()}
    assert structure_fingerprint(first) == structure_fingerprint(second)
    assert content_fingerprint(first) == content_fingerprint(second)
    renamed = {"c": first["a"], "b": first["b"]}
    assert structure_fingerprint(renamed) != structure_fingerprint(first)
    assert content_fingerprint(renamed) != content_fingerprint(first)


@pytest.mark.parametrize("name", ["m.gguf", "M.GGUF", "M.Gguf"])
def test_a_gguf_file_is_known_by_its_suffix_in_any_case(tmp_path, name):
    refused(lambda: bases._locate(str(tmp_path / name), None), "no such file")
    (tmp_path / name).touch()
    assert bases._locate(str(tmp_path / name), None) == ("gguf", str(tmp_path), {"gguf_file": name})


# The base model's configuration

ROPE = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}

# A family, and values that change what a model of equal weights computes.
CHANGED = [
    ("llama", {"rms_norm_eps": 1e-5}), ("llama", {"rope_theta": 500000.0}), ("llama", {"rope_parameters": ROPE}),
    ("llama", {"hidden_act": "gelu"}), ("mistral", {"sliding_window": 40}), ("mistral", {"sliding_window": None}),
    ("qwen2", {"layer_types": ["sliding_attention"] * 2}), ("gemma2", {"attn_logit_softcapping": 20.0}),
    ("gemma2", {"final_logit_softcapping": None}), ("gemma2", {"query_pre_attn_scalar": 100}),
    ("gemma3_text", {"layer_types": ["full_attention", "sliding_attention"]}),
    ("granite", {"attention_multiplier": 0.5}), ("granite", {"residual_multiplier": 0.5}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    ("gpt2", {"activation_function": "relu"}), ("gpt2", {"layer_norm_epsilon": 1e-6}),
    ("gpt_neox", {"use_parallel_residual": False}), ("phi", {"partial_rotary_factor": 0.25}),
    ("cohere2", {"logit_scale": 2.0}), ("llama", {"some_new_key": 1}),
]  # fmt: skip
INERT = {
    "_name_or_path": "somewhere/else", "architectures": ["Other"], "transformers_version": "9.0", "use_cache": False,
    "eos_token_id": 5, "bos_token_id": None, "pad_token_id": 3, "dtype": "bfloat16", "attention_dropout": 0.1,
    "unsloth_fixed": True, "unsloth_version": "2026.1", "transformers.js_config": {"dtype": "q4"},
    "initializer_range": 0.5, "id2label": {0: "a"}, "output_attentions": False,
}  # fmt: skip


def config_of(family, **values):
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
    return AutoConfig.for_model(family, **sizes | values)


@pytest.mark.parametrize(("family", "values"), CHANGED, ids=str)
def test_a_configuration_that_changes_the_function_is_another_base(family, values):
    recorded = json.loads(json.dumps(config_values(config_of(family))))
    assert config_difference(recorded, config_of(family)) is None
    assert next(iter(values)).split("_")[0] in config_difference(recorded, config_of(family, **values))


@pytest.mark.parametrize("key", INERT)
def test_what_cannot_change_the_function_is_no_difference(key):
    assert config_values(config_of("llama", **{key: INERT[key]})) == config_values(config_of("llama"))


@pytest.mark.parametrize("family", sorted(SUPPORTED_FAMILIES))
def test_every_family_has_a_configuration_that_json_can_hold(family):
    values = config_values(config_of(family))
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert len(values) > 10


def test_keys_of_other_versions_of_transformers():
    config = config_of("llama")
    recorded = config_values(config)
    del recorded["mlp_bias"]  # written before there was such a key: it has its default
    assert config_difference(recorded, config) is None
    assert "mlp_bias is true, not false" in config_difference(recorded, config_of("llama", mlp_bias=True))
    assert config_difference(recorded | {"newer_key": None, "newer_switch": False}, config) is None
    assert config_difference(recorded | {"newer_key": 3}, config) == "newer_key is null, not 3"


def test_a_record_of_another_version_is_completed_by_the_installed_class():
    config = config_of("qwen2", use_sliding_window=True, max_window_layers=1, sliding_window=40)
    recorded = config_values(config)
    older = {key: value for key, value in recorded.items() if key != "layer_types"}  # derived from the other keys
    older["rope_parameters"] = {"rope_theta": recorded["rope_parameters"]["rope_theta"]}  # without its rope_type
    assert config_difference(older, config) is None
    assert "layer_types" in config_difference(older, config_of("qwen2", sliding_window=40))
    assert "rope_parameters" in config_difference(older | {"rope_parameters": ROPE}, config)


def test_a_gguf_file_holds_numbers_in_single_precision():
    config = config_of("llama", rms_norm_eps=1e-5)
    recorded = config_values(config) | {"rms_norm_eps": 9.999999747378752e-06}
    assert config_difference(recorded, config) is None
    assert "rms_norm_eps" in config_difference(recorded | {"rms_norm_eps": 1.0001e-05}, config)
    assert config_values(config_of("llama", _model_name_or_path="a title")) == config_values(config_of("llama"))


def test_another_class_with_the_same_tensors_is_another_base():
    """Gemma's norms add one to the weights of which Llama's are made."""
    model = Base()
    manifest = manifest_for(model)
    model.config = config_of("gemma")
    refused(lambda: check_base(manifest, model), "a gemma model", "llama")


def test_the_configuration_is_checked_when_a_sidecar_is_loaded(tmp_path, caplog):
    """By every command: a base of the same weights with a window that only acts beyond the short probe."""
    base = save_tiny_llama(tmp_path / "base", max_position_embeddings=300)
    sidecar = save_sidecar(tmp_path / "sidecar", base)
    assert len(sidecar.manifest.probe.long.input_ids) == 4 * 32
    other = shutil.copytree(base, tmp_path / "other")
    edit_json(other / "config.json", lambda values: values.update(rms_norm_eps=3e-6))
    loading.load(sidecar.path, str(base))
    error = refused(lambda: loading.load(sidecar.path, str(other)), "rms_norm_eps is 3e-06, not 1e-06")
    assert "--allow-base-mismatch" in error.hint
    loading.load(sidecar.path, str(other), allow_base_mismatch=True)
    *_, last = climb(sidecar.path, str(other))
    assert (last.name, last.error.exit_code) == ("base", 2)
    edit_json(sidecar.path / "attnprune.json", lambda values: values["base"].pop("config"))
    assert not caplog.messages
    loading.load(sidecar.path, str(other))  # as a sidecar of format 1.0: the probe is all there is
    assert "does not record its base's configuration" in caplog.messages[0]


def test_a_window_beyond_the_short_probe_is_seen_by_the_longer_one(tmp_path):
    sizes = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}  # fmt: skip
    base, narrow = tmp_path / "base", tmp_path / "narrow"
    for folder, window in ((base, None), (narrow, 70)):
        torch.manual_seed(0)
        MistralForCausalLM(MistralConfig(**sizes, sliding_window=window)).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
    sidecar = save_sidecar(tmp_path / "sidecar", base)
    edit_json(sidecar.path / "attnprune.json", lambda values: values["base"].pop("config"))
    loading.load(sidecar.path, str(base))
    with pytest.raises(VerificationError, match="probe of 128 tokens"):
        loading.load(sidecar.path, str(narrow))


def test_a_merged_folder_whose_configuration_was_changed_is_refused(tmp_path):
    base = save_tiny_llama(tmp_path / "base")
    sidecar = save_sidecar(tmp_path / "sidecar", base)
    merged.write_merged(*loading.load(sidecar.path, str(base)), sidecar, tmp_path / "merged", same_dtype=True)
    loading.load(tmp_path / "merged")
    edit_json(tmp_path / "merged" / "config.json", lambda values: values.update(rms_norm_eps=3e-6))
    refused(lambda: loading.load(tmp_path / "merged"), "config.json: is damaged")


def test_text_that_a_base_writes_is_kept_by_weights_and_configuration():
    config = config_values(config_of("llama"))
    keys = [
        model_key({"content": content, "config": values})
        for content in ("1" * 64, "2" * 64)
        for values in (config, config | {"rms_norm_eps": 1e-5}, None)
    ]
    assert len(set(keys)) == 6
    assert keys[2] == "1" * 64
