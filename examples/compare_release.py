"""This release beside an earlier one, on the same machine, in turn: a training step, the demo, a dry run, text.

    python examples/compare_release.py 7a36cc7 --model MODEL.gguf --data TEXT.txt --out RESULT.json

Each measurement is a process of its own that imports one of the two releases; they alternate, so that a slow minute of
the machine does not fall on one side. What takes longer than --limit is stopped and written down as that.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from attnprune.bench.clock import machine
from attnprune.files import write_atomic

HERE = Path(__file__).resolve().parents[1]
IMPORTS = """
import json, sys, time
try:
    from attnprune.runs.config import build_config
    from attnprune.training import recipe
    from attnprune.data.sampling import sample
    from attnprune.sidecar import bases
    NEW = True
except ImportError:  # before the house was rebuilt
    from attnprune import recipe, runtime as bases
    from attnprune.config import build_config
    from attnprune.data import sample
    NEW = False
from transformers import TrainerCallback
class Done(BaseException): pass
class Clock(TrainerCallback):
    def __init__(self, steps): self.steps, self.marks = steps, []
    def on_step_begin(self, args, state, control, **kwargs):
        if len(self.marks) == self.steps: raise Done
        self.begin = time.perf_counter()
    def on_step_end(self, args, state, control, **kwargs): self.marks.append(time.perf_counter() - self.begin)
def steps(values, count, skip):
    clock = Clock(count)
    try: recipe.sparsify(build_config(values), callbacks=[clock])
    except Done: pass
    print(json.dumps(sorted(clock.marks[skip:])))
"""
STEP = """
steps({"model": {"name": MODEL, "device": "cpu"}, "data": {"source": DATA, "seq_len": 256, "eval_tokens": 512},
       "gate": {"initial_mass": 0.0}, "output": {"folder": OUT},
       "train": {"scope": "lora", "lora_rank": 64, "steps": 1000, "batch_size": 2, "micro_batch_size": 2,
                 "eval_every": 1000, "save_every": 1000, "precision": PRECISION, **(COMPILE if NEW else {})}}, 6, 2)
"""
DEMO = """
steps({"model": {"name": "demo", "device": "cpu"}, "data": {"source": "task"}, "output": {"folder": OUT},
       "constraint": {"kind": "loss", "tolerance": 0.01},
       "train": {"steps": 2000, "batch_size": 128, "eval_every": 2000, "save_every": 2000}}, 120, 20)
"""
TEXT = """
base = bases.load_base(MODEL, device="cpu")
sample(base.model, base.tokenizer, 2, 8, 0)
start = time.perf_counter()
sample(base.model, base.tokenizer, 32, 64, 0)
print(json.dumps([(time.perf_counter() - start) / (32 * 63)]))
"""
PROBES = {
    "training step, 2 x 256 tokens, precision left to auto": (STEP, {"PRECISION": "auto", "COMPILE": {}}),
    "training step, 2 x 256 tokens, fp32": (STEP, {"PRECISION": "fp32", "COMPILE": {}}),
    "training step, 2 x 256 tokens, fp32, compiled layers": (STEP, {"PRECISION": "fp32", "COMPILE": {"compile": "on"}}),
    "training step, 2 x 256 tokens, bf16": (STEP, {"PRECISION": "bf16", "COMPILE": {}}),
    "demo, one step": (DEMO, {}),
    "self-written text, one token": (TEXT, {}),
}


def probe(source: Path, code: str, names: dict[str, object], limit: float) -> list[float] | str:
    """Seconds that a fresh process of a release measured, or what it said at its end."""
    head = "".join(f"{name} = {value!r}\n" for name, value in names.items())
    command = [sys.executable, "-c", head + IMPORTS + code]
    try:
        # From its own folder: Python looks into the current one before PYTHONPATH.
        done = subprocess.run(
            command, env=environment(source), cwd=source, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return f"stopped after {limit:g} s"
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no message"])[-1][:200]
    return json.loads(done.stdout.strip().splitlines()[-1])


def dry_run(source: Path, names: dict[str, str], limit: float) -> dict[str, object]:
    """Seconds and peak resident bytes of `attnprune sparsify MODEL --data DATA --dry-run`."""
    arguments = ["sparsify", names["MODEL"], "--data", names["DATA"], "--dry-run", "--out", names["OUT"]]
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "attnprune", *arguments], env=environment(source), cwd=source,
        preexec_fn=_sixteen_gigabytes,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        peak = _peak(process.pid)
        process.kill()
        process.wait()
        return {"seconds": None, "peak_bytes": peak, "note": f"no plan after {limit:g} s: stopped"}
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    note = "" if process.returncode == 0 else f"exit {process.returncode} within 16 GB"
    return {"seconds": time.perf_counter() - start, "peak_bytes": usage.ru_maxrss * 1024, "note": note}


def _sixteen_gigabytes() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))


def _peak(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def unpacked(reference: str, folder: Path) -> Path:
    """The folder, with the package as it was at a commit."""
    archive = subprocess.run(
        ["git", "-C", str(HERE), "archive", reference, "attnprune"], capture_output=True, check=True
    )
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    return folder


def environment(source: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(source)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reference", help="a commit of this repository")
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=180.0, help="seconds of one measurement")
    parser.add_argument("--only", help="measurements whose name holds this")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sources = {given.reference: unpacked(given.reference, Path(folder)), "this": HERE}
        names = {"MODEL": str(Path(given.model).resolve()), "DATA": str(Path(given.data).resolve())}
        record = {"machine": machine(torch.device("cpu")).model_dump(), "reference": given.reference, "seed": 0}
        record |= {"command": f"python examples/compare_release.py {given.reference} --model MODEL --data DATA"}
        record["measured"] = _kept(given.out) if given.only else []
        for place, (name, (code, more)) in enumerate(PROBES.items()):
            if given.only and given.only not in name:
                continue
            found: dict[str, list] = {release: [] for release in sources}
            for number in range(given.repeats):
                for release, source in sources.items():
                    out = {"OUT": f"{folder}/{place}-{number}-{release}"}
                    found[release].append(probe(source, code, names | more | out, given.limit))
            add(record, {"what": name, **compared(found, given.reference)}, given.out)
        if not given.only or given.only in "dry run":
            runs = {r: dry_run(s, names | {"OUT": f"{folder}/dry-{r}"}, given.limit) for r, s in sources.items()}
            add(record, {"what": "dry run of 16 blocks of 512 tokens", "runs": runs}, given.out)


def compared(found: dict[str, list], reference: str) -> dict[str, object]:
    """Medians of the processes' medians, in seconds, and how many times faster this release is."""
    runs = {
        release: [statistics.median(values) if isinstance(values, list) else values for values in results]
        for release, results in found.items()
    }
    medians = {}
    for release, values in runs.items():
        numbers = [value for value in values if not isinstance(value, str)]
        medians[release] = statistics.median(numbers) if numbers else None
    ours, theirs = medians["this"], medians[reference]
    return {"seconds": runs, "median": medians, "times_faster": theirs / ours if ours and theirs else None}


def _kept(file: Path) -> list[dict]:
    return json.loads(file.read_text())["measured"] if file.exists() else []


def add(record: dict, row: dict, file: Path) -> None:
    """Put a row into the record, in place of one of the same name, and write it at once."""
    record["measured"] = [other for other in record["measured"] if other["what"] != row["what"]] + [row]
    write_atomic(file, json.dumps(record, indent=1) + "\n")
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
