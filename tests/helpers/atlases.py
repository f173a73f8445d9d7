"""Made-up atlases: their shares are random, their numbers fit together."""

from __future__ import annotations

import random

from attnprune.heads.result import KINDS, Atlas, labels

EDGES = [0, 1, 2, 4, 8, 16, 32, 64]
TOKENS = (" the", " store", " Mary", ",", "\n", " gave", " to", " drink")


def model_atlas(layers=4, heads=6, name="some/model", kind="sparse", seed=0, token=None):
    """A model of an atlas; every fifth head of a sparse one is closed, `token` stands in every place for a text."""
    chance = random.Random(seed)
    made = []
    for index in range(layers * heads):
        closed = kind == "sparse" and index % 5 == 4
        made.append(_head(*divmod(index, heads), closed, kind, chance, token))
    return {
        "name": name, "kind": kind, "layers": layers, "heads_per_layer": heads, "heads": made, "seconds": 3.0,
        "closed": [(h["layer"], h["head"]) for h in made if h["open"] == 0],
    }  # fmt: skip


def _head(layer, head, closed, kind, chance, token):
    visible, count = 20 * 64 * 65 // 2, 0 if closed else chance.randrange(30, 4000)

    def text():
        return chance.choice(TOKENS) if token is None else token

    def reading(total):
        favourite = chance.choice([*KINDS, None, None])
        kinds = {
            name: {"share": chance.uniform(0.6, 1) if name == favourite else chance.uniform(0, 0.3), "control": 0.05}
            if total
            else {"share": 0, "control": 0}
            for name in KINDS
        }
        parts = [chance.random() ** 3 for _ in EDGES[1:]]
        made = {"total": total, "kinds": kinds, "offset": 3 if total else 0, "labels": []}
        made["distances"] = [part / sum(parts) if total else 0 for part in parts]
        return made

    def example(rank):
        query = chance.randrange(20, 64)
        key = chance.choice([query - 2, chance.randrange(query - 12)])
        starts = [(key - 5, 14)] if query - key < 8 else [(key - 5, 9), (query - 7, 11)]
        starts = [(max(0, start), size - min(0, start)) for start, size in starts]
        windows = [{"start": start, "tokens": [text() for _ in range(size)]} for start, size in starts]
        return {"block": rank, "query": query, "key": key, "weight": 0.9, "strength": 5.0 - rank, "text": windows}

    return {
        "layer": layer, "head": head, "open": count if kind == "sparse" else visible, "visible": visible,
        "queries": count / 8000, "edges_per_query": count / 1280,
        "edges": reading(count) if kind == "sparse" else None, "mass": reading(0 if closed else 900.0),
        "examples": [] if closed else [example(rank) for rank in range(5)],
        "directions": [
            {"share": 0.4 / (rank + 1), "raises": [text() for _ in range(6)], "lowers": [text() for _ in range(6)]}
            for rank in range(3)
        ],
    }  # fmt: skip


def atlas_of(*models, data="some text.txt", note="a note"):
    """A record of one or two models, labelled by the rule."""
    made = Atlas.model_validate({
        "command": "attnprune atlas some/model --data 'some text.txt'", "data": data, "tokens": 1280, "blocks": 20,
        "seq_len": 64, "offset_edges": EDGES, "models": list(models), "notes": [note], "seconds": 6.0,
    })  # fmt: skip
    for model in made.models:
        for head in model.heads:
            for reading in filter(None, (head.edges, head.mass)):
                reading.labels = labels(reading.kinds, head.open)
    return made
