"""The memory and time of real runs beside what their plans said, each run in a process of its own.

    python -m examples.check_memory MODEL:DATA:SCOPE:LOAD_IN:BLOCKS:TOKENS ... --out examples/results/memory-cpu.json

MODEL and DATA are what `attnprune sparsify` takes; LOAD_IN is full, 4bit or 8bit; BLOCKS go through the model at once.
Resident memory (VmHWM) is reset when the plan is made, read at the end of training and at the end of the run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

import attnprune
from attnprune.training.machine import PeakMemory

STEPS = 4


class Clock(TrainerCallback):
    """Seconds of the steps after the first, and the peak when training ends."""

    def __init__(self):
        self.seconds: list[float] = []
        self.peak = 0

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self.start)

    def on_train_end(self, args, state, control, **kwargs):
        self.peak = resident("VmHWM")


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def run(model: str, data: str, scope: str, load_in: str, blocks: int, tokens: int) -> dict[str, Any]:
    """One run, and what its plan said."""
    clock, plans = Clock(), []

    def on_plan(plan: Any) -> bool:
        plans.append(plan)
        PeakMemory(torch.device("cpu")).restart()
        return True

    with tempfile.TemporaryDirectory() as folder:
        attnprune.sparsify(
            model, data=data, scope=scope, load_in=load_in, steps=STEPS, batch_size=2 * blocks,
            micro_batch_size=blocks, seq_len=tokens, eval_tokens=1024, device="cpu", precision="fp32",
            out=f"{folder}/run", progress=False, callbacks=[clock], on_plan=on_plan,
        )  # fmt: skip
    plan, whole = plans[0], resident("VmHWM")
    planned = max(plan.memory.total, plan.evaluation_bytes)
    seconds = sum(clock.seconds[1:]) / len(clock.seconds[1:])
    return {
        "model": Path(model).name, "scope": scope, "load_in": load_in, "blocks": blocks, "tokens": tokens,
        "training": {"planned": planned, "measured": clock.peak, "off": planned / clock.peak - 1},
        "run": {
            "planned": max(planned, plan.export_bytes), "measured": whole,
            "off": max(planned, plan.export_bytes) / whole - 1,
        },
        "seconds_per_step": {
            "planned": plan.seconds_per_1000_steps / 1000, "measured": seconds,
            "off": plan.seconds_per_1000_steps / 1000 / seconds - 1,
        },
        "parts": asdict(plan.memory) | {"evaluation": plan.evaluation_bytes, "export": plan.export_bytes},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.out is None:  # one run, in its own process
        model, data, scope, load_in, blocks, tokens = options.runs[0].split(":")
        print(json.dumps(run(model, data, scope, load_in, int(blocks), int(tokens))))
        return
    found = []
    for line in options.runs:
        done = subprocess.run(
            [sys.executable, "-m", "examples.check_memory", line], capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(done.stderr)
        found.append(json.loads(done.stdout.splitlines()[-1]))
        named = [":".join(Path(p).name if i < 2 else p for i, p in enumerate(r.split(":"))) for r in options.runs]
        command = f"python -m examples.check_memory {' '.join(named)} --out {options.out}"
        options.out.write_text(json.dumps({"command": command, "runs": found}, indent=2) + "\n")
        print(line, {key: round(found[-1][key]["off"], 3) for key in ("training", "run", "seconds_per_step")})


if __name__ == "__main__":
    main()
