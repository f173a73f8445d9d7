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

# What all runs share: the small model's context, equal tokens, and the loss itself as the constraint (the training
# text is the base model's own distribution, so the loss is honest).
COMMON = {
    "data": {"seq_len": 256, "eval_tokens": 16384},
    "constraint": {"kind": "loss", "tolerance": 0.01},
    "train": {"scope": "full", "steps": 800, "batch_size": 8, "eval_every": 100, "save_every": 10_000},
}
VARIANTS: dict[str, dict] = {
    "default": {},
    "log": {"gate": {"penalty": "log"}},
    "log scores": {"gate": {"penalty": "log", "bias_init": "scores"}},
    "log scores T4": {"gate": {"penalty": "log", "bias_init": "scores", "temperature": 4.0}},
    "log scores lr1e-3": {"gate": {"penalty": "log", "bias_init": "scores"}, "train": {"learning_rate": 1e-3}},
    "log scores rate.03": {"gate": {"penalty": "log", "bias_init": "scores"}, "constraint": {"rate": 0.03}},
    "d": {"gate": {"penalty": "log", "bias_init": "scores"}, "train": {"distill": True}},
    "d start.04": {
        "gate": {"penalty": "log", "bias_init": "scores"},
        "train": {"distill": True},
        "constraint": {"start_tolerance": 0.04},
    },
    "d pi": {
        "gate": {"penalty": "log", "bias_init": "scores"},
        "train": {"distill": True},
        "constraint": {"gain": 1.0, "rate": 0.02, "clip": 3.0, "smoothing": 0.8},
    },
    "d pi start.03": {
        "gate": {"penalty": "log", "bias_init": "scores"},
        "train": {"distill": True},
        "constraint": {"gain": 1.0, "rate": 0.02, "clip": 3.0, "smoothing": 0.8, "start_tolerance": 0.03},
    },
    "d pi b2 start.03": {
        "gate": {"penalty": "log", "bias_init": "scores"},
        "train": {"distill": True, "adam_beta2": 0.98},
        "constraint": {"gain": 1.0, "rate": 0.02, "clip": 3.0, "smoothing": 0.8, "start_tolerance": 0.03},
    },
    "d pi b2 start.03 lr6e-4": {
        "gate": {"penalty": "log", "bias_init": "scores"},
        "train": {"distill": True, "adam_beta2": 0.98, "learning_rate": 6e-4},
        "constraint": {"gain": 1.0, "rate": 0.02, "clip": 3.0, "smoothing": 0.8, "start_tolerance": 0.03},
    },
    "d pi b2 start.03 T4": {
        "gate": {"penalty": "log", "bias_init": "scores", "temperature": 4.0},
        "train": {"distill": True, "adam_beta2": 0.98},
        "constraint": {"gain": 1.0, "rate": 0.02, "clip": 3.0, "smoothing": 0.8, "start_tolerance": 0.03},
    },
    "small batch": {
        "gate": {"penalty": "log", "bias_init": "scores"},
        "train": {"distill": True, "adam_beta2": 0.99, "batch_size": 2, "eval_every": 200},
        "constraint": {"gain": 1.0, "rate": 0.005, "clip": 3.0, "smoothing": 0.95, "start_tolerance": 0.03},
    },
    "A1e-4": {
        "gate": {"penalty": "log", "bias_init": "scores"},
        "train": {"distill": True, "adam_beta2": 0.98, "learning_rate": 1e-4},
        "constraint": {"gain": 1.0, "rate": 0.02, "clip": 3.0, "smoothing": 0.8, "start_tolerance": 0.03},
    },
    "A3e-5": {
        "gate": {"penalty": "log", "bias_init": "scores"},
        "train": {"distill": True, "adam_beta2": 0.98, "learning_rate": 3e-5},
        "constraint": {"gain": 1.0, "rate": 0.02, "clip": 3.0, "smoothing": 0.8, "start_tolerance": 0.03},
    },
    "d lr1e-4": {"gate": {"penalty": "log", "bias_init": "scores"}, "train": {"distill": True, "learning_rate": 1e-4}},
    "kl": {"gate": {"penalty": "log", "bias_init": "scores"}, "constraint": {"kind": "kl", "tolerance": 0.02}},
    "kl lr1e-3": {
        "gate": {"penalty": "log", "bias_init": "scores"},
        "constraint": {"kind": "kl", "tolerance": 0.02},
        "train": {"learning_rate": 1e-3},
    },
    "paper": {
        "gate": {"estimator": "gumbel", "bias_init": 0.0},
        "constraint": {"paired": False},
        "train": {"gate_learning_rate": 1e-12},
    },
    "control": {
        "gate": {"bias_init": 100.0},
        "constraint": {"kind": "density", "target_density": 1.0},
    },
}
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
        evaluate = ["eval", str(folder), "--data", str(model / "test.jsonl"), "--base", str(model), "--tokens", "65536", "--json"]
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
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=800)
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
