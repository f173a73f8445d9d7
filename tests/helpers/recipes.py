"""Runs on a tiny model: their inputs, configurations and artefacts."""

from __future__ import annotations

import json
import os
from pathlib import Path

from transformers import TrainerCallback

from attnprune.runs.config import RunConfig, build_config, merge


def run_config(inputs, out: Path, **overrides) -> RunConfig:
    model, text = inputs
    values = {
        "model": {"name": str(model), "device": "cpu"},
        "data": {"source": str(text), "seq_len": 16, "eval_tokens": 160},
        "constraint": {"kind": "kl", "tolerance": 0.5},
        "train": {"scope": "full", "steps": 12, "batch_size": 4, "eval_every": 4, "save_every": 4, "warmup_steps": 2},
        "output": {"folder": str(out)},
    }
    return build_config(merge(values, overrides))


def artefact(folder: Path) -> dict[str, bytes]:
    names = ("gates.safetensors", "delta.safetensors", "attnprune.json")
    return {name: (folder / name).read_bytes() for name in names}


def sidecar_files(folder: Path) -> dict[str, bytes]:
    """Tensors and manifest of any kind of sidecar, by name."""
    return {file.name: file.read_bytes() for file in [*folder.rglob("*.safetensors"), folder / "attnprune.json"]}


def logged(folder: Path, key: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if "multiplier" in line]


class _SignalAt(TrainerCallback):
    def __init__(self, step, number):
        self.step, self.number = step, number

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)
