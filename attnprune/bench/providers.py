"""Every implementation of attention at hand, dense and gated, as a function of query, key, value and bias."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnprune.attention.chunked import GateSettings
from attnprune.attention.dispatch import choose, gated_attention
from attnprune.attention.reference import gated_attention_reference
from attnprune.bench import clock
from attnprune.bench.cases import NOISE_SEED, Case
from attnprune.errors import UnsupportedModelError

SDPA = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION, "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION, "sdpa-math": SDPBackend.MATH,
}  # fmt: skip
GATED = ("eager", "chunked", "triton", "splash")
PROVIDERS = (*SDPA, "flex", *GATED)


Attend = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""(query, key, value, bias) -> (output, penalty or None)."""


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
