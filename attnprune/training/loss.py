"""Output layer, KL(base || sparse) and both cross-entropies, a chunk of tokens at a time: the logits of a whole batch
never exist, so memory does not grow with the vocabulary.

The output layer is frozen: the gradient of the hidden states is all that is needed, and it is made in the forward pass.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

# Logits of one model in memory at once: many rows keep a GPU busy, few stay in the caches of a CPU.
CHUNK_LOGITS = {"cuda": 1 << 28, "cpu": 1 << 22}


def chunk_tokens(device: str, vocabulary: int) -> int:
    """Tokens whose logits exist at once, on a kind of device."""
    return max(16, CHUNK_LOGITS[device] // vocabulary)


class Head(NamedTuple):
    """A frozen output layer: logits = cap * tanh(x / cap) with x = scale * (hidden @ weight.T + bias), or x itself.

    weight [V, D] and bias [V] are in the dtype of the matrix product.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def linear(self, hidden: Tensor) -> Tensor:
        """hidden [N, D] in the weight's dtype -> raw logits [N, V], before scale and cap."""
        return functional.linear(hidden, self.weight, self.bias)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] -> logits [..., V]."""
        return _scaled(self.linear(hidden.to(self.weight.dtype)), self)


class Distilled(NamedTuple):
    """Means over the counted tokens, nats per token (scalars). Only `damage` has a gradient.

    damage = share * kl + (1 - share) * (loss - base_loss).
    """

    damage: Tensor
    kl: Tensor
    loss: Tensor
    base_loss: Tensor


def distill(hidden: Tensor, base_hidden: Tensor | None, head: Head, labels: Tensor, share: float) -> Distilled:
    """Compare the sparse model with its base on their last hidden states [N, D], without whole logits.

    Args:
        hidden, base_hidden: of the two models; without a base `kl` and `base_loss` are 0, and `share` must be.
        labels: int64 [N], the token that follows each position; a negative one does not count.
        share: of the KL in the damage.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        dtype = head.weight.dtype
        base_hidden = None if base_hidden is None else base_hidden.to(dtype)
        return Distilled(*_Distill.apply(hidden.to(dtype), base_hidden, head, labels, share))


class _Distill(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, base_hidden: Tensor | None, head: Head, labels: Tensor, share: float):
        wants_gradient = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wants_gradient else None
        wide = torch.promote_types(hidden.dtype, torch.float32)
        rows = torch.zeros(3, len(hidden), dtype=wide, device=hidden.device)
        chunk = chunk_tokens(hidden.device.type, len(head.weight))
        for first in range(0, len(hidden), chunk):
            part = slice(first, first + chunk)
            logits = head.linear(hidden[part])
            base_logits = None if base_hidden is None else head.linear(base_hidden[part])
            slope = _rows(logits, base_logits, labels[part], rows[:, part], share, head)
            if gradient is not None:
                torch.mm(slope, head.weight, out=gradient[part])
        if gradient is not None:
            gradient.mul_((labels >= 0)[:, None])
        count = (labels >= 0).sum().clamp(min=1)
        kl, loss, base_loss = (rows.sum(1) / count).unbind(0)
        ctx.save_for_backward(gradient, count)
        ctx.mark_non_differentiable(kl, loss, base_loss)
        return share * kl + (1 - share) * (loss - base_loss), kl, loss, base_loss

    @staticmethod
    def backward(ctx: Any, *gradients: Any):
        gradient, count = ctx.saved_tensors
        return (gradient * (gradients[0] / count)).to(gradient.dtype), None, None, None, None


def _rows(logits: Tensor, base_logits: Tensor | None, labels: Tensor, out: Tensor, share: float, head: Head) -> Tensor:
    """Write KL, loss and base loss of each row into `out` [3, N]; return d(share * KL + (1 - share) * loss) / d logits.

    `logits` and `base_logits` [N, V] are raw, and are overwritten. Slopes of rows that do not count mean nothing.
    """
    if logits.is_cuda and base_logits is not None:
        from attnprune.attention.kernels.loss import distill_rows

        options = {"share": share, "scale": head.scale, "softcap": head.softcap, "gradient": True}
        distill_rows(logits, base_logits, labels, out, **options)
        return logits
    counted, at = labels >= 0, labels.clamp(min=0)[:, None]
    scaled = _scaled(logits.to(out.dtype), head)
    log_p = scaled.log_softmax(-1)
    out[1] = (-log_p.gather(1, at).squeeze(1)).where(counted, 0)
    target: Tensor | None = None
    if base_logits is not None:
        log_base = _scaled(base_logits.to(out.dtype), head).log_softmax(-1)
        out[2] = (-log_base.gather(1, at).squeeze(1)).where(counted, 0)
        target = log_base.exp()
        out[0] = log_base.sub_(log_p).mul_(target).sum(-1).where(counted, 0)
    slope = log_p.exp_()
    if target is not None:
        slope.sub_(target, alpha=share)
    slope.scatter_add_(1, at, torch.full_like(at, share - 1.0, dtype=slope.dtype))
    if head.softcap is not None:
        slope.mul_(1 - (scaled / head.softcap) ** 2)
    return (slope if head.scale == 1 else slope.mul_(head.scale)).to(logits.dtype)


def _scaled(raw: Tensor, head: Head) -> Tensor:
    x = raw if head.scale == 1 else raw * head.scale  # no pass over memory for nothing
    return x if head.softcap is None else head.softcap * torch.tanh(x / head.softcap)
