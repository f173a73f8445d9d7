"""One circuit search by this release and by an earlier one, on the same machine: the time of every part of it.

    python -m examples.time_circuit 17a1a2d MODEL.gguf --task ioi --out examples/results/circuit-time.json

The searches run one after the other, each in a process of its own. A part is what the search says that it does, on
standard error; its seconds are those until it says the next thing. What takes longer than --limit is stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from threading import Timer
from typing import Any

import torch

from attnprune.bench.clock import machine
from attnprune.files import write_atomic
from examples.compare_release import HERE, environment, unpacked

LOAD = "load the model"
PREFIX = "model: "  # of what the search says


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reference", help="a commit of this repository")
    parser.add_argument("model")
    parser.add_argument("--task", required=True)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--limit", type=float, default=7200.0, help="seconds of one search")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    model = str(Path(given.model).resolve()) if Path(given.model).exists() else given.model
    options = ["--task", given.task, "--prompts", str(given.prompts), "--no-levels", "--no-controls"]
    record: dict[str, Any] = {"machine": machine(torch.device("cpu")).model_dump(), "reference": given.reference}
    record |= {"command": " ".join(["attnprune circuit", Path(given.model).name, *options]), "seed": 0, "searches": {}}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for release, source in {given.reference: unpacked(given.reference, place), "this": HERE}.items():
            command = ["circuit", model, *options, "--out", str(place / f"out-{release}")]
            record["searches"][release] = timed(source, command, given.limit) | found(place / f"out-{release}")
            write_atomic(given.out, json.dumps(record, indent=1) + "\n")
            print(json.dumps(record["searches"][release]), flush=True)


def timed(source: Path, command: list[str], limit: float) -> dict[str, Any]:
    """Seconds of a command of a release, in all and of its parts, and its peak memory in bytes."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "attnprune", *command], env=environment(source), cwd=source, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stderr is not None
    stop = Timer(limit, process.kill)
    stop.start()
    parts: dict[str, float] = {}
    part, since = LOAD, start
    for line in process.stderr:
        if line.startswith(PREFIX):
            now = time.perf_counter()
            parts[part] = parts.get(part, 0.0) + now - since
            part, since = line.strip().removeprefix(PREFIX), now
    _, status, usage = os.wait4(process.pid, 0)
    stop.cancel()
    parts[part] = parts.get(part, 0.0) + time.perf_counter() - since
    return {
        "exit": os.waitstatus_to_exitcode(status),
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_bytes": usage.ru_maxrss * 1024,
        "parts": {name: round(seconds, 1) for name, seconds in parts.items()},
    }


def found(folder: Path) -> dict[str, Any]:
    """The circuit of a search that ended."""
    if not (folder / "circuit.json").exists():
        return {"circuit": None}
    model = json.loads((folder / "circuit.json").read_text())["models"][0]
    names = {"edges": model["counts"]["edges"], "by ranking": model["ranked"]["edges"]}
    faithfulness = {"validation": model["validation_faithfulness"], "test": model["test"]["faithfulness"]["value"]}
    return {"circuit": names | {"faithfulness": faithfulness}}


if __name__ == "__main__":
    main()
