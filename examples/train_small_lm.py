"""Train the small language model of the recipe search: a 4-layer, 16-head Llama on PEPs and Rust RFCs.

    python examples/train_small_lm.py peps.txt rust_rfcs.txt --out small-lm

Every 20th document is held out. OUT gets the model, its BPE tokenizer, and the documents as train.jsonl and test.jsonl,
so the text that `attnprune sparsify OUT --data OUT/train.jsonl` trains on IS the base model's own distribution, and
neither of them has seen test.jsonl. Recipes are chosen on the beginning of test.jsonl; unseen.jsonl has its other
documents, for what is reported. The model has not converged: compare with an open-gate control.

examples/small-lm holds the tokenizer and the configuration of the model that examples/results reports on. Its weights
are not kept in the repository: this script makes them again, bit for bit on a processor like the one that made them
(the last line says whether), and the history has them: `git show 277e95c:examples/small-lm/model.safetensors`.
`--texts-only` writes just the texts.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from attnprune.data.blocks import pack
from attnprune.files import sha256_of
from attnprune.measure import measure

END_OF_TEXT = "<|endoftext|>"
SEQ_LEN = 256
REPORTED_ON = "6d3e44cb4f4f1521225a588ef1edcdba19ff60a16a3f47b8cd689f91a4179258"  # sha256 of its model.safetensors
CHOSEN_ON = 5  # the first 1 / CHOSEN_ON of the held-out documents is what settings were compared on


def documents(file: Path) -> list[str]:
    """The file's documents: a PEP starts with `PEP: N` after two empty lines, an RFC with its name or date."""
    starts = r"\n\n\n(?=PEP: ?\d)|\n\n(?=- Feature Name)|\n\n(?=- Start Date)"
    return [text for text in re.split(starts, file.read_text(encoding="utf-8")) if len(text) > 1000]


def write_texts(files: list[Path], folder: Path) -> dict[str, list[str]]:
    """Write train.jsonl, test.jsonl (every 20th document) and a part of it, unseen.jsonl; returns the lists."""
    everything = [text for file in files for text in documents(file)]
    parts = {"test": everything[::20], "train": [text for i, text in enumerate(everything) if i % 20]}
    parts["unseen"] = parts["test"][len(parts["test"]) // CHOSEN_ON :]
    for name, texts in parts.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return parts


def build_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with `size` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, model_max_length=SEQ_LEN)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--texts-only", action="store_true", help="write the .jsonl files and stop")
    options = parser.parse_args()

    weights = options.out / "model.safetensors"
    if weights.exists() and not options.texts_only:
        parser.error(f"{weights}: exists, and is not overwritten")
    torch.manual_seed(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    parts = write_texts(options.texts, options.out)
    print(f"{len(parts['train']) + len(parts['test'])} documents", flush=True)
    if options.texts_only:
        return
    tokenizer = build_tokenizer(parts["train"], options.vocabulary)
    train, test = (pack(parts[name], tokenizer, SEQ_LEN, 10**9, name) for name in ("train", "test"))
    print(f"{train.input_ids.numel():,} training tokens", flush=True)

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=SEQ_LEN, tie_word_embeddings=True,
            bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 3e-3, total_steps=options.steps, pct_start=0.03, final_div_factor=1e4
    )
    stream, began = train.input_ids.flatten(), time.perf_counter()
    for step in range(1, options.steps + 1):
        starts = torch.randint(len(stream) - SEQ_LEN, (options.batch_size, 1))
        ids = stream[starts + torch.arange(SEQ_LEN)]
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == options.steps:
            report = measure(model.eval(), test.take(torch.arange(min(128, len(test)))))
            model.train()
            seconds = time.perf_counter() - began
            print(f"step {step}: train {loss.item():.3f}, held-out {report.loss:.4f} ({seconds:.0f} s)", flush=True)
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    same = sha256_of(weights) == REPORTED_ON
    print("the model" if same else "not, bit for bit, the model", "that examples/results reports on", flush=True)


if __name__ == "__main__":
    main()
