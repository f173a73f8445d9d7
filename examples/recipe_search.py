"""Which settings govern density at equal loss and equal tokens: one `attnprune sparsify` per variant and seed.

    python examples/train_small_lm.py peps.txt rust_rfcs.txt --out small-lm
    python examples/recipe_search.py small-lm --out examples/results/recipe-search.json

Every run selects its best state on blocks of train.jsonl that it did not train on; the numbers reported are measured
on test.jsonl, which neither the base model nor any run has seen. Runs already in the JSON file are not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tomli_w
import torch
import transformers

import attnprune
from attnprune.config import merge

# What all runs share: equal tokens, and the loss itself as the constraint (the training text is the base model's own
# distribution, so the loss is honest).
COMMON = {
    "data": {"seq_len": 256, "eval_tokens": 65536},
    "constraint": {"kind": "loss", "tolerance": 0.01, "start_factor": 10.0},
    "train": {"scope": "full", "batch_size": 8, "eval_every": 250, "save_every": 100_000},
}
# The default recipe, then each of its parts replaced by what the published method does, then all of them at once.
VARIANTS: dict[str, dict] = {
    "default": {},
    "gumbel noise": {"gate": {"estimator": "gumbel"}},
    "penalty temperature 4": {"gate": {"temperature": 4.0}},
    "mean density as penalty": {"gate": {"penalty": "mean"}},
    "bias 4 in every head": {"gate": {"initial_mass": 0.0, "bias_init": 4.0}},
    "constant tolerance": {"constraint": {"start_factor": 1.0}},
    "no proportional gain": {"constraint": {"gain": 0.0}},
    "learning from the text": {"train": {"distill": False}},
    "published": {
        "gate": {"estimator": "gumbel", "penalty": "mean", "initial_mass": 0.0, "bias_init": 0.0},
        "constraint": {"paired": False, "start_factor": 1.0, "gain": 0.0},
        "train": {"distill": False, "adam_beta2": 0.999, "gate_learning_rate": 1e-12, "final_fraction": 0.0},
    },
    # The open-gate control: the same budget spent on the loss alone, with gates that cannot close.
    "control": {
        "gate": {"initial_mass": 0.0, "bias_init": 100.0},
        "constraint": {"kind": "density", "target_density": 1.0, "minimum": 1e-9, "initial": 1e-9},
        "train": {"distill": False},
    },
}
for percent in (5.0, 1.0, 0.5, 0.3):
    VARIANTS[f"density {percent:g} %"] = {"constraint": {"kind": "density", "target_density": percent / 100}}
CURVE = {"step": "step", "density": "eval_density", "loss": "eval_loss", "kl": "eval_kl", "feasible": "eval_feasible"}
REPORTED = ("loss", "base_loss", "control_loss", "kl", "density", "edges_per_query", "agreement", "tokens", "seq_len")


def run(model: Path, variant: str, seed: int, extra: dict) -> dict:
    """One run and its measurement on test.jsonl."""
    began = time.perf_counter()
    settings = merge(merge(merge(COMMON, VARIANTS[variant]), extra), {"train": {"seed": seed}})
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # two runs share two cores
    with tempfile.TemporaryDirectory() as scratch:
        config, folder = Path(scratch) / "variant.toml", Path(scratch) / "run"
        config.write_text(tomli_w.dumps(settings))
        attnprune_command = [sys.executable, "-m", "attnprune"]
        sparsify = ["sparsify", str(model), "--config", str(config), "--data", str(model / "train.jsonl")]
        code = subprocess.run(
            [*attnprune_command, *sparsify, "--out", str(folder), "--quiet"], env=environment, check=False
        ).returncode
        if code not in (0, 3):  # 3: finished, constraint not met
            raise RuntimeError(f"{variant}, seed {seed}: exit code {code}")
        evaluate = [
            "eval",
            str(folder),
            "--data",
            str(model / "test.jsonl"),
            "--base",
            str(model),
            "--tokens",
            "65536",
            "--json",
        ]
        done = subprocess.run([*attnprune_command, *evaluate], env=environment, stdout=subprocess.PIPE, check=True)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        result = json.loads((folder / "attnprune.json").read_text())["result"]
    test = json.loads(done.stdout)["reports"][0]
    return {
        "variant": variant,
        "seed": seed,
        "settings": settings,
        "tokens": settings["train"]["steps"] * settings["train"]["batch_size"] * settings["data"]["seq_len"],
        "selected": {key: result[key] for key in ("density", "loss", "base_loss", "feasible")},
        "test": {key: test[key] for key in REPORTED},
        "curve": [{k: line[name] for k, name in CURVE.items()} for line in lines if "eval_density" in line],
        "multiplier": [[line["step"], line["multiplier"]] for line in lines if "multiplier" in line][::5],
        "seconds": round(time.perf_counter() - began),
    }


def facts() -> dict:
    """Where and with what the runs were made."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "command": "python examples/recipe_search.py small-lm",
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": 1},
        "versions": {
            "attnprune": attnprune.__version__, "torch": torch.__version__, "transformers": transformers.__version__
        },
        "commit": commit,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()

    runs = json.loads(options.out.read_text())["runs"] if options.out.exists() else []
    done = {(r["variant"], r["seed"], r["settings"]["train"]["steps"]) for r in runs}
    wanted = [(v, s) for s in options.seeds for v in options.variants if (v, s, options.steps) not in done]
    writing = threading.Lock()

    def work(job: tuple[str, int]) -> None:
        record = run(options.model, *job, {"train": {"steps": options.steps}})
        with writing:
            runs.append(record)
            options.out.write_text(json.dumps({**facts(), "runs": runs}, indent=1) + "\n")
            t, c = record["test"], record["curve"][-1]
            print(
                f"{record['variant']:24s} seed {record['seed']} density {t['density']:.3%} "
                f"gap {t['loss'] - t['base_loss']:+.4f} control {t['control_loss'] - t['base_loss']:+.4f} "
                f"| end {c['density']:.3%} {c['feasible']} | {record['seconds']} s",
                flush=True,
            )

    with ThreadPoolExecutor(options.workers) as pool:
        list(pool.map(work, wanted))


if __name__ == "__main__":
    main()
