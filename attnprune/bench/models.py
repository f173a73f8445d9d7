"""`attnprune bench train` and `generate`: whole models, gated against the dense base with SDPA, on the same tokens."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from attnprune.attention.interface import gates_of
from attnprune.bench import clock
from attnprune.bench.record import Row
from attnprune.measure import token_losses

CHECKED_TOKENS = 8


def bench_train(dense: Any, gated: Any, ids: Tensor, repeats: int) -> list[Row]:
    """Rows of whole training steps (forward, backward, AdamW on all weights) of two models on `ids` [B, T].

    The gated model also has the edge penalty in its loss. Neither runs a reference model.
    """
    device = ids.device
    runs = {"dense sdpa": _training_step(dense, ids), "gated": _training_step(gated, ids)}
    peaks = {name: clock.peak_bytes(run, device) for name, run in runs.items()}
    rows = []
    for name, timing in clock.time_together(runs, repeats, device).items():
        rows.append(
            Row(
                suite="train step",
                provider=name,
                configuration=f"{ids.shape[0]} x {ids.shape[1]} tokens",
                status="ok",
                timing=timing,
                peak_bytes=peaks[name],
                tokens_per_second=1000 * ids.numel() / timing.median_ms,
            )
        )
    return _against_first(rows)


def _training_step(model: Any, ids: Tensor) -> clock.Run:
    model.eval()  # no dropout, as in our trainer; everything else trains the same
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = token_losses(model(input_ids=ids, use_cache=False).logits, ids)[1].mean()
        for gate in gates_of(model):
            if gate.last is not None:
                loss = loss + 1e-9 * gate.last.penalty.sum()
        loss.backward()
        optimizer.step()

    return step


def bench_generate(dense: Any, sparse: Any, ids: Tensor, new_tokens: int, repeats: int) -> list[Row]:
    """Rows of prefill and of greedy decoding with a cache, for the base and the sparse model, on `ids` [B, T].

    The sparse model's first tokens are compared with those it finds without a cache.
    """
    times: dict[str, tuple[list[float], list[float]]] = {"dense sdpa": ([], []), "sparse": ([], [])}
    models = {"dense sdpa": dense, "sparse": sparse}
    tokens = {}
    for round_ in range(repeats + 1):
        for name, model in models.items():
            tokens[name], prefill, decode = _greedy(model, ids, new_tokens)
            if round_:  # the first round is the warm-up
                times[name][0].append(prefill)
                times[name][1].append(decode)
    checked = min(CHECKED_TOKENS, new_tokens)
    agrees = torch.equal(tokens["sparse"][:, :checked], _uncached(sparse, ids, checked))
    rows = []
    for phase, count in (("prefill", ids.numel()), ("decode", ids.shape[0] * (new_tokens - 1))):
        made = []
        for name, taken in times.items():
            timing = clock.timing_of(taken[0 if phase == "prefill" else 1])
            wrong = name == "sparse" and not agrees
            made.append(
                Row(
                    suite="generate",
                    provider=name,
                    configuration=f"{phase}, {ids.shape[0]} x {ids.shape[1]} tokens",
                    status="wrong" if wrong else "ok",
                    timing=timing,
                    tokens_per_second=1000 * count / timing.median_ms,
                    note="generation with a cache differs from generation without one" if wrong else "",
                )
            )
        rows += _against_first(made)
    return rows


@torch.no_grad()
def _greedy(model: Any, ids: Tensor, new_tokens: int) -> tuple[Tensor, float, float]:
    """(new tokens [B, N], milliseconds of the prefill, of the other tokens)."""
    marks = [_now(ids.device)]
    made = model(input_ids=ids, use_cache=True)
    marks.append(_now(ids.device))
    found = [made.logits[:, -1:].argmax(-1)]
    for _ in range(new_tokens - 1):
        made = model(input_ids=found[-1], past_key_values=made.past_key_values, use_cache=True)
        found.append(made.logits[:, -1:].argmax(-1))
    marks.append(_now(ids.device))
    return torch.cat(found, 1), 1000 * (marks[1] - marks[0]), 1000 * (marks[2] - marks[1])


@torch.no_grad()
def _uncached(model: Any, ids: Tensor, new_tokens: int) -> Tensor:
    whole = ids
    for _ in range(new_tokens):
        whole = torch.cat([whole, model(input_ids=whole, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return whole[:, ids.shape[1] :]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _against_first(rows: list[Row]) -> list[Row]:
    """The first row is dense SDPA."""
    first = rows[0].timing
    for row in rows:
        if first is not None and row.timing is not None:
            row.ratio_to_sdpa = first.median_ms / row.timing.median_ms
    return rows
