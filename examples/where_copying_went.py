"""Which layers and heads a sparse model lost its copying in: random tokens, repeated once (induction).

    python examples/where_copying_went.py SIDECAR --base MODEL --out copying.json

The damage report of `attnprune eval --damage`, on the repeated half alone; the share of copied tokens with the worst
layers and heads open, one after the other; and for each of these heads how much of its attention in the base goes where
a copying head's goes, and how much of that the gates let through.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnprune.attention.interface import gates_forced_open, gates_of, heads_forced_open
from attnprune.data.blocks import IGNORED_LABEL, Blocks
from attnprune.measure import BATCH_TOKENS, token_losses
from attnprune.sidecar.damage import Damage, fingerprints
from attnprune.sidecar.folder import open_sidecar
from attnprune.training.damage import HEADS, measure_damage
from attnprune.training.evaluation import load_pair

STEPS = (1, 2, 4, 8, 16, 32)  # layers or heads that are opened together


def repeated(vocabulary: int, seq_len: int, rows: int, seed: int) -> Blocks:
    """Random tokens, repeated once; what counts is every repeated token but the first, which nobody can know."""
    half = torch.randint(vocabulary, (rows, seq_len // 2), generator=torch.Generator().manual_seed(seed))
    ids = torch.cat([half, half], 1)
    labels = ids.clone()
    labels[:, : seq_len // 2 + 1] = IGNORED_LABEL
    return Blocks(ids, labels, "random tokens, repeated")


@torch.no_grad()
def copied(model: Any, blocks: Blocks) -> float:
    """Share of the counted tokens that are the model's argmax."""
    rows, right = max(1, BATCH_TOKENS // blocks.seq_len), []
    for ids, labels in zip(blocks.input_ids.split(rows), blocks.labels.split(rows), strict=True):
        log_p, _ = token_losses(model(input_ids=ids, use_cache=False).logits, labels)
        right.append(log_p.argmax(-1) == labels[:, 1:][labels[:, 1:] != IGNORED_LABEL])
    return torch.cat(right).float().mean().item()


def opened(model: Any, blocks: Blocks, heads: Sequence[tuple[int, int | slice]]) -> float:
    """`copied` with these heads of these layers open together."""
    gates = gates_of(model)
    with ExitStack() as stack:
        for layer, head in heads:
            stack.enter_context(heads_forced_open(gates[layer], head))
        return copied(model, blocks)


@torch.no_grad()
def places(model: Any, ids: Tensor, heads: list[tuple[int, int]]) -> list[dict[str, float]]:
    """Where each head looks from the repeated half, as mean attention: at the token after the same one before (what a
    copying head reads), at the same one before, and at the one just before (what a copying head has to know of)."""
    half = ids.shape[1] // 2
    patterns = model(input_ids=ids[:1], use_cache=False, output_attentions=True).attentions
    query = torch.arange(half, ids.shape[1] - 1)
    keys = {"after the same": query - half + 1, "the same": query - half, "just before": query - 1}
    return [
        {name: round(patterns[layer][0, head][query, key].mean().item(), 4) for name, key in keys.items()}
        for layer, head in heads
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sidecar", type=Path)
    parser.add_argument("--base")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--heads", type=int, default=HEADS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    sidecar = open_sidecar(options.sidecar)
    dense, sparse = load_pair(sidecar, options.base, "cpu")
    blocks = repeated(len(dense.tokenizer), sidecar.manifest.result.seq_len, options.rows, options.seed)
    base, files = dense.model, fingerprints(sidecar)
    damage: Damage = measure_damage(sparse, base, blocks, files, heads=options.heads, on_note=print)
    layers = [(layer, slice(None)) for layer in damage.ranked_layers()]
    heads = [(layer, head) for layer, head, _ in damage.ranked_heads()]
    shares: dict[str, Any] = {"sparse": copied(sparse, blocks)}
    with gates_forced_open(base):
        shares["base"] = copied(base, blocks)
        before = places(base, blocks.input_ids, heads)
    for name, ranked in (("layers", layers), ("heads", heads)):
        counts = [count for count in STEPS if count < len(ranked)] + [len(ranked)]
        shares[name] = {count: round(opened(sparse, blocks, ranked[:count]), 4) for count in counts}
        print(name, shares[name])
    after = places(sparse, blocks.input_ids, heads)
    found = {
        "copied": shares,
        "heads": [
            {"head": f"{layer}.{head}", "kl_won": round(won, 4), "base": a, "sparse": b}
            for (layer, head, won), a, b in zip(damage.ranked_heads(), before, after, strict=True)
        ],
        "damage": json.loads(damage.to_json()),
    }
    options.out.write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
