"""The adapter folder of a LoRA sidecar is plain PEFT's, on purpose: the same weights, dense. The sidecar is not."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from attnprune.attention.interface import gates_forced_open
from attnprune.sidecar import bases, loading
from attnprune.sidecar.folder import open_sidecar
from attnprune.sidecar.identity import base_tensors
from tests.helpers.factory import save_tiny_llama
from tests.helpers.paths import VECTORS
from tests.helpers.sidecars import save_sidecar, save_tiny_gpt2

GOLDEN = {"gpt2-lora": "gpt2", "llama-gqa-lora": "llama-gqa", "llama-bf16-lora": "llama-bf16"}
TOLERANCE = 1e-5

every = pytest.mark.parametrize("name", [*GOLDEN, "first-release", "gpt2", "llama"])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """(sidecar, base) by name: golden ones, the first release's trained one, and random ones of another rank."""
    folder = tmp_path_factory.mktemp("peft")
    known = {name: (VECTORS / name, VECTORS / "bases" / base) for name, base in GOLDEN.items()}
    known["first-release"] = (VECTORS / "first-release", bases.demo_folder())
    for name, make in (("gpt2", save_tiny_gpt2), ("llama", save_tiny_llama)):
        base = make(folder / f"{name}-base")
        known[name] = (save_sidecar(folder / name, base, "lora").path, base)
    return known


@every
def test_peft_merges_the_adapter_into_our_weights(place, name):
    sidecar, folder = place[name]
    base = AutoModelForCausalLM.from_pretrained(folder)
    before = {key: tensor.detach().clone() for key, tensor in base.named_parameters()}
    found = dict(PeftModel.from_pretrained(base, sidecar / "adapter").merge_and_unload().named_parameters())
    expected = base_tensors(loading.load(sidecar, str(folder)).model)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key].data, tensor.data, rtol=0, atol=TOLERANCE)
    changed = {key for key in found if not torch.equal(found[key], before[key])}
    modules = {key.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for key in open_sidecar(sidecar).weights()}
    assert changed == {f"{module}.weight" for module in modules}


@every
def test_peft_computes_our_logits_with_every_gate_open(place, name):
    sidecar, folder = place[name]
    ours = loading.load(sidecar, str(folder), dtype=torch.float32).model
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, sidecar / "adapter").eval()
    ids = torch.tensor([open_sidecar(sidecar).manifest.probe.input_ids])
    with torch.no_grad():
        dense = adapted(input_ids=ids).logits
        sparse = ours(input_ids=ids).logits
        with gates_forced_open(ours):
            expected = ours(input_ids=ids).logits
    # A 16-bit base: our merge was rounded to it, the unmerged adapter was not.
    tolerance = 5e-2 if "bf16" in name else TOLERANCE * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(dense, expected, rtol=0, atol=tolerance)
    assert (dense - sparse).abs().max() > 0.1  # what PEFT runs is dense, so not what the sidecar is


@every
def test_the_sidecar_itself_is_no_adapter(place, name):
    sidecar, folder = place[name]
    base = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json'"):
        PeftModel.from_pretrained(base, sidecar)
    with pytest.raises(ValueError, match="adapter model file not found"):
        base.load_adapter(str(sidecar))
    assert not any("lora" in key for key in base.state_dict())
