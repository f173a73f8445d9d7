"""Gather one run's evidence into a JSON file: its curve, its manifest's result, and measurements on other texts.

python examples/collect_results.py RUN --base MODEL --data a.txt --data b.txt --tokens 16384 --out results.json

The other sidecars of a frontier are measured on the same texts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

import attnprune
from attnprune.runs.frontier import read_frontier

CURVE = (
    "step", "eval_density", "eval_loss", "eval_base_loss", "eval_kl", "eval_agreement", "eval_edges_per_query",
    "eval_feasible",
)  # fmt: skip


def measured(sidecar: Path, options: argparse.Namespace) -> dict[str, Any]:
    """A sidecar's own result, and what `attnprune eval` gives on the other texts."""
    command = [sys.executable, "-m", "attnprune", "eval", str(sidecar), "--base", options.base, "--json"]
    command += ["--device", options.device, "--tokens", str(options.tokens)]
    command += [part for text in options.data for part in ("--data", text)]
    reports = []
    if options.data:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        reports = json.loads(done.stdout)["reports"]
    result = json.loads((sidecar / "attnprune.json").read_text())["result"]
    return {
        "result_on_the_held_out_split": result | {"data": Path(result["data"]).name},
        "other_texts": [{k: v for k, v in report.items() if k != "heads"} for report in reports],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--base", required=True)
    parser.add_argument("--data", action="append", default=[], help="other texts to measure on")
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--device", default="cpu", help="where to measure the other texts: cpu or cuda")
    parser.add_argument("--note", default="")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    manifest = json.loads((options.run / "attnprune.json").read_text())
    lines = [json.loads(line) for line in (options.run / "metrics.jsonl").read_text().splitlines()]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    found = read_frontier(options.run)
    points = found[0][:-1] if found else []  # the last one is the run itself
    evidence = {
        "note": options.note,
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
        | ({"device": torch.cuda.get_device_name()} if options.device == "cuda" else {}),
        "versions": {
            "attnprune": attnprune.__version__, "torch": torch.__version__, "transformers": transformers.__version__
        },
        "commit": commit,
        "base": manifest["base"],
        "weights": manifest["weights"],
        "sidecar_bytes": sum(entry["size"] for entry in manifest["files"].values()),
        **measured(options.run, options),
        "curve": [{k: line[k] for k in CURVE} for line in lines if "eval_density" in line],
        "frontier": [{"limit": p.limit, **measured(options.run / p.folder, options)} for p in points],
    }  # fmt: skip
    options.out.write_text(json.dumps(evidence, indent=1) + "\n")


if __name__ == "__main__":
    main()
