"""Which settings govern density at equal loss and equal tokens: one `attnprune sparsify` per variant and seed.

    python examples/train_small_lm.py peps.txt rust_rfcs.txt --out examples/small-lm
    python examples/recipe_search.py examples/small-lm --out examples/results/recipe-search.json

Every run selects its best state on blocks of its training text that it did not train on. It is then measured on text
that neither the base model nor any run has seen: --test, to choose settings by, and --unseen, to report. The texts are
files beside the model (train.jsonl, test.jsonl, unseen.jsonl) unless they are named. A run with a frontier is measured
at each of its densities. Runs already in the JSON file are not repeated; one that was interrupted goes on from its last
checkpoint, in a folder beside the JSON file that is removed when the run is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tomli_w
import torch
import transformers

import attnprune
from attnprune.runs.config import merge

# What all runs share. The training text is the base model's own distribution, so its loss is honest, and learning half
# from the text is not learning another domain.
COMMON = {
    "data": {"seq_len": 256, "eval_tokens": 16384},
    "gate": {"temperature": 1.0, "slope_temperature": 1.0},
    "constraint": {"kind": "density", "target_density": 0.01},
    "train": {
        "scope": "full", "batch_size": 8, "learning_rate": 1e-3, "min_lr_ratio": 0.02, "distill": 0.5,
        "eval_every": 500, "save_every": 500,
    },
}  # fmt: skip
OPEN = {
    "gate": {"initial_mass": 0.0, "bias_init": 100.0},
    "constraint": {"target_density": 1.0, "minimum": 1e-9, "initial": 1e-9},
}
PUBLISHED = {
    "gate": {"estimator": "gumbel", "penalty": "mean", "initial_mass": 0.0, "bias_init": 0.0},
    "constraint": {"kind": "loss", "tolerance": 0.01, "paired": False, "start_factor": 1.0, "gain": 0.0},
    "train": {
        "learning_rate": 3e-4, "distill": 0.0, "adam_beta2": 0.999, "gate_learning_rate": 1e-12,
        "final_fraction": 0.0,
    },
}  # fmt: skip


def text_at(density: float, **gate: float) -> dict:
    """Held at a target density and learning from the text alone, with these settings of the gates."""
    return {
        "gate": gate,
        "constraint": {"target_density": density},
        "train": {"distill": 0.0, "learning_rate": 3e-3},
    }


HELD = text_at(0.0105, slope_temperature=0.5, temperature=0.5)
# What one setting does to the recipe that is held at 1 %.
ONE_CHANGE = {
    "gumbel noise": {"gate": {"estimator": "gumbel"}},
    "both temperatures 0.25": {"gate": {"temperature": 0.25, "slope_temperature": 0.25}},
    "penalty temperature 4": {"gate": {"temperature": 4.0}},
    "bias 4 in every head": {"gate": {"initial_mass": 0.0, "bias_init": 4.0}},
    "gate rate 5e-3": {"train": {"gate_learning_rate": 5e-3}},
    "gate rate 8e-2": {"train": {"gate_learning_rate": 8e-2}},
    "multiplier by PI": {"constraint": {"update": "pi"}},
    "attention alone": {"train": {"scope": "attn"}},
    "LoRA rank 16": {"train": {"scope": "lora", "lora_rank": 16}},
    "LoRA rank 4": {"train": {"scope": "lora", "lora_rank": 4}},
    "gates alone": {"train": {"scope": "gates"}},
}
FROM_BASE = merge(HELD, {"train": {"distill": 1.0}})
ALL_LINEAR = {"train": {"scope": "lora", "lora_rank": 16, "lora_targets": "all"}}
# What one setting of the learning signal does to the recipe that is held at 1 % and learns from the base.
SIGNALS = {
    **{f"match {weight:g}": {"train": {"match": weight}} for weight in (1.0, 5.0, 20.0)},
    "LoRA rank 16 on all linear layers": ALL_LINEAR,
    "LoRA rank 16 on all linear layers, match 5": merge(ALL_LINEAR, {"train": {"match": 5.0}}),
    "learning rate 3e-4": {"train": {"learning_rate": 3e-4}},
    "learning rate 1e-3": {"train": {"learning_rate": 1e-3}},
    "learning rate 1e-3, match 5": {"train": {"learning_rate": 1e-3, "match": 5.0}},
    "a tenth of the rate outside of the attention": {"train": {"rest_learning_rate": 1e-4}},
    "the density falls over half of the run": {"constraint": {"fall": 0.5}},
    "a tenth of the text": {"train": {"distill": 0.9}},
}
FRONTIER = {"constraint": {"frontier": [0.05, 0.01, 0.005], "target_density": 0.003}}
# The density is fixed and the loss compared; then the loss is fixed and the density compared, the published way last.
VARIANTS: dict[str, dict] = {
    "density 1 %": {},
    "from the base alone": {"train": {"distill": 1.0}},
    "from the text alone": {"train": {"distill": 0.0}},
    "learning rate 3e-4": {"train": {"learning_rate": 3e-4}},
    "learning rate 3e-3": {"train": {"learning_rate": 3e-3}},
    "text, learning rate 3e-3": text_at(0.01),
    # Runs end up to 12 % below their target; these end just below 1 %.
    "text, learning rate 3e-3, 1.05 %": text_at(0.0105),
    "text, learning rate 3e-3, 1.11 %": text_at(0.0111),
    "text, learning rate 3e-3, 1.11 %, penalty temperature 0.5": text_at(0.0111, temperature=0.5),
    "text, learning rate 6e-3, 1.11 %": merge(text_at(0.0111), {"train": {"learning_rate": 6e-3}}),
    # With the narrower straight-through slope, the best of those tried at 1 %; also at other densities.
    "text, learning rate 3e-3, 1.11 %, slope temperature 0.5": text_at(0.0111, slope_temperature=0.5),
    "text, learning rate 3e-3, 1.05 %, both temperatures 0.5": HELD,
    "text, learning rate 3e-3, 5 %, slope temperature 0.5": text_at(0.05, slope_temperature=0.5),
    "text, learning rate 3e-3, 0.5 %, slope temperature 0.5": text_at(0.005, slope_temperature=0.5),
    "text, learning rate 3e-3, 0.3 %, slope temperature 0.5": text_at(0.003, slope_temperature=0.5),
    "text, learning rate 3e-3, 0.3 %, both temperatures 0.5": text_at(0.003, slope_temperature=0.5, temperature=0.5),
    "text, learning rate 3e-3, 0.2 %, both temperatures 0.5": text_at(0.002, slope_temperature=0.5, temperature=0.5),
    "text, learning rate 3e-3, 0.13 %, both temperatures 0.5": text_at(0.0013, slope_temperature=0.5, temperature=0.5),
    **{f"held at 1 %, {name}": merge(HELD, change) for name, change in ONE_CHANGE.items()},
    "held at 1 %, from the base": FROM_BASE,
    "held at 1 %, from the base, attention alone": merge(FROM_BASE, ONE_CHANGE["attention alone"]),
    "held at 1 %, from the base, LoRA rank 16": merge(FROM_BASE, ONE_CHANGE["LoRA rank 16"]),
    **{f"held at 1 %, from the base, {name}": merge(FROM_BASE, change) for name, change in SIGNALS.items()},
    "frontier": merge(FROM_BASE, FRONTIER),
    "frontier, match 5": merge(merge(FROM_BASE, FRONTIER), {"train": {"match": 5.0}}),
    "frontier, learning rate 1e-3, match 5": merge(
        merge(FROM_BASE, FRONTIER), {"train": {"learning_rate": 1e-3, "match": 5.0}}
    ),
    "published": PUBLISHED,
    # The loss compared on the same tokens: unpaired, the sampling error of the base's mean enters the tolerance.
    "published, paired": merge(PUBLISHED, {"constraint": {"paired": True}}),
    "published, paired, learning rate 3e-3": merge(
        PUBLISHED, {"constraint": {"paired": True}, "train": {"learning_rate": 3e-3}}
    ),
    # The open-gate controls: the same budget with gates that cannot close, learning the same way or from the text.
    "control": OPEN,
    "control, text": merge(OPEN, {"train": {"distill": 0.0}}),
    "control, text, learning rate 3e-4": merge(OPEN, {"train": {"distill": 0.0, "learning_rate": 3e-4}}),
    "control, text, learning rate 3e-3": merge(OPEN, {"train": {"distill": 0.0, "learning_rate": 3e-3}}),
    "control, text, learning rate 6e-3": merge(OPEN, {"train": {"distill": 0.0, "learning_rate": 6e-3}}),
}  # fmt: skip
CURVE = {"step": "step", "density": "eval_density", "loss": "eval_loss", "kl": "eval_kl", "feasible": "eval_feasible"}
# glibc gives freed blocks back to the system at once; keeping them saves a training step on CPU its page faults. Any of
# these fixes the size from which blocks are mapped (and unmapped) one by one at 128 KiB, so that must be off as well.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "8000000000", "MALLOC_TOP_PAD_": "200000000"}
TOKENS = {"test": 65_536, "unseen": 262_144}  # from the start of each text, or what there is
REPORTED = ("loss", "base_loss", "control_loss", "kl", "density", "edges_per_query", "agreement", "tokens", "seq_len")


def train(model: Path, texts: list[str], settings: dict, folder: Path) -> None:
    """One `attnprune sparsify` into `folder`, or the rest of one."""
    if (folder / "attnprune.json").exists():
        return
    if (folder / "run.toml").exists():
        arguments = ["--resume", str(folder)]
    else:
        folder.parent.mkdir(parents=True, exist_ok=True)
        config = folder.with_suffix(".toml")
        config.write_text(tomli_w.dumps(settings))
        data = [argument for text in texts for argument in ("--data", text)]
        arguments = [str(model), "--config", str(config), *data, "--out", str(folder)]
    attnprune_command(["sparsify", *arguments, "--quiet"], good=(0, 3))  # 3: finished, constraint not met


def record(model: Path, texts: dict[str, str], variant: str, seed: int, settings: dict, folder: Path) -> dict:
    """What a finished run came to, measured on the texts to choose by and to report on."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((folder / "attnprune.json").read_text())["result"]
    points = [
        {"limit": float(place.name) / 100, **{name: measure(model, place, text, name) for name, text in texts.items()}}
        for place in sorted(folder.glob("frontier/*"), key=lambda place: -float(place.name))
    ]
    return {
        "variant": variant,
        "seed": seed,
        "settings": settings,
        "tokens": settings["train"]["steps"] * settings["train"]["batch_size"] * settings["data"]["seq_len"],
        "selected": {key: result[key] for key in ("density", "loss", "base_loss", "feasible")},
        **{name: measure(model, folder, text, name) for name, text in texts.items()},
        **({"frontier": points} if points else {}),
        "curve": [{k: line[name] for k, name in CURVE.items()} for line in lines if "eval_density" in line],
        "multiplier": [[line["step"], line["multiplier"]] for line in lines if "multiplier" in line][::5],
    }


