"""Sidecars written in a moment, without training: a tiny base on disk, chosen gates, random changes of the weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from attnprune.attention.interface import gates_of
from attnprune.data.blocks import Blocks
from attnprune.measure import gate_statistics, measure
from attnprune.sidecar import bases, format, loading, merged
from attnprune.sidecar.folder import Sidecar, file_entries, publish, save_files
from attnprune.sidecar.probe import measure_probe, probe_rows
from attnprune.training import export
from tests.helpers.factory import byte_tokenizer, save_tiny_llama

TEMPLATES = {"default": "{{ messages[0].content }}!", "tool_use": "tools: {{ tools }}", "rag 2": "R"}

TARGETS = {"llama": ["q_proj", "k_proj", "v_proj", "o_proj"], "gpt2": ["c_attn", "attn.c_proj"]}


def save_sidecar(folder: Path, base: Path, kind: str = "none", seed: int = 0, biases=None) -> Sidecar:
    """A sidecar of `base` that loads and whose probe holds; random gates unless `biases` [layers][heads] are given."""
    fresh = bases.load_base(str(base))
    entry = bases.identity(fresh)
    generator = torch.Generator().manual_seed(seed)
    weights, adapter, changed = _changes(fresh.model, kind, generator)
    config = fresh.model.config
    heads = [config.num_attention_heads] * config.num_hidden_layers
    if biases is None:
        biases = [torch.randn(count, generator=generator).numpy() for count in heads]
    biases = [np.asarray(layer, np.float32) for layer in biases]
    loading.install(fresh.model, biases, weights, changed)
    blocks = Blocks(ids := torch.randint(1, 250, (4, 32), generator=generator), ids.clone(), "random ids")
    report = measure(fresh.model, blocks)
    probe = measure_probe(fresh.model, *probe_rows(ids, bases.context_length(fresh.model)))
    staging = folder.with_name(f".{folder.name}")
    arrays = export.gate_arrays(biases, gate_statistics(fresh.model, blocks))
    save_files(staging, arrays, weights, adapter)
    manifest = {
        "format": format.FORMAT, "format_version": format.FORMAT_VERSION, "created_by": "attnprune 0.1.0",
        "requires": ["gate:threshold"] + ([f"weights:{kind}"] if kind != "none" else []),
        "base": {key: value for key, value in entry.items() if value is not None},
        "gate": {"logit": "score+bias", "threshold": 0, "heads": heads},
        "weights": changed.model_dump(exclude_none=True),
        "files": file_entries(staging),
        "result": {
            "loss": report.loss, "base_loss": report.loss, "kl": 0.0, "density": report.density,
            "edges_per_query": report.edges_per_query, "open_edges": report.open_edges,
            "visible_edges": report.visible_edges, "exact_match": 0.0, "seq_len": 32, "tokens": report.tokens,
            "data": "random ids", "data_sha256": "0" * 64, "steps": 0, "seed": seed, "constraint": "kl", "limit": 0.05,
            "feasible": True,
        },
        "probe": probe.model_dump() | {"edge_tolerance": 0},
    }  # fmt: skip
    assert len(gates_of(fresh.model)) == len(heads)
    return publish(staging, folder, format.Manifest.model_validate(manifest))


def _changes(model, kind, generator):
    """(tensors, adapter configuration or None, manifest entry) of random changes of the attention weights."""
    if kind == "none":
        return {}, None, format.WeightsEntry(kind="none")
    targets = TARGETS[model.config.model_type]
    matrices = {n: p for n, p in model.named_parameters() if any(n.endswith(f"{t}.weight") for t in targets)}
    if kind == "delta":
        tensors = {n: p.detach() + 0.02 * torch.randn(p.shape, generator=generator) for n, p in matrices.items()}
        return tensors, None, format.WeightsEntry(kind="delta", tensors=len(tensors))
    conv = model.config.model_type == "gpt2"  # its Conv1D keeps weights as [in, out]
    tensors = {}
    for name, parameter in matrices.items():
        inner, outer = parameter.shape if conv else parameter.shape[::-1]
        stem = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        tensors[f"{stem}A.weight"] = torch.randn(4, inner, generator=generator)
        tensors[f"{stem}B.weight"] = 0.02 * torch.randn(outer, 4, generator=generator)
    adapter = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None, "r": 4, "lora_alpha": 8,
        "target_modules": targets, "fan_in_fan_out": conv, "bias": "none", "inference_mode": True,
    }  # fmt: skip
    return tensors, adapter, format.WeightsEntry(kind="lora", rank=4, alpha=8.0, tensors=len(tensors))


def save_merged(folder: Path, kind: str = "lora") -> Path:
    """A merged folder of a tiny llama, made from `folder`-base and `folder`-sidecar beside it."""
    base = save_tiny_llama(folder.with_name(f"{folder.name}-base"))
    sidecar = save_sidecar(folder.with_name(f"{folder.name}-sidecar"), base, kind)
    model, tokenizer = loading.load(sidecar.path, str(base))
    merged.write_merged(model, tokenizer, sidecar, folder, same_dtype=True)
    return folder


def reseal(folder: Path, change=lambda values: None) -> None:
    """Bring sizes, hashes and fingerprint of a merged folder in line with its files, as whoever changed them would.

    `change` is applied to config.json before.
    """
    file = folder / "config.json"
    values = json.loads(file.read_text())
    change(values)
    block = values["attnprune"]
    for name in block["files"]:
        raw = (folder / name).read_bytes()
        block["files"][name] = {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    block["merged"]["config"] = format.config_fingerprint(values)
    file.write_text(json.dumps(values))


def save_tiny_gpt2(folder: Path) -> Path:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=257, n_embd=32, n_head=4, n_layer=2, n_positions=64, bos_token_id=256, eos_token_id=256,
        initializer_range=0.2, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def base_with_a_rich_tokenizer(folder: Path) -> Path:
    """A tiny llama with several chat templates, added tokens and (stand-ins of) SentencePiece models."""
    save_tiny_llama(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATES
    tokenizer.add_tokens(["<note>"])
    tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<tool>"]})
    tokenizer.save_pretrained(folder)
    for name in ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model"):
        (folder / name).write_bytes(b"\0a SentencePiece model: " + name.encode())
    return folder
