"""Write the golden vectors of formats/vectors/v1: python examples/write_vectors.py [--out FOLDER]

Three tiny base models and every kind of artefact made from them, with what a reader must find in each
(expected/NAME.json). All stored values are small multiples of a power of two, so that merging is exact on any machine,
and no score lies near its gate, so that the open edges are too. `first-release` was written by version 0.1.0 itself and
is not made here.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from attnprune.attention.interface import gates_of
from attnprune.data.blocks import Blocks
from attnprune.measure import gate_statistics, measure
from attnprune.sidecar import bases, format, loading, masks
from attnprune.sidecar.edges import open_edges
from attnprune.sidecar.folder import Sidecar, file_entries, open_merged, open_sidecar, publish, save_files
from attnprune.sidecar.merged import write_merged
from attnprune.sidecar.probe import measure_probe, probe_rows
from attnprune.sidecar.quiet import quiet
from attnprune.training import export

VECTORS = Path(__file__).parent.parent / "formats" / "vectors" / "v1"
VOCABULARY = ["<eos>", *"abcdefghijklmnopqrstuvwxyz", *".,:;?"]
TEXT = "t h e g a t e o p e n s . a n d s h u t s"
LAYERS, HEADS, WIDTH, LENGTH, RANK = 2, 4, 16, 16, 2
MARGIN = 1e-4  # no score of the measured text is nearer to its gate than this
KINDS = {"gates": "none", "lora": "lora", "delta": "delta"}
# Base model -> number of key/value heads and dtype; gpt2 has one fused qkv matrix.
BASES = {"gpt2": (HEADS, torch.float32), "llama-gqa": (2, torch.float32), "llama-bf16": (HEADS, torch.bfloat16)}
TARGETS = {"llama": ["k_proj", "o_proj", "q_proj", "v_proj"], "gpt2": ["attn.c_proj", "c_attn"]}
SEEDS = {"gpt2": 1, "llama-gqa": 5, "llama-bf16": 3}


def exact(generator: np.random.Generator, shape: tuple[int, ...], step: float) -> torch.Tensor:
    """Integers in [-32, 32] times `step`: exact in every float format, also when a few are multiplied and added."""
    return torch.from_numpy(generator.integers(-32, 33, shape).astype(np.float32) * step)


def write_base(folder: Path, name: str) -> None:
    """A random base model [2 layers, 4 heads, width 16, 32 tokens] with a tokenizer of one token per letter."""
    kv_heads, dtype = BASES[name]
    common: dict[str, Any] = {"vocab_size": len(VOCABULARY), "bos_token_id": None, "eos_token_id": 0}
    if name == "gpt2":
        model: Any = GPT2LMHeadModel(
            GPT2Config(n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_inner=24, n_positions=32, **common)
        )
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=WIDTH,
                intermediate_size=24,
                num_hidden_layers=LAYERS,
                num_attention_heads=HEADS,
                num_key_value_heads=kv_heads,
                max_position_embeddings=32,
                **common,
            )
        )
    generator = np.random.default_rng(SEEDS[name])
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.ndim == 2:
                parameter.copy_(exact(generator, tuple(parameter.shape), 2**-6))
    with quiet():
        model.to(dtype).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)


def write_sidecar(folder: Path, base: Path, kind: str) -> None:
    """A sidecar of `base` with random gates and, for lora and delta, random changes of the attention weights.

    Raises:
        ValueError: a score of the measured text lies within MARGIN of its gate: choose another seed.
    """
    name = base.name
    dense = bases.load_base(str(base), dtype=BASES[name][1])
    entry = bases.identity(dense)
    sparse = bases.load_base(str(base), dtype=BASES[name][1]).model
    generator = np.random.default_rng([SEEDS[name], list(KINDS.values()).index(kind)])
    weights, adapter, changed = changes(sparse, kind, generator)
    biases = [exact(generator, (HEADS,), 2**-4).numpy() for _ in range(LAYERS)]
    biases[-1][-1] = -1000.0  # one closed head
    loading.install(sparse, biases, weights, changed)
    ids = torch.from_numpy(generator.integers(1, len(VOCABULARY), (4, LENGTH)))
    blocks = Blocks(ids, ids.clone(), "random tokens")
    if dense.model.dtype == torch.float32:
        check_margin(sparse, blocks)
    report = measure(sparse, blocks, reference=bases.dense(dense.model), control=True)
    staging = folder.with_name(f".{folder.name}")
    save_files(staging, export.gate_arrays(biases, gate_statistics(sparse, blocks)), weights, adapter)
    measured = ("loss", "base_loss", "control_loss", "kl", "density", "edges_per_query", "open_edges")
    measured += ("visible_edges", "seq_len", "tokens", "data")
    manifest = {
        "format": format.FORMAT,
        "format_version": format.FORMAT_VERSION,
        "requires": ["gate:threshold"] + ([] if kind == "none" else [f"weights:{kind}"]),
        "created_by": "attnprune examples/write_vectors.py",
        "base": {key: value for key, value in entry.items() if value is not None},
        "gate": {"logit": "score+bias", "threshold": 0, "heads": [HEADS] * LAYERS},
        "weights": changed.model_dump(exclude_none=True),
        "files": file_entries(staging),
        "result": {key: getattr(report, key) for key in measured}
        | {"exact_match": report.exact_match or 0.0}  # the format asks for a number
        | {"data_sha256": blocks.fingerprint, "steps": 0, "seed": SEEDS[name]}
        | {"constraint": "density", "limit": 0.5, "feasible": report.density <= 0.5},
        "probe": measure_probe(sparse, *probe_rows(ids, bases.context_length(sparse))).model_dump(),
    }
    publish(staging, folder, format.Manifest.model_validate(manifest))


def changes(
    model: Any, kind: str, generator: np.random.Generator
) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None, format.WeightsEntry]:
    """(tensors, adapter configuration or None, manifest entry) of changed attention weights, in the base's dtype."""
    targets = TARGETS[model.config.model_type]
    matrices = {n: p for n, p in model.named_parameters() if any(n.endswith(f"{t}.weight") for t in targets)}
    if kind == "none":
        return {}, None, format.WeightsEntry(kind="none")
    if kind == "delta":
        tensors = {n: exact(generator, tuple(p.shape), 2**-6).to(p.dtype) for n, p in matrices.items()}
        return tensors, None, format.WeightsEntry(kind="delta", tensors=len(tensors))
    conv = model.config.model_type == "gpt2"  # its weights are stored as [in, out]
    tensors = {}
    for name, parameter in matrices.items():
        inner, outer = parameter.shape if conv else parameter.shape[::-1]
        stem = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        tensors[f"{stem}A.weight"] = exact(generator, (RANK, inner), 2**-6)
        tensors[f"{stem}B.weight"] = exact(generator, (outer, RANK), 2**-6)
    adapter = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None, "r": RANK,
        "lora_alpha": 2 * RANK, "target_modules": targets, "fan_in_fan_out": conv, "bias": "none",
        "inference_mode": True,
    }  # fmt: skip
    entry = format.WeightsEntry(kind="lora", rank=RANK, alpha=2.0 * RANK, tensors=len(tensors))
    return tensors, adapter, entry


