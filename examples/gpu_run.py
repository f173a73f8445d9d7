"""One run on one GPU, from the best sidecar on: train for as long as there is time, then measure on texts kept apart.

    python examples/gpu_run.py SmolLM2-135M-Instruct.Q4_1.gguf --data 'general-0*.jsonl.zst' --data peps.txt \
        --evaluate general-heldout.jsonl.zst --evaluate wikitext2_valid.txt --out run --time 9m

The run starts from --init (examples/smollm2-half, whose gates reopen under a looser limit), falls through --frontier to
its last density and keeps the best state of each. The sidecars lie in OUT/run; what each of them gives on each text and
length is added to OUT/measured.jsonl at once, so that nothing is lost when the time ends. The next run starts from
OUT/run or OUT/run/frontier/N. Texts to train on and texts to evaluate on must be different files.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from attnprune.bench.clock import machine
from attnprune.errors import AttnPruneError
from attnprune.files import append_line
from attnprune.runs.config import RunConfig, build_config
from attnprune.runs.frontier import read_frontier
from attnprune.sidecar.folder import open_sidecar
from attnprune.training import evaluation, recipe
from attnprune.units import seconds

ROOT = Path(__file__).parent
SHARE = 0.85  # of the time is for the run and its export; the rest for measuring


def settings(options: argparse.Namespace) -> RunConfig:
    """The run: held at falling densities, learning from the base's logits and hidden states."""
    *marks, target = [float(part) / 100 for part in options.frontier.split(",")]
    length = options.seq_len
    return build_config(
        {
            "model": {"name": options.model, "init": options.init, "dtype": "float32"},
            "data": {"source": options.data, "seq_len": length, "eval_tokens": options.eval_tokens},
            "constraint": {"kind": "density", "target_density": target, "frontier": marks},
            "train": {
                "scope": "lora", "lora_rank": options.lora_rank, "lora_targets": options.lora_targets,
                "match": options.match, "learning_rate": options.learning_rate, "min_lr_ratio": 0.02,
                "warmup_steps": 50, "batch_size": max(1, options.tokens_per_step // length), "seed": options.seed,
                "time": f"{SHARE * seconds(options.time):.0f}s", "eval_every": options.eval_every,
                "save_every": options.eval_every,
            },
            "output": {"folder": str(options.out / "run")},
        }
    )  # fmt: skip


def measure_all(options: argparse.Namespace, until: float, write: Any) -> None:
    """Every sidecar of the run on every text and length, the sparsest first, until the time is over."""
    folder = options.out / "run"
    found = read_frontier(folder)
    folders = [point.folder for point in reversed(found[0])] if found else ["."]
    for place in folders:
        sidecar = open_sidecar(folder / place)
        for text in [*options.evaluate, "self"]:
            for length in options.lengths:
                if time.monotonic() > until:
                    write(sidecar=place, text=text, seq_len=length, left_out="no time")
                    continue
                try:
                    [report] = evaluation.evaluate_model(
                        "", sidecar, [text], base=options.model, device=options.device, seq_len=length,
                        tokens=options.eval_tokens,
                    )  # fmt: skip
                except AttnPruneError as error:
                    write(sidecar=place, text=text, seq_len=length, failed=error.message)
                    continue
                numbers = asdict(report)
                numbers.pop("heads")
                write(sidecar=place, text=text, **numbers)


def main() -> int:
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the base: .gguf file, folder or Hub id")
    parser.add_argument("--data", action="append", required=True, help="file or pattern to train on; repeatable")
    parser.add_argument("--evaluate", action="append", default=[], help="file to measure on; repeatable")
    parser.add_argument("--init", default=str(ROOT / "smollm2-half"), help="sidecar to start from")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--time", default="9m", help="of everything")
    parser.add_argument("--frontier", default="1,0.6,0.39", help="falling densities, %%; 0.39 at T = 1024 is 2 a query")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 512, 2048, 256], help="to measure at")
    parser.add_argument("--tokens-per-step", type=int, default=16_384)
    parser.add_argument("--eval-tokens", type=int, default=16_384)
    parser.add_argument("--eval-every", type=int, default=200)
    parser.add_argument("--match", type=float, default=5.0)
    parser.add_argument("--lora-rank", type=int, default=64)
    parser.add_argument("--lora-targets", default="all")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if {*options.data} & {*options.evaluate}:
        parser.error("a text to train on is not one to measure on")
    options.out.mkdir(parents=True, exist_ok=True)

    def write(**facts: Any) -> None:
        line = {"at": round(time.monotonic() - started, 1), **facts}
        append_line(options.out / "measured.jsonl", line)
        print(json.dumps(line), flush=True)

    write(command=sys.argv[1:], **machine(torch.device(options.device)).model_dump())
    sidecar = recipe.sparsify(settings(options), on_note=lambda note: print(note, flush=True), started=started)
    assert sidecar is not None
    write(trained=sidecar.manifest.result.steps, held_out=sidecar.manifest.result.model_dump())
    measure_all(options, started + seconds(options.time), write)
    return 0


if __name__ == "__main__":
    sys.exit(main())
