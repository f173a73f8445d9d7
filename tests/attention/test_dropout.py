"""Attention dropout under gates: switched off by attach in every family's spelling, said once, restored by detach."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from attnprune.attention import dropout
from attnprune.attention.interface import SUPPORTED_FAMILIES, attach, detach
from attnprune.sidecar.loading import load
from attnprune.sidecar.merged import load_merged, write_merged
from tests.helpers.families import COMMON, NO_GROUPS, OPTIONS, ids
from tests.helpers.sidecars import save_sidecar, save_tiny_gpt2

RATE = 0.25


@pytest.fixture(autouse=True)
def _say_again():
    dropout.say.cache_clear()


def build(family, rate=RATE):
    common = {key: value for key, value in COMMON.items() if not (family in NO_GROUPS and key == "num_key_value_heads")}
    known = AutoConfig.for_model(family, **common)
    rates = {key: rate for key in dropout.CONFIG_KEYS if hasattr(known, key)}
    assert len(rates) == 1
    others = dict.fromkeys(("resid_pdrop", "embd_pdrop", "dropout", "residual_dropout", "embedding_dropout"), 0.0)
    others |= {"hidden_dropout": 0.0, "layerdrop": 0.0}
    options = OPTIONS.get(family, {}) | {key: value for key, value in others.items() if hasattr(known, key)}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **common | options | rates)).eval()


def rates_of(model):
    """Every dropout rate in the configuration and the modules."""
    found = {key: value for key, value in vars(model.config).items() if "drop" in key}
    for path, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            found[path] = module.p
        found |= {f"{path}.{key}": value for key, value in vars(module).items() if "drop" in key and key[0] != "_"}
    return found


def loss(model, tokens):
    torch.manual_seed(0)
    return model(input_ids=tokens, labels=tokens, use_cache=False).loss


@pytest.mark.parametrize("family", sorted(SUPPORTED_FAMILIES))
def test_train_mode_runs_with_the_loss_of_eval_mode(family):
    model, tokens = build(family), ids(2, 9)
    before = rates_of(model)
    assert RATE in before.values()
    attach(model, 0.1)
    expected = loss(model, tokens)
    model.train()
    assert torch.equal(loss(model, tokens), expected)
    loss(model, tokens).backward()
    detach(model)
    assert rates_of(model) == before
    assert not torch.equal(loss(model, tokens), loss(model.eval(), tokens))


def test_only_the_attentions_dropout_is_switched_off():
    config = AutoConfig.for_model("gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=97)
    model = AutoModelForCausalLM.from_config(config)
    attach(model)
    rates = rates_of(model)
    assert (rates.pop("attn_pdrop"), {rates.pop(f"transformer.h.{i}.attn.attn_dropout") for i in (0, 1)}) == (
        0.0,
        {0.0},
    )
    assert set(rates.values()) >= {0.1}
    assert all(value == 0.1 for name, value in rates.items() if "resid" in name or "embd" in name)


def test_it_is_said_once_and_only_where_there_is_something_to_say(caplog):
    with caplog.at_level(logging.WARNING):
        attach(build("llama", 0.0))
        assert not caplog.messages
        attach(build("gpt2"))
        attach(build("gpt2"))
    assert caplog.messages == ["gpt2: attention dropout 0.25 is set to 0 while gates are attached"]


def test_a_copy_is_restored_on_its_own():
    model = build("gpt2")
    attach(model)
    twin = copy.deepcopy(model)
    detach(twin)
    assert twin.config.attn_pdrop == twin.transformer.h[0].attn.attn_dropout.p == RATE
    assert model.config.attn_pdrop == model.transformer.h[0].attn.attn_dropout.p == 0.0


def test_a_failed_attach_leaves_the_dropout(monkeypatch):
    model = build("gpt2")
    monkeypatch.setattr("attnprune.attention.interface.PROBE_TOLERANCE", -1.0)
    with pytest.raises(Exception, match="open gates differ"):
        attach(model)
    assert RATE in rates_of(model).values()
    assert rates_of(model)["attn_pdrop"] == RATE


def test_sidecar_and_merged_form_train_without_attention_dropout(tmp_path):
    base = save_tiny_gpt2(tmp_path / "base")
    config = AutoConfig.from_pretrained(base)
    config.attn_pdrop = RATE
    config.save_pretrained(base)
    sidecar = save_sidecar(tmp_path / "sidecar", base)
    model, tokenizer = load(sidecar.path, str(base))
    write_merged(model, tokenizer, sidecar, tmp_path / "merged", same_dtype=True)
    portable = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokens = ids(2, 9)
    expected = loss(model, tokens)
    for form in (model, load_merged(tmp_path / "merged")[0], portable):
        assert torch.allclose(loss(form.train(), tokens), expected, atol=1e-6)
