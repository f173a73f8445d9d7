"""`attnprune bench attention`: one attention layer, dense and gated, by every implementation at hand.

Train is forward and backward with the edge penalty, prefill a forward without gradient, decode one query against a
cache. Before it is timed every provider is compared, at the timed shape and on the last group of heads, with the fp64
definition; dense ones with softmax attention, which is the definition with every gate open.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from attnprune.attention.gates import logistic_noise
from attnprune.attention.reference import gated_attention_reference
from attnprune.bench import clock
from attnprune.bench.cases import NOISE_SEED, Case
from attnprune.bench.providers import GATED, PROVIDERS, SDPA, attend, step
from attnprune.bench.record import Row, first_sentence
from attnprune.errors import InputError

CHECKED_ELEMENTS = 2**22  # scores of the fp64 definition held at once
# A score this close to its threshold may fall on either side by rounding (relative to the score where that is above 1).
UNDECIDED = 2e-5
# Relative error (Frobenius norm) up to which a provider counts as right; 16-bit outputs are rounded.
ALLOWED = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}
# Instructions per score / 128 lanes, by (suite, d <= 64): clocks that a kernel needs at least (tests/helpers/aot.json).
ISSUE_CLOCKS = {("train", True): 0.635, ("train", False): 0.61, ("prefill", True): 0.062, ("prefill", False): 0.074}
H100_CLOCKS = 132 * 1.755e9


def error_of(provider: str, case: Case) -> float | None:
    """Largest relative error (Frobenius norm) of output and gradients; None for the noisy that draw their own.

    The provider runs the case as it will be timed; compared is the last group of heads of every sequence.
    """
    if case.noise and provider in ("eager", "splash"):
        return None
    dense, one_bias = provider in SDPA or provider == "flex", provider == "splash"
    bias = torch.full_like(case.bias, float("inf")) if dense else case.bias
    case = replace(case, bias=torch.full_like(bias, float(bias.mean())) if one_bias else bias)
    train, has_gates = case.suite == "train", not dense and not one_bias
    above = torch.randn_like(case.query)
    expected, decided = _expected(case, above, train, has_gates)
    heads, kv = slice(-decided.shape[1], None), slice(-1, None)
    above[:, heads] *= decided
    leaves = [x.detach().clone().requires_grad_(train) for x in (case.query, case.key, case.value)]
    leaves.append(case.bias.detach().clone().requires_grad_(train and has_gates))
    with torch.set_grad_enabled(train):
        output, penalty = attend(provider, case)(*leaves)
        if train:
            total = (output * above).sum()
            (total + penalty.sum() if has_gates and penalty is not None else total).backward()
    made = [output.detach()[:, heads] * decided]
    if train:
        query, key, value, bias = (x.grad for x in leaves)
        made += [query[:, heads], key[:, kv], value[:, kv]]  # pyright: ignore[reportOptionalSubscript]
        made += [bias[heads]] if bias is not None else []
    errors = [(a.double() - b).norm() / b.norm().clamp(min=1e-12) for a, b in zip(made, expected, strict=True)]
    return float(torch.stack(errors).max())


def _expected(case: Case, above: Tensor, train: bool, has_gates: bool) -> tuple[list[Tensor], Tensor]:
    """The definition in fp64 for the last group of heads, a block of rows at a time.

    Returns (output, in the train suite also the gradients of query, key, value and bias; bool [B, G, Q, 1]: the rows
    without an undecided gate). Undecided rows have output 0 and no gradient from above: both sides would be right.
    """
    batch, heads, queries, _ = case.query.shape
    group, keys = heads // case.key.shape[1], case.key.shape[2]
    wide = [case.query[:, -group:], case.key[:, -1:], case.value[:, -1:], case.bias[-group:]]
    leaves = [x.detach().double().requires_grad_(train) for x in wide]
    leaves[3].requires_grad_(train and has_gates)
    query, key, value, bias = leaves
    visible, above = case.visible, above[:, -group:].double()
    outputs, decided = [], []
    for rows in torch.arange(queries, device=query.device).split(max(1, CHECKED_ELEMENTS // (batch * group * keys))):
        noise = _noise(case, group, rows) if case.noise else None
        seen = visible[:, :, rows]
        with torch.no_grad():
            scores = query[:, :, rows] @ key.transpose(-1, -2) * case.scaling
            logits = scores + bias[:, None, None] + (0 if noise is None else noise)
            undecided = (logits.abs() < UNDECIDED * scores.abs().clamp(min=1)) & seen
            clear = ~undecided.any(-1, keepdim=True)
        with torch.set_grad_enabled(train):
            output, _, penalty = gated_attention_reference(
                query[:, :, rows], key, value, bias, seen, scaling=case.scaling, noise=noise
            )
            if train:
                total = (output * above[:, :, rows] * clear).sum()
                (total + penalty.sum() if has_gates else total).backward()
        outputs.append(output.detach() * clear)
        decided.append(clear)
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    return [torch.cat(outputs, 2), *gradients], torch.cat(decided, 2)


def _noise(case: Case, group: int, rows: Tensor) -> Tensor:
    """The noise of the last `group` heads, fp64 [B, G, R, K]."""
    batch, heads, device = case.query.shape[0], case.query.shape[1], case.query.device
    lanes = torch.arange(batch * heads, device=device).view(batch, heads)[:, -group:].flatten()
    columns = torch.arange(case.key.shape[2], device=device)
    return logistic_noise(NOISE_SEED, lanes, rows, columns, torch.float64).view(batch, group, len(rows), -1)


def measure(case: Case, providers: list[str], repeats: int) -> list[Row]:
    """Check, time and weigh the providers on one case."""
    device = case.query.device
    density = case.density()
    rows: dict[str, Row] = {}
    runs: dict[str, clock.Run] = {}
    for provider in providers:
        row = Row(
            suite=case.suite, provider=provider, configuration=case.name, status="ok",
            density=density if provider in GATED else None,
        )  # fmt: skip
        rows[provider] = row
        try:
            row.error = error_of(provider, case)
            runs[provider] = step(attend(provider, case), case)
            row.peak_bytes = clock.peak_bytes(runs[provider], device)
        except TimeoutError:  # a caller's, for all providers together
            raise
        except Exception as problem:  # whatever a provider raises is the answer to whether it runs here
            runs.pop(provider, None)
            row.status, row.note = "could not run", first_sentence(problem)
            continue
        if row.error is not None and not row.error <= ALLOWED[case.query.dtype]:
            runs.pop(provider)
            row.status, row.note = "wrong", f"relative error {row.error:.2g} against the definition"
    for provider, timing in clock.time_together(runs, repeats, device).items():
        rows[provider].timing = timing
        rows[provider].ps_per_score = 1e9 * timing.median_ms / case.scores
    _compare(rows, case)
    return list(rows.values())


def _compare(rows: dict[str, Row], case: Case) -> None:
    """Fill in the ratios and, on an H100, the share of the issue limit."""
    times = {name: row.timing.median_ms for name, row in rows.items() if row.timing is not None}
    sdpa = min((taken for name, taken in times.items() if name in SDPA), default=None)
    clocks = ISSUE_CLOCKS.get((case.suite, case.query.shape[-1] <= 64))
    is_h100 = case.query.device.type == "cuda" and "H100" in torch.cuda.get_device_name(case.query.device)
    for name, taken in times.items():
        rows[name].ratio_to_sdpa = sdpa / taken if sdpa else None
        rows[name].ratio_to_eager = times["eager"] / taken if "eager" in times else None
        if is_h100 and name == "triton" and clocks and not case.noise:
            rows[name].floor_share = 1000 * case.scores * clocks / H100_CLOCKS / taken


def run(
    cases: list[Callable[[], Case]], providers: list[str], repeats: int, budget: float, describe: list[str],
    on_rows: Callable[[list[Row]], None] = lambda rows: None,
) -> tuple[list[Row], list[str]]:  # fmt: skip
    """Measure cases in order until `budget` seconds are over; returns the rows and the descriptions left out."""
    unknown = [name for name in providers if name not in PROVIDERS]
    if unknown:
        raise InputError(f"--providers: {unknown[0]} is not one of {', '.join(PROVIDERS)}")
    start, rows = time.perf_counter(), []
    for position, make in enumerate(cases):
        if position and time.perf_counter() - start > budget:
            return rows, describe[position:]
        made = measure(make(), providers, repeats)
        on_rows(made)
        rows += made
    return rows, []
