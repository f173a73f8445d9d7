"""One sparse model in its four forms: attached in memory, loaded from a sidecar, loaded from a merged folder by us and
by the portable class. The same inputs give the same numbers or the same refusal in all of them.

Long because its forms take seconds to make, and every promise about a sparse model is tried on the same ones.
"""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from attnprune.attention.interface import attach, detach, gates_of, straight_through
from attnprune.errors import AttnPruneError
from attnprune.sidecar import bases, loading, merged
from tests.helpers.command import attnprune
from tests.helpers.factory import refused, save_tiny_llama
from tests.helpers.sidecars import reseal, save_sidecar, save_tiny_gpt2

LENGTH = 9
BASES = {"llama": save_tiny_llama, "gpt2": save_tiny_gpt2}


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """Factory of the four forms of one sparse model, by name."""
    folder = tmp_path_factory.mktemp("forms")
    made = {}

    def make(family):
        if family not in made:
            base = BASES[family](folder / f"{family}-base")
            sidecar = save_sidecar(folder / f"{family}-sidecar", base)
            model, tokenizer = loading.load(sidecar.path, str(base))
            merged.write_merged(model, tokenizer, sidecar, folder / family, same_dtype=True)
            attached = bases.load_base(str(base)).model
            attach(attached, torch.stack([torch.from_numpy(bias.copy()) for bias in sidecar.biases()]))
            made[family] = {
                "attached": attached,
                "sidecar": model,
                "merged": loading.load(folder / family).model,
                "portable": AutoModelForCausalLM.from_pretrained(folder / family),
            }
        for model in made[family].values():
            model.eval()
        return made[family]

    make.folder = folder
    return make


NAMES = ("attached", "sidecar", "merged", "portable")
IDS = torch.randint(1, 250, (2, LENGTH), generator=torch.Generator().manual_seed(1))
CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
LOWEST = torch.finfo(torch.float32).min


def additive(visible, low=LOWEST, dtype=torch.float32):
    return torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, low)[None, None].expand(2, 1, -1, -1)


def four_dimensional(mask):
    return mask[None, None].expand(2, 1, LENGTH, LENGTH)


WINDOW = CAUSAL & ~torch.ones_like(CAUSAL).tril(-4)
PADDED = torch.ones(2, LENGTH, dtype=torch.long)
PADDED[1, :3] = 0
SOFT = additive(CAUSAL) - 0.5 * torch.arange(LENGTH)  # as ALiBi has it
POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]).expand(2, -1)

TAKEN = {
    "plain": {},
    "padded on the left": {"attention_mask": PADDED},
    "padded on the right": {"attention_mask": PADDED.flip(1)},
    "bool mask": {"attention_mask": four_dimensional(WINDOW)},
    "float mask": {"attention_mask": additive(WINDOW)},
    "float mask of -inf": {"attention_mask": additive(WINDOW, float("-inf"))},
    "float mask of -1e4": {"attention_mask": additive(WINDOW, -1e4)},
    "every pair": {"attention_mask": four_dimensional(torch.ones_like(CAUSAL))},
    "packed": {"position_ids": POSITIONS},
    "patterns": {"output_attentions": True},
    "cached": {"use_cache": True},
}
REFUSED = {
    "1 and 0 as integers": four_dimensional(CAUSAL.long()),
    "1 and 0 as small integers": four_dimensional(CAUSAL.to(torch.int8)),
    "0 as integers": four_dimensional(torch.zeros(LENGTH, LENGTH, dtype=torch.long)),
    "1 and 0 as floats": four_dimensional(CAUSAL.float()),
    "1 and 0 in 16 bits": four_dimensional(CAUSAL.to(torch.bfloat16)),
    "soft bias": SOFT,
    "one soft pair": additive(CAUSAL).index_put((torch.tensor(0), torch.tensor(0), torch.tensor(5), torch.tensor(2)),
                                                torch.tensor(-3.0)),
    "-100": additive(CAUSAL, -100.0),
    "NaN": additive(CAUSAL, float("nan")),
    "a bias above 0": additive(CAUSAL).masked_fill(CAUSAL, 1e-3),
    "one mask per head": additive(CAUSAL).expand(2, 4, -1, -1),
    "a mask per other batch": additive(CAUSAL)[:1].expand(3, -1, -1, -1),
    "too few keys": additive(CAUSAL)[..., :-1],
    "too many keys": torch.cat([additive(CAUSAL), additive(CAUSAL)], -1),
}  # fmt: skip


def outcome(model, options):
    with torch.no_grad():
        return model(IDS, **{"use_cache": False} | options)


