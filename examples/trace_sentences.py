"""Trace ten sentences in a sparse model and in its base, and compare the sizes, sentence by sentence.

    python examples/trace_sentences.py SIDECAR --base MODEL --out traces.json

A trace is the smallest set of attention messages found that keeps 0.9 of a prediction (docs/traces.md). Each
of the two models keeps its own prediction; the ratio of sizes is a geometric mean with a paired bootstrap
over sentences.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from attnprune.files import write_atomic
from attnprune.tracing.result import ModelTrace
from attnprune.tracing.run import trace

SENTENCES = [
    "When Mary and John went to the store, John gave a drink to",
    "The keys to the cabinet in the old house",
    "The war lasted from the year 1732 to the year 17",
    "The capital of France is Paris. The capital of Italy is",
    "def add(first, second):\n    return first +",
    "red, green, blue, red, green, blue, red, green,",
    "The opposite of hot is cold. The opposite of large is",
    "Alice put the book in the box and went out. Bob took the book out of the",
    "Monday, Tuesday, Wednesday, Thursday,",
    "She opened the door with the key, because the door was",
]
RESAMPLES = 10_000


def facts(model: ModelTrace) -> dict[str, Any]:
    """What the record keeps of one trace."""
    return {
        "predicted": model.predicted.text, "against": model.against.text, "messages": len(model.messages),
        "open": model.open, "visible": model.visible, "minimal": model.minimal,
        "closed_kl": round(model.closed.kl, 4),
        **{f"{name}_{part}": round(getattr(getattr(model, name), part), 4)
           for name in ("kept", "complement") for part in ("kl", "share", "difference")},
        "full_difference": round(model.full.difference, 4),
        "random_share": [round(x, 4) for x in (model.random.share, model.random.share_low, model.random.share_high)],
        "seconds": round(model.seconds, 1),
    }  # fmt: skip


def ratio(dense: list[int], sparse: list[int], seed: int) -> dict[str, float]:
    """Geometric mean of dense / sparse over sentences, and the 95 % percentile interval of a bootstrap over them."""
    logs = np.log(np.array(dense) / np.array(sparse))
    random = np.random.default_rng(seed)
    means = logs[random.integers(len(logs), size=(RESAMPLES, len(logs)))].mean(1)
    low, high = np.exp(np.percentile(means, [2.5, 97.5]))
    return {"value": round(float(np.exp(logs.mean())), 3), "low": round(float(low), 3), "high": round(float(high), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sidecar")
    parser.add_argument("--base", default=None)
    parser.add_argument("--target", type=float, default=0.9)
    parser.add_argument("--sentences", type=int, default=len(SENTENCES), help="only the first ones")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for text in SENTENCES[: options.sentences]:
        sparse, dense = trace(options.sidecar, text, base=options.base, target=options.target).models
        rows.append({"text": text, "sparse": facts(sparse), "dense": facts(dense)})
        sizes = ([row["dense"]["messages"] for row in rows], [row["sparse"]["messages"] for row in rows])
        record = {
            "sidecar": Path(options.sidecar).name, "base": Path(options.base or "").name, "target": options.target,
            "ratio_dense_sparse": ratio(*sizes, seed=0), "resamples": RESAMPLES, "traces": rows,
        }  # fmt: skip
        write_atomic(options.out, json.dumps(record, indent=1, ensure_ascii=False) + "\n")  # what there is so far
        print(f"{len(sparse.messages):6} {len(dense.messages):6}  {text!r}", file=sys.stderr)


if __name__ == "__main__":
    main()
