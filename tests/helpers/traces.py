"""Made-up traces: their messages are random, their numbers fit together."""

from __future__ import annotations

import random

from attnprune.tracing.result import Trace

RUN = {"difference": 2.1, "probability": 0.6, "same": True}


def model_trace(count, tokens, name="some/model", kind="sparse", layers=6, heads=4, seed=0, token=" Mary"):
    """A model of a trace of `count` messages over `tokens` positions."""
    chance = random.Random(seed)
    messages = []
    for rank in range(count):
        query = tokens - 1 if rank % 3 == 0 else chance.randrange(tokens)
        shifts = [{"id": i, "text": token, "logit": 2.0 - 0.3 * i} for i in range(5)]
        messages.append({
            "layer": chance.randrange(layers), "head": chance.randrange(heads), "query": query,
            "key": chance.randrange(query + 1), "weight": chance.random(),
            "effect": 2.0 * 0.8**rank, "exact": rank % 2 == 0,
            "raises": shifts, "lowers": [shift | {"logit": -shift["logit"]} for shift in shifts],
        })  # fmt: skip
    sizes = sorted({max(1, round(count ** (step / 8))) for step in range(9)}) if count else []
    visible = layers * heads * tokens * (tokens + 1) // 2

    def run(size, share):
        return RUN | {"size": size, "kl": 4.0 * (1 - share), "share": share}

    return {
        "name": name, "kind": kind, "layers": layers, "heads": heads, "visible": visible, "open": visible // 3 + count,
        "candidates": visible // 4 + count, "predicted": {"id": 1, "text": token, "probability": 0.62},
        "against": {"id": 2, "text": " John", "probability": 0.1}, "full": run(visible // 4 + count, 1.0),
        "closed": run(0, 0.0), "kept": run(count, 0.91), "complement": run(visible // 4, 0.12),
        "random": {"draws": 8, "kl": 4.1, "kl_low": 3.8, "kl_high": 4.4, "share": -0.02, "share_low": -0.1,
                   "share_high": 0.05},
        "messages": messages, "curve": [run(size, 0.91 * (size / count) ** 0.5) for size in sizes], "minimal": True,
        "runs": 300, "seconds": 20.0,
    }  # fmt: skip


def trace_of(*models, tokens=None, text=None):
    """A trace of some models over token texts."""
    tokens = tokens or ["When", " Mary", " and", " John", " went", " to", " the", " store", ",", " John"]
    return Trace.model_validate({
        "command": f"attnprune trace {models[0]['name']}", "text": text or "".join(tokens),
        "tokens": [{"id": i, "text": token} for i, token in enumerate(tokens)], "position": len(tokens) - 1,
        "target": 0.9, "given": True, "seed": 0, "models": list(models), "notes": ["a note"], "seconds": 21.0,
    })  # fmt: skip
