"""Every supported family as a tiny random model: padding, packing, caches, generation, save/load; refusals by name.

Long because every test runs the same models, one of each family.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from attnprune.attention.interface import SUPPORTED_FAMILIES, attach, detach, gates_forced_open, gates_of
from attnprune.errors import UnsupportedModelError
from attnprune.sidecar import modeling_attnprune
from tests.helpers.families import (
    BIAS,
    LAYERS,
    OPTIONS,
    QWEN,
    TOLERANCE,
    WINDOW,
    build,
    ids,
    load,
    logits_of,
    merged,
)

FAMILIES = sorted(SUPPORTED_FAMILIES)
WINDOWED = {"mistral", "mixtral", "phi3", "starcoder2"} | {
    f for f, o in OPTIONS.items() if "layer_types" in o or o is QWEN
}
# Their modeling code builds the mask without `position_ids`: packed documents see each other, also with eager.
NOT_PACKED_BY_TRANSFORMERS = {"gpt_oss", "opt"}


every_family = pytest.mark.parametrize("family", FAMILIES)


def assert_close(actual, expected, tolerance=TOLERANCE):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def attached():
    """Cached gated models by family; nothing may change them."""
    models = {}

    def get(family):
        if family not in models:
            models[family] = build(family)
            attach(models[family], BIAS)
        return models[family]

    return get


@pytest.fixture
def model(attached, request):
    return attached(request.getfixturevalue("family"))


def left_padded(rows, width):
    """(ids, attention mask, positions) of rows [1, n] padded on the left."""
    batch, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        batch[i, width - row.shape[1] :], mask[i, width - row.shape[1] :] = row[0], 1
    return batch, mask, (mask.cumsum(1) - 1).clamp(min=0)


def density(model):
    gates = gates_of(model)
    visible = sum(int(gate.last.visible_edges) * len(gate.bias) for gate in gates)
    return sum(int(gate.last.open_edges.sum()) for gate in gates) / visible


def generate(model, tokens, **options):
    defaults = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "disable_compile": True}
    return model.generate(tokens, **{"attention_mask": torch.ones_like(tokens)} | defaults | options)


def test_every_supported_family_has_a_merged_class():
    assert set(modeling_attnprune.FAMILIES) == SUPPORTED_FAMILIES


@every_family
def test_open_gates_equal_eager(family):
    model, tokens = build(family), ids(2, 12)
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    model.set_attn_implementation("eager")
    options = [{}, {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}]
    plain, padded = (logits_of(model, tokens, **option) for option in options)
    attach(model, BIAS)
    with gates_forced_open(model):
        assert_close(logits_of(model, tokens), plain)
        assert_close(logits_of(model, tokens, **options[1])[mask.bool()], padded[mask.bool()])
    assert (logits_of(model, tokens) - plain).abs().max() > 0.01
    detach(model)
    assert torch.equal(logits_of(model, tokens), plain)


@every_family
def test_gates_are_neither_open_nor_closed_and_windows_are_seen(family, model):
    logits_of(model, ids(2, 12))
    assert 0.2 < density(model) < 0.95
    by_layer = [int(gate.last.visible_edges) // 2 for gate in gates_of(model)]
    full, windowed = 12 * 13 // 2, 12 * 13 // 2 - 6 * 7 // 2
    assert set(by_layer) <= {full, windowed}
    assert (windowed in by_layer) == (family in WINDOWED)


@every_family
def test_future_tokens_do_not_change_past_logits(family, model):
    tokens = ids(2, 14)
    changed = torch.cat([tokens[:, :8], ids(2, 6, seed=2)], 1)
    before, after = logits_of(model, tokens), logits_of(model, changed)
    assert_close(before[:, :8], after[:, :8], 1e-6)
    assert (before[:, 8:] - after[:, 8:]).abs().max() > 0.01


@every_family
def test_left_padding_equals_single_prompts(family, model):
    rows = [ids(1, 12), ids(1, 7, seed=2)]
    batch, mask, positions = left_padded(rows, 12)
    together = logits_of(model, batch, attention_mask=mask, position_ids=positions)
    total = [gate.last.open_edges for gate in gates_of(model)]
    for i, row in enumerate(rows):
        assert_close(together[i : i + 1, 12 - row.shape[1] :], logits_of(model, row))
        total = [count - gate.last.open_edges for count, gate in zip(total, gates_of(model), strict=True)]
    assert not any(count.any() for count in total)


def packed_documents():
    """(documents, their tokens in one row, positions that start again with every document)."""
    documents = [ids(1, 9), ids(1, 4, seed=2), ids(1, 8, seed=3)]
    return documents, torch.cat(documents, 1), torch.cat([torch.arange(d.shape[1]) for d in documents])[None]


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - NOT_PACKED_BY_TRANSFORMERS))
def test_packed_documents_equal_separate_ones(family, model):
    documents, row, positions = packed_documents()
    packed = logits_of(model, row, position_ids=positions)
    for document, part in zip(documents, packed.split([d.shape[1] for d in documents], 1), strict=True):
        assert_close(part, logits_of(model, document))


@pytest.mark.parametrize("family", sorted(NOT_PACKED_BY_TRANSFORMERS))
def test_documents_packed_with_an_own_mask_equal_separate_ones(family, model):
    documents, row, positions = packed_documents()
    document = (positions[0] == 0).cumsum(0)
    full = (document[:, None] == document).tril()[None, None]
    windowed = full & (positions[0][:, None] - positions[0] < WINDOW)
    masks = {"full_attention": full, "sliding_attention": windowed} if family in WINDOWED else full
    packed = logits_of(model, row, position_ids=positions, attention_mask=masks)
    for document, part in zip(documents, packed.split([d.shape[1] for d in documents], 1), strict=True):
        assert_close(part, logits_of(model, document))


@every_family
def test_greedy_generation_is_the_same_with_every_cache(family, model):
    tokens = ids(2, 9)
    uncached = generate(model, tokens, use_cache=False)
    assert uncached.shape == (2, 17)
    assert torch.equal(generate(model, tokens, use_cache=True), uncached)
    assert torch.equal(generate(model, tokens, cache_implementation="static"), uncached)
    with gates_forced_open(model):
        assert not torch.equal(generate(model, tokens), uncached)


@every_family
def test_left_padded_generation_equals_single_prompts(family, model):
    rows = [ids(1, 9), ids(1, 5, seed=2)]
    batch, mask, _ = left_padded(rows, 9)
    together = generate(model, batch, attention_mask=mask)
    for i, row in enumerate(rows):
        assert torch.equal(together[i, 9:], generate(model, row)[0, row.shape[1] :])


@every_family
def test_beam_search_is_the_same_with_and_without_cache(family, model):
    tokens = ids(2, 8)
    beams = generate(model, tokens, num_beams=3, max_new_tokens=5)
    assert beams.shape == (2, 13)
    assert torch.equal(beams, generate(model, tokens, num_beams=3, max_new_tokens=5, use_cache=False))


@every_family
def test_cached_steps_equal_one_forward(family, model):
    tokens = ids(2, 13)
    whole = logits_of(model, tokens)
    with torch.no_grad():
        out = model(tokens[:, :8], use_cache=True)
        assert_close(out.logits, whole[:, :8])
        out = model(tokens[:, 8:10], past_key_values=out.past_key_values, use_cache=True)
        assert_close(out.logits, whole[:, 8:10])
        for i in range(10, 13):
            out = model(tokens[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
            assert_close(out.logits, whole[:, i : i + 1])


@pytest.fixture(scope="module")
def saved(attached, tmp_path_factory):
    """Folders of merged models by family; nothing may change them."""
    folders = {}

    def get(family):
        if family not in folders:
            folder = tmp_path_factory.mktemp("merged") / family
            merged(attached(family)).save_pretrained(folder)
            folders[family] = folder
        return folders[family]

    return get


@every_family
def test_merged_model_survives_saving_and_loading(family, model, saved):
    config = json.loads((saved(family) / "config.json").read_text())
    assert config["model_type"] == f"attnprune_{family}"
    loaded, info = load(saved(family), family, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokens = ids(2, 12)
    batch, mask, positions = left_padded([tokens[:1], tokens[1:, :7]], 12)
    expected = logits_of(model, tokens)
    assert_close(logits_of(loaded, tokens), expected, 1e-5)
    padded = {"attention_mask": mask, "position_ids": positions}
    ours, theirs = logits_of(model, batch, **padded), logits_of(loaded, batch, **padded)
    assert_close(theirs[mask.bool()], ours[mask.bool()], 1e-5)
    assert torch.equal(generate(loaded, tokens), generate(model, tokens))
    for gate, bias in zip(gates_of(model), BIAS, strict=True):
        assert torch.equal(gate.bias, bias)
    by_name = dict(loaded.named_parameters())
    assert sum("attnprune_gate" in name for name in by_name) == LAYERS


@every_family
def test_merged_model_in_bf16_keeps_its_gates_exact(family, model, saved):
    loaded = load(saved(family), family, dtype=torch.bfloat16)
    state = loaded.state_dict()
    gates = {name: value for name, value in state.items() if "attnprune_gate" in name}
    assert {value.dtype for value in gates.values()} == {torch.float32}
    assert torch.equal(torch.stack(list(gates.values())), BIAS)
    assert torch.bfloat16 in {value.dtype for value in state.values()}
    assert logits_of(loaded, ids(1, 9)).isfinite().all()


@every_family
def test_merged_classes_can_be_found_by_name(family):
    for cls in modeling_attnprune.classes_for(family):
        assert getattr(modeling_attnprune, cls.__name__) is cls


@every_family
def test_merged_model_through_the_auto_classes(family, model, saved):
    loaded = AutoModelForCausalLM.from_pretrained(saved(family))
    assert type(loaded) is modeling_attnprune.classes_for(family)[1]
    assert_close(logits_of(loaded, ids(2, 12)), logits_of(model, ids(2, 12)), 1e-5)


@every_family
def test_plain_model_type_is_not_what_is_written(family, saved):
    assert AutoConfig.from_pretrained(saved(family)).model_type.startswith("attnprune_")
    with pytest.raises(UnsupportedModelError, match="already sparsified"):
        attach(load(saved(family), family))


@pytest.fixture(params=["llama", "gpt2"])
def copy_of_saved(request, saved, tmp_path):
    """(family, folder, tensors) of a merged model that a test may damage."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in saved(request.param).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return request.param, folder, load_file(folder / "model.safetensors")


