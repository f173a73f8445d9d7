"""`attnprune bench attention`: one attention layer, dense and gated, by every implementation at hand.

Train is forward and backward with the edge penalty, prefill a forward without gradient, decode one query against a
cache. Before it is timed every provider is compared, at the timed shape and on the last group of heads, with the fp64
definition; dense ones with softmax attention, which is the definition with every gate open.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnprune.attention.chunked import GateSettings
from attnprune.attention.dispatch import choose, gated_attention
from attnprune.attention.interface import gates_of
from attnprune.attention.reference import gated_attention_reference
from attnprune.bench import clock
from attnprune.bench.record import Row
from attnprune.errors import InputError, UnsupportedModelError
from attnprune.gates import logistic_noise

Suite = Literal["train", "prefill", "decode"]
SUITES: tuple[Suite, ...] = get_args(Suite)
SDPA = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION, "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION, "sdpa-math": SDPBackend.MATH,
}  # fmt: skip
GATED = ("eager", "chunked", "triton", "splash")
PROVIDERS = (*SDPA, "flex", *GATED)
CHECKED_ELEMENTS = 2**22  # scores of the fp64 definition held at once
# A score this close to its threshold may fall on either side by rounding (relative to the score where that is above 1).
UNDECIDED = 2e-5
NOISE_SEED = 1234
# Relative error (Frobenius norm) up to which a provider counts as right; 16-bit outputs are rounded.
ALLOWED = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}
# Instructions per score / 128 lanes: the clocks that a kernel needs at least (tests/aot.json), by (suite, d <= 64).
ISSUE_CLOCKS = {("train", True): 0.52, ("train", False): 0.61, ("prefill", True): 0.067, ("prefill", False): 0.074}
H100_CLOCKS = 132 * 1.755e9


@dataclass(frozen=True)
class Case:
    """One configuration: query [B, H, Q, D], key and value [B, H_kv, K, D], bias [H], the last Q of K positions."""

    suite: Suite
    name: str
    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor
    noise: bool = False
    scale: float | None = None

    @property
    def visible(self) -> Tensor:
        """Causal mask, bool [1, 1, Q, K]."""
        queries, keys = self.query.shape[2], self.key.shape[2]
        rows = torch.arange(keys - queries, keys, device=self.query.device)[:, None]
        return (torch.arange(keys, device=self.query.device) <= rows)[None, None]

    @property
    def scaling(self) -> float:
        return self.query.shape[-1] ** -0.5 if self.scale is None else self.scale

    @property
    def scores(self) -> int:
        """Visible (query, key, head) triples."""
        return int(self.visible.sum()) * self.query.shape[0] * self.query.shape[1]

    def density(self) -> float:
        """Open / visible edges, in chunks of memory."""
        with torch.no_grad():
            made = gated_attention(
                self.query, self.key, self.value, self.bias, self.visible, scaling=self.scaling, backend="chunked"
            )
        return int(made.open_edges.sum()) / self.scores


Attend = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""(query, key, value, bias) -> (output, penalty or None)."""


def gaussian_case(
    suite: Suite, *, batch: int, heads: int, kv_heads: int, keys: int, width: int, dtype: torch.dtype,
    device: torch.device, density: float, noise: bool, seed: int,
) -> Case:  # fmt: skip
    """Gaussian q, k and v, with a bias per head that leaves about `density` of its edges open."""
    draw = torch.Generator().manual_seed(seed)
    queries = 1 if suite == "decode" else keys

    def normal(count: int, length: int) -> Tensor:
        return torch.randn(batch, count, length, width, generator=draw).to(device, dtype)

    query, key, value = normal(heads, queries), normal(kv_heads, keys), normal(kv_heads, keys)
    name = f"B{batch} H{heads}/{kv_heads} T{keys} d{width} {str(dtype)[6:]} {100 * density:g} %"
    case = Case(suite, name + (" noise" if noise else ""), query, key, value, torch.zeros(heads, device=device), noise)
    return replace(case, bias=bias_for_density(case, density))


