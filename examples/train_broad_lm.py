"""Train a small language model on broad text until more of it hardly helps: the base for claims at equal loss.

    python examples/train_broad_lm.py general-0[0-4].jsonl.zst peps.txt rust_rfcs.txt \
        --select general-05.jsonl.zst --out broad-lm

A Llama of 1.07 million parameters (4 layers x 4 heads, width 128, T = 256, a BPE vocabulary of 2,048 tokens made from
the same texts). It trains with transformers' Trainer, in pieces if need be: the same command goes on from the last
checkpoint, and --init goes on from a model (a piece with --decay 0 keeps its rate for the next one). Its loss on the
beginning of the --select file is measured on the way and goes into OUT/curve.json; nothing reads the texts that results
are reported on.

Whether it has converged is what a control says: another budget with every gate open (--init OUT --steps N trains on,
on other blocks) must not lower the loss on unseen text by 0.01 nats.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from attnprune.data.blocks import Blocks, mix
from attnprune.data.sources import documents
from attnprune.data.texts import read_blocks

SEQ_LEN = 256
END_OF_TEXT = "<|endoftext|>"
SELECT_TOKENS = 131_072
DOCUMENTS_FOR_TOKENIZER = 4_000  # of each file: its beginning, which is a sample


def make_tokenizer(files: list[str], size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with `size` tokens, from the beginning of each file."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet)
    texts = (text for file in files for text in islice(documents(file, "text", None), DOCUMENTS_FOR_TOKENIZER))
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, model_max_length=SEQ_LEN)


def read(file: str, tokenizer: PreTrainedTokenizerFast, tokens: int, cache: Path) -> Blocks:
    """The blocks of a file, tokenized once."""
    stored = cache / f"{Path(file).name}.safetensors"
    if not stored.exists():
        ids = read_blocks(file, "text", tokenizer, SEQ_LEN, tokens).input_ids
        cache.mkdir(parents=True, exist_ok=True)
        save_file({"ids": ids.to(torch.int16)}, stored)
        print(f"{file}: {ids.numel():,} tokens", flush=True)
    ids = load_file(stored)["ids"].long()
    return Blocks(ids, ids, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--select", required=True, help="text whose loss is measured on the way")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--init", type=Path, help="model to train on from, with other blocks: the control")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--decay", type=float, default=0.5, help="last share of the steps in which the rate falls to 0")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--eval-every", type=int, default=250)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=10**9, help="at most, of each file")
    parser.add_argument("--compile", action="store_true", help="torch.compile: faster where a C++ compiler is at hand")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16: faster where the processor has it")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.init is not None:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(options.init)
        model = LlamaForCausalLM.from_pretrained(options.init, dtype=torch.float32)
    elif (options.out / "tokenizer.json").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(options.out)
    else:
        tokenizer = make_tokenizer(options.texts, 2048)
        tokenizer.save_pretrained(options.out)
    if options.init is None:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer), hidden_size=options.width, intermediate_size=11 * options.width // 4,
                num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=SEQ_LEN,
                tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
            )
        )  # fmt: skip
    cache = options.out / "tokens"
    train = mix([read(file, tokenizer, options.tokens, cache) for file in options.texts])
    select = read(options.select, tokenizer, SELECT_TOKENS, cache)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {train.input_ids.numel():,} training tokens", flush=True)

    arguments = TrainingArguments(
        output_dir=str(options.out / "checkpoints"), max_steps=options.steps,
        per_device_train_batch_size=options.batch_size, per_device_eval_batch_size=64,
        learning_rate=options.learning_rate, weight_decay=0.1, adam_beta2=0.95, max_grad_norm=1.0,
        lr_scheduler_type="warmup_stable_decay", warmup_steps=min(100, options.steps // 10),
        lr_scheduler_kwargs={"num_decay_steps": max(1, int(options.decay * options.steps)), "min_lr_ratio": 0.0},
        eval_strategy="steps", eval_steps=options.eval_every, save_strategy="steps", save_steps=options.eval_every,
        save_total_limit=2, logging_steps=options.eval_every, seed=options.seed, data_seed=options.seed,
        report_to="none", disable_tqdm=True, torch_compile=options.compile, bf16=options.bf16,
        use_cpu=not torch.cuda.is_available(), dataloader_drop_last=True, prediction_loss_only=True,
        remove_unused_columns=False,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=train, eval_dataset=select)
    checkpoints = options.out / "checkpoints"
    before = get_last_checkpoint(str(checkpoints)) if checkpoints.exists() else None
    began = time.perf_counter()
    if options.init is not None and before is None:
        print(f"at the start: {trainer.evaluate()['eval_loss']:.4f} on {options.select}", flush=True)
    trainer.train(resume_from_checkpoint=before)
    print(f"{time.perf_counter() - began:.0f} s", flush=True)
    per_step = options.batch_size * SEQ_LEN
    curve = [
        {"step": line["step"], "tokens": line["step"] * per_step, "loss": round(line["eval_loss"], 5)}
        for line in trainer.state.log_history
        if "eval_loss" in line
    ]
    lines = ",\n ".join(json.dumps(point) for point in curve)
    (options.out / "curve.json").write_text(f"[{lines}]\n", encoding="utf-8")
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)


if __name__ == "__main__":
    main()
