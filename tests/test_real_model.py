"""A real pretrained model, SmolLM2-135M-Instruct from its GGUF file, through a few steps of the whole flow."""

from __future__ import annotations

import gguf
import pytest
import torch

import attnprune
from attnprune.attention.interface import gates_of
from attnprune.runs.config import build_config
from attnprune.sidecar import bases, loading
from attnprune.sidecar.gguf_header import read_once
from attnprune.training import recipe
from tests.helpers.factory import gguf_file, save_text

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    config = build_config(
        {
            "model": {"name": str(gguf_file()), "device": "cpu"},
            "data": {"source": str(save_text(folder / "text.txt", 60)), "seq_len": 48, "eval_tokens": 192},
            "train": {"steps": 3, "batch_size": 2, "eval_every": 3, "save_every": 3},
            "output": {"folder": str(folder / "run")},
        }
    )
    sidecar = recipe.sparsify(config)
    assert sidecar is not None
    return sidecar, attnprune.load(sidecar.path, base=str(gguf_file()))


def test_sidecar_is_small_and_names_a_gguf_base(sparse):
    sidecar, _ = sparse
    assert sidecar.manifest.weights.kind == "lora"
    assert sum(entry.size for entry in sidecar.manifest.files.values()) < 10e6
    assert sidecar.manifest.base.kind == "gguf"
    assert sidecar.manifest.base.repo_id is None
    assert sidecar.manifest.gate.heads == [9] * 30


def test_its_header_is_read_once_for_a_load(monkeypatch):
    read = []

    class Counted(gguf.GGUFReader):
        def __init__(self, path):
            read.append(path)
            super().__init__(path)

    monkeypatch.setattr(gguf, "GGUFReader", Counted)
    bases.load_base(str(gguf_file()))
    assert len(read) == 1
    assert gguf.GGUFReader is Counted  # and nothing is kept
    with pytest.raises(ZeroDivisionError), read_once():
        raise ZeroDivisionError
    assert gguf.GGUFReader is Counted


def test_probe_is_reproduced_and_edges_are_gone(sparse):
    sidecar, (model, _) = sparse
    loading.verify_probe(model, sidecar.manifest)
    assert sidecar.manifest.result.density < 0.95


def test_generation_is_the_same_with_and_without_caches(sparse):
    _, (model, tokenizer) = sparse
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    options = {"max_new_tokens": 12, "do_sample": False}
    cached = model.generate(**prompt, **options)
    assert torch.equal(cached, model.generate(**prompt, **options, use_cache=False))
    assert torch.equal(cached, model.generate(**prompt, **options, cache_implementation="static"))
    assert "Paris" in tokenizer.decode(cached[0])


def test_left_padded_batch_equals_single_prompts(sparse):
    _, (model, tokenizer) = sparse
    prompts = ["The capital of France is", "Two plus two"]
    tokenizer.padding_side = "left"
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    together = model.generate(**batch, max_new_tokens=6, do_sample=False)[:, -6:]
    for row, prompt in zip(together, prompts, strict=True):
        alone = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=6, do_sample=False)[0, -6:]
        assert torch.equal(row, alone)


def test_closed_gates_are_closed_and_open_gates_are_the_weights_alone(sparse):
    _, (model, tokenizer) = sparse
    ids = tokenizer("Sparse attention keeps few edges.", return_tensors="pt")["input_ids"]
    attentions = model(input_ids=ids, output_attentions=True).attentions
    for gate, pattern in zip(gates_of(model), attentions, strict=True):
        assert gate.last is not None
        assert torch.equal((pattern[0] > 0).sum((1, 2)), gate.last.open_edges)
