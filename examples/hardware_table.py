"""What fits on which GPU, by the plan's own formulas on models without memory: docs/hardware.md.

    python -m examples.hardware_table --out docs/hardware.md --json examples/results/hardware.json

Nothing is measured here, and nothing is downloaded: the shapes are those of the published configurations.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from attnprune.runs.config import TrainConfig
from attnprune.training.loss import chunk_tokens
from attnprune.training.memory import Estimator, Shape, shape_of
from attnprune.training.plan import CONTEXT, SHARE

LLAMA = {"num_key_value_heads": 8, "num_attention_heads": 32, "vocab_size": 128_256, "max_position_embeddings": 131_072}
MODELS = {
    "GPT-2 medium": ("gpt2", {"n_layer": 24, "n_embd": 1024, "n_head": 16}),
    "Pythia-1B": ("gpt_neox", {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 8,
                               "intermediate_size": 8192, "vocab_size": 50_304}),
    "OLMo-1B": ("olmo", {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16,
                         "intermediate_size": 8192, "vocab_size": 50_304, "tie_word_embeddings": True}),
    "Llama-3.2-1B": ("llama", LLAMA | {"hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192,
                                       "head_dim": 64, "tie_word_embeddings": True}),
    "OLMo-2-7B": ("olmo2", {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
                            "intermediate_size": 11_008, "vocab_size": 100_352, "max_position_embeddings": 4096}),
    "Llama-3.1-8B": ("llama", LLAMA | {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14_336}),
}  # fmt: skip
# name: scope, 4 bits, checkpointing, optimiser, processes, sharded
WAYS = {
    "LoRA": ("lora", False, False, "adamw", 1, False),
    "LoRA, checkpointing": ("lora", False, True, "adamw", 1, False),
    "LoRA in 4 bits, checkpointing": ("lora", True, True, "adamw", 1, False),
    "LoRA, checkpointing, 8 processes": ("lora", False, True, "adamw", 8, False),
    "everything, checkpointing": ("full", False, True, "adamw", 1, False),
    "everything, checkpointing, adamw8bit": ("full", False, True, "adamw8bit", 1, False),
    "everything, checkpointing, FSDP2 over 8": ("full", False, True, "adamw", 8, True),
}
LENGTHS, CARDS = (512, 2048), (24, 48, 80, 141)


def linear_layers(model: Any) -> dict[str, torch.nn.Module]:
    """The linear layers of the decoder, by name: what --load-in quantises."""
    head = model.get_output_embeddings()
    return {n: m for n, m in model.named_modules() if isinstance(m, (torch.nn.Linear, Conv1D)) and m is not head}


def shapes(name: str) -> dict[tuple[str, bool], Shape]:
    """(scope, in 4 bits) -> the shape that the formulas ask for."""
    family, sizes = MODELS[name]
    found = {}
    for scope, dtype in (("lora", torch.bfloat16), ("full", torch.float32)):
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes), dtype=dtype)
        linear = linear_layers(model)
        gates = model.config.num_hidden_layers * model.config.num_attention_heads
        numbers = [math.prod(layer.weight.shape) for layer in linear.values()]
        if scope == "lora":
            inside = [name for name in linear if "attn" in name or "attention" in name]
            model.requires_grad_(False)
            with torch.device("meta"):
                model = get_peft_model(model, LoraConfig(r=16, target_modules=inside), autocast_adapter_dtype=False)
        shape = shape_of(model)
        shape = replace(shape, trainable=shape.trainable + gates, sizes=(*shape.sizes, gates))
        found[scope, False] = shape
        codes = sum(
            n / 2 + n / 64 + 4 * n / (64 * 256) for n in numbers
        )  # nf4 in blocks of 64, scales in blocks of 256
        packed = round(shape.weights - 2 * sum(numbers) + codes)
        found[scope, True] = replace(shape, weights=packed, full=2 * shape.parameters, largest=2 * max(numbers))
    return found


def row(shape: Shape, way: str, length: int) -> dict[str, Any]:
    """Bytes with one block at once, those of evaluation and export, and the blocks that fit each card."""
    scope, _, checkpointing, optimizer, processes, sharded = WAYS[way]
    train = TrainConfig(scope=scope, gradient_checkpointing=checkpointing, optimizer=optimizer)  # pyright: ignore[reportArgumentType]
    estimator = Estimator(
        shape, train, length, on_cpu=False, bf16=True, compares=True, process=CONTEXT, processes=processes,
        sharded=sharded, chunk=chunk_tokens("cuda", shape.vocabulary) if scope == "lora" else None,
    )  # fmt: skip
    fits = {}
    for card in CARDS:
        room = SHARE["cuda"] * card * 1e9
        fits[card] = estimator.fits(room) if estimator.evaluation() <= room else 0
    return {
        "one_block": estimator.of(1).total, "evaluation": estimator.evaluation(), "export": estimator.export(),
        "blocks": fits,
    }  # fmt: skip


def table(rows: list[dict[str, Any]], length: int) -> list[str]:
    """A Markdown table of one block length."""
    head = "| model | what trains | GB, one block | " + " | ".join(f"{card} GB" for card in CARDS) + " |"
    lines = [head, "|---|---|---|" + "---|" * len(CARDS)]
    for found in rows:
        if found["tokens"] == length:
            fits = " | ".join(f"{n:,}" if n else "-" for n in found["blocks"].values())
            lines.append(f"| {found['model']} | {found['way']} | {found['one_block'] / 1e9:.1f} | {fits} |")
    return lines


PAGE = """# What fits on which GPU

