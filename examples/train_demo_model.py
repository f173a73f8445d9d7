"""Train the bundled model: a 4-layer GPT-2-shaped transformer that adds two-digit numbers.

The task is the one of the first figure of arXiv 2512.05865: `#ab+cd=efg`, ten characters, one token each. 4,096 of the
10,000 sums are never trained on; the script reports exact answers on them. Rerun it with

    python examples/train_demo_model.py --out attnprune/assets/demo
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from attnprune.data.texts import addition_task
from attnprune.measure import measure

CHARACTERS = "0123456789+=#"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    vocabulary = {character: index for index, character in enumerate(CHARACTERS)} | {"<pad>": len(CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", clean_up_tokenization_spaces=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    tokenizer = build_tokenizer()
    train, held_out = addition_task(tokenizer)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=10, n_embd=64, n_layer=4, n_head=4, n_inner=256,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=options.steps, pct_start=0.05)
    for step in range(1, options.steps + 1):
        rows = torch.randint(len(train), (256,))
        loss = model(input_ids=train.input_ids[rows], labels=train.labels[rows]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 1000 == 0 or step == options.steps:
            report = measure(model.eval(), held_out, batch_size=512)
            print(f"step {step}: held-out loss {report.loss:.5f}, exact answers {report.exact_match:.2%}", flush=True)
            model.train()
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)


if __name__ == "__main__":
    main()