def measure(model: Path, folder: Path, text: str, name: str) -> dict:
    """One `attnprune eval` on a text."""
    data = ["--data", text, "--tokens", str(TOKENS[name])]
    done = attnprune_command(["eval", str(folder), "--base", str(model), *data, "--json"])
    report = json.loads(done.stdout)["reports"][0]
    return {key: report[key] for key in REPORTED}


def attnprune_command(arguments: list[str], good: tuple[int, ...] = (0,)) -> subprocess.CompletedProcess:
    """The tool in its own process with one thread, so that two runs share two cores."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **KEEP_MEMORY}
    command = [sys.executable, "-m", "attnprune", *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=False)
    if done.returncode not in good:
        raise RuntimeError(f"attnprune {shlex.join(arguments)}: exit code {done.returncode}")
    return done


def facts() -> dict:
    """Where and with what the runs were made."""
    return {
        "command": "python examples/recipe_search.py MODEL [--train TEXT] [--test TEXT --unseen TEXT]",
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": 1},
        "versions": {
            "attnprune": attnprune.__version__, "torch": torch.__version__, "transformers": transformers.__version__
        },
        "commit": commit(),
    }  # fmt: skip


def commit() -> str:
    """The commit that this copy of the repository is at, and whether it was changed since."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train", nargs="+", help="texts to train on; default: MODEL/train.jsonl")
    parser.add_argument("--test", help="text to choose settings by; default: MODEL/test.jsonl")
    parser.add_argument("--unseen", help="text to report on; default: MODEL/unseen.jsonl")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()

    beside = {name: str(options.model / f"{name}.jsonl") for name in ("train", "test", "unseen")}
    texts = {"test": options.test or beside["test"], "unseen": options.unseen or beside["unseen"]}
    runs = json.loads(options.out.read_text())["runs"] if options.out.exists() else []
    done = {(r["variant"], r["seed"], r["settings"]["train"]["steps"]) for r in runs}
    wanted = [(v, s) for s in options.seeds for v in options.variants if (v, s, options.steps) not in done]
    writing = threading.Lock()

    def work(job: tuple[str, int]) -> None:
        variant, seed = job
        began, made_with = time.perf_counter(), commit()
        settings = merge(merge(COMMON, VARIANTS[variant]), {"train": {"seed": seed, "steps": options.steps}})
        name = "".join(c if c.isalnum() else "-" for c in f"{variant}-{options.steps}-{seed}")
        folder = options.out.with_suffix(".runs") / name
        train(options.model, options.train or [beside["train"]], settings, folder)
        made = record(options.model, texts, variant, seed, settings, folder)
        made |= {"seconds": round(time.perf_counter() - began), "commit": made_with}
        with writing:
            runs.append(made)
            options.out.write_text(json.dumps({**facts(), "runs": runs}, separators=(",", ":")) + "\n")
            shutil.rmtree(folder)
            folder.with_suffix(".toml").unlink()
            t, c = made["test"], made["curve"][-1]
            print(
                f"{variant:24s} seed {seed} density {t['density']:.3%} "
                f"gap {t['loss'] - t['base_loss']:+.4f} control {t['control_loss'] - t['base_loss']:+.4f} "
                f"| end {c['density']:.3%} {c['feasible']} | {made['seconds']} s",
                flush=True,
            )

    with ThreadPoolExecutor(options.workers) as pool:
        list(pool.map(work, wanted))


if __name__ == "__main__":
    main()