Computed by the formulas of the plan (`attnprune/training/memory.py`) on models that hold no memory:

    python -m examples.hardware_table --out docs/hardware.md --json examples/results/hardware.json

Nothing in these tables is measured. On CPUs the same formulas are compared with real runs by
`examples/check_memory.py`. In six of them (the bundled model, `examples/broad-lm`, SmolLM2-135M, also in 4 and 8 bits)
the plan's memory is between 12 % below and 12 % above the measured peak, and its time for a step within 7 %
([memory-cpu.json](../examples/results/memory-cpu.json), the command is in it; `smollm2` is the .gguf file after
`save_pretrained`). On a GPU one number is known: 29 GiB for 32 blocks of 512 tokens of SmolLM2-135M. A run corrects
them by a measured step, and `--dry-run` prints the result.

A number under a card is how many blocks one GPU takes at once, in 90 % of its memory, with bf16, `adamw` unless said,
the base compared with at every step, and adapters of rank 16 on the attention. `-`: not even one. "GB, one block" is
per GPU.

- LoRA keeps the base in bf16. In 4 bits it is nf4 (`--load-in 4bit`).
- "Everything" trains fp32 weights beside a frozen fp32 copy. FSDP2 divides all of that.
- More processes that share a batch need the memory of one each, and a little for adapters' gradients.
- Export measures the base and the artefact in full precision, side by side. Where the GPU does not hold both, that is
  done in the host's memory: 32 GB for a model of 8B in bf16.

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    rows = []
    for name in MODELS:
        known = shapes(name)
        for way, (scope, packed, *_) in WAYS.items():
            for length in LENGTHS:
                if name == "GPT-2 medium" and length > 1024:
                    continue  # beyond its context
                rows.append({"model": name, "way": way, "tokens": length, **row(known[scope, packed], way, length)})
    command = f"python -m examples.hardware_table --out {options.out} --json {options.json}"
    options.json.write_text(json.dumps({"command": command, "rows": rows}, indent=2) + "\n")
    text = PAGE
    for length in LENGTHS:
        text += f"## Blocks of {length:,} tokens\n\n" + "\n".join(table(rows, length)) + "\n\n"
    options.out.write_text(text.rstrip() + "\n")


if __name__ == "__main__":
    main()