@pytest.mark.parametrize("family", BASES)
@pytest.mark.parametrize("case", TAKEN)
def test_every_form_computes_the_same(forms, family, case):
    first, *others = (outcome(forms(family)[name], TAKEN[case]) for name in NAMES)
    assert first.logits.isfinite().all()
    for other in others:
        assert torch.equal(first.logits, other.logits)
        for mine, theirs in zip(first.attentions or (), other.attentions or (), strict=True):
            assert torch.equal(mine != 0, theirs != 0)
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", BASES)
def test_a_4d_mask_is_what_it_says(forms, family):
    """The float and the bool form of one mask are one mask, and a causal one is what the model does itself."""
    for model in forms(family).values():
        window = outcome(model, TAKEN["bool mask"]).logits
        assert all(
            torch.equal(outcome(model, TAKEN[case]).logits, window) for case in TAKEN if case.startswith("float")
        )
        causal = outcome(model, {"attention_mask": four_dimensional(CAUSAL)}).logits
        assert torch.equal(causal, outcome(model, {}).logits)
        assert not torch.equal(window, causal)


@pytest.mark.parametrize("family", BASES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", REFUSED)
def test_every_form_refuses_masks_that_say_something_else(forms, family, name, case):
    with pytest.raises((AttnPruneError, ValueError), match=r"^attention_mask: .*"):
        outcome(forms(family)[name], {"attention_mask": REFUSED[case]})


# --- gradients


STEP = 1e-3  # in fp32, in which norms and rotations compute; no gate of these models flips on the way


def directional(model, embeddings, direction):
    """The derivative of a number that the model makes along a direction of its input: by autograd, by differences."""

    def number(x):
        return model(inputs_embeds=x, use_cache=False).logits[0, -1, :7].double().sin().sum()

    x = embeddings.clone().requires_grad_()
    gradient = torch.autograd.grad(number(x), x)[0]
    with torch.no_grad():
        difference = (number(embeddings + STEP * direction) - number(embeddings - STEP * direction)) / (2 * STEP)
    return (gradient * direction).sum().item(), difference.item()


def points(model):
    embeddings = model.get_input_embeddings()(IDS[:1]).detach()
    return embeddings, torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("family", BASES)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_a_model_at_rest_are_those_of_its_function(forms, family, name):
    model = forms(family)[name]
    slope, difference = directional(model, *points(model))
    assert slope == pytest.approx(difference, rel=2e-3)


@pytest.mark.parametrize("family", BASES)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_the_patterns_are_those_of_the_patterns(forms, family, name):
    model = forms(family)[name]
    embeddings, direction = points(model)

    def number(x):
        attentions = model(inputs_embeds=x, use_cache=False, output_attentions=True).attentions
        return sum(pattern.double().square().sum() for pattern in attentions)

    x = embeddings.clone().requires_grad_()
    slope = (torch.autograd.grad(number(x), x)[0] * direction).sum().item()
    with torch.no_grad():
        difference = (number(embeddings + STEP * direction) - number(embeddings - STEP * direction)) / (2 * STEP)
    assert slope == pytest.approx(difference.item(), rel=2e-2)


@pytest.mark.parametrize("family", BASES)
def test_the_training_slope_follows_the_mode_or_the_switch(forms, family):
    model = forms(family)["attached"]
    place = points(model)
    true = directional(model, *place)[0]
    with straight_through(model):
        trained, difference = directional(model, *place)
    assert true == pytest.approx(difference, rel=2e-3)
    assert abs(trained - true) > 1e-2 * abs(true)  # five tolerances
    model.train()
    assert directional(model, *place)[0] == trained
    with straight_through(model, False):
        assert directional(model, *place)[0] == true
    assert all(gate.straight_through is None for gate in gates_of(model))


@pytest.mark.parametrize("family", BASES)
@pytest.mark.parametrize("backend", ["chunked", "reference", "triton"])
def test_every_backend_has_the_true_gradient(forms, family, backend, monkeypatch):
    model = forms(family)["attached"]
    embeddings = model.get_input_embeddings()(IDS).detach()

    def gradient():
        x = embeddings.clone().requires_grad_()
        return torch.autograd.grad(model(inputs_embeds=x, use_cache=False).logits[:, -1, :7].sin().sum(), x)[0]

    expected = torch.autograd.grad(
        forms(family)["portable"](inputs_embeds=(x := embeddings.clone().requires_grad_()), use_cache=False)
        .logits[:, -1, :7].sin().sum(), x,
    )[0]  # fmt: skip
    monkeypatch.setenv("ATTNPRUNE_BACKEND", backend)
    torch.testing.assert_close(gradient(), expected, rtol=2e-4, atol=2e-5)


# --- a sparse model does not come back dense


def every_way_to_save(model):
    from peft import LoraConfig, get_peft_model

    yield model.save_pretrained
    yield model.base_model.save_pretrained
    wrapped = get_peft_model(model, LoraConfig(target_modules=["c_attn", "q_proj"]))
    yield wrapped.save_pretrained
    yield wrapped.push_to_hub
    yield model.push_to_hub
    yield wrapped.merge_and_unload().save_pretrained


@pytest.mark.parametrize("family", BASES)
@pytest.mark.parametrize("name", ["attached", "sidecar", "merged"])
def test_an_attached_model_is_not_saved_as_a_stock_one(forms, family, name, tmp_path):
    """Nothing is written, and no repository is made: the refusal comes before the first file or request."""
    model = copy.deepcopy(forms(family)[name])
    for save in every_way_to_save(model):
        refused(lambda save=save: save(tmp_path / "saved"), "would come back dense")
        assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize("family", BASES)
def test_a_detached_model_is_saved_and_loads_as_the_base(forms, family, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = copy.deepcopy(forms(family)["attached"])
    detach(get_peft_model(model, LoraConfig(target_modules=["c_attn", "q_proj"])).merge_and_unload())
    model.save_pretrained(tmp_path / "dense")
    dense = bases.load_base(str(forms.folder / f"{family}-base")).model
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(again(IDS).logits, dense(IDS).logits)


@pytest.mark.parametrize("family", BASES)
def test_detach_finds_the_model_under_its_wrapper(forms, family):
    from peft import LoraConfig, get_peft_model

    model = copy.deepcopy(forms(family)["attached"])
    refused(lambda: detach(model.base_model), "larger model")
    assert gates_of(model)
    detach(get_peft_model(model, LoraConfig(target_modules=["c_attn", "q_proj"])))
    assert not gates_of(model)
    assert model.config._attn_implementation == "sdpa"
    detach(model)  # one without gates is left alone


@pytest.mark.parametrize("family", BASES)
def test_a_base_with_weights_that_it_does_not_use_is_refused(forms, family, tmp_path):
    forms(family)
    base = forms.folder / f"{family}-base"
    stray = next(name for name in bases.load_base(str(base)).model.state_dict() if name.endswith(".weight"))
    layer = {"llama": "model.layers.1.self_attn", "gpt2": "transformer.h.1.attn"}[family]
    for extra, allowed in (
        (f"{layer}.attnprune_gate.bias", False),
        (f"{layer}.q_norm.weight", False),
        ("stray", False),
        (f"{stray}_scale", False),
        (
            f"{layer}.rotary_emb.inv_freq",
            family == "llama",
        ),  # a buffer of older versions that transformers itself leaves out
        (f"{layer}.bias", family == "gpt2"),
    ):
        folder = shutil.copytree(base, tmp_path / extra)
        tensors = load_file(folder / "model.safetensors") | {extra: torch.ones(4)}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        if allowed:
            bases.load_base(str(folder))
        else:
            error = refused(lambda folder=folder: bases.load_base(str(folder)), f"has no place for {extra}")
            assert ("--merge" in error.hint) == ("attnprune_gate" in extra)


def test_commands_take_no_sparse_model_for_a_dense_one(forms, tmp_path):
    """A folder as earlier versions let it be saved, and a base of the same weights with another configuration."""
    forms("llama")
    stray, other = (shutil.copytree(forms.folder / "llama-base", tmp_path / name) for name in ("stray", "other"))
    tensors = load_file(stray / "model.safetensors")
    gates = {f"model.layers.{i}.self_attn.attnprune_gate.bias": torch.zeros(4) for i in range(2)}
    save_file(tensors | gates, stray / "model.safetensors", {"format": "pt"})
    values = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(values | {"hidden_act": "gelu"}))
    (tmp_path / "text.txt").write_text("The gate opens.\n" * 200)
    sidecar = forms.folder / "llama-sidecar"
    for arguments, message in (
        (["eval", stray, "--data", "text.txt", "--seq-len", "32"], "attnprune_gate"),
        (["verify", sidecar, "--base", other], 'hidden_act is "gelu", not "silu"'),
    ):
        done = attnprune(*arguments, cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("family", BASES)
def test_a_stock_class_does_not_load_a_merged_folder(forms, family):
    model = forms(family)["attached"]
    stock = type(model)
    sizes = {"vocab_size": model.config.vocab_size}
    for options in ({}, {"attn_implementation": "sdpa"}, {"attn_implementation": "sdpa", **sizes}):
        with pytest.raises((ValueError, RuntimeError)):
            stock.from_pretrained(forms.folder / family, **options)


PARTS = {
    "llama": ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"),
    "gpt2": ("transformer.wte", "transformer.wpe", "transformer.drop", "transformer.ln_f", "lm_head"),
}
LAYERS = {"llama": "model.layers", "gpt2": "transformer.h"}


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("family", BASES)
def test_the_portable_class_runs_from_memory_or_disk(forms, family, where, tmp_path):
    """What `device_map="auto"` makes of a model that does not fit: layers that are read back for every forward."""
    whole = forms(family)["portable"]
    places = dict.fromkeys(PARTS[family], "cpu") | {f"{LAYERS[family]}.{i}": where for i in range(2)}
    model = AutoModelForCausalLM.from_pretrained(
        forms.folder / family, device_map=places, offload_folder=str(tmp_path)
    ).eval()
    gates = [p.device.type for n, p in model.named_parameters() if "attnprune_gate" in n]
    assert gates == ["meta" if where == "disk" else "cpu"] * 2
    for options in ({}, {"attention_mask": PADDED}):
        assert torch.equal(outcome(model, options).logits, outcome(whole, options).logits)


@pytest.mark.parametrize("key", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_every_reader(forms, tmp_path, key, value):
    """One row of a token that the probe does not hold gives finite logits until somebody writes that token."""
    forms("llama")
    folder = shutil.copytree(forms.folder / "llama", tmp_path / "damaged")
    tensors = load_file(folder / "model.safetensors")
    tensors[key][3] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"{key} is not finite"):
        AutoModelForCausalLM.from_pretrained(folder)
    refused(lambda: loading.load(folder), "damaged")
    reseal(folder)
    refused(lambda: loading.load(folder), f"non-finite value in {key}")


def test_gates_that_are_not_finite_are_refused_on_the_disk_too(forms, tmp_path):
    forms("llama")
    folder = shutil.copytree(forms.folder / "llama", tmp_path / "damaged")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.attnprune_gate.bias"][2] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    places = dict.fromkeys(PARTS["llama"], "cpu") | {f"model.layers.{i}": "disk" for i in range(2)}
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.attnprune_gate\.bias is not finite"):
        AutoModelForCausalLM.from_pretrained(folder, device_map=places, offload_folder=str(tmp_path / "offload"))


def test_gates_are_attached_to_a_model_on_the_disk(forms, tmp_path):
    """They are in memory, and the model computes what it did. Without accelerate nothing says where parts are."""
    forms("llama")
    places = dict.fromkeys(PARTS["llama"], "cpu") | {f"model.layers.{i}": "disk" for i in range(2)}
    model = AutoModelForCausalLM.from_pretrained(
        forms.folder / "llama-base", device_map=places, offload_folder=str(tmp_path)
    )
    ids = torch.arange(8)[None]
    plain = AutoModelForCausalLM.from_pretrained(forms.folder / "llama-base")
    gates = attach(model, bias=100.0)
    assert not any(gate.bias.is_meta for gate in gates)
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, plain(ids).logits, atol=1e-4)
    refused(lambda: attach(plain.to("meta")), "nothing says where they are")


def test_a_merged_folder_of_format_1_0_still_loads(forms, tmp_path):
    """It hid the size of the vocabulary alone, and had neither a configuration on record nor a hash of its own."""
    for family in BASES:
        model = forms(family)["sidecar"]
        folder = shutil.copytree(forms.folder / family, tmp_path / family)
        values = json.loads((folder / "config.json").read_text())
        width = "n_embd" if family == "gpt2" else "hidden_size"
        values[width] = values.pop(f"attnprune_{width}")
        block = values["attnprune"]
        block |= {"format_version": "1.0", "requires": ["gate:threshold"]}
        del block["merged"]["config"], block["base"]["config"]
        (folder / "config.json").write_text(json.dumps(values))
        for old in (loading.load(folder).model, AutoModelForCausalLM.from_pretrained(folder)):
            assert torch.equal(outcome(old, {}).logits, outcome(model, {}).logits)


def test_attention_dropout_is_left_out_by_the_portable_class_too(forms):
    """With a warning, and without a change of what the model computes in training."""
    forms("gpt2")
    model = AutoModelForCausalLM.from_pretrained(forms.folder / "gpt2", attn_pdrop=0.1)
    rest = outcome(model, {}).logits
    with pytest.warns(UserWarning, match="attention dropout is left out"):
        trained = outcome(model.train(), {}).logits
    assert torch.equal(trained, rest)