def check_margin(model: Any, blocks: Blocks) -> None:
    """Raise ValueError where moving every bias by MARGIN changes an edge of `blocks`."""
    counts = []
    for shift in (-MARGIN, 2 * MARGIN, -MARGIN):
        for gate in gates_of(model):
            gate.bias.data += shift
        counts.append(measure(model, blocks).open_edges)
    if len(set(counts)) > 1:
        raise ValueError("a score lies too near to its gate")


def digest(path: Path) -> str:
    """sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def files_of(folder: Path) -> dict[str, str]:
    """sha256 of every file below `folder`."""
    return {f.relative_to(folder).as_posix(): digest(f) for f in sorted(folder.rglob("*")) if f.is_file()}


def expected_sidecar(folder: Path, base: Path | str) -> dict[str, Any]:
    """What a reader finds in a sidecar, and what its model gives on the probe."""
    opened = open_sidecar(folder)
    loaded = loading.load(folder, str(base))
    gates = opened.gates
    changed = sorted(changed_names(opened)) if isinstance(base, Path) else []  # exact in our own vectors only
    parameters = dict(loaded.model.named_parameters())
    return {
        "what": "sidecar",
        "base": base.name if isinstance(base, Path) else base,
        "files": files_of(folder),
        "heads": opened.manifest.gate.heads,
        "bias": [layer.tolist() for layer in opened.biases()],
        "density": [layer.tolist() for layer in opened.density],
        "closed": [gates[f"layers.{i}.gate.closed"].tolist() for i in range(len(opened.manifest.gate.heads))],
        "sink": [gates[f"layers.{i}.stats.sink"].tolist() for i in range(len(opened.manifest.gate.heads))],
        "offset_edges": gates["stats.offset_edges"].tolist(),
        "merged_weights_sha256": {name: tensor_digest(parameters[name]) for name in changed},
        "probe": probe_values(loaded.model, opened.manifest),
    }


def changed_names(opened: Sidecar) -> set[str]:
    """The base's parameters that a sidecar changes."""
    names = set(opened.weights())
    if opened.manifest.weights.kind == "lora":
        return {n.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] + ".weight" for n in names}
    return names


