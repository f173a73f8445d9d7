"""A small set of messages by gradient descent on a score per message: open while it is above 0.

As the gates of a sparse model are trained, and as circuits are (attnprune.circuit.search.masks): a hard threshold with
a straight-through gradient, the logarithm of the number of messages as the penalty, a multiplier that holds the KL.
Every step runs a set as it will be judged. A closed message has a derivative too, so it may come back; a step that
breaks the prediction is taken back.

The first set is the shortest prefix, by the size of what each message contributes, that hardly changes the prediction.
Size, not sign: messages that pull the other way cancel, and without all of them at once the prediction is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from attnprune.circuit.search.masks import take_back
from attnprune.tracing.messages import Messages
from attnprune.training.constraint import Multiplier

STEPS = 60
_RATE, _LAST_RATE = 0.2, 0.1  # of learning, for scores up to 1; share of it at the end, it falls over the last third
_BETAS = (0.8, 0.95)
_SPREAD = 0.3  # of the first scores, per factor of e in rank
_PREFIXES, _SHORTER = 12, 0.7  # tried for the first set; length of each as a share of the one before
_HARDLY = 0.25  # of the KL that is allowed: the most that the first set may have
_MULTIPLIER = 0.2  # at first: most messages may go
_AIM = 0.8  # of the KL that is allowed: where the multiplier holds it
_BROKEN = 3.0  # times the KL that is allowed


def learn(messages: Messages, allowed: float, points: Sequence[float], watch: Callable[[int], None]) -> Tensor:
    """The smallest set on the way (the candidates' numbers [n]) whose KL is at most `allowed`; all, if there is none.

    The first scores fall with the rank by gradients over `points`, see `Messages.slopes`. `watch` is told the step.
    """
    every = torch.arange(len(messages), device=messages.device)
    order = messages.slopes(every, points).abs().argsort(descending=True, stable=True)
    scores = torch.empty(len(every), device=messages.device)
    scores[order] = (_SPREAD * ((_first(messages, order, allowed) + 1) / (every + 1)).log()).clamp(-1, 1)
    before, best = scores.clone(), every
    optimizer = torch.optim.Adam([scores.requires_grad_()], betas=_BETAS, eps=1e-12)
    multiplier = Multiplier(_MULTIPLIER, rate=0.1, gain=1.0, smoothing=0.0, minimum=0.03)
    for step in range(STEPS):
        watch(step)
        kept = scores.detach() > 0
        kl, gradient = messages.derivatives(kept.nonzero()[:, 0])
        if kl > _BROKEN * allowed and step:
            take_back(scores, before, kept)
            continue
        before, count = scores.detach().clone(), int(kept.sum())
        if kl <= allowed and count < len(best):
            best = kept.nonzero()[:, 0]
        multiplier.step(kl / max(allowed, 1e-9) - _AIM)
        pull = multiplier.value / max(allowed, 1e-9)
        scores.grad = (pull * gradient).to(scores.dtype) + 1 / max(1, count)  # of the logarithm of their number
        optimizer.param_groups[0]["lr"] = _RATE * min(1.0, max(_LAST_RATE, 3 * (1 - step / STEPS)))
        optimizer.step()
        with torch.no_grad():
            scores.clamp_(-1, 1)
    return best


def _first(messages: Messages, order: Tensor, allowed: float) -> int:
    """How many messages of an order to begin with: the shortest of some prefixes before one that changes too much."""
    sizes = [max(1, round(len(order) * _SHORTER**power)) for power in range(1, _PREFIXES + 1)]
    first = len(order)
    for size, kl in zip(sizes, messages.kl([order[:size] for size in sizes]), strict=True):
        if not kl <= _HARDLY * allowed:  # NaN neither
            break
        first = size
    return first