def rewrite(folder, tensors):
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def gate_keys(tensors):
    return sorted(key for key in tensors if "attnprune_gate" in key)


@pytest.mark.parametrize("missing", ["one", "all"])
def test_missing_gates_are_refused(copy_of_saved, missing):
    family, folder, tensors = copy_of_saved
    for key in gate_keys(tensors)[: 1 if missing == "one" else None]:
        del tensors[key]
    rewrite(folder, tensors)
    with pytest.raises(ValueError, match="attnprune_gate"):
        load(folder, family)


def test_gates_of_a_layer_that_does_not_exist_are_refused(copy_of_saved):
    family, folder, tensors = copy_of_saved
    key = gate_keys(tensors)[0]
    tensors[key.replace(".0.", ".9.")] = tensors[key].clone()
    rewrite(folder, tensors)
    with pytest.raises(ValueError, match="attnprune_gate"):
        load(folder, family)


def test_gates_of_a_wrong_shape_are_refused(copy_of_saved):
    family, folder, tensors = copy_of_saved
    tensors[gate_keys(tensors)[0]] = torch.zeros(3)
    rewrite(folder, tensors)
    with pytest.raises((ValueError, RuntimeError)):
        load(folder, family)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_gates_that_are_not_finite_are_refused(copy_of_saved, value):
    family, folder, tensors = copy_of_saved
    tensors[gate_keys(tensors)[-1]][0] = value
    rewrite(folder, tensors)
    with pytest.raises(ValueError, match="not finite"):
        load(folder, family)


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "attnprune"])
def test_another_attention_is_refused(copy_of_saved, implementation):
    family, folder, _ = copy_of_saved
    with pytest.raises(ValueError, match="only with its own attention"):
        load(folder, family, attn_implementation=implementation)
    loaded = load(folder, family)
    expected = logits_of(loaded, ids(1, 6))
    with pytest.raises(ValueError, match="only with its own attention"):
        loaded.set_attn_implementation(implementation)
    assert torch.equal(logits_of(loaded, ids(1, 6)), expected)
    with pytest.raises(ValueError, match="only with its own attention"):
        loaded.config._attn_implementation = implementation
    loaded.config._attn_implementation_internal = implementation
    with pytest.raises(RuntimeError, match="switched"):
        loaded(ids(1, 6))


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "attnprune", "flex_attention"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_another_attention_through_the_auto_classes_is_refused(family, saved, implementation):
    with pytest.raises(ValueError, match="only with its own attention"):
        AutoModelForCausalLM.from_pretrained(saved(family), attn_implementation=implementation)