def bias_for_density(case: Case, density: float) -> Tensor:
    """Per head the bias that leaves this share of the edges open, from the scores of up to 64 queries per sequence."""
    rows = torch.linspace(0, case.query.shape[2] - 1, min(64, case.query.shape[2]), device=case.query.device).long()
    seen = case.visible[0, 0, rows]
    group = case.query.shape[1] // case.key.shape[1]
    found = []
    for head in range(case.query.shape[1]):
        scores = case.query[:, head, rows].float() @ case.key[:, head // group].float().transpose(-1, -2)
        ordered = scores[:, seen].flatten().sort().values * case.scaling
        # halfway between two scores, so that none of them sits on the threshold
        closed = min(max(1, round((1 - density) * len(ordered))), len(ordered) - 1)
        found.append(-ordered[closed - 1 : closed + 1].mean())
    return torch.stack(found)


def attend(provider: str, case: Case) -> Attend:
    """The provider as a function of tensors. Raises UnsupportedModelError where it cannot run the case."""
    if provider in SDPA:
        return _sdpa(SDPA[provider], case)
    if provider == "flex":
        return _flex(case)
    if provider == "eager":
        return _eager(case)
    if provider == "splash":
        return _splash(case)
    return _ours(provider, case)


def _sdpa(backend: SDPBackend, case: Case) -> Attend:
    causal = case.query.shape[2] > 1

    def run(query, key, value, bias):
        with sdpa_kernel(backend):
            return functional.scaled_dot_product_attention(
                query,
                key,
                value,
                is_causal=causal,
                scale=case.scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            ), None

    return run


def _flex(case: Case) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    queries, keys = case.query.shape[2], case.key.shape[2]

    def causal(b, h, query, key):
        return query + keys - queries >= key

    mask = create_block_mask(causal, None, None, queries, keys, device=str(case.query.device))
    compiled = torch.compile(flex_attention)

    def run(query, key, value, bias):
        grouped = query.shape[1] != key.shape[1]
        return compiled(query, key, value, block_mask=mask, scale=case.scaling, enable_gqa=grouped), None

    return run


def _eager(case: Case) -> Attend:
    """The definition in fp32 with dense [B, H, Q, K] tensors, as one writes it in PyTorch."""
    visible = case.visible

    def run(query, key, value, bias):
        noise = None
        if case.noise:
            noise = torch.logit(torch.rand(*query.shape[:3], key.shape[2], device=query.device).clamp(1e-7, 1 - 1e-7))
        output, _, penalty = gated_attention_reference(
            query.float(), key.float(), value.float(), bias, visible, scaling=case.scaling, noise=noise
        )
        return output.to(query.dtype), penalty

    return run


def _splash(case: Case) -> Attend:
    """The authors' kernel (github.com/hrpan/splash_attention): one bias for all heads, no grouped queries, no cache."""
    if importlib.util.find_spec("splash_attention") is None:
        raise UnsupportedModelError("splash_attention is not installed")
    if case.query.shape != case.key.shape:
        raise UnsupportedModelError("no grouped queries and no cache")
    if case.scale is not None:
        raise UnsupportedModelError("no scaling but 1 / sqrt(d)")
    from splash_attention import splash_attention  # pyright: ignore[reportMissingImports]

    def run(query, key, value, bias):
        output, penalty, *_ = splash_attention(query, key, value, float(case.bias.mean()), True, case.noise, False)
        return output, penalty

    return run


def _ours(backend: str, case: Case) -> Attend:
    visible = case.visible
    choose(case.query.device, case.query.dtype, case.query.shape[-1], backend=backend)  # raises if it cannot
    settings = GateSettings(noise_seed=NOISE_SEED if case.noise else None)

    def run(query, key, value, bias):
        made = gated_attention(
            query, key, value, bias, visible, scaling=case.scaling, settings=settings, backend=backend
        )
        return made.output, made.penalty

    return run


def step(function: Attend, case: Case) -> clock.Run:
    """What is timed: the forward, in the train suite with the backward."""
    leaves = [case.query, case.key, case.value, case.bias]
    if case.suite != "train":

        def forward() -> Tensor:
            with torch.no_grad():
                return function(*leaves)[0]

        return forward
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    above = torch.randn_like(case.query)

    def forward_backward() -> None:
        output, penalty = function(*leaves)
        outputs, gradients = [output], [above]
        if penalty is not None:
            outputs, gradients = [output, penalty], [above, torch.ones_like(penalty)]
        # not `backward`: gradients that stay on the leaves would count as there before the run, not as its memory
        torch.autograd.grad(outputs, leaves, gradients, allow_unused=True)

    return forward_backward


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
        except Exception as problem:  # whatever a provider raises is the answer to whether it runs here
            runs.pop(provider, None)
            row.status, row.note = "could not run", _first_sentence(problem)
            continue
        if row.error is not None and not row.error <= ALLOWED[case.query.dtype]:
            runs.pop(provider)
            row.status, row.note = "wrong", f"relative error {row.error:.2g} against the definition"
    for provider, timing in clock.time_together(runs, repeats, device).items():
        rows[provider].timing = timing
        rows[provider].ps_per_score = 1e9 * timing.median_ms / case.scores
    _compare(rows, case)
    return list(rows.values())


def _first_sentence(problem: Exception) -> str:
    text = getattr(problem, "message", None) or str(problem).splitlines()[0].split(". ")[0]
    return text[:200] or type(problem).__name__


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


def captured_case(
    suite: Suite, model: torch.nn.Module, ids: Tensor, layer: int, name: str, dtype: torch.dtype
) -> Case:  # fmt: skip
    """The q, k, v, scaling and biases of one layer of a sparse model on a text: `ids` [1, T].

    Raises:
        InputError: no such layer, or one with more than causal softmax (capped scores, sinks, a window).
    """
    gates = gates_of(model)
    if not 0 <= layer < len(gates):
        raise InputError(f"--layer: {layer} is not within 0 and {len(gates) - 1}")
    calls: list[tuple[tuple[Tensor, ...], dict[str, Any]]] = []
    hook = gates[layer].register_forward_pre_hook(
        lambda gate, args, options: calls.append((args, options)), with_kwargs=True
    )
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    finally:
        hook.remove()
    [((query, key, value, visible), options)] = calls
    extra = [what for what, key_ in (("capped scores", "softcap"), ("sinks", "sinks")) if options[key_] is not None]
    query, key, value = (x.to(dtype).contiguous() for x in (query, key, value))
    case = Case(suite, name, query, key, value, gates[layer].bias.detach(), scale=options["scaling"])
    extra += [] if torch.equal(visible.expand_as(case.visible), case.visible) else ["a mask that is not just causal"]
    if extra:
        raise InputError(f"--layer: layer {layer} has {extra[0]}, which not every implementation here knows")
    if math.isclose(options["scaling"], query.shape[-1] ** -0.5):
        case = replace(case, scale=None)
    return replace(case, query=query[:, :, -1:].contiguous()) if suite == "decode" else case