def tensor_digest(values: torch.Tensor) -> str:
    """sha256 of a tensor's values, row-major, as little-endian fp32."""
    return hashlib.sha256(values.detach().float().contiguous().numpy().astype("<f4").tobytes()).hexdigest()


@torch.no_grad()
def probe_values(model: Any, manifest: format.Manifest) -> dict[str, Any]:
    """Loss, open edges, and the last position's logits rounded to six places, on the stored probe."""
    ids = torch.tensor([manifest.probe.input_ids])
    blocks = Blocks(ids, ids.clone(), "probe")
    report = measure(model, blocks)
    logits = model(input_ids=blocks.input_ids, use_cache=False).logits[0, -1].float()
    return {
        "loss": report.loss,
        "open_edges": report.open_edges,
        "last_logits": [round(value, 6) for value in logits.tolist()],
    }


def write_derived(out: Path, base: str) -> None:
    """The merged form of a base's LoRA sidecar and, for fp32 (16 bits round too freely), its mask on TEXT."""
    source = open_sidecar(out / f"{base}-lora")
    model, tokenizer = loading.load(source.path, str(out / "bases" / base))
    merged = out / f"{base}-merged"
    write_merged(model, tokenizer, source, fresh(merged), same_dtype=True)
    write_expected(out, merged.name, expected_merged(merged, base))
    if BASES[base][1] != torch.float32:
        return
    file = fresh(out / f"{base}-mask.safetensors")
    found = open_edges(model, tokenizer, TEXT)
    masks.save(file, found.mask(source.manifest.gate.heads), found.input_ids)
    write_expected(out, f"{base}-mask", expected_mask(file, f"{base}-lora"))


def fresh(path: Path) -> Path:
    """A path at which nothing is any more."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return path


def expected_merged(folder: Path, base: str) -> dict[str, Any]:
    """What a reader finds in a merged folder, and what its model gives on the probe."""
    stored = load_file(folder / "model.safetensors")
    return {
        "what": "merged",
        "base": base,
        "files": files_of(folder),
        "weights_sha256": {name: tensor_digest(values) for name, values in sorted(stored.items())},
        "probe": probe_values(loading.load(folder).model, open_merged(folder).manifest),
    }


def expected_mask(file: Path, source: str) -> dict[str, Any]:
    """What a reader finds in a mask: the tokens, and the number of open edges of each head."""
    mask = masks.read(file)
    layers = range(len(mask.packed))
    return {
        "what": "mask",
        "source": source,
        "sha256": digest(file),
        "input_ids": mask.input_ids.tolist(),
        "open": [mask.layer(i).sum((1, 2)).tolist() for i in layers],
    }


def write_expected(out: Path, name: str, values: dict[str, Any]) -> None:
    """Write expected/NAME.json, canonical."""
    (out / "expected").mkdir(exist_ok=True)
    text = json.dumps(values, indent=1, sort_keys=True, allow_nan=False) + "\n"
    (out / "expected" / f"{name}.json").write_text(text, encoding="utf-8")


def write_all(out: Path) -> None:
    """Write every base and vector into `out`; what is there already under those names is replaced."""
    for base in BASES:
        write_base(fresh(out / "bases" / base), base)
        for label, kind in KINDS.items():
            folder = fresh(out / f"{base}-{label}")
            write_sidecar(folder, out / "bases" / base, kind)
            write_expected(out, folder.name, expected_sidecar(folder, out / "bases" / base))
        write_derived(out, base)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=VECTORS)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    write_all(out)
    if (out / "first-release").is_dir():
        write_expected(out, "first-release", expected_sidecar(out / "first-release", "demo"))


if __name__ == "__main__":
    main()