@pytest.mark.parametrize("attention", [{}, {"attn_implementation": "eager"}, {"attn_implementation": "sdpa"}])
@every_family
def test_a_stock_class_refuses_the_folder(family, attention, saved):
    """It would warn about unused gates and run dense, were it not for the attention and vocabulary in config.json."""
    stock = modeling_attnprune.classes_for(family)[1].__bases__[1]
    folder = saved(family)
    # Which of them depends on whether the family has a padding token, and on what the class does with it first.
    with pytest.raises((ValueError, RuntimeError, IndexError, AssertionError)):
        stock.from_pretrained(folder, **attention)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merged_gates_stay_fp32_when_the_model_is_cast(saved, dtype):
    loaded = load(saved("llama"), "llama").to(dtype)
    gates = [value for name, value in loaded.state_dict().items() if "attnprune_gate" in name]
    assert loaded.dtype == dtype
    assert torch.equal(torch.stack(gates), BIAS)


def patterns_of(model, tokens):
    with torch.no_grad():
        return model(tokens, use_cache=False, output_attentions=True).attentions


@every_family
def test_patterns_are_returned_for_every_layer(family, model):
    patterns = patterns_of(model, ids(2, 9))
    assert len(patterns) == LAYERS
    for pattern, gate in zip(patterns, gates_of(model), strict=True):
        assert pattern.shape == (2, 4, 9, 9)
        assert (pattern != 0).sum((0, 2, 3)).tolist() == gate.last.open_edges.tolist()


