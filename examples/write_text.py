"""Text to learn from: what a base model writes by itself (temperature 1), then other texts, as one .jsonl file.

    python examples/write_text.py MODEL --rows 8192 --with peps.txt --with rust_rfcs.txt --out mixed.jsonl

`--data self` needs no file, but knows no other text. Here rows become text and are tokenised again, and on CUDA they
are drawn from bf16 weights: close to the model's own distribution, not exactly it.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from attnprune.data.sampling import sample
from attnprune.sidecar import bases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="Hub id, folder or .gguf file")
    parser.add_argument("--rows", type=int, default=8192, help="texts to write")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens of each")
    parser.add_argument("--rows-at-once", type=int, default=0, help="0: at most 32 on a CPU, 4 GiB of them on CUDA")
    parser.add_argument("--with", dest="others", type=Path, action="append", default=[], help="text file behind them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    device = bases.pick_device("auto")
    base = bases.load_base(args.model, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    start = time.perf_counter()
    ids = sample(base.model, base.tokenizer, args.rows, args.seq_len, args.seed, args.rows_at_once)
    seconds = time.perf_counter() - start
    with args.out.open("w", encoding="utf-8") as out:
        for text in base.tokenizer.batch_decode(ids) + [file.read_text(encoding="utf-8") for file in args.others]:
            out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    print(f"{ids.numel():,} tokens in {seconds:.0f} s")


if __name__ == "__main__":
    main()
