"""Compare gate estimators and penalty temperatures on the bundled model, three seeds each.

    python examples/compare_estimators.py --out examples/results/estimators.json

Every run is one `attnprune sparsify demo` with its defaults except for the two settings, the seed and the tolerance.
The number reported at N steps is the lowest density among the evaluations up to step N that meet the constraint (loss
<= base + tolerance on the 4,096 held-out sums), so all densities are at equal loss. 1.0 means that none met it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

import attnprune

MILESTONES = (1000, 2000, 3000)
TOLERANCE = 0.015  # nats above the base


def run(estimator: str, temperature: float, seed: int, steps: int, folder: Path) -> dict:
    """One run; its densities at the milestones."""
    start = time.perf_counter()
    command = [
        sys.executable, "-m", "attnprune", "sparsify", "demo", "--estimator", estimator,
        "--tolerance", str(TOLERANCE),
        "--temperature", str(temperature), "--seed", str(seed), "--steps", str(steps), "--out", str(folder), "--quiet",
    ]  # fmt: skip
    code = subprocess.run(command, check=False).returncode
    if code not in (0, 3):  # 3: finished, constraint not met
        raise SystemExit(f"{' '.join(command)} ended with exit code {code}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    feasible = [(e["step"], e["eval_density"], e["eval_loss"]) for e in lines if e.get("eval_feasible")]
    result = json.loads((folder / "attnprune.json").read_text())["result"]
    return {
        "estimator": estimator,
        "temperature": temperature,
        "seed": seed,
        "density": {str(n): min((d for s, d, _ in feasible if s <= n), default=1.0) for n in MILESTONES if n <= steps},
        "final": {key: result[key] for key in ("density", "loss", "base_loss", "exact_match", "feasible")},
        "multiplier_end": [line["multiplier"] for line in lines if "multiplier" in line][-1],
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 4.0])
    parser.add_argument("--estimators", nargs="+", default=["threshold", "gumbel"])
    options = parser.parse_args()

    runs = []
    for seed, estimator, temperature in itertools.product(
        range(options.seeds), options.estimators, options.temperatures
    ):
        with tempfile.TemporaryDirectory() as scratch:
            runs.append(run(estimator, temperature, seed, options.steps, Path(scratch) / "run"))
        print(json.dumps(runs[-1]), flush=True)
        options.out.write_text(json.dumps(report(runs, options), indent=1) + "\n")
    print(table(runs))


def report(runs: list[dict], options: argparse.Namespace) -> dict:
    """The committed JSON: how it was made, on what, and every run."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "command": "python examples/compare_estimators.py",
        "steps": options.steps,
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {
            "attnprune": attnprune.__version__, "torch": torch.__version__, "transformers": transformers.__version__
        },
        "commit": commit,
        "table": table(runs).splitlines(),
        "runs": runs,
    }  # fmt: skip


def table(runs: list[dict]) -> str:
    """Markdown: mean and range over the seeds."""
    lines = ["| estimator | T_p | " + " | ".join(f"{n:,} steps" for n in MILESTONES) + " |", "|---|---|---|---|---|"]
    for key in dict.fromkeys((r["estimator"], r["temperature"]) for r in runs):
        group = [r for r in runs if (r["estimator"], r["temperature"]) == key]
        cells = []
        for milestone in MILESTONES:
            values = [100 * r["density"][str(milestone)] for r in group if str(milestone) in r["density"]]
            text = f"{statistics.mean(values):.3g} % ({min(values):.3g}-{max(values):.3g})" if values else "-"
            cells.append(text)
        lines.append(f"| {key[0]} | {key[1]:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
