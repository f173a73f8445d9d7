"""A small set of messages by gradient descent on a score per message: open while it is above 0.

As the gates of a sparse model are trained, and as circuits are (attnprune.circuit.search.masks): a hard threshold with
a straight-through gradient, the logarithm of the number of messages as the penalty, a multiplier that holds the KL.
Every step runs a set as it will be judged. A closed message has a derivative too, so it may come back; a step that
breaks the prediction is taken back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from attnprune.tracing.messages import Messages
from attnprune.training.constraint import Multiplier

STEPS = 120
_RATE, _LAST_RATE = 0.1, 0.1  # of learning, for scores up to 1; share of it at the end, it falls over the last third
_BETAS = (0.8, 0.95)
_SPREAD = 0.3  # of the first scores, per factor of e in rank
_AIM = 0.8  # of the KL that is allowed: where the multiplier holds it
_BROKEN = 3.0  # times the KL that is allowed


def learn(messages: Messages, allowed: float, points: Sequence[float], watch: Callable[[int], None]) -> Tensor:
    """The smallest set on the way (the candidates' numbers [n]) whose KL is at most `allowed`; all, if there is none.

    The first scores fall with the rank by gradients over `points`, see `Messages.slopes`. `watch` is told the step.
    """
    every = torch.arange(len(messages), device=messages.device)
    order = messages.slopes(every, points).argsort(descending=True, stable=True)
    scores = torch.empty(len(every), device=messages.device)
    scores[order] = (_SPREAD * ((len(every) + 1) / (every + 1)).log()).clamp(max=1)
    before, best = scores.clone(), every
    optimizer = torch.optim.Adam([scores.requires_grad_()], betas=_BETAS, eps=1e-12)
    multiplier = Multiplier(1.0, rate=0.1, gain=1.0, smoothing=0.0, minimum=0.03)
    for step in range(STEPS):
        watch(step)
        kept = scores.detach() > 0
        kl, gradient = messages.derivatives(kept.nonzero()[:, 0])
        if kl > _BROKEN * allowed and step:
            with torch.no_grad():  # back, and what that step dropped is now dropped last
                scores.copy_(torch.where((before > 0) & ~kept, 1.0, before))
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
