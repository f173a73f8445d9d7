"""attnprune.lens: what a sparse model computes is the same in TransformerLens (where it is installed)."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from tests.helpers.paths import ROOT

pytest.importorskip("transformer_lens.model_bridge", reason="pip install transformer-lens")

import attnprune
from attnprune import lens
from attnprune.attention.interface import gates_forced_open
from tests.helpers.factory import byte_tokenizer, refused, save_tiny_llama
from tests.helpers.sidecars import save_sidecar, save_tiny_gpt2

VECTORS = ROOT / "formats" / "vectors" / "v1"
TOLERANCE = 1e-4

every = pytest.mark.parametrize("name", ["gpt2", "llama", "demo", "gpt2-merged", "llama-merged"])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """(path, base) of sidecars and merged folders by name; `demo` is a trained model, with value biases."""
    folder = tmp_path_factory.mktemp("lens")
    known = {"demo": (VECTORS / "first-release", None), "gpt2-merged": (VECTORS / "gpt2-merged", None)}
    known["llama-merged"] = (VECTORS / "llama-gqa-merged", None)
    for name, make in (("gpt2", save_tiny_gpt2), ("llama", save_tiny_llama)):
        base = make(folder / f"{name}-base")
        known[name] = (save_sidecar(folder / name, base, "lora").path, str(base))
    return known


@pytest.fixture
def pair(place, name):
    """(attnprune's model, the bridge, token ids [2, T])."""
    model = attnprune.load(*place[name]).model
    length = min(24, model.config.max_position_embeddings)
    return model, lens.load(*place[name]), torch.randint(model.config.vocab_size, (2, length))


def logits_of(model, ids, **options):
    with torch.no_grad():
        out = model(ids, **options)
    return getattr(out, "logits", out)


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@every
def test_logits_are_those_of_attnprune_load(pair):
    model, bridge, ids = pair
    expected = logits_of(model, ids)
    assert_equal(logits_of(bridge, ids), expected)
    bridge.reset_hooks()
    assert_equal(logits_of(bridge, ids), expected)
    assert_equal(logits_of(copy.deepcopy(bridge), ids), expected)
    bridge.reset_hooks(including_permanent=True)
    without = logits_of(bridge, ids)
    assert (without - expected).abs().max() > 0.1
    with gates_forced_open(model):
        assert_equal(without, logits_of(model, ids))


@every
def test_the_cache_holds_the_gated_pattern(pair):
    model, bridge, ids = pair
    with torch.no_grad():
        expected = model(ids, output_attentions=True).attentions
        _, cache = bridge.run_with_cache(ids)
    causal = torch.ones(ids.shape[1], ids.shape[1]).tril().bool()
    for layer, pattern in enumerate(expected):
        found = cache[f"blocks.{layer}.attn.hook_pattern"]
        assert_equal(found, pattern)
        assert (found[..., causal] == 0).any()
        assert (found.sum(-1) < 0.99).any()  # not renormalised


@pytest.mark.parametrize("name", ["gpt2", "llama", "demo"])
def test_left_padded_rows_and_generation_agree(pair):
    model, bridge, ids = pair
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    places = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    assert_equal(logits_of(bridge, ids, **places)[mask.bool()], logits_of(model, ids, **places)[mask.bool()])
    prompt = ids[:1, :5]
    settings = {"max_new_tokens": 4, "do_sample": False}
    found = bridge.generate(prompt, return_type="tokens", stop_at_eos=False, verbose=False, **settings)
    expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), min_new_tokens=4, **settings)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["demo", "llama"])
def test_compatibility_mode_does_not_fold_value_biases(pair, name):
    model, bridge, ids = pair
    expected = logits_of(model, ids).log_softmax(-1)
    folded = copy.deepcopy(bridge)
    with pytest.raises(ValueError, match="changes a gated model"):
        copy.deepcopy(bridge).enable_compatibility_mode(refactor_factored_attn_matrices=True)
    bridge.enable_compatibility_mode()
    assert_equal(logits_of(bridge, ids).log_softmax(-1), expected)
    del folded.process_weights  # TransformerLens' own, which takes rows of the pattern to sum to 1
    folded.enable_compatibility_mode()
    difference = (logits_of(folded, ids).log_softmax(-1) - expected).abs().max()
    assert (difference > 0.1) == (name == "demo")  # llama has no value biases


@every
def test_text_gets_the_tokens_of_the_models_own_tokenizer(place, name):
    tokenizer, bridge = attnprune.load(*place[name]).tokenizer, lens.load(*place[name])
    assert bridge.to_tokens("12+34")[0].tolist() == tokenizer("12+34").input_ids


def test_a_family_whose_pattern_hooks_cannot_change_is_refused(tmp_path):
    config = OPTConfig(
        vocab_size=257, hidden_size=32, ffn_dim=48, word_embed_proj_dim=32, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, init_std=0.2, dropout=0.0,
    )  # fmt: skip
    OPTForCausalLM(config).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    sidecar = save_sidecar(tmp_path / "sidecar", tmp_path / "base")
    refused(lambda: lens.load(sidecar.path, str(tmp_path / "base")), "opt: ", "TransformerLens")


def script(*arguments):
    command = [sys.executable, "examples/transformer_lens.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def test_the_script_shows_the_edges_of_a_text(place):
    done = script(place["demo"][0], "--text", "12+34=")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("6 tokens, next: ")
    assert len(lines) == 5
    assert all(0 <= int(count) <= 21 for line in lines[1:] for count in line.split(": ")[1].split())


def test_the_script_says_on_one_line_what_is_wrong(place):
    done = script(place["llama"][0], "--text", "a")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "--base" in done.stderr
    assert "Traceback" not in done.stderr
