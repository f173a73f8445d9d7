"""Prompts with the runs of a model, on which circuits are evaluated exactly, and how thorough a search is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from attnprune.circuit.model import patching
from attnprune.circuit.model.adapters import Anatomy, open_gates
from attnprune.circuit.record import Interval
from attnprune.circuit.search.cache import Cache, digest
from attnprune.circuit.search.outside import Outside
from attnprune.circuit.search.units import Edges, Group, Units
from attnprune.circuit.tasks import Prompts
from attnprune.circuit.worth import Ablation, Procedure

Watch = Callable[[str, int, int], None]
"""Told what is going on, and how many of how many steps of it are done."""

ROUNDING = 1e-4  # of a faithfulness
HOPELESS = 0.5  # share of the target: circuits below it are broken, and no smaller one is looked for
BOOTSTRAP = 1000


@dataclass(frozen=True)
class Settings:
    """How thorough a search is.

    Attributes:
        target: faithfulness to reach; see `attnprune.circuit.result` for when it is.
        sizes: evaluated sizes per ranking before bisection.
        control_sizes: the same in broken control models.
        max_steps: most points of EAP-IG; from 4 on they double until its gap is below 5 %.
        all_edges: graphs of up to this many edges are small: they are scored exactly, edge by edge.
        exact_prompts: most train prompts of exact scores in a larger graph.
        mask_steps: steps of learning a mask, up to three times as many while it still shrinks; 0 leaves it out.
        deletions: most evaluations that delete edges; 0 leaves it out.
        draws: random circuits.
        trials: random choices of ablated edges in a stress test, for each kind and share.
        ablate: what edges outside a circuit carry.
        levels: search nodes and messages as well as edges.
        procedure: "exact", or "published": count as published too.
        batch_size: prompts in one run.
    """

    target: float = 0.9
    sizes: int = 14
    control_sizes: int = 8
    max_steps: int = 16
    all_edges: int = 5000
    exact_prompts: int = 16
    mask_steps: int = 100
    deletions: int = 240
    draws: int = 20
    trials: int = 3
    ablate: Ablation = "corrupt"
    procedure: Procedure = "exact"
    levels: bool = True
    batch_size: int = 32
    seed: int = 0

    @property
    def band(self) -> tuple[float, float]:
        """Faithfulness on validation prompts that a search aims at."""
        return self.target - ROUNDING, 2 - self.target + ROUNDING

    def is_small(self, units: int) -> bool:
        """Whether so many edges, or units of another level, are few."""
        return units <= self.all_edges

    def in_band(self, faithfulness: float) -> bool:
        """Whether it lies in the band."""
        return self.band[0] <= faithfulness <= self.band[1]


QUICK = {
    "sizes": 8, "control_sizes": 4, "max_steps": 4, "exact_prompts": 8,
    "mask_steps": 0, "deletions": 0, "draws": 3, "trials": 1, "levels": False,
}  # fmt: skip


class Measured(NamedTuple):
    """A circuit on the prompts of a split [N]: the task's metric, and KL(model || circuit) of the next token, nats."""

    metric: Tensor
    kl: Tensor


class Split:
    """The runs of one split of a task through one model; circuits are evaluated on it. Collected when first needed.

    `to_rank`: keep all of the clean runs, which scores need and evaluations do not. `by_template`: one template a run.
    `outside`: what edges outside a circuit carry, by default values of the corrupted prompts. `gap`: what a faithful
    circuit changes the metric by, by default what the model itself does.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        batches: Sequence[Prompts],
        key: str,
        cache: Cache,
        batch_size: int,
        *,
        to_rank: bool = False,
        by_template: bool = False,
        outside: Outside | None = None,
        gap: float | None = None,
    ):
        self.anatomy, self.key = anatomy, key
        self._cache, self._gap = cache, gap
        self._outside = outside or Outside(anatomy, "corrupt", batches, key, cache, batch_size)
        self._to_rank = to_rank
        device = anatomy.model.device
        self.prompts = [part.to(device) for batch in batches for part in _parts(batch, batch_size, by_template)]
        self.units: Units = Edges(anatomy)
        self._groups: list[Group] = []  # shared by the views of this split

    def on(self, units: Units) -> Split:
        """The same prompts and runs, for circuits of another level."""
        view = copy(self)
        view.units = units
        return view

    def __len__(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def groups(self) -> list[Group]:
        """The prompts with their runs."""
        if not self._groups:
            self._groups += [self.collected(prompts) for prompts in self.prompts]
        return self._groups

    def collected(self, prompts: Prompts) -> Group:
        """Prompts with their runs, which are not kept."""
        clean, corrupted = self._outside.pair(prompts)
        if not self._to_rank:
            clean = clean._replace(outputs=clean.outputs[:0].clone(), streams=clean.streams[:0].clone())
        return Group(prompts, clean, corrupted)

    def free(self) -> None:
        """Drop the runs; they are collected again when needed."""
        self._groups.clear()

    @property
    def is_asked(self) -> bool:
        """Whether another metric is wanted than the model's own."""
        return self._gap is not None

    @property
    def clean(self) -> Tensor:
        """Metric [N] of a faithful circuit: that of the model itself, if no gap was given."""
        return self._scored("clean", self.wanted)

    def wanted(self, group: Group) -> Tensor:
        """The metric of a faithful circuit for the prompts of a group."""
        if self._gap is None:
            return group.prompts.score(group.clean.logits)
        return group.prompts.score(group.corrupted.logits) + self._gap

    @property
    def corrupted(self) -> Tensor:
        """Metric [N] without any edge: that of the corrupted prompts, by the answers of the clean ones."""
        return self._scored("corrupted", lambda group: group.prompts.score(group.corrupted.logits))

    def _scored(self, name: str, scores: Callable[[Group], Tensor]) -> Tensor:
        def compute() -> list[float]:
            return [x for group in self.groups for x in scores(group).tolist()]

        return torch.tensor(self._cache.numbers(f"{self.key} {name}", compute))

    def measure(self, edges: Tensor, messages: Sequence[Tensor] | None = None) -> Measured:
        """Evaluate a circuit of `units`; with edges, `messages` may have a mask [L, B, H, S, S] for each group."""

        def compute() -> list[list[float]]:
            parts = [_measured(self, group, edges, mask) for group, mask in zip(self.groups, masks, strict=True)]
            return [torch.cat(part).tolist() for part in zip(*parts, strict=True)]

        masks = [None] * len(self.prompts) if messages is None else list(messages)
        key = f"{self.key} {digest(edges, *(messages or ()))}"
        return Measured(*map(torch.tensor, self._cache.numbers(key, compute)))

    def lost(self, kept: Tensor, most: float) -> float:
        """How far from 1 the faithfulness of a circuit is; infinitely far, where that is more than `most` before all
        prompts have run: the others would have to make up for it."""

        def compute() -> list[float]:
            gap = (self.clean - self.corrupted).double().sum().item()
            missing = 0.0
            for group in self.groups:
                metric, _ = _measured(self, group, kept, None)
                missing += (self.wanted(group).cpu().double() - metric.double()).sum().item() / gap
                if not missing <= most:
                    return [math.inf]
            return [abs(missing)]

        return self._cache.numbers(f"{self.key} lost {most} {digest(kept)}", compute)[0]

    def faithfulness(self, edges: Tensor, messages: Sequence[Tensor] | None = None) -> float:
        """The ratio of means."""
        return ratio_of_means(self.measure(edges, messages).metric, self.clean, self.corrupted)


