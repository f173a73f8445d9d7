"""The attention of a model on one text, message by message: exact runs with messages closed, and their gradients.

A set of messages is a bool mask [L, H, T, T] over (layer, head, query, key). A run with a set keeps of each head's
pattern P * A the entries of the set and adds them up, which is the definition in attnprune.attention.reference with
more gates closed; whatever later layers compute follows from that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from attnprune.attention.interface import allowed_difference
from attnprune.circuit.model.activations import Hooks, forward, norm_factor, repeat_heads
from attnprune.circuit.model.adapters import Anatomy, Block
from attnprune.circuit.model.attribution import frozen
from attnprune.errors import InputError, SelfCheckError

BATCH_TOKENS = 256  # in one run: as many sets as fit


class Messages:
    """One model on one text, up to the token whose prediction is traced; the model shows its attention pattern.

    Attributes:
        ids: int64 [1, T]. logits: fp64 [V] of the full run, at the last token; log_p: their log-probabilities.
        weights: P * A of the full run [L, H, T, T]; 0 where no message is sent. values: [L, H_kv, T, width].
        factors: what a norm behind the attention multiplies its output by, [T, D] per layer; None without such a norm.
        stream: what the final norm reads, [T, D].
        candidates: int64 [N, 4] (layer, head, query, key): the messages that can reach the prediction. In the last
            layer these are the ones that the last token gets.
        runs: how many sets have been run, gradients included.
    """

    stream: Tensor

    def __init__(self, anatomy: Anatomy, ids: Tensor):
        """Run the text once. Raises InputError: logits that are not finite; SelfCheckError: not the model's own."""
        self.anatomy, self.ids, self.device, self.runs = anatomy, ids, ids.device, 1
        patterns: list[Tensor] = []
        values: list[Tensor] = []
        self.factors: list[Tensor | None] = [None] * len(anatomy.blocks)

        def keep(value: Tensor, pattern: Tensor) -> Tensor:
            patterns.append(pattern[0])
            values.append(value[0])
            return pattern @ repeat_heads(value, pattern.shape[1])

        def keep_stream(x: Tensor) -> None:
            self.stream = x[0]

        with torch.no_grad(), Hooks() as hooks:
            for layer, block in enumerate(anatomy.blocks):
                hooks.gate(_gate(block), keep)
                if block.attention_post_norm is not None:
                    hooks.after(block.output, self._keep_factor(layer, block.attention_post_norm))
            hooks.before(anatomy.final_norm, keep_stream)
            full = forward(anatomy, ids, 1)[0, -1]
        self.weights, self.values = torch.stack(patterns), torch.stack(values)
        self._check(full)
        self.logits = full.double()
        self.log_p = self.logits.log_softmax(-1)
        reaching = self.weights != 0
        reaching[-1, :, :-1] = False
        self.candidates = reaching.nonzero()
        self._flat = reaching.flatten().nonzero()[:, 0]

    def _keep_factor(self, layer: int, norm: torch.nn.Module) -> Callable[[Tensor, Tensor], None]:
        def keep(_: Tensor, total: Tensor) -> None:
            self.factors[layer] = norm_factor(norm, total)[0]

        return keep

    @torch.no_grad()
    def _check(self, full: Tensor) -> None:
        """The run in which nothing is closed is the model's own."""
        own = forward(self.anatomy, self.ids, 1)[0, -1]
        family = self.anatomy.model.config.model_type
        if not bool(own.isfinite().all()):
            raise InputError(f"{family}: the logits are not finite on this text")
        off = (own - full).abs().max().item()
        if not off <= allowed_difference(own, self.anatomy.model):
            raise SelfCheckError(f"{family}: with all messages open the logits are off by {off:.2g}")

    def __len__(self) -> int:
        """How many candidates there are."""
        return len(self.candidates)

    @property
    def at_once(self) -> int:
        """Sets in one run."""
        return max(1, BATCH_TOKENS // self.ids.shape[1])

    @torch.no_grad()
    def run(self, sets: list[Tensor]) -> Tensor:
        """Logits fp64 [B, V] at the last token, with only the candidates of each set open (their numbers, [n] each)."""
        found = [self._logits(self._masks(sets[i : i + self.at_once])) for i in range(0, len(sets), self.at_once)]
        self.runs += len(sets)
        return torch.cat(found)

    def kl(self, sets: list[Tensor]) -> Tensor:
        """KL(full || set) in nats, fp64 [B], of each set."""
        return self.divergence(self.run(sets))

    def divergence(self, logits: Tensor) -> Tensor:
        """KL(full || logits) [B] of logits [B, V]."""
        other = logits.double().log_softmax(-1)
        return functional.kl_div(other, self.log_p.expand_as(other), log_target=True, reduction="none").sum(-1)

    def slopes(self, chosen: Tensor, points: Sequence[float]) -> Tensor:
        """What each message of a set [n] contributes by gradients: the fall of the KL that it brings, fp64 [n].

        Each message is multiplied by a weight. The weights of the set go from 0 to 1 together, all others stay 0; the
        mean of the KL's derivative over `points` of this path, with its sign turned, adds up to the KL of no message
        less that of the set (integrated gradients, arXiv 1703.01365). A gate's decision has no derivative.
        """
        mask = self._masks([chosen])[0].to(self.weights.dtype)
        total = torch.zeros(len(self), dtype=torch.float64, device=self.device)
        for first in range(0, len(points), self.at_once):
            scale = torch.tensor(points[first : first + self.at_once], dtype=mask.dtype, device=self.device)
            total -= self._derivatives(scale.view(-1, 1, 1, 1, 1) * mask)[1]
        return total[chosen] / len(points)

    def derivatives(self, chosen: Tensor) -> tuple[float, Tensor]:
        """The KL of a set [n], and its derivative by the weight of every candidate, fp64 [N], those closed included."""
        kl, gradient = self._derivatives(self._masks([chosen]).to(self.weights.dtype))
        return kl.item(), gradient

    def _derivatives(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of the KLs of messages with weights [B, L, H, T, T], and of their derivatives per candidate [N]."""
        with frozen(self.anatomy.model), torch.enable_grad():
            kl = self.divergence(self._logits(weights.requires_grad_())).sum()
            (gradient,) = torch.autograd.grad(kl, weights)
        self.runs += len(weights)
        return kl.detach(), gradient.sum(0).flatten()[self._flat].double()

    def _masks(self, sets: list[Tensor]) -> Tensor:
        """Sets of candidates (their numbers, [n] each) as masks [B, L, H, T, T]."""
        masks = torch.zeros(len(sets), self.weights.numel(), dtype=torch.bool, device=self.device)
        for mask, chosen in zip(masks, sets, strict=True):
            mask[self._flat[chosen]] = True
        return masks.unflatten(1, self.weights.shape)

    def _logits(self, weights: Tensor) -> Tensor:
        """Logits fp64 [B, V] at the last token with each message multiplied by its weight [B, L, H, T, T]."""
        with Hooks() as hooks:
            for layer, block in enumerate(self.anatomy.blocks):
                hooks.gate(_gate(block), _weighted(weights[:, layer]))
            return forward(self.anatomy, self.ids.expand(len(weights), -1), 1)[:, -1].double()


def _gate(block: Block) -> torch.nn.Module:
    assert block.gate is not None  # the pattern is visible
    return block.gate


def _weighted(weights: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda value, pattern: (pattern * weights) @ repeat_heads(value, pattern.shape[1])