@every_family
def test_merged_patterns_equal_the_attached_ones(family, model, saved):
    ours, theirs = patterns_of(model, ids(2, 9)), patterns_of(load(saved(family), family), ids(2, 9))
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine != 0, other != 0)
        assert_close(mine, other, 1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("chunk", [1, 200])
def test_merged_model_does_not_depend_on_its_chunk_size(monkeypatch, family, model, saved, chunk):
    monkeypatch.setattr(modeling_attnprune, "CHUNK_ELEMENTS", chunk)
    assert_close(logits_of(load(saved(family), family), ids(2, 12)), logits_of(model, ids(2, 12)), 1e-5)


def test_merged_model_leaves_dropout_out(saved):
    loaded, tokens = load(saved("llama"), "llama"), ids(1, 6)
    rest = loaded(tokens).logits
    loaded.train()
    for layer in loaded.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.warns(UserWarning, match="dropout"):
        assert torch.equal(loaded(tokens).logits, rest)


def test_no_merged_class_for_other_families():
    with pytest.raises(ValueError, match="bloom"):
        modeling_attnprune.classes_for("bloom")
    with pytest.raises(AttributeError):
        getattr(modeling_attnprune, "AttnPruneBloomForCausalLM")  # noqa: B009


UNSUPPORTED = {
    "bloom": {"n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
    "falcon": {},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    "codegen": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4},
    "t5": {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4},
    "mamba": {},
    "bert": {},
}


@pytest.mark.parametrize("family", UNSUPPORTED)
def test_unsupported_families_are_refused_by_name(family):
    common = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(family, **common | UNSUPPORTED[family])
    with torch.device("meta"):
        if family == "t5":
            from transformers import T5ForConditionalGeneration

            model = T5ForConditionalGeneration(config)
        else:
            model = AutoModelForCausalLM.from_config(config)
    implementation = model.config._attn_implementation
    with pytest.raises(UnsupportedModelError, match=family):
        attach(model)
    assert model.config._attn_implementation == implementation
    assert not gates_of(model)