def _parts(batch: Prompts, size: int, by_template: bool) -> Iterable[Prompts]:
    groups = [torch.arange(len(batch))]
    if by_template:
        groups = [(batch.template == template).nonzero()[:, 0] for template in batch.template.unique()]
    return [batch.take(rows) for group in groups for rows in group.split(size)]


@torch.no_grad()
def _measured(split: Split, group: Group, kept: Tensor, messages: Tensor | None) -> tuple[Tensor, Tensor]:
    if messages is None:
        logits = split.units.logits(group, kept)
    else:
        logits = patching.run_circuit(split.anatomy, group.clean, group.corrupted, kept, messages)
    full, own = (x[:, -1].float().log_softmax(-1) for x in (group.clean.logits, logits))
    return group.prompts.score(logits).cpu(), (full.exp() * (full - own)).sum(-1).clamp(min=0).cpu()


def ratio_of_means(circuit: Tensor, clean: Tensor, corrupted: Tensor) -> float:
    """Faithfulness of a circuit from metrics [N]; 0 where clean and corrupted prompts do not differ at all."""
    gap = (clean.double().mean() - corrupted.double().mean()).item()
    return (circuit.double().mean() - corrupted.double().mean()).item() / gap if gap else 0.0


def faithfulness_interval(circuit: Tensor, clean: Tensor, corrupted: Tensor, seed: int) -> Interval:
    """Faithfulness with its 95 % bootstrap interval over prompts."""
    drawn = _resampled(circuit.double(), clean.double(), corrupted.double(), seed)
    low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    return Interval(value=ratio_of_means(circuit, clean, corrupted), low=low, high=high)


def faithfulness_bounds(circuit: Tensor, clean: Tensor, corrupted: Tensor, seed: int) -> tuple[float, float]:
    """One-sided 95 % lower and upper bound of the faithfulness, from metrics [N].

    A bootstrap over N prompts knows of no prompt that is unlike them, so the fewer there are, the more it claims: with
    one it is certain. Here each resample draws from one prompt more, of the mean gap: of that the circuit explains
    nothing for the lower bound, twice as much for the upper one. So it takes some 20 prompts, all at 1, for a lower
    bound of 0.85; with many prompts it is the usual percentile.
    """
    circuit, clean, corrupted = (x.double() for x in (circuit, clean, corrupted))
    gap = clean.mean() - corrupted.mean()
    bounds = []
    for worst, percentile in ((0.0, 0.05), (2.0, 0.95)):
        more = (corrupted.mean() + worst * gap, clean.mean(), corrupted.mean())
        first, second, third = (
            torch.cat((x, one[None])) for x, one in zip((circuit, clean, corrupted), more, strict=True)
        )
        bounds.append(_resampled(first, second, third, seed).quantile(percentile).item())
    return bounds[0], bounds[1]


def _resampled(circuit: Tensor, clean: Tensor, corrupted: Tensor, seed: int) -> Tensor:
    """The faithfulness of bootstrap resamples of the prompts, fp64 [BOOTSTRAP]."""
    rows = resamples(len(clean), seed)
    means = [x[rows].mean(1) for x in (circuit, clean, corrupted)]
    gap = means[1] - means[2]
    return torch.where(gap == 0, 0.0, (means[0] - means[2]) / gap)


def resamples(count: int, seed: int) -> Tensor:
    """Rows of bootstrap resamples, int64 [BOOTSTRAP, count]."""
    return torch.randint(count, (BOOTSTRAP, count), generator=torch.Generator().manual_seed(seed))


def pattern_visible(anatomy: Anatomy) -> AbstractContextManager[None]:
    """Inside the block the model shows its attention pattern: a dense one runs with open gates."""
    return nullcontext() if anatomy.gated else open_gates(anatomy.model)
